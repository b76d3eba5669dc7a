"""The truncation error of a layer as a function of its threshold, on activations in memory (arXiv 2411.02335, sec. 3).

Once the activations are there, the error at a threshold costs one matrix product. Every error is kept as a point of
the curve, so that a later search starts from all that is known.
"""

import bisect
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsity_utils.console import InputError
from sparsity_utils.neurons.find import FFN, widened
from sparsity_utils.neurons.thresholds import magnitudes
from sparsity_utils.sparsity.search import Point, find_root

WIDTH_SHARE = 0.5  # of a tolerance: relative width at which a bracket ends the search, as where a function jumps
NARROWEST = 1e-13  # no bracket is asked to be narrower than rounding allows
QUANTILES = (0.1, 0.3, 0.5, 0.65, 0.8, 0.9)  # of the magnitudes: where a curve is first evaluated
QUANTILE_SAMPLE = 20_000  # magnitudes that the quantiles are taken from


def output_norms(weight: Tensor, h: Tensor) -> Tensor:
    """||W_out h||_2 of each token, without the output bias. `weight` (d, d_ff), `h` (tokens, d_ff) -> (tokens,)."""
    return torch.linalg.vector_norm(h @ weight.T, dim=-1)


def whole_norms(ffn: FFN, h: Tensor) -> Tensor:
    """||W_out h||_2 of each token of widened `h`, (tokens, d_ff) -> (tokens,). Raises `InputError` if not finite."""
    norms = output_norms(widened(ffn.down_weight), h)
    if not bool(norms.isfinite().all()):
        raise InputError(
            f"The outputs of {ffn.name} are NaN or infinite: check the model's weights, or load it in a wider dtype."
        )
    return norms


def relative_errors(ffn: FFN, h: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """||sum_{i in D} n_i|| / ||W_out h|| of each token, 0 where W_out h is zero, and where that is so; (tokens,) each.

    Args:
        ffn: the FFN that `h`, (tokens, d_ff), was seen in.
        active: True outside D, (tokens, d_ff).
    """
    h = widened(h)
    whole = whole_norms(ffn, h)
    zero = whole == 0
    tail = output_norms(widened(ffn.down_weight), h * ~active)  # finite: `whole_norms` looked; 6 times masked_fill
    return (tail / whole).masked_fill(zero, 0), zero


class ErrorCurve:
    """err(eps) = mean over tokens of ||sum_{i: ||n_i|| < eps} n_i|| / ||W_out h||, the output bias on neither side.

    Tokens whose FFN output is zero are left out. Every evaluated point is exact and kept.
    """

    def __init__(self, parts: Sequence[tuple[FFN, Tensor]]) -> None:
        """`parts`: the FFN of a layer, or its routed experts, each with its h on the kept tokens, (tokens, d_ff)."""
        self.parts = [_Part(ffn, h) for ffn, h in parts]
        self.tokens = sum(len(part.norms) for part in self.parts)
        self.points: list[Point] = [(0.0, 0.0)]  # (eps, err), in order of eps
        sizes = torch.cat([part.magnitudes.flatten() for part in self.parts])
        positive = sizes[sizes > 0]
        self.empty = positive.numel() == 0
        if self.empty:
            return
        self.smallest = float(positive.min())
        sample = positive[:: max(1, positive.numel() // QUANTILE_SAMPLE)]
        largest = math.nextafter(float(positive.max()), math.inf)
        self.points.append((largest, 1.0))  # all neurons truncated
        for eps in torch.quantile(sample, torch.tensor(QUANTILES, dtype=sample.dtype, device=sample.device)).tolist():
            self.error(eps)

    def error(self, eps: float) -> float:
        """err(eps): one matrix product."""
        error = math.fsum(part.errors(eps) for part in self.parts) / self.tokens
        bisect.insort(self.points, (eps, error))
        return error

    def activation_ratio(self, eps: float) -> float:
        """Share of neurons, over the tokens and experts kept, with ||n_i|| >= eps and not zero."""
        least = math.inf if self.empty else max(eps, self.smallest)
        active = sum(int((part.magnitudes >= least).sum()) for part in self.parts)
        return active / sum(part.magnitudes.numel() for part in self.parts)

    def threshold(self, cett: float, tolerance: float) -> float:
        """An eps with |err(eps) - cett| <= tolerance * cett; where err jumps over `cett`, the last eps below the jump.

        err mostly increases with eps. Where it does not, err may cross `cett` more than once, and this is one of the
        crossings. CETT 0 truncates nothing but exact zeros (eps = 0), CETT 1 everything (eps = infinity).
        """
        if cett == 0 or self.empty:
            return 0.0
        if cett == 1:
            return math.inf
        nearest = min(self.points, key=lambda point: abs(point[1] - cett))
        if abs(nearest[1] - cett) <= tolerance * cett:
            return nearest[0]
        below = max(index for index, (_, error) in enumerate(self.points) if error <= cett)
        low, high = self.points[below], self.points[below + 1]
        while low[0] == 0:  # go down until below the crossing, so that logarithms can be taken
            eps = max(high[0] * min(cett / high[1], 0.9) * 0.9, self.smallest)
            point = (eps, self.error(eps))
            low, high = (point, high) if point[1] <= cett else (low, point)
            if abs(point[1] - cett) <= tolerance * cett:
                return eps
        return self._search(cett, low, high, tolerance)

    def _search(self, cett: float, low: Point, high: Point, tolerance: float) -> float:
        """The eps where log err - log cett is zero; as a function of log eps that is almost straight."""

        def height(error: float) -> float:
            return math.log(max(error / cett, 1e-3))

        root = find_root(
            lambda x: height(self.error(math.exp(x))),
            (math.log(low[0]), height(low[1])),
            (math.log(high[0]), height(high[1])),
            f_tolerance=tolerance,
            x_tolerance=max(tolerance * WIDTH_SHARE, NARROWEST),
        )
        return math.exp(root)


class _Part:
    """The kept activations of one FFN. Tokens with a zero output are left out."""

    def __init__(self, ffn: FFN, h: Tensor) -> None:
        h, self.ffn = widened(h), ffn
        norms = whole_norms(ffn, h)
        kept = norms > 0
        self.h, self.norms = (h, norms) if bool(kept.all()) else (h[kept], norms[kept])
        self.magnitudes = magnitudes(ffn, self.h)  # (tokens, d_ff)

    @property
    def weight(self) -> Tensor:
        """W_out, (d, d_ff), widened for each use: kept, it would be twice the memory of a half-precision model."""
        return widened(self.ffn.down_weight)

    def errors(self, eps: float) -> float:
        """Sum over tokens of the relative truncation error, ||sum_{i: ||n_i|| < eps} n_i|| / ||W_out h||."""
        tail = self.h * (self.magnitudes < eps)  # (tokens, d_ff); 2,048 x 320: 0.5 ms, masked_fill 2.2, the product 1.6
        return float((output_norms(self.weight, tail) / self.norms).sum(dtype=torch.float64))
