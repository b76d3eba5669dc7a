"""Observe or skip the neurons of a model's FFNs inside a `with` block, and leave the model as it was.

Where an FFN's activation function and down projection are modules, two hooks see s and h. Where they are not (routed
experts, fused expert tensors, functions), the module that computes it runs under a `flow.Flow`, which follows its
vectors to the same two places.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsity_utils.console import InputError
from sparsity_utils.neurons.find import FFN, check_not_bypassed, find_ffns, layer_count, owners
from sparsity_utils.neurons.flow import Down, Flow
from sparsity_utils.neurons.modes import forward_replaced, unchunked
from sparsity_utils.neurons.thresholds import Thresholds

Visit = Callable[[FFN, Tensor, Tensor, Tensor], Tensor | None]


class NeuronMask(Protocol):
    """What `sparse_neurons` asks: `Thresholds` of a rule on neurons, or anything like it."""

    @property
    def values(self) -> Sequence[Any]:
        """What decides in each layer, first layer first."""

    def active(self, ffn: FFN, s: Tensor, h: Tensor) -> Tensor:
        """True where a neuron of `ffn` is active, bool; `s`, `h` and the result are (rows, d_ff)."""


@contextmanager
def observe_neurons(model: nn.Module, callback: Callable[[FFN, Tensor, Tensor, Tensor], Any]) -> Iterator[list[FFN]]:
    """Inside the block, every forward pass calls `callback(ffn, s, h, tokens)` once per FFN, first layer first.

    `s` and `h`, (rows, d_ff), are the model's own numbers in its own dtype: read them, never write them. `tokens`,
    (rows,) int64, tells which token each row belongs to: its position in the batch, flattened (batch * length,). A
    dense FFN sees every token once and in order, unless the model runs it on pieces of the batch: then it calls back
    once per piece. A routed expert sees those sent to it, if there are any; rows that it is fed times a routing weight
    of zero are not.
    What the callback returns is ignored, so that no output bit changes. Inside a `sparse_neurons` block, `h` is seen
    after the mask. Yields the FFNs. The hooks are gone when the block ends, also by an exception.

    Raises `InputError` when no FFN is found, and when one without modules of its own runs in another way than when it
    was found (so that nothing is passed over): run the model in evaluation mode.
    """

    def seen(ffn: FFN, s: Tensor, h: Tensor, tokens: Tensor) -> None:
        callback(ffn, s, h, tokens)

    with _visited(model, find_ffns(model), seen) as ffns:
        yield ffns


@contextmanager
def sparse_neurons(model: nn.Module, thresholds: NeuronMask) -> Iterator[list[FFN]]:
    """Inside the block, the model runs with the neurons that `thresholds` calls inactive set to zero.

    Each FFN is judged on the activations of this sparse run, which earlier masked layers have already altered.
    Yields the FFNs. The hooks are gone when the block ends, also by an exception.

    Raises `InputError` when `thresholds` was made for another number of layers, and when a model with routed experts
    is run with gradients, which do not flow through its masks.
    """

    def masked(ffn: FFN, s: Tensor, h: Tensor, tokens: Tensor) -> Tensor:
        return h * thresholds.active(ffn, s, h)  # torch.where, which branches on every number, takes 6 times as long

    ffns = find_ffns(model)
    check_layers(thresholds, ffns)
    with _visited(model, ffns, masked):
        yield ffns


def check_layers(thresholds: NeuronMask, ffns: list[FFN]) -> None:
    """Raises `InputError` when `thresholds` are of a rule on inputs, or for another number of layers than `ffns`."""
    if isinstance(thresholds, Thresholds):
        thresholds.check_on_neurons()
    layers = layer_count(ffns)
    if len(thresholds.values) != layers:
        raise InputError(
            f"The thresholds are for {len(thresholds.values)} layers and the model has {layers}: "
            f"use thresholds solved on a model of this shape."
        )


@contextmanager
def _visited(model: nn.Module, ffns: list[FFN], visit: Visit) -> Iterator[list[FFN]]:
    """Call `visit(ffn, s, h, tokens)` just before each down projection; a tensor it returns takes the place of `h`."""
    check_not_bypassed(model)
    with unchunked(model), ExitStack() as stack:
        pending: dict[nn.Module, Tensor] = {}  # activation -> s, until its down projection
        turns = _Turns(stack, model, ffns)
        hooked: dict[nn.Module, list[FFN]] = {}  # down -> the layers that it serves
        for ffn in ffns:
            if ffn.activation is not None and ffn.down is not None:
                hooked.setdefault(ffn.down, []).append(ffn)
        for served in hooked.values():
            _hook(stack, served, visit, pending, turns)
        for owner, owned in owners(ffns).items():
            _follow(stack, model.get_submodule(owner), owned, visit, turns)
        yield ffns


class _Turns:
    """Which of the layers that the same modules serve runs next. They run in order, in one call of `FFN.scope`."""

    def __init__(self, stack: ExitStack, model: nn.Module, ffns: list[FFN]) -> None:
        self.counts: dict[tuple, int] = {}
        self.last: dict[tuple, Any] = {}  # the x of the last layer, where a layer may come in pieces
        for scope in {ffn.scope for ffn in ffns if ffn.calls > 1}:
            module = model.get_submodule(scope)
            served = {self._key(ffn): ffn for ffn in ffns if ffn.calls > 1 and ffn.scope == scope}
            stack.callback(module.register_forward_pre_hook(partial(self._begin, served)).remove)
            stack.callback(module.register_forward_hook(partial(self._end, served)).remove)

    def next_of(self, served: list[FFN], x: Any = None) -> FFN:
        """The layer that runs now; the same as before when `x` is not None and the same as before."""
        if len(served) == 1:
            return served[0]
        key = self._key(served[0])
        if x is None or self.last.get(key) != x:
            self.counts[key] = self.counts.get(key, 0) + 1
            self.last[key] = x
        if self.counts[key] > len(served):
            raise InputError(self._sentence(served[0]))
        return served[self.counts[key] - 1]

    @staticmethod
    def _key(ffn: FFN) -> tuple:
        return ffn.down or ffn.owner, id(ffn.parameter), ffn.matrix.offset

    @staticmethod
    def _sentence(ffn: FFN) -> str:
        return (
            f"{ffn.name} serves {ffn.calls} layers of the model and ran another number of times: "
            f"run the whole model, with unchanged settings."
        )

    def _begin(self, served: dict[tuple, FFN], module: nn.Module, args: tuple) -> None:
        for key in served:
            self.counts[key] = 0
            self.last.pop(key, None)

    def _end(self, served: dict[tuple, FFN], module: nn.Module, args: tuple, output: Any) -> None:
        for key, ffn in served.items():
            if self.counts[key] != ffn.calls:
                raise InputError(self._sentence(ffn))


def _hook(stack: ExitStack, served: list[FFN], visit: Visit, pending: dict[nn.Module, Tensor], turns: _Turns) -> None:
    """See s and h of the layers that one down projection serves, in the order in which they run."""

    def keep_s(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        pending[module] = output

    def visit_h(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        ffn = turns.next_of(served)
        s, h = pending.pop(ffn.activation).flatten(0, -2), args[0].flatten(0, -2)
        with Flow.paused():
            replacement = visit(ffn, s, h, torch.arange(len(h), device=h.device))
        return None if replacement is None else (replacement.view_as(args[0]), *args[1:])

    for activation in {ffn.activation for ffn in served}:
        stack.callback(activation.register_forward_hook(keep_s).remove)
    stack.callback(served[0].down.register_forward_pre_hook(visit_h).remove)


def _follow(stack: ExitStack, owner: nn.Module, ffns: list[FFN], visit: Visit, turns: _Turns) -> None:
    """Inside the stack, `owner` runs under a `Flow` that calls `visit` for each of `ffns`."""
    names = {id(parameter): name for name, parameter in [*owner.named_parameters(), *owner.named_buffers()]}
    by_place: dict[tuple[str, int], list[FFN]] = {}
    for ffn in ffns:
        by_place.setdefault((names[id(ffn.parameter)], ffn.matrix.offset), []).append(ffn)
    forward = owner.forward
    seen: set[int] = set()  # layers

    def visited(down: Down) -> Tensor | None:
        new = None
        for matrix, rows in down.blocks:
            served = by_place.get((matrix.parameter, matrix.offset))
            if served is None:
                continue
            ffn = turns.next_of(served, down.vectors.image.xs)
            seen.add(ffn.layer)
            rows, tokens = _routed(ffn, down, rows)
            if len(tokens) == 0:
                continue
            replacement = visit(ffn, down.s[rows], down.h[rows], tokens)
            if replacement is not None:
                if torch.is_grad_enabled() and ffn.parameter.requires_grad:
                    raise InputError(
                        f"No gradient flows through the masks of {ffn.name}: run sparse_neurons under torch.no_grad()."
                    )
                new = down.h.clone() if new is None else new
                new[rows] = replacement
        return new

    def followed(*args: Any, **kwargs: Any) -> Any:
        seen.clear()
        with Flow(owner, visited):
            output = forward(*args, **kwargs)
        unseen = sorted({ffn.name for ffn in ffns if ffn.calls == 1 and ffn.layer not in seen})
        if unseen:
            raise InputError(
                f"{unseen[0]} ran in another way than when it was found, and its neurons were not seen: "
                f"run the model in evaluation mode, with unchanged settings."
            )
        return output

    stack.enter_context(forward_replaced(owner, followed))


def _routed(ffn: FFN, down: Down, rows: Any) -> tuple[Any, Tensor]:
    """The rows, and their tokens, that count: of a routed expert not those that are zero as it was fed times zero."""
    tokens = down.tokens[rows]
    dropped = tokens < 0
    tokens = torch.where(dropped, -1 - tokens, tokens)
    if ffn.experts == 1 or not bool(dropped.any()):
        return rows, tokens
    kept = ~dropped | down.h[rows].any(-1)  # a bias makes neurons act on zeros
    return torch.arange(len(down.h), device=tokens.device)[rows][kept], tokens[kept]
