"""An 8-bit copy of the gate weights with a proven error bound: it finds neurons that are certainly inactive.

Reading W_gate in full caps every exact method under the rule "gate" at 3 times the dense speed. Row i is copied as
w_i = a_i q_i + e_i with q_i in int8, and by Cauchy and Schwarz

    |w_i . x - a_i q_i . x| <= ||e_i|| ||x||.

Where a_i q_i . x is so far inside the inactive region that no such error leads out of it, the neuron is inactive and
its full-precision row is not read. All others are computed as without the copy, so that the outcome has the same bits.

The radius around a_i q_i . x also holds the rounding errors of float32 sums of n terms in any order, with or without
fused products: gamma_n ||w|| ||x|| with gamma_n = n u / (1 - n u), u = 2^-24 (Higham, Accuracy and Stability of
Numerical Algorithms, 2nd edition, section 3.1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import naive

LEVELS = 127  # of an int8, on either side of zero
UNIT = 2.0**-24  # of float32
LARGEST = 1e38  # a third of what float32 holds
UP = 1 + 1e-9  # covers the rounding of float64
TINY = 2.0**-120  # per term: what products lose that are too small for float32
ACT_ERROR = 1e-5  # relative, of an activation function computed in float32
GELU_ERROR = 4e-6  # absolute, of GELU where 1 + erf(g) cancels: a few float32 steps near 1, times |g| up to 6


@dataclass(frozen=True, eq=False)
class CertifiedGate:
    """The copy, and the g for which a neuron is certainly inactive: g <= tail, or low <= g <= high."""

    bits: Tensor  # (d_ff, d), int8
    scale: Tensor  # (d_ff,), float64 of a float32
    radius: Tensor  # (d_ff,), float64: largest distance of g_i from its estimate, per unit of ||x||
    fixed: Tensor  # (d_ff,), float64: what is added to radius * ||x||, whatever x is
    most: Tensor  # (d_ff,), float64: the ||x|| up to which no float32 sum can overflow
    region: Tensor  # (3, d_ff), float64: tail, low, high

    @property
    def nbytes(self) -> int:
        """Bytes that one call reads of the copy."""
        parts = (self.bits, self.scale, self.radius, self.fixed, self.most, self.region)
        return sum(part.nbytes for part in parts)

    def certain(self, x: Tensor, b_gate: Tensor | None = None) -> Tensor:
        """Which neurons are certainly inactive for which token, bool, (tokens, d_ff): the kernel's rule in float64.

        With the estimate m = a_i q_i . x + b_i and r = radius_i ||x|| + fixed_i: m + r <= tail, or low <= m - r and
        m + r <= high.
        """
        wide = x.double()
        middle = wide @ (self.scale[:, None] * self.bits.double()).T
        middle = middle if b_gate is None else middle + b_gate.double()
        sizes = wide.norm(dim=1, keepdim=True)
        reach = sizes * self.radius + self.fixed
        tail, low, high = self.region
        inside = (middle + reach <= tail) | ((middle - reach >= low) & (middle + reach <= high))
        return inside & (sizes <= self.most)


def certified_gate(w_gate: Tensor, b_gate: Tensor | None, act: str, limit: Tensor) -> CertifiedGate:
    """The 8-bit copy of `w_gate`, (d_ff, d), a quarter of its size in float32.

    Args:
        limit: (d_ff,); neuron i is inactive where |act(g_i)| <= limit_i.

    Raises `ValueError` when the weights are not on a CPU, the one device with a kernel for it, and when no neuron can
    ever be certain to be inactive.
    """
    if w_gate.device.type != "cpu":
        raise ValueError(f"The gate weights are on {w_gate.device}; certified gates run on a CPU only.")
    region = inactive_region(act, limit)
    if (region[0] == -torch.inf).all() and (region[1] > region[2]).all():
        raise ValueError(
            f"With {act} and a limit of zero no neuron is certainly inactive: certify an FFN with the rule 'gate', or "
            f"one with ReLU."
        )
    w = w_gate.detach().double()
    d = w.shape[1]
    scale = (w.abs().amax(dim=1) / LEVELS).float().double()
    bits = (w / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().nan_to_num(0, 0, 0)
    bits = bits.clamp(-LEVELS, LEVELS)
    error = (w - scale[:, None] * bits).norm(dim=1)
    gamma = (d + 4) * UNIT / (1 - (d + 4) * UNIT)
    radius = (error + gamma * (2 * w.norm(dim=1) + error)) * UP
    bias = torch.zeros(len(w), dtype=torch.float64) if b_gate is None else b_gate.detach().double().abs()
    fixed = 4 * UNIT * bias + d * TINY * (1 + scale)
    # By Cauchy and Schwarz no partial sum exceeds this times ||x||.
    largest = torch.maximum(w.norm(dim=1), bits.norm(dim=1))
    most = torch.where(bias < LARGEST, LARGEST / largest, 0.0)
    return CertifiedGate(bits.to(torch.int8), scale, radius, fixed, most, region)


def inactive_region(act: str, limit: Tensor) -> Tensor:
    """Where |act(g)| <= limit for certain, also as computed in float32: tail, low and high, (3, d_ff), float64.

    low > high where there is no such interval. `limit`: (d_ff,); below zero nothing is inactive.
    """
    limit = limit.double().clamp(max=torch.finfo(torch.float32).max)
    if act in ("relu", "relu2"):
        tail = limit if act == "relu" else limit.clamp(min=0).sqrt() * (1 - ACT_ERROR)
        tail = tail.masked_fill(limit < 0, -torch.inf)
        return torch.stack([tail, torch.full_like(tail, torch.inf), torch.full_like(tail, -torch.inf)])
    margin = limit * ACT_ERROR + (GELU_ERROR if act.startswith("gelu") else 0)
    return torch.stack(_around_a_minimum(act, limit - margin))


def _around_a_minimum(act: str, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tail, low and high of SiLU and GELU, which fall from 0 to a minimum at some g < 0, then rise, through 0 at 0."""
    function, far = naive.ACTIVATIONS[act], torch.full_like(limit, 40.0)
    grid = torch.linspace(-3, 0, 300_001, dtype=torch.float64)
    place = grid[function(grid).argmin()]
    bottom = torch.full_like(limit, float(place))
    high = _bisected(lambda g: function(g) <= limit, torch.zeros_like(limit), limit + far)
    low = _bisected(lambda g: function(g) >= -limit, torch.zeros_like(limit), bottom)
    tail = _bisected(lambda g: function(g) >= -limit, -far, bottom)
    everywhere_left = function(place) >= -limit  # then even the minimum is within the limit
    nothing = limit <= 0
    tail = torch.where(everywhere_left, high, tail.masked_fill(function(-far) < -limit, -torch.inf))
    return tail.masked_fill(nothing, -torch.inf), low.masked_fill(nothing, torch.inf), high


def _bisected(inside, start: Tensor, end: Tensor) -> Tensor:
    """The number nearest to `end` that is still `inside`, as `start` is, to 1e-15 of the distance between the two."""
    for _ in range(60):
        middle = (start + end) / 2
        good = inside(middle)
        start, end = torch.where(good, middle, start), torch.where(good, end, middle)
    return start
