"""Sparse linear kernels in the place of a model's linear maps, for rules on their inputs (`neurons.input_rules`).

The maps that read one vector are one call: q, k and v; o; gate, up and down of an FFN. The first module of such a call
computes all of it, the others return their part. No module is replaced.
"""

import math
import threading
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels.linear import SparseInputFFN, SparseLinear, side_by_side
from kernels.pages import LargePages
from sparsity_utils.console import InputError
from sparsity_utils.neurons.activations import activation_name
from sparsity_utils.neurons.find import FFN
from sparsity_utils.neurons.input_rules import INPUT_RULES, InputRule, TopInputs
from sparsity_utils.neurons.linears import LinearMap, find_linears
from sparsity_utils.neurons.modes import forward_replaced
from sparsity_utils.neurons.thresholds import Thresholds


def checked_maps(model: nn.Module, thresholds: Thresholds) -> list[LinearMap]:
    """The linear maps of `model`. Raises `InputError` when `thresholds` are for another number of them."""
    maps = find_linears(model)
    if len(thresholds.values) != len(maps):
        raise InputError(
            f"The thresholds are for {len(thresholds.values)} linear maps and the model has {len(maps)}: use "
            f"thresholds of a rule on inputs, solved on a model of this shape."
        )
    return maps


class Stored:
    """What kernels keep of a model's weights in another order or in fewer bits: made once, then shared."""

    def __init__(self) -> None:
        self.pages = LargePages()
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned at the first call with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def linear_kernel(
    maps: Sequence[LinearMap], thresholds: Thresholds, eight_bits: bool = False, stored: Stored | None = None
) -> SparseLinear:
    """The kernel that computes maps of one vector under `thresholds`, their outputs side by side.

    eight_bits: keep the weights as integers with a scale for each map and input (`SparseLinear.quantised`).

    Raises `InputError` for maps in a basis of their own and for weights that no kernel takes.
    """
    whole = whole_kernel(maps, stored or Stored(), eight_bits)
    return replace(whole, **{"limits": None, **_rule(maps, thresholds)})


def whole_kernel(maps: Sequence[LinearMap], stored: Stored, eight_bits: bool = False) -> SparseLinear:
    """The kernel of maps of one vector that skips nothing. Raises what `linear_kernel` raises."""
    key = (tuple(linear.index for linear in maps), eight_bits)
    return stored.once(key, lambda: _skips_nothing(maps, eight_bits, stored.pages))


def _skips_nothing(maps: Sequence[LinearMap], eight_bits: bool, pages: LargePages) -> SparseLinear:
    if any(linear.basis is not None for linear in maps):
        raise InputError(f"{maps[0].name} is rotated, and no kernel takes rotated maps: use sparse_inputs.")
    weight_t, widths = side_by_side([linear.weight for linear in maps])
    bias = torch.cat([_bias(linear) for linear in maps]) if any(_biased(linear) for linear in maps) else None
    limits = torch.full((len(maps), len(weight_t)), -1.0, device=weight_t.device)
    try:
        kernel = SparseLinear(weight_t, widths, limits, bias=bias)
    except ValueError as error:
        raise InputError(f"{maps[0].name} cannot run on a sparse kernel: {error}") from error
    kernel = kernel.quantised() if eight_bits else kernel
    return replace(kernel, weight_t=pages.copied(kernel.weight_t))


def _biased(linear: LinearMap) -> bool:
    return getattr(linear.module, "bias", None) is not None


def _bias(linear: LinearMap) -> Tensor:
    """What the map's module adds to its outputs, (out,); zeros where it has no bias."""
    if not _biased(linear):
        return linear.weight.new_zeros(len(linear.outputs))
    bias: Any = linear.module.bias
    return bias.detach()[linear.outputs.to(bias.device)]


def _rule(maps: Sequence[LinearMap], thresholds: Thresholds) -> dict[str, Any]:
    """The rule of some maps as `SparseLinear` takes it: score_j > t is |x_j| > t / norm_j."""
    rule: InputRule = INPUT_RULES[thresholds.rule]
    values = [thresholds.values[linear.index] for linear in maps]
    one = torch.ones((), dtype=torch.float32, device=maps[0].weight.device)
    norms = torch.stack([rule.scores(linear, one.expand(linear.inputs)) for linear in maps])  # (maps, in)
    if not isinstance(rule, TopInputs):
        limits = torch.tensor(values, device=norms.device)[:, None] / norms
        return {"limits": limits.nan_to_num(nan=math.inf).float()}  # 0 / 0: a column of zeros
    if min(values) < 1:
        return {"limits": torch.full_like(norms, math.inf)} if max(values) < 1 else _refuse(maps, values)
    return {"keep": tuple(int(value) for value in values), "norms": norms.float()}


def _refuse(maps: Sequence[LinearMap], values: list[float]) -> dict[str, Any]:
    raise InputError(f"{maps[0].name} keeps {values} inputs; a kernel takes none of all its maps, or one at least.")


def ffn_kernel(
    ffn: FFN, maps: Sequence[LinearMap], kernel: Callable[[Sequence[LinearMap]], SparseLinear]
) -> SparseInputFFN:
    """The kernel of a gated FFN among whose block's `maps` are its three. Raises `InputError` where there is none.

    kernel: makes that of maps of one vector.
    """
    roles = {linear.role: linear for linear in maps}
    if "up" not in roles:
        raise InputError(f"{ffn.name} is a plain FFN; the kernels of rules on inputs are of gated ones.")
    first, last = kernel([roles["gate"], roles["up"]]), kernel([roles["down"]])
    return SparseInputFFN(first, last, activation_name(ffn.activation))


def check_not_trained(name: str, modules: Collection[nn.Module], x: Tensor) -> None:
    """Raises `InputError` in training mode, and where autograd would follow what a kernel computes of `x` for them."""
    followed = torch.is_grad_enabled() and (
        x.requires_grad or any(one.requires_grad for module in modules for one in module.parameters())
    )
    if followed or any(module.training for module in modules):
        raise InputError(f"{name} runs on a sparse kernel, which does not train: use model.eval() and torch.no_grad().")


def replace_maps(stack: ExitStack, readers: list[LinearMap], kernel: SparseLinear) -> None:
    """Inside the stack, the maps that read one vector run on their kernel.

    The first module that is given the vector computes all of them; each module returns its own.
    """
    kept = threading.local()  # of each thread that runs the model: the vector, its outputs, and who has not had them
    for module in {linear.module for linear in readers}:
        stack.enter_context(forward_replaced(module, _part(module, readers, kernel, kept)))


def _places(module: nn.Module, readers: list[LinearMap]) -> Tensor | slice:
    """Where the outputs of `module` lie among those of all `readers` side by side."""
    ends = torch.tensor([len(linear.outputs) for linear in readers]).cumsum(0).tolist()
    own = [(linear.outputs.cpu(), end) for linear, end in zip(readers, ends, strict=True) if linear.module is module]
    places = torch.empty(sum(len(outputs) for outputs, _ in own), dtype=torch.long)
    for outputs, end in own:
        places[outputs] = torch.arange(end - len(outputs), end)
    first, count = int(places[0]), len(places)
    return slice(first, first + count) if torch.equal(places, torch.arange(first, first + count)) else places


def _part(module: nn.Module, readers: list[LinearMap], kernel: SparseLinear, kept: Any) -> Callable:
    places, modules = _places(module, readers), {linear.module for linear in readers}

    def forward(x: Tensor) -> Tensor:
        check_not_trained(readers[0].name, modules, x)
        if getattr(kept, "x", None) is not x or module not in kept.left:
            kept.x, kept.y, kept.left = x, kernel(x), set(modules)
        y = kept.y[..., places]
        kept.left.discard(module)
        if not kept.left:
            kept.x = kept.y = None
        return y

    return forward
