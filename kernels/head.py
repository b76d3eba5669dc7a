"""An output head that reads the full rows only of words that could still be among the likeliest.

With an 8-bit copy of the head (`kernels.eight_bits`) the logit of word v lies within m_v - r_v and m_v + r_v. Let L be
the k-th largest of the lower ends. A word with m_v + r_v < L cannot be among the k likeliest, whatever the rounding;
the logits of all others are computed from their full rows. So greedy decoding (k = 1) gets the exact argmax and top-k
sampling the exact k, and what is read is the copy, a quarter of the head in float32, and some full rows.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.eight_bits import EightBits, eight_bits
from kernels.ffn import MAX_TOKENS, described
from kernels.selection import kth_largest


@dataclass(frozen=True, eq=False)
class CertifiedHead:
    """Logits of the k likeliest words, exact; call it with x, (..., d), to get logits, (..., vocabulary).

    Those of words that are certainly not among the k likeliest are minus infinity. The logits are float32 sums that do
    not depend on k. More than MAX_TOKENS tokens, such as prompts, get all logits. CPU only.

    Raises `ValueError` when weight and bias are not float32 on a CPU or do not fit, and for a k outside the vocabulary.
    """

    weight: Tensor  # (vocabulary, d)
    k: int = 1
    bias: Tensor | None = None  # (vocabulary,)
    copy: EightBits = field(init=False)

    def __post_init__(self) -> None:
        w, b = self.weight, self.bias
        if w.dim() != 2 or w.dtype != torch.float32 or w.device.type != "cpu":
            raise ValueError(f"The head is {described(w)}; it must be (vocabulary, d), float32, on a CPU.")
        if b is not None and (b.shape != w.shape[:1] or b.dtype != w.dtype or b.device != w.device):
            raise ValueError(f"The bias is {described(b)}; it must be ({len(w)},), float32, on a CPU.")
        if not 1 <= self.k <= len(w):
            raise ValueError(f"k is {self.k}; choose 1 to {len(w)}, the size of the vocabulary.")
        object.__setattr__(self, "weight", w.detach().contiguous())
        object.__setattr__(self, "copy", eight_bits(w, b))

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of `x`, (..., d): exact for the k likeliest words of each token, minus infinity where certainly not.

        Raises `ValueError` when `x` does not fit the weights.
        """
        if x.shape[-1:] != self.weight.shape[1:] or x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(f"x is {described(x)}; it must be (..., {self.weight.shape[1]}), float32, on a CPU.")
        rows = x.detach().reshape(-1, x.shape[-1])  # (tokens, d)
        if not 0 < len(rows) <= MAX_TOKENS:
            return F.linear(x, self.weight, self.bias)
        from kernels.cpu_head import run

        return run(self, rows.contiguous()).view(*x.shape[:-1], len(self.weight))

    def undecided(self, x: Tensor) -> Tensor:
        """Which words' full rows are read for `x`, (tokens, d): bool, (tokens, vocabulary); the rule in float64."""
        middle, reach, trusted = self.copy.estimates(x, self.bias)
        low = torch.where(trusted, middle - reach, -torch.inf)
        least = kth_largest(low, self.k)
        return ~(trusted & (middle + reach < least))
