"""What corrected decoding reads: densities as Sirius counts them, of the weights of one step.

A round of period P reads (P - 1) d + 1 times the weights, with d the density of a sparse step, and gives AAL tokens.
"""

from torch import nn

from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.linears import find_linears
from sparsity_utils.neurons.rules import RULES


def weights_read(rule: str, activation_ratio: float, nonzero_share: float = 1.0) -> float:
    """Share of the weights of a gated FFN that a sparse step reads under a rule; "csparse": neurons of the prompt."""
    if rule == "csparse":
        return activation_ratio
    return RULES["top-k" if rule == "fsparse" else rule].weights_read(activation_ratio, nonzero_share)


def read_parameters(model: nn.Module) -> int:
    """Parameters that a step of the full model reads: all but an embedding that is not the output head as well."""
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight  # type: ignore[operator]
    everything = sum(parameter.numel() for parameter in model.parameters())
    return everything - (ends[0].numel() if ends[0] is not ends[1] else 0)


def step_density(model: nn.Module, ffn_weights_read: float) -> float:
    """d = 1 - f (1 - r): share of the read parameters that a sparse step reads.

    f is the share of the FFNs in the read parameters, r the share of their weights that is read.
    """
    ffns = {ffn.name: ffn for ffn in find_ffns(model)}.values()
    matrices = 2 + (next(iter(ffns)).up is not None)
    in_ffns = sum(matrices * ffn.down_weight.numel() for ffn in ffns)
    return 1 - in_ffns / read_parameters(model) * (1 - ffn_weights_read)


def inputs_density(model: nn.Module, kept: float) -> float:
    """d = 1 - f (1 - kept), with f the share of all linear maps of blocks: each skips the same share of its inputs."""
    return 1 - sum(linear.size for linear in find_linears(model)) / read_parameters(model) * (1 - kept)


def break_even(density: float, period: int) -> float:
    """The average advance length at which corrected decoding reads as much as the full model, (P - 1) d + 1."""
    return (period - 1) * density + 1


def effective_density(density: float, period: int, advance: float) -> float:
    """Weights read per token, in those of the full model: ((P - 1) d + 1) / AAL."""
    return break_even(density, period) / advance
