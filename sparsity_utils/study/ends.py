"""What a way to train changes: layers of a run before its first step and after its last, and what its maps read."""

from collections.abc import Sequence
from contextlib import contextmanager

import pandas as pd
import torch
from torch import nn
from transformers import GraniteForCausalLM

from sparsity_utils.models.config import PARTS, RANDOM_TARGETS, ModelConfig
from sparsity_utils.models.decoder import build_model, default_device
from sparsity_utils.models.input_training import KeptInputs, as_computed, attach_as_trained, read_kept_inputs
from sparsity_utils.models.loss import linear_cross_entropy
from sparsity_utils.models.shapes import d_ff
from sparsity_utils.models.training import model_tensors, random_data, validation_loss
from sparsity_utils.neurons.hooks import observe_neurons
from sparsity_utils.sparsity.metrics import measure_sparsity
from sparsity_utils.study.profiles import MeasureConfig
from sparsity_utils.study.runs import Run, RunConfig, run_batches
from sparsity_utils.text.corpus import Corpus
from sparsity_utils.text.windows import TrainingBatches, measurement_batches

CALIBRATION = 16_384  # tokens at most: over sets of that many the ratio of ReLU models varied by 0.3 points
UNTRAINED = KeptInputs(keep=10)  # what models that were trained to read everything are tried with: 37.5% of inputs cut


def run_ends(run: Run, corpus: Corpus, settings: MeasureConfig) -> pd.DataFrame:
    """One row per layer of a run.

    Columns:
        step: of the last checkpoint, which all numbers are of unless they are called initial.
        layer: from 0.
        initial_share, final_share: of the neurons, those that are not zero as the map down reads them, mean over
            tokens: a neuron that it leaves out counts as zero.
        initial_gradient, final_gradient: Euclidean norm of the gradient of the cross-entropy, without a penalty, in the
            layer's trained matrices on the first batch.
        loss: on evaluation tokens, nats; of random data on what training read, or on more of the kind.
        activation_ratio: CETT-PPL-p%; empty for random data and quantised inputs, on which it is not solved.
        read_parameters: weights that a token is allowed to read: keep / 16 of the matrices, and the output head.
        weights_read: share of the weights of all linear maps whose inputs are not zero, mean over tokens.
        rise_untrained: by how much the loss rises if every map reads only the largest 10 / 16 of its inputs; empty for
            runs that were trained to read less or quantised inputs, and where that is no whole number of inputs.

    `loss` and what follows it are of the whole model and stand in every row.
    """
    config = RunConfig.from_identity(run.manifest["config"])
    batches = run_batches(config, corpus, settings.evaluation_tokens)
    fresh, model = initial_model(config.model, config.train.seed), run.load(run.last_step)
    layers = {
        "initial_share": nonzero_shares(fresh, batches),
        "final_share": nonzero_shares(model, batches),
        "initial_gradient": gradient_norms(fresh, config, corpus),
        "final_gradient": gradient_norms(model, config, corpus),
    }
    whole = {
        "loss": (loss := validation_loss(model, batches)),
        "activation_ratio": _activation_ratio(model, config, corpus, settings),
        "read_parameters": config.parameters * config.model.keep / PARTS
        + config.model.d_model * config.model.vocabulary,
        "weights_read": weights_read(model, batches),
        "rise_untrained": _loss_untrained(model, config, batches) - loss,
    }
    table = pd.DataFrame(layers).assign(**whole)
    table.insert(0, "step", run.last_step)
    table.insert(1, "layer", range(len(table)))
    return table


def initial_model(config: ModelConfig, seed: int) -> GraniteForCausalLM:
    """The model of a run before its first step, as a checkpoint of it would be opened."""
    model = build_model(config, seed).eval()
    model.load_state_dict(as_computed(model.config, model_tensors(model)), strict=False)  # the head is the embedding
    return attach_as_trained(model).to(default_device())


def nonzero_shares(model: GraniteForCausalLM, batches: Sequence[dict]) -> list[float]:
    """Of each layer, the share of its neurons that are not zero, mean over the tokens of `batches`."""
    counts = torch.zeros(model.config.num_hidden_layers, 2, dtype=torch.float64)  # not zero, all

    def count(ffn, s, h, tokens) -> None:
        counts[ffn.layer] += torch.tensor([(h != 0).sum().item(), h.numel()], dtype=torch.float64)

    with torch.inference_mode(), observe_neurons(model, count):
        for batch in batches:
            model.model(input_ids=batch["input_ids"].to(model.device))
    return (counts[:, 0] / counts[:, 1]).tolist()


def weights_read(model: GraniteForCausalLM, batches: Sequence[dict]) -> float:
    """The share of the weights of the layers' linear maps that meet an input that is not zero, mean over tokens."""
    read = torch.zeros(2, dtype=torch.float64)  # weights times tokens: read, all

    def count(linear: nn.Linear, args: tuple) -> None:
        inputs = torch.tensor([(args[0] != 0).sum().item(), args[0].numel()], dtype=torch.float64)
        read.add_(inputs * linear.out_features)

    linears = [linear for layer in model.base_model.layers for linear in _maps(layer)]
    with torch.inference_mode(), _hooked([linear.register_forward_pre_hook(count) for linear in linears]):
        for batch in batches:
            model.model(input_ids=batch["input_ids"].to(model.device))
    return float(read[0] / read[1])


def gradient_norms(model: GraniteForCausalLM, config: RunConfig, corpus: Corpus) -> list[float]:
    """Of each layer, the norm of the loss's gradient in its trained matrices, on the first batch of training."""
    tokens, targets = random_data(config.model, config.train).training(corpus.tokens("train"))
    batches = TrainingBatches(
        tokens, config.model.context, config.train.batch_tokens, config.train.seed, targets=targets
    )
    inputs, wanted = (part.to(model.device) for part in batches(0))
    with torch.enable_grad():
        hidden = model.model(input_ids=inputs).last_hidden_state.flatten(0, 1)  # (tokens, d)
        scale = 1.0 / model.config.logits_scaling
        linear_cross_entropy(hidden, model.lm_head.weight, wanted.flatten(), scale).backward()
    norms = [
        torch.stack([linear.weight.grad.square().sum() for linear in _maps(layer)]).sum()
        for layer in model.base_model.layers
    ]
    model.zero_grad(set_to_none=True)
    return [norm.sqrt().item() for norm in norms]


def _maps(layer: nn.Module) -> list[nn.Linear]:
    """The linear maps of a layer that are trained: without up of a plain FFN, whose weights are zero for good."""
    named = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    return [linear for name, linear in named.items() if name != "mlp.up_proj" or linear.bias is None]


def _activation_ratio(model: GraniteForCausalLM, config: RunConfig, corpus: Corpus, settings: MeasureConfig) -> float:
    if getattr(model.config, RANDOM_TARGETS, False) or config.model.quantised:
        return float("nan")
    parts = {"calibration": min(settings.calibration_tokens, CALIBRATION), "evaluation": settings.evaluation_tokens}
    texts = {
        part: measurement_batches(corpus.tokens("validation"), config.model.context, part, wanted)
        for part, wanted in parts.items()
    }
    report = measure_sparsity(
        model, texts["evaluation"], metric="cett-ppl", p=settings.p, calibration=texts["calibration"]
    )
    return report.activation_ratio


def _loss_untrained(model: GraniteForCausalLM, config: RunConfig, batches: Sequence[dict]) -> float:
    widths = config.model.d_model, d_ff(config.model.d_model, config.model.ffn_ratio)
    if KeptInputs.of(config.model) or any(width * UNTRAINED.keep % PARTS for width in widths):
        return float("nan")
    with _hooked(read_kept_inputs(model, UNTRAINED)):
        return validation_loss(model, list(batches))


@contextmanager
def _hooked(hooks: list):
    """Removes the hooks when the block ends."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
