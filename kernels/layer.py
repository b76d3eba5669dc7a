"""A decoder layer for one new token of each sequence, in one call.

At the size of a small model Python takes longer than reading the weights: of SmolLM2, half of its inputs skipped, a
token needs 5 ms of reading and took 20 ms with a call for each map. So all of a layer is one call:

    a = x + residual o(attention(q, k, v of norm_1(x)))
    y = a + residual FFN(norm_2(a))

with RMSNorm (arXiv 1910.07467), queries and keys turned by their position (RoPE, arXiv 2104.09864, the two halves of a
head being the pairs), and several heads of queries for one of keys and values (GQA, arXiv 2305.13245).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kernels.ffn import SparseFFN
from kernels.linear import SparseInputFFN, SparseLinear


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """A decoder layer whose maps are sparse kernels; it is given one token of each sequence. CPU and float32 only.

    Raises `ValueError` when the parts do not follow each other, or are not float32 on a CPU.
    """

    gains: Tensor  # (2, d): of the norms before attention and before the FFN
    eps: tuple[float, float]  # of the norms
    qkv: SparseLinear  # three maps: of queries, keys and values
    o: SparseLinear
    ffn: SparseFFN | SparseInputFFN
    head_size: int
    scale: float  # what scores are multiplied by
    residual: float = 1.0

    def __post_init__(self) -> None:
        widths, d = self.qkv.widths, self.qkv.d
        heads = len(widths) == 3 and widths[1] == widths[2] and widths[0] % widths[1] == 0
        whole = self.head_size % 2 == 0 and not any(width % self.head_size for width in widths)
        follow = self.gains.shape == (2, d) and self.o.d == widths[0] and self.o.widths == (d,) == (self.ffn_inputs,)
        if not (heads and whole and follow):
            raise ValueError(
                f"Gains {tuple(self.gains.shape)}, q, k and v of {widths}, o of {self.o.d} to {self.o.widths} and a "
                f"FFN of {self.ffn_inputs} make no layer of {d} with heads of {self.head_size}."
            )
        of_ffn = self.ffn.gate_up.dtype if isinstance(self.ffn, SparseInputFFN) else self.ffn.w_gate.dtype
        kinds = {self.gains.dtype, self.qkv.dtype, self.o.dtype, of_ffn}
        devices = {self.gains.device.type, self.qkv.weight_t.device.type, self.o.weight_t.device.type}
        if kinds != {torch.float32} or devices != {"cpu"}:
            raise ValueError(f"The parts are of {kinds} on {devices}: a layer is one call in float32 on a CPU.")
        object.__setattr__(self, "gains", self.gains.detach().contiguous())

    @cached_property
    def arrays(self) -> tuple:
        """The parts as the kernel takes them, which share their memory, and the bytes of the weights."""
        from kernels.cpu_layer import arrays

        return arrays(self)

    @property
    def ffn_inputs(self) -> int:
        """Number of inputs of the FFN."""
        return self.ffn.gate_up.d if isinstance(self.ffn, SparseInputFFN) else self.ffn.w_gate.shape[1]

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        """The layer's output, (sequences, d), of `x`, (sequences, d), the newest token of each sequence.

        Args:
            cos, sin: of the angles by which the token's position turns a head, (sequences or 1, head_size) each.
            keys, values: (sequences, heads of keys, room, head_size). The first `length` tokens of each sequence are
                read, and those of the newest are written after them.
        """
        from kernels.cpu_layer import run

        return run(self, x, cos, sin, keys, values, length)
