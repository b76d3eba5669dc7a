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

from kernels.ffn import SparseFFN, described
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
        follow = self.gains.shape == (2, d) and (self.o.d, self.o.widths) == (widths[0], (d,))
        inputs, outputs = self.ffn_sizes
        if not (heads and whole and follow and inputs == outputs == d):
            raise ValueError(
                f"Gains {tuple(self.gains.shape)}, q, k and v of {widths}, o of {self.o.d} to {self.o.widths} and a "
                f"FFN of {inputs} to {outputs} make no layer of {d} with heads of {self.head_size}."
            )
        maps, tensors = [self.qkv, self.o], [self.gains]
        if isinstance(self.ffn, SparseInputFFN):
            maps += [self.ffn.gate_up, self.ffn.down]
        else:
            tensors += [self.ffn.w_gate]
        kinds = {linear.dtype for linear in maps} | {tensor.dtype for tensor in tensors}
        devices = {tensor.device.type for tensor in [*tensors, *(linear.weight_t for linear in maps)]}
        if kinds != {torch.float32} or devices != {"cpu"}:
            raise ValueError(f"The parts are of {kinds} on {devices}: a layer is one call in float32 on a CPU.")
        object.__setattr__(self, "gains", self.gains.detach().contiguous())

    @cached_property
    def arrays(self) -> tuple:
        """The parts as the kernel takes them, which share their memory, and the bytes of the weights."""
        from kernels.cpu_layer import arrays

        return arrays(self)

    @property
    def ffn_sizes(self) -> tuple[int, int]:
        """Numbers of inputs and outputs of the FFN."""
        if isinstance(self.ffn, SparseInputFFN):
            return self.ffn.gate_up.d, self.ffn.down.widths[0]
        return self.ffn.w_gate.shape[1], self.ffn.w_down_t.shape[1]

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        """The layer's output, (sequences, d), of `x`, (sequences, d), the newest token of each sequence.

        Args:
            cos, sin: of the angles by which the token's position turns a head, (sequences or 1, head_size) each.
            keys, values: (sequences, heads of keys, room, head_size). The first `length` tokens of each sequence are
                read, and those of the newest are written after them.

        Raises `ValueError` when one of these does not fit the layer, when there is no room, and in a forked process.
        """
        from kernels.cpu_layer import run

        self._check_given(x, cos, sin, keys, values, length)
        return run(self, x.contiguous(), cos.contiguous(), sin.contiguous(), keys, values, length)

    def _check_given(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int) -> None:
        """Takes 2 us, at every token."""
        size, groups = self.head_size, self.qkv.widths[1] // self.head_size
        given, turns, kept = x.shape, cos.shape, keys.shape
        if given[1:] != (self.qkv.d,):
            raise ValueError(f"x is {described(x)}; it must be (sequences, {self.qkv.d}), one token of each.")
        texts = given[0]
        if turns not in ((texts, size), (1, size)) or sin.shape != turns:
            raise ValueError(f"cos is {described(cos)} and sin {described(sin)}; both must be ({texts} or 1, {size}).")
        if kept[:2] != (texts, groups) or kept[3:] != (size,) or values.shape != kept:
            raise ValueError(
                f"keys are {described(keys)} and values {described(values)}; both must be ({texts}, {groups}, room, "
                f"{size})."
            )
        if not 0 <= length < kept[2]:
            raise ValueError(f"length is {length}, and there is room for {kept[2]} tokens: give a length below that.")
        if not (keys.is_contiguous() and values.is_contiguous()):
            raise ValueError("keys and values are written to: both must be contiguous.")
        for one in (x, cos, sin, keys, values):
            if one.dtype is not torch.float32 or not one.is_cpu or one.requires_grad:
                needs = ", which needs a gradient" if one.requires_grad else ""
                raise ValueError(f"A part given is {described(one)}{needs}: a layer is float32 on a CPU, no gradient.")
