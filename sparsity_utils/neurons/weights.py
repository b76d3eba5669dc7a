"""Which parameter of a model a tensor is, lies in, or was copied or gathered from."""

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_utils.neurons.vectors import COPIES, GATHERS

TRANSPOSES = ("t", "transpose", "permute", "numpy_T")  # primitive operations
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor computed from parameters alone."""

    base: Tensor | None = None  # view of a parameter that it copies, or is gathered from
    chosen: Tensor | None = None  # the entries of the base along dimension 0, where gathered


class Weights:
    """Which parameter or buffer of a module a tensor lies in, found by its address."""

    def __init__(self, module: nn.Module) -> None:
        named = [*module.named_parameters(), *module.named_buffers()]
        spans = [(x.data_ptr(), x.data_ptr() + x.nbytes, name) for name, x in named if x.numel()]
        self.spans = sorted(spans)
        self.starts = [start for start, _, _ in self.spans]

    def find(self, x: Tensor) -> tuple[str, int] | None:
        """Name of the parameter or buffer that `x` lies in, and its offset there in elements; None outside all."""
        index = bisect_right(self.starts, x.data_ptr()) - 1
        if index < 0 or x.data_ptr() >= self.spans[index][1]:
            return None
        start, _, name = self.spans[index]
        return name, (x.data_ptr() - start) // x.itemsize


def is_one_matrix(constant: Constant) -> bool:
    """Whether all vectors are multiplied by the same matrix."""
    base = constant.base
    return constant.chosen is None and base is not None and (base.dim() == 2 or base.stride(0) == 0)


def operation(func: Any) -> str:
    """Name of a primitive operation, without its library and overload."""
    return func.__name__.partition(".")[0]


def moved_constant(constant: Constant, func: Any, args: tuple, kwargs: dict, out: Tensor) -> Constant:
    """What a copy, view or gather makes of a tensor that is computed from parameters alone."""
    name, base = operation(func), constant.base
    if base is None:
        return constant
    if name in COPIES or (out.shape == args[0].shape and name not in (*GATHERS, *TRANSPOSES)):
        return constant
    if name in TRANSPOSES:
        return replace(constant, base=func(base, *args[1:], **kwargs))
    if constant.chosen is None and name == "index" and len(args[1]) == 1 and args[1][0].dtype in INTEGERS:
        return Constant(base, args[1][0])
    if constant.chosen is None and name == "index_select" and args[1] == 0:
        return Constant(base, args[2])
    return Constant()
