"""One sparse FFN: its weights checked once, its backend chosen by their device."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kernels import naive
from kernels.certified import CertifiedGate, certified_gate

MAX_TOKENS = 16  # tokens of one call that the kernels take; above, most neurons are active for some token
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROCESS = os.getpid()  # a forked child has another
BACKENDS = {"cpu": "kernels.cpu_ffn", "cuda": "kernels.triton_ffn"}  # device -> module with `run(ffn, x)`


@dataclass(frozen=True, eq=False)
class SparseFFN:
    """An FFN of which only the active neurons are read; call it with x, (..., d), to get y, (..., d_out).

    Symbols and rules are those of `kernels.naive`. All tensors are on one device and of one dtype (float32, float16 or
    bfloat16), sums are kept in float32. The same input gives the same bits on every call. No gradient flows through
    it. More than MAX_TOKENS tokens are computed densely, by `naive.sparse_ffn`, as are all on a CPU in a process that
    was forked. In half precision that compares rounded numbers with the threshold, and the kernels compare unrounded
    ones; neurons very near it may be judged differently.

    Raises `ValueError` when shapes, dtypes or devices do not fit, and when act or rule is unknown.
    """

    w_gate: Tensor  # (d_ff, d); of a plain FFN, the one matrix before the activation function
    w_up: Tensor | None  # (d_ff, d); None: a plain FFN
    w_down_t: Tensor  # (d_ff, d_out): the down projection transposed, so that a neuron is one contiguous row
    threshold: Any  # a number or (d_ff,), stored as the latter; below zero all are active under the rule "gate"
    act: str = "relu"  # one of naive.ACTIVATIONS
    rule: str = "gate"  # one of naive.RULES
    b_gate: Tensor | None = None  # (d_ff,)
    b_up: Tensor | None = None  # (d_ff,)
    b_down: Tensor | None = None  # (d_out,)
    certificate: CertifiedGate | None = field(default=None, init=False)  # made by `certified`

    def __post_init__(self) -> None:
        self._check()
        for name, tensor in self._tensors().items():
            object.__setattr__(self, name, tensor.detach().contiguous())
        object.__setattr__(self, "threshold", self._threshold_per_neuron())

    @property
    def d_ff(self) -> int:
        """Number of neurons."""
        return self.w_gate.shape[0]

    @property
    def gate_limit(self) -> Tensor:
        """The |s_i| up to which neither W_up nor W_down of neuron i is needed, (d_ff,), float32."""
        return self.threshold if self.rule == "gate" else torch.zeros_like(self.threshold)

    @cached_property
    def arrays(self) -> tuple:
        """The weights as the kernel for CPUs takes them, which shares their memory."""
        from kernels.cpu_ffn import arrays

        return arrays(self)

    def certified(self) -> "SparseFFN":
        """This FFN, which first reads an 8-bit copy of W_gate (`kernels.certified`). Its outputs have the same bits.

        The copy is made of the weights as they are now: make another after they change.

        Raises `ValueError` on other devices than a CPU, and where no neuron could ever be certainly inactive.
        """
        same = replace(self)
        object.__setattr__(same, "certificate", certified_gate(self.w_gate, self.b_gate, self.act, self.gate_limit))
        return same

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """FFN(x) of the active neurons, (..., d_out), in the dtype of `x`, (..., d).

        Raises `ValueError` when the size, dtype or device of `x` is not that of the weights.
        """
        d = self.w_gate.shape[1]
        if x.dim() == 0 or x.shape[-1] != d or x.dtype != self.w_gate.dtype or x.device != self.w_gate.device:
            raise ValueError(
                f"x is {described(x)}, and w_gate is {described(self.w_gate)}: x must be (..., {d}), of the same "
                f"dtype and on the same device."
            )
        rows = x.detach().reshape(-1, d)  # (tokens, d)
        run = backend(x.device.type) if 0 < len(rows) <= MAX_TOKENS else run_dense
        return run(self, rows.contiguous()).view(*x.shape[:-1], self.w_down_t.shape[1])

    def _tensors(self) -> dict[str, Tensor]:
        names = ("w_gate", "w_up", "w_down_t", "b_gate", "b_up", "b_down")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _check(self) -> None:
        for name, value, known in (("act", self.act, naive.ACTIVATIONS), ("rule", self.rule, naive.RULES)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}.")
        tensors = self._tensors()
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name} is of type {type(tensor).__name__}; it must be a torch tensor.")
        for name in ("w_gate", "w_down_t"):
            if tensors[name].dim() != 2 or 0 in tensors[name].shape:
                raise ValueError(f"{name} is {described(tensors[name])}; it must have two dimensions, d_ff first.")
        d_ff, d = self.w_gate.shape
        d_out = self.w_down_t.shape[1]
        shapes = {"w_up": (d_ff, d), "w_down_t": (d_ff, d_out), "b_gate": (d_ff,), "b_up": (d_ff,), "b_down": (d_out,)}
        for name, tensor in tensors.items():
            if tensor.shape != shapes.get(name, (d_ff, d)):
                raise ValueError(
                    f"{name} is {described(tensor)}; with w_gate of {d_ff} neurons and {d} inputs its shape must be "
                    f"{shapes[name]}{', the down projection transposed' if name == 'w_down_t' else ''}."
                )
            if tensor.dtype not in DTYPES or tensor.dtype != self.w_gate.dtype or tensor.device != self.w_gate.device:
                raise ValueError(
                    f"{name} is {described(tensor)}, and w_gate is {described(self.w_gate)}: all weights must be on "
                    f"one device and of one dtype, float32, float16 or bfloat16."
                )
        if self.b_up is not None and self.w_up is None:
            raise ValueError("b_up was given without w_up; give a plain FFN's bias as b_gate.")

    def _threshold_per_neuron(self) -> Tensor:
        """The threshold of each neuron, (d_ff,), float32, on the device of the weights."""
        given, device = self.threshold, self.w_gate.device
        if isinstance(given, (int, float)):
            given = torch.tensor(float(given), dtype=torch.float64, device=device)
        if not isinstance(given, Tensor):
            raise ValueError(f"The threshold is {given!r}; it must be a number, or a tensor of one per neuron.")
        if given.device != device or given.shape not in ((), (self.d_ff,)):
            raise ValueError(
                f"The threshold is {described(given)}; it must be one number, or one per neuron, ({self.d_ff},), on "
                f"the device of the weights, {device}."
            )
        if device.type == "cpu" and given.isnan().any():  # elsewhere a look would wait for the device
            raise ValueError("A threshold is NaN; it must be a number.")
        largest = torch.finfo(torch.float32).max
        return given.detach().clamp(max=largest).to(torch.float32).expand(self.d_ff).contiguous()


def sparse_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down_t: Tensor,
    threshold: Tensor | float,
    act: str = "relu",
    rule: str = "gate",
    *,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """FFN(x) of the neurons that `rule` and `threshold` leave active: `SparseFFN` in one call.

    Weights whose rows are not contiguous are copied, at every call; keep a `SparseFFN` to do that once.
    """
    return SparseFFN(w_gate, w_up, w_down_t, threshold, act, rule, b_gate, b_up, b_down)(x)


def run_dense(ffn: SparseFFN, x: Tensor) -> Tensor:
    """The same rule run densely, in the dtype of `x`, (tokens, d)."""
    biases = {"b_gate": ffn.b_gate, "b_up": ffn.b_up, "b_down": ffn.b_down}
    return naive.sparse_ffn(x, ffn.w_gate, ffn.w_up, ffn.w_down_t, ffn.threshold, ffn.act, ffn.rule, **biases)


def backend(device: str) -> Callable[[SparseFFN, Tensor], Tensor]:
    """The function that computes on this kind of device: its kernel or, after a warning, `run_dense` if none works."""
    module = kernels_of("FFNs", device, BACKENDS.get(device))
    return run_dense if module is None else module.run


@cache  # so that it warns once
def kernels_of(what: str, device: str, name: str | None) -> Any:
    """The module `name`, whose kernels compute `what` on this kind of device; None, after a warning, if none works."""
    reason = f"there is no kernel for {device!r}"
    if name is not None:
        try:
            return import_module(name)
        except Exception as error:  # not installed, too old, or nowhere to keep what it compiles
            reason = f"{name} cannot be used ({error})"
    warnings.warn(f"Sparse {what} on {device} run densely, with a mask: {reason}.", stacklevel=4)
    return None


def forked() -> bool:
    """Whether this process was forked from the one that loaded the kernels."""
    return os.getpid() != PROCESS


def described(x: Tensor) -> str:
    """Shape, dtype and device, for messages."""
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
