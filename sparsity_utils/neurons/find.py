"""Find the FFNs of a model: where each lies, which layer it belongs to, and which activation function it computes.

Names follow arXiv 2411.02335, section 3: a gated FFN computes `s = act(W_gate x)`, `h = s * (W_in x)` and
`W_out h`; a plain one `h = s = act(W_in x)` and `W_out h`. Neuron i gives `W_out[:, i] * h_i`. Routed experts of a
mixture share a layer.

s is what the model multiplies by the other map of x, after thresholds or masks of its own; h is what the down
projection is given. Of two activated maps (dReLU, `act(W_gate x) * act(W_in x)`) s is the first factor.

A layer is one step of the computation: FFNs that share their weights are layers of their own, and so is each call of a
module that the model runs several times.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from sparsity_utils.console import InputError, check
from sparsity_utils.neurons.complete import check_followed, check_in_place, check_none_left_out
from sparsity_utils.neurons.trace import FirstMap, Inputs, Use, trace
from sparsity_utils.neurons.vectors import Frames, Matrix, common

CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map of x that a module computes: `module(x)[..., outputs]` is `weight @ x + bias`.

    Constants that the model multiplies by or adds on the way, other than that bias, are not looked for.
    """

    module: nn.Module  # the innermost one that runs the map; its first argument is x; may be the same of gate and up
    outputs: slice  # which columns of what it returns are of this map
    holder: nn.Module  # the module that has the parameter with W
    parameter_name: str  # its name there
    matrix: Matrix  # which part of it W is

    @property
    def weight(self) -> Tensor:
        """W, (d_ff, d): a view, so that it follows the model."""
        return self.matrix.of(getattr(self.holder, self.parameter_name))

    @property
    def bias(self) -> Tensor | None:
        """What the module adds to W x, (d_ff,): a view; None where it has no parameter `bias` of its outputs' size."""
        return _bias(self.module, self.outputs, self.matrix.size[0])


@dataclass(frozen=True, eq=False)
class FFN:
    """One FFN, or one routed expert: all that measuring and masking need to know of it."""

    layer: int  # position among the model's FFN layers, from 0; the routed experts of one layer share it
    name: str  # name inside the model of the module that computes it, or that holds all experts of its layer
    holder: nn.Module  # the module that has the parameter with W_out
    parameter_name: str  # its name there
    matrix: Matrix  # which part of it W_out is
    activation: nn.Module | None = None  # its output is s  (batch, length, d_ff)
    down: nn.Module | None = None  # its first argument is h  (batch, length, d_ff)
    gate: Projection | None = None  # what s is computed from; None of routed experts and without modules of their own
    up: Projection | None = None  # what s is multiplied by; None of a plain FFN, and where gate is None
    owner: str = ""  # where activation or down is missing: name of a module that computes all of the FFN
    expert: int = 0  # which of the routed experts of its layer
    experts: int = 1  # how many routed experts share its layer and its threshold; 1 in a dense model
    in_encoder: bool = False  # whether it belongs to the encoder of an encoder-decoder
    call: int = 0  # which of the calls of its modules in one run of the model, where they serve several layers
    calls: int = 1  # how many layers they serve
    scope: str = ""  # where calls > 1: name of the innermost module whose one call makes all of them

    @property
    def parameter(self) -> Tensor:
        """The parameter that W_out lies in."""
        return getattr(self.holder, self.parameter_name)

    @property
    def down_weight(self) -> Tensor:
        """W_out, without its bias, (d, d_ff): a view, so that it follows the model."""
        return self.matrix.of(self.parameter)

    @property
    def down_bias(self) -> Tensor | None:
        """What the module `down` adds to W_out h, (d,), as `Projection.bias`; None also where `down` is None."""
        return _bias(self.down, slice(None), self.matrix.size[0])

    @property
    def d_ff(self) -> int:
        """Number of neurons."""
        return self.matrix.size[1]

    def column_norms(self) -> Tensor:
        """||W_out[:, i]||_2 of each neuron, in float32 or wider, (d_ff,)."""
        return torch.linalg.vector_norm(widened(self.down_weight), dim=0)


def _bias(module: nn.Module | None, outputs: slice, size: int) -> Tensor | None:
    bias = getattr(module, "bias", None)
    chosen = bias.detach()[outputs] if isinstance(bias, Tensor) and bias.dim() == 1 else None
    return chosen if chosen is not None and len(chosen) == size else None


bypassed: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the last modules of FFNs that run on sparse kernels just now


def check_not_bypassed(model: nn.Module) -> None:
    """Raises `InputError` for a model whose FFNs, or some of them, are in a `sparse_kernels` block of any model.

    Modules of these FFNs are given zeros there.
    """
    if isinstance(model, nn.Module) and any(module in bypassed for module in model.modules()):
        raise InputError(
            f"The FFNs of this {type(model).__name__} run on sparse kernels; leave that block before they are "
            f"observed, masked or replaced."
        )


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when already float64: the precision of norms and errors."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_count(ffns: list[FFN]) -> int:
    """Number of layers that the FFNs of a model form; the routed experts of one layer count once."""
    return ffns[-1].layer + 1


@dataclass(frozen=True)
class _Found:
    """The FFNs that were found in a model; they hold as long as it consists of the same modules and parameters."""

    parts: list[tuple]
    ffns: list[FFN]


def _parts(model: nn.Module) -> list[tuple]:
    """What a model consists of: equal for two moments between which no module or parameter was replaced or reshaped.

    Flags of modules count too, since they switch adapters off and on; the one for training does not.
    """
    parts = []
    for module in model.modules():
        flags = tuple(name for name, value in vars(module).items() if value is True and name != "training")
        shapes = [(name, WeakIdRef(p), p.shape, p.stride()) for name, p in module._parameters.items() if p is not None]
        parts.append((weakref.ref(module), flags, *shapes))
    return parts


_found: weakref.WeakKeyDictionary[nn.Module, _Found] = weakref.WeakKeyDictionary()


def find_ffns(model: nn.Module, inputs: Inputs | None = None) -> list[FFN]:
    """The FFNs of `model` in the order in which they run; routed experts of one layer side by side.

    They are found by what the model computes, not by the names or shapes of its modules: it runs once, on a tiny input,
    while `flow.Flow` follows its vectors. What that run does not reach (a vision tower, given text) is not found. The
    result is kept until modules or parameters of the model are replaced.

    Args:
        inputs: keyword arguments of the model, or its one positional argument; None: made up from its config. Needed
            once, for models that are not of `transformers` or that take neither token ids nor images.

    Raises `InputError` naming the modules looked at when there is none, when the model does not run, and where not all
    FFNs can be measured: weights that are elsewhere or are no parameters, and neurons that more than the down
    projection reads.
    """
    check(isinstance(model, nn.Module), f"The model is of type {type(model).__name__}: give a torch module.")
    known, parts = _found.get(model), _parts(model)
    if known is None or known.parts != parts:
        check_not_bypassed(model)
        check_in_place(model)
        uses, strays = trace(model, inputs)
        check_followed(model, uses, strays)
        ffns = _ffns(model, uses)
        if not ffns:
            raise InputError(_nothing_found(model))
        check_none_left_out(model, ffns)
        known = _found[model] = _Found(parts, ffns)
    return list(known.ffns)


def _nothing_found(model: nn.Module) -> str:
    looked_at: dict[str, str] = {}  # class -> name of one such module
    for name, module in model.named_modules():
        if not name or any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.children()):
            looked_at.setdefault(type(module).__name__, name or "the model itself")
    seen = ", ".join(f"{kind} ({name})" for kind, name in looked_at.items())
    return (
        f"No FFN was found in {type(model).__name__}: in none of {seen} is an element-wise nonlinear function of "
        f"a linear map of x, alone or times another linear map of x, mapped back to the size of x by an unquantised "
        f"weight of the model; only such FFNs are supported."
    )


# FFNs from the down projections that ran.


@dataclass(frozen=True)
class _Container:
    """The innermost list (or dict) of modules of which one entry computes the whole FFN."""

    name: str
    child: str
    rest: str  # name of the parameter inside that entry


def _ffns(model: nn.Module, uses: list[Use]) -> list[FFN]:
    first: dict[tuple, Use] = {}
    for use in uses:
        first.setdefault((use.matrix.parameter, use.matrix.offset, use.x), use)
    layers: dict[tuple, list[Use]] = {}
    for use in first.values():
        container = _container(model, use)
        if _fused_experts(model, use.matrix) > 1 or container is None:
            key: tuple = (use.matrix.parameter, use.x)
        else:
            key = (container.name, use.x)  # layers of a decoder, unlike experts, are applied to different vectors
        layers.setdefault(key, []).append(use)
    ran = {use.matrix.parameter for use in first.values()}
    encoder = set(model.get_encoder().modules()) if _is_encoder_decoder(model) else set()  # type: ignore[operator]
    ffns: list[FFN] = []
    for layer, members in enumerate(layers.values()):
        ffns += _layer(model, layer, members, _in_pieces(uses, members[0]), ran, encoder)
    return _with_calls(ffns, list(layers.values()))


def _in_pieces(uses: list[Use], of: Use) -> Frames:
    """The modules that are running during all uses of one matrix on the same x, of which it may see a piece each time.

    A call, not a module, is what runs all of them.
    """
    calls = [use for use in uses if use.matrix == of.matrix and use.x == of.x]
    return of.frames[: len(common(*(use.calls for use in calls)))]


def _with_calls(ffns: list[FFN], layers: list[list[Use]]) -> list[FFN]:
    """The FFNs, told apart where the same modules serve several layers. Raises `InputError` where they are experts."""

    def served(ffn: FFN) -> tuple:
        return ffn.down or ffn.owner, ffn.parameter, ffn.matrix.offset

    by_modules: dict[tuple, list[FFN]] = {}
    for ffn in ffns:
        by_modules.setdefault(served(ffn), []).append(ffn)
    result = []
    for ffn in ffns:
        same = by_modules[served(ffn)]
        if len(same) == 1:
            result.append(ffn)
            continue
        check(
            ffn.experts == 1,
            f"The routed experts {ffn.name} serve several layers, which cannot be told apart: unshare them first.",
        )
        runs = [layers[other.layer][0] for other in same]
        scope = runs[0].frames[: len(common(*(run.calls for run in runs)))][-1]
        result.append(replace(ffn, call=same.index(ffn), calls=len(same), scope=scope))
    return result


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _layer(
    model: nn.Module, layer: int, members: list[Use], frames: Frames, ran: set[str], encoder: set[nn.Module]
) -> list[FFN]:
    """The FFNs of one layer, given its down projections that ran: some experts may not have run."""
    use = members[0]
    name = frames[-1]
    activation, down = use.activation, use.down
    matrices = [use.matrix]
    container = _container(model, use)
    fused = _fused_experts(model, use.matrix)
    if fused > 1:
        matrices = _slices(use.matrix, fused)
    elif container is not None and (len(members) > 1 or use.gathered is not None):
        matrices = _siblings(model, container, use.matrix, {other.matrix.parameter for other in members}, ran)
        if len(matrices) > 1:
            name, frames = container.name, _outside(frames, container.name)
    routed = len(matrices) > 1 or use.gathered is not None
    if routed or activation is None or down is None:
        activation = down = None
    gate, up = (None, None) if routed else (_projection(model, use.gate), _projection(model, use.up))
    owner = common(frames, *(other.gathered for other in members if other.gathered is not None))[-1]
    result = []
    for expert, matrix in enumerate(matrices):
        holder, parameter_name = _place(model, matrix)
        result.append(
            FFN(
                layer=layer,
                name=name,
                holder=holder,
                parameter_name=parameter_name,
                matrix=matrix,
                activation=None if activation is None else model.get_submodule(activation),
                down=None if down is None else model.get_submodule(down),
                gate=gate,
                up=up,
                owner=owner,
                expert=expert,
                experts=len(matrices),
                in_encoder=holder in encoder,
            )
        )
    return result


def _place(model: nn.Module, matrix: Matrix) -> tuple[nn.Module, str]:
    """The module that has the parameter of a matrix, and the parameter's name there."""
    path, _, name = matrix.parameter.rpartition(".")
    return model.get_submodule(path), name


def _projection(model: nn.Module, first: FirstMap | None) -> Projection | None:
    if first is None:
        return None
    return Projection(model.get_submodule(first.module), first.outputs, *_place(model, first.matrix), first.matrix)


def _fused_experts(model: nn.Module, matrix: Matrix) -> int:
    """How many matrices like this one make up its parameter; 1 where that is no stack of matrices."""
    whole = getattr(*_place(model, matrix)).numel()
    d, d_ff = matrix.size
    solid = matrix.stride in ((d_ff, 1), (1, d))
    return whole // (d * d_ff) if solid and whole % (d * d_ff) == 0 and matrix.offset % (d * d_ff) == 0 else 1


def _slices(matrix: Matrix, count: int) -> list[Matrix]:
    size = matrix.size[0] * matrix.size[1]
    return [Matrix(matrix.parameter, entry * size, matrix.size, matrix.stride) for entry in range(count)]


def _container(model: nn.Module, use: Use) -> _Container | None:
    parts = use.matrix.parameter.split(".")
    for end in range(len(parts) - 2, 0, -1):
        name, child = ".".join(parts[:end]), parts[end]
        holds_all = f"{use.frames[-1]}.".startswith(f"{name}.{child}.")
        if holds_all and isinstance(model.get_submodule(name), CONTAINERS):
            return _Container(name, child, ".".join(parts[end + 1 :]))
    return None


def _siblings(
    model: nn.Module, container: _Container, matrix: Matrix, members: set[str], ran: set[str]
) -> list[Matrix]:
    """W_out of the experts in the container: those that ran on the same vectors, and those alike that did not run."""
    entries = model.get_submodule(container.name)
    parameters = dict(entries.named_parameters())
    kind, shape = type(getattr(entries, container.child, None)), parameters[f"{container.child}.{container.rest}"].shape
    matrices = []
    for child, module in entries.named_children():
        inside = f"{child}.{container.rest}"
        name = f"{container.name}.{inside}"
        alike = type(module) is kind and inside in parameters and parameters[inside].shape == shape
        if alike and (name in members or name not in ran):
            matrices.append(Matrix(name, matrix.offset, matrix.size, matrix.stride))
    return matrices


def _outside(frames: Frames, container: str) -> Frames:
    return tuple(name for name in frames if not name.startswith(f"{container}."))


def owners(ffns: Iterable[FFN]) -> dict[str, list[FFN]]:
    """The FFNs without a module for their activation function or their down projection, by the name of their owner."""
    found: dict[str, list[FFN]] = {}
    for ffn in ffns:
        if ffn.activation is None or ffn.down is None:
            found.setdefault(ffn.owner, []).append(ffn)
    return found
