"""Find q, k, v and o of each causal attention layer by what they compute.

A decoder runs once on a tiny input, and the output of every linear map is cut off from what it was computed from. Then
the derivatives of a map's input z with respect to those outputs tell which of them z is made of, without another map
between, and at which positions. Where z mixes positions, its map is o. Attention gives z_t from q_t, k_s and v_s of
all s <= t. At the first position the softmax is over one number, so that z_0 = v_0, whatever q and k are. Of the
outputs that reach z,

    v  reaches z_0
    k  reaches z_t from position 0, not z_0
    q  reaches z_t from position t alone, not z_0
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsity_utils.console import InputError
from sparsity_utils.neurons.find import widened
from sparsity_utils.neurons.modes import eager_attention, evaluating
from sparsity_utils.neurons.trace import Inputs, tiny_inputs

ROUNDING = 0.02  # relative difference at which a module still counts as computing W x + b: bfloat16 rounds by 0.004
REACHES = 0.1  # of the largest derivative: above, z_0 depends on a column; below is rounding of the softmax

Found = tuple[nn.Module, Tensor]  # a module, and which columns of what it returns make a map, (out,) int64


@dataclass(frozen=True, eq=False)
class LinearCall:
    """A linear map that ran. Its output is a leaf of autograd's graph."""

    module: nn.Module
    transposed: bool
    given: Tensor  # its input as the model gave it
    x: Tensor  # the same, (texts, length, in)
    y: Tensor  # (..., out)


def attentions(model: nn.Module, calls: list[LinearCall], others: set[nn.Module]) -> list[dict[str, Found]]:
    """The maps q, k, v and o of each attention layer, first layer first.

    Args:
        calls: the linear maps that ran, by `linear_calls`.
        others: modules known to compute something else, such as FFNs.

    Raises `InputError` where what reaches an o is not q, k and v of one vector.
    """
    names = {module: name for name, module in model.named_modules()}
    found: list[dict[str, Found]] = []
    since: list[LinearCall] = []  # the last o
    with torch.enable_grad():  # a caller may have turned gradients off
        for call in calls:
            if call.module in others:
                continue
            parts = _mixed(call, since)
            since.append(call)
            if parts is not None:
                found.append(_roles(call, parts, names))
                since = []
    return found


def _check_unquantised(model: nn.Module) -> None:
    for name, module in model.named_modules():
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        narrow = (
            tensor for tensor in held if tensor.dim() == 2 and tensor.itemsize == 1 and tensor.dtype != torch.bool
        )
        if next(narrow, None) is not None:
            raise InputError(
                f"{name} keeps quantised weights; rules on the inputs of linear maps read columns of unquantised ones: "
                f"open the model with dtype=torch.float32 or bfloat16."
            )


def linear_calls(model: nn.Module, inputs: Inputs | None) -> list[LinearCall]:
    """The linear maps of one forward pass, in the order in which they run, each cut off from what it was computed from.

    inputs: as `neurons.find.find_ffns` takes them; the positions of each window are the second dimension.

    Raises `InputError` for quantised weights.
    """
    _check_unquantised(model)
    given = tiny_inputs(model) if inputs is None else inputs
    parts = given.values() if isinstance(given, Mapping) else [given]
    texts = next((len(part) for part in parts if isinstance(part, Tensor) and part.dim()), 1)
    calls: list[LinearCall] = []

    def cut(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        transposed = _is_transposed(module, args, output)
        x = None if transposed is None else _by_text(args[0], texts)
        if transposed is None or x is None:
            return None
        y = output.detach().requires_grad_()
        calls.append(LinearCall(module, transposed, args[0], x, y))
        return y.clone()  # the model may write into it

    devices = sorted({x.device.index for x in model.parameters() if x.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(eager_attention(model))  # flex attention has no derivatives on a CPU
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.enable_grad())
        for module in model.modules():
            if isinstance(getattr(module, "weight", None), Tensor):
                stack.callback(module.register_forward_hook(cut).remove)
        model(**given) if isinstance(given, Mapping) else model(given)
    return calls


def _is_transposed(module: Any, args: tuple, output: object) -> bool | None:
    """Whether the module returned x W + b (True) or W x + b (False); None where it is neither."""
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    if weight.dim() != 2 or len(args) != 1 or not isinstance(output, Tensor) or not isinstance(args[0], Tensor):
        return None
    x = args[0].detach()
    if not x.is_floating_point() or x.dim() < 2:
        return None
    for transposed in (False, True):
        matrix = weight.mT if transposed else weight
        if x.shape[-1] != matrix.shape[1] or output.shape != (*x.shape[:-1], matrix.shape[0]):
            continue
        y = functional.linear(widened(x), widened(matrix), None if bias is None else widened(bias.detach()))
        if bool((y - output.detach()).norm() <= ROUNDING * y.norm()):
            return transposed
    return None


def _by_text(x: Tensor, texts: int) -> Tensor | None:
    """`x` by text and position, also where a model has flattened both; None where its rows are no such."""
    if x.dim() == 3:
        return x
    return x.unflatten(0, (texts, -1)) if len(x) % texts == 0 else None


def _mixed(call: LinearCall, calls: list[LinearCall]) -> list[tuple[LinearCall, Tensor, Tensor, Tensor]] | None:
    """What reaches the input of `call`, if that mixes positions; else None.

    Each part is a call, and for its columns (out,) how strongly they reach z_0, z_1... from position 0, and z_1... from
    later positions.
    """
    if not call.x.requires_grad or not calls:
        return None
    generator = torch.Generator().manual_seed(0)
    direction = 1 + torch.rand(call.x.shape[-1], generator=generator)  # of one sign, so that no head cancels another
    z = (call.x * direction.to(call.x)).sum((0, 2))  # (length,)
    later = _gradients(z[1:].sum(), calls)
    if not any(grad is not None and bool(grad[:, 0].any()) for grad in later):
        return None
    first = _gradients(z[0], calls)
    parts = []
    for other, at_first, at_later in zip(calls, first, later, strict=True):
        if at_later is None:
            continue
        own = torch.zeros_like(at_later) if at_first is None else at_first
        columns = [grad.abs().amax(0) for grad in (own, at_later)]  # (length, out)
        parts.append((other, columns[0].amax(0), columns[1][0], columns[1][1:].amax(0)))
    return parts


def _gradients(z: Tensor, calls: list[LinearCall]) -> list[Tensor | None]:
    """The derivatives of `z` with respect to the outputs of each call, by text and position; None where it has none."""
    found = torch.autograd.grad(z, [call.y for call in calls], retain_graph=True, allow_unused=True)
    return [
        None if grad is None else grad.reshape(*call.x.shape[:-1], -1) for call, grad in zip(calls, found, strict=True)
    ]


def _roles(
    o: LinearCall, parts: list[tuple[LinearCall, Tensor, Tensor, Tensor]], names: Mapping[nn.Module, str]
) -> dict:
    most = max(float(part[1].max()) for part in parts)
    roles = {"o": (o.module, torch.arange(o.y.shape[-1]))}
    used = []
    for call, to_first, from_first, from_later in parts:
        is_v = (to_first > REACHES * most) & (from_first > 0)
        is_k = ~is_v & (from_first > 0)
        is_q = ~is_v & ~is_k & (from_later > 0) & (to_first <= REACHES * most)
        for role, columns in (("q", is_q), ("k", is_k), ("v", is_v)):
            if bool(columns.any()):
                _check(role not in roles, o, names)
                roles[role] = call.module, columns.nonzero().flatten().cpu()
                used.append(call)
        _check(bool((is_q | is_k | is_v).all()), o, names)
    _check(roles.keys() == {"q", "k", "v", "o"}, o, names)
    _check(len(roles["k"][1]) == len(roles["v"][1]), o, names)
    _check(all(call.given is used[0].given for call in used), o, names)
    return roles


def _check(condition: bool, o: LinearCall, names: Mapping[nn.Module, str]) -> None:
    if not condition:
        raise InputError(
            f"What {names[o.module]} is given is not causal attention over q, k and v, each computed by an unquantised "
            f"linear map of one vector; rules on the inputs of linear maps know no other kind of block."
        )
