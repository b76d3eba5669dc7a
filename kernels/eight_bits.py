"""A matrix in 8 bits with a proven bound on how far its products are from those of the matrix.

Row i is copied as w_i = a_i q_i + e_i with q_i in int8, and by Cauchy and Schwarz

    |w_i . x - a_i q_i . x| <= ||e_i|| ||x||.

The radius around a_i q_i . x also holds the rounding errors of float32 sums of n terms in any order, with or without
fused products: gamma_n ||w|| ||x|| with gamma_n = n u / (1 - n u), u = 2^-24 (Higham, Accuracy and Stability of
Numerical Algorithms, 2nd edition, section 3.1). So whatever the copy decides, no kernel's rounding can contradict.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 127  # of an int8, on either side of zero
UNIT = 2.0**-24  # of float32
LARGEST = 1e38  # a third of what float32 holds
UP = 1 + 1e-9  # covers the rounding of float64
TINY = 2.0**-120  # per term: what products lose that are too small for float32


@dataclass(frozen=True, eq=False)
class EightBits:
    """A matrix in 8 bits, and how far its products can be from those of the matrix itself.

    With the estimate m_i = a_i q_i . x + b_i, any float32 sum of w_i . x + b_i lies within radius_i ||x|| + fixed_i of
    any float32 sum of m_i, as long as ||x|| <= most_i.
    """

    bits: Tensor  # (rows, d), int8
    scale: Tensor  # (rows,), float64 of a float32
    radius: Tensor  # (rows,), float64: largest distance of w_i . x from its estimate, per unit of ||x||
    fixed: Tensor  # (rows,), float64: what is added to radius * ||x||, whatever x is
    most: Tensor  # (rows,), float64: the ||x|| up to which no float32 sum can overflow

    @property
    def nbytes(self) -> int:
        """Bytes of the copy and its numbers."""
        return sum(part.nbytes for part in (self.bits, self.scale, self.radius, self.fixed, self.most))

    def estimates(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """m, its reach and where they can be trusted, (tokens, rows) each, in float64, of `x`, (tokens, d)."""
        wide = x.double()
        middle = wide @ (self.scale[:, None] * self.bits.double()).T
        middle = middle if bias is None else middle + bias.double()
        sizes = wide.norm(dim=1, keepdim=True)
        return middle, sizes * self.radius + self.fixed, sizes <= self.most


def eight_bits(weight: Tensor, bias: Tensor | None) -> EightBits:
    """The 8-bit copy of `weight`, (rows, d), a quarter of its size in float32."""
    w = weight.detach().double()
    d = w.shape[1]
    scale = (w.abs().amax(dim=1) / LEVELS).float().double()
    bits = (w / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().nan_to_num(0, 0, 0)
    bits = bits.clamp(-LEVELS, LEVELS)
    error = (w - scale[:, None] * bits).norm(dim=1)
    gamma = (d + 4) * UNIT / (1 - (d + 4) * UNIT)
    radius = (error + gamma * (2 * w.norm(dim=1) + error)) * UP
    size = torch.zeros(len(w), dtype=torch.float64) if bias is None else bias.detach().double().abs()
    fixed = 4 * UNIT * size + d * TINY * (1 + scale)
    # By Cauchy and Schwarz no partial sum exceeds this times ||x||.
    largest = torch.maximum(w.norm(dim=1), bits.norm(dim=1))
    most = torch.where(size < LARGEST, LARGEST / largest, 0.0)
    return EightBits(bits.to(torch.int8), scale, radius, fixed, most)
