"""An 8-bit copy of the gate weights with a proven error bound: it finds neurons that are certainly inactive.

Reading W_gate in full caps every exact method under the rule "gate" at 3 times the dense speed. Where the copy's
product with x is so far inside the inactive region that its error cannot lead out of it, the neuron is inactive and its
full-precision row is not read. All others are computed as without the copy, so that the outcome has the same bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import naive
from kernels.eight_bits import EightBits, eight_bits

ACT_ERROR = 1e-5  # relative, of an activation function computed in float32
GELU_ERROR = 4e-6  # absolute, of GELU where 1 + erf(g) cancels: a few float32 steps near 1, times |g| up to 6


@dataclass(frozen=True, eq=False)
class CertifiedGate:
    """The copy, and the g for which a neuron is certainly inactive: g <= tail, or low <= g <= high."""

    copy: EightBits
    region: Tensor  # (3, d_ff), float64: tail, low, high

    @property
    def nbytes(self) -> int:
        """Bytes that one call reads of the copy."""
        return self.copy.nbytes + self.region.nbytes

    def certain(self, x: Tensor, b_gate: Tensor | None = None) -> Tensor:
        """Which neurons are certainly inactive for which token, bool, (tokens, d_ff): the kernel's rule in float64.

        With the estimate m and its reach r: m + r <= tail, or low <= m - r and m + r <= high.
        """
        middle, reach, trusted = self.copy.estimates(x, b_gate)
        tail, low, high = self.region
        inside = (middle + reach <= tail) | ((middle - reach >= low) & (middle + reach <= high))
        return inside & trusted


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
    return CertifiedGate(eight_bits(w_gate, b_gate), region)


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
