"""What training a model takes on each of its devices, by arithmetic; importing this loads nothing heavy.

Counted are weights, gradients, moments, gathered layers, and what the backward pass is kept for, as the modules of
`transformers` keep it without torch.compile. Buffers within one operation come on top, so that a fifth of a device
should stay free.
"""

from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.models.shapes import d_ff, head_count, non_embedding_parameters

STATE = 16  # bytes of float32 per parameter: weight, gradient and the two moments of AdamW
LOSS_TOKENS = 512  # whose logits are held at a time


def stored_parameters(model: ModelConfig) -> int:
    """All parameters: matrices of the layers, the tied embedding, gains of norms."""
    gains = model.d_model * (2 * model.n_layers + 1)
    matrices = non_embedding_parameters(model.d_model, model.n_layers, model.ffn_ratio)
    return matrices + model.vocabulary * model.d_model + gains


def device_memory(model: ModelConfig, train: TrainConfig, half: bool = True) -> dict[str, float]:
    """Bytes on each device, by what they are for: state, gathered, activations, loss.

    half: whether layers compute in bfloat16, as on a GPU.
    """
    tokens = train.micro_tokens or train.batch_tokens // train.devices
    layer = non_embedding_parameters(model.d_model, 1, model.ffn_ratio)
    embedding = model.vocabulary * model.d_model
    width = 2 if half else 4  # bytes
    if train.devices > 1:  # a layer at work, the next one, gradients of one; the embedding and its gradient in float32
        gathered = 3 * width * layer + 8 * embedding
    else:  # copies in bfloat16 that autocast makes and the backward pass keeps
        gathered = 2 * layer * (1 if train.recompute else model.n_layers) if half else 0
    activations = layer_activations(model, half)
    kept = model.n_layers * (4 * model.d_model if train.recompute else activations)
    return {
        "state": STATE * stored_parameters(model) / train.devices,
        "gathered": gathered,
        "activations": tokens * (kept + (activations if train.recompute else 0) + 8 * model.d_model),
        # Hidden states and their gradient; the head, its gradient, and logits, softmax and slope of some tokens.
        "loss": 2 * width * tokens * model.d_model + (4 + width) * embedding + 12 * LOSS_TOKENS * model.vocabulary,
    }


def layer_activations(model: ModelConfig, half: bool) -> float:
    """Bytes per token that one layer keeps for its backward pass.

    Both norms keep input and output in float32: 16 d, and 8 for their scales. Queries, keys and values as they are
    attended, and the inputs of matrices, take 18 d in bfloat16, where each matrix keeps a copy of its own, and 24 d in
    float32, where they share it. The FFN keeps 3 d_ff numbers, 4 if its activation function needs its input again.
    Attention keeps its normaliser, 4 bytes a head.
    """
    width = 2 if half else 4
    numbers = 3 if model.activation == "relu" else 4
    hidden = numbers * width * d_ff(model.d_model, model.ffn_ratio)
    return (34 if half else 40) * model.d_model + hidden + 4 * head_count(model) + 8
