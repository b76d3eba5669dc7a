"""Find the linear maps of a decoder; observe their inputs, or skip some, inside a `with` block.

A block of a decoder has seven maps, q, k, v, o, gate, up and down, which read four vectors:

    attention  what q, k and v are computed from
    o          what attention mixes from the values v
    ffn        what gate and up are computed from; a plain FFN has a gate alone, as in `neurons.find`
    down       h, the neurons

Input j of a map contributes W[:, j] x_j to its output. Each map has a mask of its own, also where several share a
vector or one module computes them all.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsity_utils.console import InputError, check
from sparsity_utils.neurons.attention import Found, LinearCall, attentions, linear_calls
from sparsity_utils.neurons.find import FFN, check_not_bypassed, find_ffns, widened
from sparsity_utils.neurons.modes import forward_replaced
from sparsity_utils.neurons.trace import Inputs

VECTORS = {
    "q": "attention", "k": "attention", "v": "attention", "o": "o", "gate": "ffn", "up": "ffn", "down": "down"
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Basis:
    """Other coordinates z of a vector x: z = `into` x and x = `back` z, each (in, in)."""

    into: Tensor
    back: Tensor


@dataclass(frozen=True, eq=False)
class LinearMap:
    """One linear map of a block: `module(x)[..., outputs]` is `weight @ coordinates(x)`, plus the module's bias."""

    index: int  # position among the maps of the model: block by block, in the order of `VECTORS`
    layer: int  # of its block, from 0
    role: str  # a key of `VECTORS`
    block: str  # name of the module that computes all of the block
    name: str  # of `module`
    module: nn.Module
    outputs: Tensor  # which columns of what the module returns, (out,) int64
    transposed: bool  # whether the module keeps its weight as (in, out)
    basis: Basis | None = None  # in which its inputs are masked; None: as the model has them

    @property
    def vector(self) -> str:
        """Which of the four vectors of its block it reads."""
        return VECTORS[self.role]

    @property
    def weight(self) -> Tensor:
        """W, (out, in), without gradient, as it now is in the model; times `back` where there is a basis."""
        whole = _weight(self.module, self.transposed)
        weight = whole if len(self.outputs) == len(whole) else whole[self.outputs.to(whole.device)]
        return weight if self.basis is None else weight @ self.basis.back.to(weight)

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return _weight(self.module, self.transposed).shape[1]

    @property
    def size(self) -> int:
        """Number of weights."""
        return len(self.outputs) * self.inputs

    def coordinates(self, x: Tensor) -> Tensor:
        """The inputs that are masked, of the vector `x` that the module is given; both (..., in)."""
        return x if self.basis is None else x @ self.basis.into.to(x).mT

    def restored(self, z: Tensor) -> Tensor:
        """The vector that has the coordinates `z`; both (..., in)."""
        return z if self.basis is None else z @ self.basis.back.to(z).mT

    def column_norms(self, order: int = 2) -> Tensor:
        """||W[:, j]|| of each input, in float32 or wider, (in,). `order` 2: Euclidean; 1: sum of sizes."""
        return torch.linalg.vector_norm(widened(self.weight), ord=order, dim=0)


def _weight(module: Any, transposed: bool) -> Tensor:
    weight = module.weight.detach()
    return weight.mT if transposed else weight


class InputMask(Protocol):
    """What `sparse_inputs` asks: `Thresholds` of a rule on inputs, or anything like it."""

    @property
    def values(self) -> Sequence[float]:
        """One number for each map."""

    def active_inputs(self, linear: LinearMap, x: Tensor) -> Tensor:
        """True where an input of `linear` is kept, bool; `x`, its coordinates, and the result are (..., in)."""


_found: weakref.WeakKeyDictionary[nn.Module, tuple[list[FFN], list[LinearMap]]] = weakref.WeakKeyDictionary()


def find_linears(model: nn.Module, inputs: Inputs | None = None) -> list[LinearMap]:
    """The linear maps of `model`, a decoder, block by block.

    They are found by what they compute, not by their names: those of FFNs as `find_ffns` finds them, those of attention
    by which positions of their outputs reach which positions of the next map's input (`neurons.attention`). The
    embeddings and the output head are not among them. The result is kept until modules of the model are replaced.

    Args:
        inputs: as `find_ffns` takes them.

    Raises `InputError` for models that are no decoders, mixtures of experts, quantised weights, and blocks that are
    not made of these seven maps.
    """
    ffns = find_ffns(model, inputs)
    known = _found.get(model)
    if known is None or known[0] != ffns:
        known = _found[model] = (ffns, _linears(model, ffns, inputs))
    return list(known[1])


def _linears(model: nn.Module, ffns: list[FFN], inputs: Inputs | None) -> list[LinearMap]:
    kind = type(model).__name__
    config = getattr(model, "config", None)
    check(
        not getattr(config, "is_encoder_decoder", False),
        f"{kind} is an encoder-decoder; rules on the inputs of linear maps are for decoders.",
    )
    for ffn in ffns:
        what = "has routed experts" if ffn.experts > 1 else "does not compute its first linear map by a module"
        check(
            ffn.experts == 1 and ffn.gate is not None,
            f"{ffn.name} of {kind} {what}, and rules on the inputs of linear maps need dense FFNs made of modules.",
        )
    calls = linear_calls(model, inputs)
    found = attentions(model, calls, {module for ffn in ffns for module, _ in _ffn_maps(ffn).values()})
    check(
        len(found) == len(ffns),
        f"{kind} has {len(ffns)} FFNs and {len(found)} attention layers made of unquantised linear maps q, k, v and o; "
        f"rules on the inputs of linear maps are for decoders whose blocks have one of each.",
    )
    names = {module: name for name, module in model.named_modules()}
    result: list[LinearMap] = []
    for ffn, roles in zip(ffns, found, strict=True):
        maps = {**roles, **_ffn_maps(ffn)}
        block = _common([names[module] for module, _ in maps.values()])
        transposed = _checked_modules(maps, calls, names)
        for role in VECTORS:
            if role in maps:
                module, outputs = maps[role]
                place = (len(result), ffn.layer, role, block, names[module])
                result.append(LinearMap(*place, module, outputs, transposed[module]))
    return result


def _ffn_maps(ffn: FFN) -> dict[str, Found]:
    maps: dict[str, Found] = {"down": (ffn.holder, torch.arange(ffn.matrix.size[0]))}
    for role, part in (("gate", ffn.gate), ("up", ffn.up)):
        if part is not None:
            maps[role] = part.module, part.outputs.start + part.outputs.step * torch.arange(ffn.d_ff)
    return maps


def _common(names: list[str]) -> str:
    """The innermost module that holds all of the modules named."""
    split = [name.split(".") for name in names]
    shared = next((i for i, parts in enumerate(zip(*split, strict=False)) if len(set(parts)) > 1), 0)
    return ".".join(split[0][:shared])


def _checked_modules(
    maps: dict[str, Found], calls: list[LinearCall], names: dict[nn.Module, str]
) -> dict[nn.Module, bool]:
    """Whether each module of a block keeps its weight transposed.

    Raises `InputError` unless each runs once as a linear map, all of whose outputs are those of `maps`.
    """
    found = {}
    for module in dict.fromkeys(module for module, _ in maps.values()):
        ran = [call for call in calls if call.module is module]
        known = torch.cat([outputs for owner, outputs in maps.values() if owner is module]).sort().values
        check(
            len(ran) == 1 and torch.equal(known, torch.arange(ran[0].y.shape[-1])),
            f"{names[module]} is not run once as an unquantised linear map that computes some of q, k, v, o, gate, up "
            f"and down and nothing else; rules on the inputs of linear maps know no other kind.",
        )
        found[module] = ran[0].transposed
    return found


@contextmanager
def observe_inputs(
    model: nn.Module, callback: Callable[[list[LinearMap], Tensor], Any], maps: Sequence[LinearMap] | None = None
) -> Iterator[list[LinearMap]]:
    """Inside the block, every forward pass calls `callback(readers, x)` once per vector that linear maps read.

    `readers` are the maps that read `x`, (rows, in), which holds the model's own numbers in its own dtype, a row per
    token, in order: read it, never write it. Inside a `sparse_inputs` block, `x` is seen before the masks. What the
    callback returns is ignored. Yields the maps. The hooks are gone when the block ends, also by an exception.

    Args:
        maps: those to observe; None: all.
    """
    check_not_bypassed(model)
    chosen = find_linears(model) if maps is None else list(maps)
    with ExitStack() as stack:
        for readers in by_vector(chosen):

            def seen(module: nn.Module, args: tuple, readers: list[LinearMap] = readers) -> None:
                callback(readers, args[0].flatten(0, -2))

            stack.callback(readers[0].module.register_forward_pre_hook(seen).remove)
        yield chosen


def by_vector(maps: Sequence[LinearMap]) -> list[list[LinearMap]]:
    """The maps in lists that read one vector each."""
    groups: dict[tuple[int, str], list[LinearMap]] = {}
    for linear in maps:
        groups.setdefault((linear.layer, linear.vector), []).append(linear)
    return list(groups.values())


@contextmanager
def sparse_inputs(
    model: nn.Module, mask: InputMask, maps: Sequence[LinearMap] | None = None
) -> Iterator[list[LinearMap]]:
    """Inside the block, each linear map computes W (x * active), active being what `mask` says of the map and its x.

    Each map is judged on the inputs of this sparse run. The model keeps its modules and weights; a module that computes
    several maps runs once for each. Yields the maps. The model is as it was when the block ends, also by an exception.

    Args:
        maps: as `find_linears` finds them, perhaps with a basis; None: without.

    Raises `InputError` when `mask` was made for another number of maps, or for neurons.
    """
    check_not_bypassed(model)
    maps = find_linears(model) if maps is None else list(maps)
    if len(mask.values) != len(maps):
        raise InputError(
            f"The thresholds are for {len(mask.values)} linear maps and the model has {len(maps)}: use thresholds of a "
            f"rule on inputs, solved on a model of this shape."
        )

    def masked(linear: LinearMap, x: Tensor) -> Tensor:
        z = linear.coordinates(x)
        return linear.restored(z * mask.active_inputs(linear, z))

    by_module: dict[nn.Module, list[LinearMap]] = {}
    for linear in maps:
        by_module.setdefault(linear.module, []).append(linear)
    with ExitStack() as stack:
        for module, own in by_module.items():
            stack.enter_context(forward_replaced(module, _masked_forward(module.forward, own, masked)))
        yield maps


def _masked_forward(forward: Callable, maps: list[LinearMap], masked: Callable[[LinearMap, Tensor], Tensor]) -> Any:
    def compute(x: Tensor) -> Tensor:
        first = forward(masked(maps[0], x))
        if len(maps) == 1:
            return first
        y = first.clone()
        for linear in maps[1:]:
            outputs = linear.outputs.to(y.device)
            y[..., outputs] = forward(masked(linear, x))[..., outputs]
        return y

    return compute
