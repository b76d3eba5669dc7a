"""What training takes on a device: the arithmetic against what torch holds on a small shape."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.models.decoder import build_model
from sparsity_utils.models.memory import device_memory, stored_parameters
from sparsity_utils.models.training import Training

TOKENS = 512


def shape(layers: int, activation: str = "relu") -> ModelConfig:
    return ModelConfig(64, layers, activation, vocabulary=300, context=128, head_size=16)


def kept_for_backward(config: ModelConfig, half: bool, recompute: bool) -> int:
    """Bytes that torch keeps for the backward pass of the layers, weights and copies of them left out."""
    model = build_model(config, 0).train()
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    storages = {}

    def keep(tensor):
        if tensor.shape[0] == TOKENS // config.context or tensor.shape[0] == TOKENS:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, config.vocabulary, (TOKENS // config.context, config.context))
    mixed = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), mixed:
        hidden = model.model(input_ids=ids).last_hidden_state
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_activations_are_those_that_torch_keeps(activation, half, recompute):
    train = TrainConfig(TOKENS * 10, batch_tokens=TOKENS, recompute=recompute)
    held = [kept_for_backward(shape(layers, activation), half, recompute) for layers in (2, 5)]
    told = [device_memory(shape(layers, activation), train, half)["activations"] for layers in (2, 5)]
    assert told[1] - told[0] == pytest.approx(held[1] - held[0], rel=0.01)
    if not recompute:
        assert told[1] == pytest.approx(held[1], rel=0.03)


def test_the_state_is_what_the_optimizer_holds():
    train = TrainConfig(TOKENS * 10, batch_tokens=TOKENS)
    training = Training(shape(3), train, np.arange(5000, dtype=np.uint16) % 300, [], None)
    training.train_step()
    moments = [t for state in training.optimizer.state.values() for t in state.values() if t.ndim]
    held = 2 * sum(p.nbytes for p in training.model.parameters()) + sum(t.nbytes for t in moments)  # gradients: equal
    assert device_memory(shape(3), train)["state"] == held == 16 * stored_parameters(shape(3))
    shared = TrainConfig(TOKENS * 10, batch_tokens=TOKENS, devices=4, micro_tokens=128)
    assert device_memory(shape(3), shared)["state"] == held / 4
