"""Masks on the down projection alone: three scores of a neuron times three ways to say how many of them stay.

    score         gate |s_i|, h |h_i|, or n ||n_i|| = |h_i| ||W_down[:, i]||
    allocation    top-k: as many for every token and layer; shared: one threshold for all layers; cett: a threshold of
                  each layer, all layers with one relative error, the token mean of ||sum_D n_i|| / ||FFN(x)||

CETT (arXiv 2411.02335, section 3) is score n with allocation cett, its Top-k the score gate with top-k. The published
comparison changes both at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sparsity_utils.console import check, progress
from sparsity_utils.neurons.find import FFN, find_ffns, widened
from sparsity_utils.neurons.hooks import observe_neurons
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.rules import k_largest
from sparsity_utils.sparsity.error_curve import output_norms
from sparsity_utils.sparsity.input_thresholds import ascending, real_rows, smallest_kept, thinning
from sparsity_utils.sparsity.passes import Batch, run_backbone

SCORES = ("gate", "h", "n")
ALLOCATIONS = ("top-k", "shared", "cett")
ERROR_TOKENS = 512  # of which the mean of a relative error is known to about 1%
GRID = 20  # sparsities at which the relative error of a layer is known; straight lines between


@dataclass(frozen=True, eq=False)
class DownMask:
    """Which neurons are inputs of the down projections of a model. Gate and up are computed in full."""

    score: str  # one of SCORES
    allocation: str  # one of ALLOCATIONS
    values: tuple[float, ...]  # of each layer the threshold, or the number of neurons kept

    @property
    def rule(self) -> str:
        """`n-cett`, and the like."""
        return f"{self.score}-{self.allocation}"

    def active(self, ffn: FFN, s: Tensor, h: Tensor) -> Tensor:
        """True where a neuron is kept, (rows, d_ff) bool; one of size zero never is."""
        sizes, value = scores(self.score, ffn, s, h), self.values[ffn.layer]
        if self.allocation == "top-k":
            return k_largest(sizes, int(value))
        return (sizes >= value) & (sizes != 0)

    def map_share(self, role: str, active: float, nonzero: float) -> float:
        """As of a `Rule`: only the down projection is read in part."""
        return active if role == "down" else 1.0


def scores(score: str, ffn: FFN, s: Tensor, h: Tensor) -> Tensor:
    """What neurons are ordered by, float32 or wider, (rows, d_ff)."""
    sizes = widened(s if score == "gate" else h).abs()
    return sizes * ffn.column_norms() if score == "n" else sizes


class DownScores:
    """Neurons of every layer on calibration tokens, in memory, and the masks that meet a sparsity on them."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], show_progress: bool = False) -> None:
        """Runs a dense pass over `batches`, keeping every n-th real token so that KEPT_BYTES suffice."""
        self.ffns = find_ffns(model)
        check(
            len({ffn.layer for ffn in self.ffns}) == len(self.ffns),
            f"{type(model).__name__} has routed experts, and masks on down projections are for dense FFNs.",
        )
        every = thinning(batches, 8 * sum(ffn.d_ff for ffn in self.ffns))  # s and h, 4 each
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {ffn.layer: [] for ffn in self.ffns}
        rows: Tensor

        def keep(ffn: FFN, s: Tensor, h: Tensor, tokens: Tensor) -> None:
            parts[ffn.layer].append((s[rows], h[rows]))

        for batch in progress(batches, "dense pass", len(batches), show_progress):
            rows = real_rows(batch)[::every]
            with evaluating(model), observe_neurons(model, keep):
                run_backbone(model, batch)
        self.parts = [tuple(map(torch.cat, zip(*parts[ffn.layer], strict=True))) for ffn in self.ffns]
        self._sorted: tuple[str, list[Tensor], np.ndarray | None] = ("", [], None)

    def mask(self, score: str, allocation: str, sparsity: float) -> DownMask:
        """The mask that leaves out `sparsity` of all neurons on the kept tokens, top-k of whole neurons."""
        if allocation == "top-k":
            return DownMask(score, allocation, tuple(round((1 - sparsity) * ffn.d_ff) for ffn in self.ffns))
        ordered = self._ordered(score)
        if allocation == "shared":
            every = ascending(torch.cat(ordered))
            return DownMask(score, allocation, (smallest_kept(every, sparsity),) * len(ordered))
        values = zip(ordered, self._equal_errors(score, sparsity), strict=True)
        return DownMask(score, allocation, tuple(smallest_kept(sizes, share) for sizes, share in values))

    def _ordered(self, score: str) -> list[Tensor]:
        """The sorted scores of each layer, (tokens * d_ff,)."""
        if self._sorted[0] != score:
            found = zip(self.ffns, self.parts, strict=True)
            self._sorted = score, [ascending(scores(score, ffn, s, h).flatten()) for ffn, (s, h) in found], None
        return self._sorted[1]

    def _equal_errors(self, score: str, sparsity: float) -> np.ndarray:
        """Sparsities of the layers, mean `sparsity`, at which all have one relative error, (layers,)."""
        ordered = self._ordered(score)
        shares = np.linspace(0, 1, GRID + 1)
        errors = self._sorted[2]
        if errors is None:
            errors = np.array([self._errors(score, layer, shares[1:-1]) for layer in range(len(ordered))])
            errors = np.maximum.accumulate(errors, axis=1)  # more neurons left out may err a little less
            self._sorted = score, ordered, errors
        low, high = 0.0, 1.0
        for _ in range(50):  # bisection of the relative error that all layers share
            middle = (low + high) / 2
            met = np.array([np.interp(middle, [0.0, *curve, 1.0], shares) for curve in errors])
            low, high = (middle, high) if met.mean() < sparsity else (low, middle)
        return met

    def _errors(self, score: str, layer: int, shares: np.ndarray) -> list[float]:
        """Mean relative error of a layer at each sparsity, over ERROR_TOKENS at most."""
        ffn, (s, h) = self.ffns[layer], (part[:: -(-len(part) // ERROR_TOKENS)] for part in self.parts[layer])
        sizes, h, weight = scores(score, ffn, s, h), widened(h), widened(ffn.down_weight)
        whole, ordered = output_norms(weight, h), self._ordered(score)[layer]
        tails = [output_norms(weight, h * (sizes < smallest_kept(ordered, share))) for share in shares]
        return [float((tail / whole)[whole > 0].mean(dtype=torch.float64)) for tail in tails]
