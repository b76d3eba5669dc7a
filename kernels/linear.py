"""Linear maps that read only the weights of active inputs: their weights checked once, a backend by device.

A map computes y = W (x masked): an input j of a token is active by its size |x_j| times a factor n_j (1, or a norm of
the column W[:, j]), and an inactive one counts as zero. W is kept transposed, so that the weights of an input are one
contiguous row, which is read where the input is active for at least one token of the call. Maps of one input, such as
query, key and value, are one call: at the size of a small model starting a call costs as much as reading its weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from kernels import naive
from kernels.eight_bits import LEVELS
from kernels.ffn import DTYPES, MAX_TOKENS, described, kernels_of

BACKENDS = {"cpu": "kernels.cpu_linear", "cuda": "kernels.triton_linear"}  # device -> module with `run(linear, x)`


@dataclass(frozen=True, eq=False)
class SparseLinear:
    """Linear maps of one input; call it with x, (..., d), to get their outputs side by side, (..., sum of d_out).

    Input j of map m is active for a token where |x_j| > limits[m, j] or, with `keep`, where |x_j| norms[m, j] is among
    the keep[m] largest of the token (ties with the last of them too) and x_j is not zero. An x_j that is infinite or
    NaN is always active. So broken numbers reach the output, unless they are in weights that the rule does not read.

    All tensors are on one device. Sums are kept in float32; the same input gives the same bits on every call. No
    gradient flows through it. Many tokens are masked and multiplied by all weights.

    Raises `ValueError` when shapes, dtypes or devices do not fit, and when both limits and keep are given, or neither.
    """

    weight_t: Tensor  # (d, sum of d_out): all maps side by side, each transposed; int8 where `scale` is given
    widths: tuple[int, ...]  # d_out of each map
    limits: Tensor | None = None  # (maps, d), float32; below zero an input is always active
    keep: tuple[int, ...] | None = None  # of each map, 1 to d
    norms: Tensor | None = None  # (maps, d), float32: n of the rule with `keep`; None: 1
    bias: Tensor | None = None  # (sum of d_out,)
    scale: Tensor | None = None  # (maps, d), float32: what the integers of a row are multiplied by
    dtype: torch.dtype | None = None  # of x, y and bias; None: that of the weights, with `scale` float32

    def __post_init__(self) -> None:
        for name in ("weight_t", "limits", "norms", "bias", "scale"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, getattr(self, name).detach().contiguous())
        if self.dtype is None:
            object.__setattr__(self, "dtype", self.weight_t.dtype if self.scale is None else torch.float32)
        self._check()

    @property
    def d(self) -> int:
        """Number of inputs."""
        return self.weight_t.shape[0]

    @cached_property
    def _blocks(self) -> dict[int, Tensor]:
        return {}

    @cached_property
    def arrays(self) -> tuple:
        """The tensors as the kernel for CPUs takes them, which shares their memory."""
        from kernels.cpu_linear import arrays

        return arrays(self)

    def blocks(self, size: int) -> Tensor:
        """The outputs in blocks of `size`, each of one map: map, first output, end of the map's outputs, int32.

        (blocks, 3). It is made once: a GPU would wait for the copy from the host, and a CUDA graph refuses it.
        """
        if size not in self._blocks:
            ends = list(accumulate(self.widths))
            rows = [
                (number, first, end)
                for number, (end, width) in enumerate(zip(ends, self.widths, strict=True))
                for first in range(end - width, end, size)
            ]
            self._blocks[size] = torch.tensor(rows, dtype=torch.int32, device=self.weight_t.device)
        return self._blocks[size]

    def __call__(self, x: Tensor) -> Tensor:
        """The maps of `x`, (..., d), in its dtype, (..., sum of d_out).

        Raises `ValueError` when the size, dtype or device of `x` is not that of the weights.
        """
        if x.dim() == 0 or x.shape[-1] != self.d or x.dtype != self.dtype or x.device != self.weight_t.device:
            raise ValueError(
                f"x is {described(x)}, and the weights are {described(self.weight_t)}: x must be (..., {self.d}), "
                f"{str(self.dtype).removeprefix('torch.')}, on the same device."
            )
        rows = x.detach().reshape(-1, self.d)  # (tokens, d)
        run = backend(x.device.type) if len(rows) else dense
        return run(self, rows.contiguous()).view(*x.shape[:-1], sum(self.widths))

    def active(self, x: Tensor) -> Tensor:
        """Which inputs are active, bool, (maps, tokens, d), of `x`, (tokens, d): the rule, in float32 or wider."""
        return naive.active_inputs(x, self.limits, self.keep, self.norms)

    def wide_weights(self) -> Tensor:
        """The weights as numbers in float32, or float64 where they are, (d, sum of d_out)."""
        if self.scale is None:
            return self.weight_t.to(torch.promote_types(self.weight_t.dtype, torch.float32))
        widths = torch.tensor(self.widths, device=self.scale.device)
        return self.weight_t * self.scale.T.repeat_interleave(widths, dim=1)

    def quantised(self) -> "SparseLinear":
        """These maps with their weights in 8 bits: of each map and input, integers times one scale.

        The largest weight of an input is LEVELS steps; each weight is off by half a step at most.
        """
        parts = self.weight_t.float().split(self.widths, dim=1)
        scale = torch.stack([part.abs().amax(dim=1) / LEVELS for part in parts])  # (maps, d)
        steps = [part / size[:, None].clamp(min=1e-38) for part, size in zip(parts, scale, strict=True)]
        bits = torch.cat(steps, dim=1).round().clamp(-LEVELS, LEVELS).to(torch.int8)
        return replace(self, weight_t=bits, scale=scale, dtype=self.dtype)

    def _check(self) -> None:
        w, maps = self.weight_t, len(self.widths)
        kinds = DTYPES if self.scale is None else (torch.int8,)
        if w.dim() != 2 or 0 in w.shape or w.dtype not in kinds or sum(self.widths) != w.shape[1]:
            raise ValueError(
                f"weight_t is {described(w)}; it must be (d, {sum(self.widths)}), for maps of {self.widths} outputs, "
                f"float32, float16 or bfloat16, or int8 with a scale."
            )
        if (self.limits is None) == (self.keep is None):
            raise ValueError("Give either limits or keep, the one or the other rule.")
        for name in ("limits", "norms", "scale"):
            tensor = getattr(self, name)
            if tensor is not None and (tensor.shape != (maps, self.d) or tensor.dtype != torch.float32):
                raise ValueError(f"{name} is {described(tensor)}; it must be ({maps}, {self.d}) float32.")
        if self.keep is not None and (len(self.keep) != maps or not all(1 <= k <= self.d for k in self.keep)):
            raise ValueError(f"keep is {self.keep}; give {maps} numbers from 1 to {self.d}.")
        if self.dtype not in DTYPES or (self.scale is None and self.dtype != w.dtype):
            raise ValueError(f"dtype is {self.dtype}, and the weights are {described(w)}: leave it out.")
        if self.bias is not None and (self.bias.shape != (w.shape[1],) or self.bias.dtype != self.dtype):
            raise ValueError(f"bias is {described(self.bias)}; it must be ({w.shape[1]},), of the dtype of x.")
        for tensor in (self.limits, self.norms, self.scale, self.bias):
            if tensor is not None and tensor.device != w.device:
                raise ValueError(f"The weights are on {w.device} and a part on {tensor.device}: use one device.")


def side_by_side(weights: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """`weight_t` and `widths` of maps whose weights are given as nn.Linear has them, each (d_out, d)."""
    return torch.cat([weight.detach().T for weight in weights], dim=1), tuple(len(weight) for weight in weights)


@dataclass(frozen=True, eq=False)
class SparseInputFFN:
    """A gated FFN of which the inputs of all three maps are sparse: y = down(act(gate(x)) * up(x)), in one call.

    Raises `ValueError` when the maps do not follow each other, or act is unknown.
    """

    gate_up: SparseLinear  # two maps of d_ff outputs
    down: SparseLinear  # of d_ff inputs
    act: str = "silu"

    def __post_init__(self) -> None:
        if self.act not in naive.ACTIVATIONS:
            raise ValueError(f"act is {self.act!r}; choose one of {', '.join(naive.ACTIVATIONS)}.")
        if self.gate_up.widths != (self.down.d,) * 2 or len(self.down.widths) != 1:
            raise ValueError(
                f"gate_up has the widths {self.gate_up.widths} and down {self.down.d} inputs: give two maps, gate and "
                f"up, of as many outputs as down has inputs."
            )

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The FFN's output, (..., d_out), of `x`, (..., d)."""
        rows = x.detach().reshape(-1, self.gate_up.d).contiguous()
        fits = x.device.type == "cpu" and 0 < len(rows) <= MAX_TOKENS and x.dtype == self.gate_up.dtype
        module = kernels_of("linear maps", "cpu", BACKENDS["cpu"]) if fits else None
        y = dense_ffn(self, rows) if module is None else module.run_ffn(self, rows)
        return y.view(*x.shape[:-1], self.down.widths[0])


def dense(linear: SparseLinear, x: Tensor) -> Tensor:
    """The same rule run densely, in the dtype of `x`, (tokens, d); of 8-bit weights their numbers."""
    active = linear.active(x)
    weights = linear.weight_t if linear.scale is None else linear.wide_weights()
    parts = weights.to(x.dtype).split(linear.widths, dim=1)
    y = torch.cat([torch.where(a, x, 0) @ w for a, w in zip(active, parts, strict=True)], dim=1)
    return y if linear.bias is None else y + linear.bias


def dense_ffn(ffn: SparseInputFFN, x: Tensor) -> Tensor:
    """The FFN by its maps, each on its own, of `x`, (tokens, d)."""
    gate, up = ffn.gate_up(x).chunk(2, dim=-1)
    return ffn.down(naive.ACTIVATIONS[ffn.act](gate) * up)


def backend(device: str) -> Callable[[SparseLinear, Tensor], Tensor]:
    """The function that computes on this kind of device: its kernel or, after a warning, `dense` if none works."""
    module = kernels_of("linear maps", device, BACKENDS.get(device))
    return dense if module is None else module.run
