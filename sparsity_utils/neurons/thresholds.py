"""Which neurons a metric calls inactive: the set D of arXiv 2411.02335, section 3."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity_utils.console import InputError
from sparsity_utils.neurons.hooks import FFN, widened

RULES = ("relu", "top-k", "fat", "cett")


@dataclass(frozen=True)
class Thresholds:
    """A rule and its threshold in each layer. D, per token, is

    - "relu": s_i = 0 (the value is not used);
    - "top-k": all but the k largest |s_i| (value k). Ties with the k-th largest stay active, so that the outcome
      does not depend on the order of the neurons;
    - "fat": |s_i| < value;
    - "cett": ||n_i||_2 = |h_i| * ||W_out[:, i]||_2 < value.

    A neuron that is exactly zero (s_i, for "cett" h_i) is in D whatever the threshold. Comparisons are made in
    float32 or wider.
    """

    rule: str
    values: tuple[float, ...]  # one entry per layer, first layer first

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise InputError(f"The threshold rule is {self.rule!r}; choose one of {', '.join(RULES)}.")
        if not all(value >= 0 for value in self.values):
            raise InputError(f"The thresholds are {self.values}; none may be negative or NaN.")

    def active(self, ffn: FFN, s: Tensor, h: Tensor) -> Tensor:
        """True where a neuron is active, False where it is in D.

        Args:
            ffn: the FFN that `s` and `h`, (..., d_ff), were seen in.

        Returns: bool, (..., d_ff).
        """
        value = self.values[ffn.layer]
        if self.rule == "relu":
            return s != 0
        if self.rule == "top-k":
            size = s.abs()
            smallest_kept = size.topk(min(int(value), ffn.d_ff), dim=-1).values[..., -1:]  # (..., 1)
            return (size >= smallest_kept) & (s != 0)
        if self.rule == "fat":
            return (widened(s).abs() >= value) & (s != 0)
        return widened(h).abs() >= self.per_neuron(ffn)

    def per_neuron(self, ffn: FFN) -> Tensor:
        """Rule "cett": the |h_i| from which on neuron i is active, in float32 or wider, (d_ff,); never zero."""
        norms = ffn.column_norms()
        smallest = torch.nextafter(norms.new_zeros(()), norms.new_ones(()))  # above exact zeros, whatever the threshold
        return (self.values[ffn.layer] / norms).nan_to_num(nan=0.0, posinf=math.inf).clamp(min=smallest)


def magnitudes(ffn: FFN, h: Tensor) -> Tensor:
    """||n_i||_2 = |h_i| * ||W_out[:, i]||_2 in float32 or wider, (..., d_ff)."""
    return widened(h).abs() * ffn.column_norms()
