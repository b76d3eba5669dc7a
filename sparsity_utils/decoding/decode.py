"""Put a sparse kernel in the place of a model's FFNs inside a `with` block, so that decoding skips inactive neurons.

The modules that compute W_gate x, W_up x and W_down h are bypassed: the first computes all of the FFN with
`kernels.SparseFFN`, the last returns it, and what lies between runs on zeros. No module is replaced, so that this works
for every model whose FFNs `find_ffns` finds as modules of their own.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels import MAX_TOKENS, SparseFFN
from kernels.head import CertifiedHead
from kernels.layer import DecoderLayer
from kernels.linear import SparseLinear
from sparsity_utils.console import InputError, check
from sparsity_utils.decoding.head_kernels import run_head
from sparsity_utils.decoding.input_kernels import (
    Stored,
    check_not_trained,
    checked_maps,
    ffn_kernel,
    linear_kernel,
    replace_maps,
    whole_kernel,
)
from sparsity_utils.decoding.layer_kernels import WholeLayer, run_whole, whole_layers, with_kernels
from sparsity_utils.neurons.activations import activation_name
from sparsity_utils.neurons.find import (
    FFN,
    Projection,
    bypassed,
    check_not_bypassed,
    find_ffns,
    widened,
)
from sparsity_utils.neurons.hooks import check_layers
from sparsity_utils.neurons.input_rules import INPUT_RULES
from sparsity_utils.neurons.linears import LinearMap, by_vector
from sparsity_utils.neurons.modes import evaluating, forward_replaced, unchanged
from sparsity_utils.neurons.rules import RULES
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.neurons.trace import Inputs, tiny_inputs

ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative RMS error of one FFN's output
Kernel = Callable[[Tensor], Tensor]
THROUGH_LAYERS = 10  # times as much is allowed in the model's output


@contextmanager
def sparse_kernels(
    model: nn.Module,
    thresholds: Thresholds | None,
    *,
    certified: bool = False,
    eight_bits: bool = False,
    likeliest: int | None = None,
    inputs: Inputs | None = None,
) -> Iterator[list[Kernel]]:
    """Inside the block, `model` reads only the weights that `thresholds` calls for: of FFNs, or of all linear maps.

    `model.generate` then gives what it gives under `sparse_neurons`, or under `sparse_inputs` for a rule on inputs,
    with the same thresholds, up to the rounding of sums in another order and, in half precision, of the numbers that
    are compared with a threshold. Calls of more than 16 tokens, such as prompts, run densely under the same mask. The
    weights that the kernels keep in another order are copied for the block; change no weights inside it, and no numbers
    that modules hold, such as an epsilon.

    Before the block begins, kernels that skip nothing are compared with the model's own FFNs on a tiny input. On a CPU
    in float32 a decoder layer of the usual form is one call for a single token (`decoding.layer_kernels`).

    Args:
        thresholds: of a rule with a `limit`, "relu", "fat" or "cett", or of a rule on inputs; None: FFNs skip nothing.
        certified: also keep an 8-bit copy of each gate that proves neurons inactive (`kernels.certified`; CPU).
        eight_bits: keep the weights of linear maps as 8-bit integers, so that their outputs are rounded; for rules on
            inputs.
        likeliest: the output head computes that many of the likeliest words exactly, and reads an 8-bit copy to tell
            which (`kernels.head`; CPU). Other logits are minus infinity. 1 for plain greedy decoding, k for sampling
            with top_k up to k; not for beams, nor with processors that may put the likeliest word behind another
            (min_new_tokens, repetition_penalty, no_repeat_ngram_size, bad_words_ids), which `generate` then refuses.
        inputs: as `find_ffns` takes them, for models that need it.

    Yields the kernels: one per FFN, first layer first, then those of attention and of the head, if any. When the block
    ends, also by an exception, the model is as it was.

    Raises `InputError` when a FFN has routed experts, is computed without modules of its own, has another activation
    function than `kernels.naive.ACTIVATIONS`, or when the model makes more of its parts than the kernel; when
    `thresholds` are for another number of layers or of a rule without a limit, such as "top-k"; when `certified`,
    `eight_bits` or `likeliest` is asked for where it cannot work; and inside the block when the model is in training
    mode or should give gradients, and when `generate` asks for more than the `likeliest` words.
    """
    kernels = ready_kernels(model, thresholds, Stored(), inputs, certified, eight_bits, likeliest)
    with running(model, kernels):
        yield kernels.all()


@dataclass(frozen=True, eq=False)
class ReadyKernels:
    """Kernels of one model, made and checked, which `running` puts to use."""

    ffns: list[FFN]
    of_ffns: Sequence[Kernel]  # one each
    attention: list[tuple[list[LinearMap], SparseLinear]]  # maps of one vector and their kernel; none: the model's own
    head: CertifiedHead | None
    layers: list[tuple[WholeLayer, DecoderLayer]]  # run as one call each for single tokens; all or none

    def all(self) -> list[Kernel]:
        """One per FFN, then those of attention and of the head."""
        others = [kernel for _, kernel in self.attention] + ([] if self.head is None else [self.head])
        return [*self.of_ffns, *others]


def ready_kernels(
    model: nn.Module,
    thresholds: Thresholds | None,
    stored: Stored,
    inputs: Inputs | None = None,
    certified: bool = False,
    eight_bits: bool = False,
    likeliest: int | None = None,
) -> ReadyKernels:
    """The kernels of a `sparse_kernels` block; raises what it raises.

    stored: shared by the kernels of several blocks of one model, so that its weights are checked and copied once.
    """
    check_not_bypassed(model)
    ffns = replaceable_ffns(model, inputs)
    on_inputs = thresholds is not None and thresholds.rule in INPUT_RULES
    check(on_inputs or not eight_bits, "eight_bits is for thresholds of a rule on the inputs of linear maps.")
    stored.once("checked", lambda: _check_outputs(model, ffns, inputs))
    head = None if likeliest is None else stored.once(("head", likeliest), lambda: head_kernel(model, likeliest))
    layers = stored.once("layers", lambda: whole_layers(model, ffns, kernel_of, inputs))
    if not on_inputs:
        if thresholds is not None:
            check_layers(thresholds, ffns)
        neurons = [kernel_of(ffn, thresholds, certified, stored) for ffn in ffns]
        own = [whole_kernel(readers, stored) for layer in layers for readers in layer.attention]
        return ReadyKernels(ffns, neurons, [], head, with_kernels(layers, own, neurons))
    check(not certified, "certified is for thresholds of a rule on neurons.")
    maps = checked_maps(model, thresholds)

    def kernel(own: Sequence[LinearMap]) -> SparseLinear:
        return linear_kernel(own, thresholds, eight_bits, stored)

    blocks = [[linear for linear in maps if linear.layer == ffn.layer] for ffn in ffns]
    of_ffns = [ffn_kernel(ffn, block, kernel) for ffn, block in zip(ffns, blocks, strict=True)]
    attention = by_vector([linear for linear in maps if linear.vector in ("attention", "o")])
    of_attention = [kernel(readers) for readers in attention]
    replaced = list(zip(attention, of_attention, strict=True))
    return ReadyKernels(ffns, of_ffns, replaced, head, with_kernels(layers, of_attention, of_ffns))


@contextmanager
def running(model: nn.Module, kernels: ReadyKernels) -> Iterator[None]:
    """Inside the block `model` computes with `kernels`, made for it. Raises `InputError` in a block of others."""
    check_not_bypassed(model)
    with ExitStack() as stack:
        stack.enter_context(_bypass(kernels.ffns, kernels.of_ffns))
        for readers, kernel in kernels.attention:
            replace_maps(stack, readers, kernel)
        for layer, whole in kernels.layers:
            stack.enter_context(run_whole(layer, whole))
        if kernels.head is not None:
            stack.enter_context(run_head(model, head_module(model), kernels.head))
        yield


def head_module(model: Any) -> nn.Linear:
    """The output head of `model`. Raises `InputError` where it has none that is one linear map."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    check(isinstance(head, nn.Linear), f"{type(model).__name__} has no output head that is one linear map.")
    return head


def head_kernel(model: nn.Module, likeliest: int) -> CertifiedHead:
    """The kernel of the model's output head. Raises `InputError` where there is none."""
    head, config = head_module(model), getattr(model, "config", None)
    capped = getattr(config and config.get_text_config(), "final_logit_softcapping", None) is not None
    check(
        not capped,
        f"{type(model).__name__} caps its logits after the head: a word left out would count, so leave likeliest out.",
    )
    try:
        return CertifiedHead(head.weight, likeliest, head.bias)
    except ValueError as error:
        raise InputError(f"The output head cannot be certified: {error}") from error


def replaceable_ffns(model: nn.Module, inputs: Inputs | None = None) -> list[FFN]:
    """The FFNs of `model`; raises `InputError` when no kernel can take the place of one."""
    ffns = find_ffns(model, inputs)
    taken: set[nn.Module] = set()
    for ffn in ffns:
        _check_parts(ffn, taken)
    return ffns


def kernel_of(
    ffn: FFN, thresholds: Thresholds | None, certified: bool = False, stored: Stored | None = None
) -> SparseFFN:
    """The kernel that computes `ffn` under `thresholds`. Raises `InputError` where there is none."""
    down = ffn.down_weight.t()
    try:
        rule, threshold = kernel_rule(ffn, thresholds)
        kernel = SparseFFN(
            w_gate=ffn.gate.weight,
            w_up=None if ffn.up is None else ffn.up.weight,
            w_down_t=down if stored is None else stored.once(("down", ffn.name), lambda: stored.pages.copied(down)),
            threshold=threshold,
            act=activation_name(ffn.activation),
            rule=rule,
            b_gate=ffn.gate.bias,
            b_up=None if ffn.up is None else ffn.up.bias,
            b_down=ffn.down_bias,
        )
        return kernel.certified() if certified else kernel
    except ValueError as error:
        raise InputError(f"{ffn.name} cannot run on a sparse kernel: {error}") from error


def kernel_rule(ffn: FFN, thresholds: Thresholds | None) -> tuple[str, Tensor | float]:
    """The kernels' rule and threshold with which the same neurons of `ffn` are active; `thresholds` None: all of them.

    On the gate a rule keeps |s| >= limit, the kernels |s| > t: t is the next smaller float32.
    """
    if thresholds is None:
        return "gate", -1.0
    rule = RULES[thresholds.rule]
    limit = rule.limit(ffn, thresholds.values[ffn.layer])
    if rule.decided_on == "gate":
        limit = torch.nextafter(torch.tensor(limit), torch.tensor(0.0)).item()
    return rule.decided_on, limit


def _check_parts(ffn: FFN, taken: set[nn.Module]) -> None:
    """Raises `InputError` unless modules that no other FFN has `taken` compute the FFN and can be bypassed."""
    if ffn.experts > 1 or ffn.gate is None or ffn.activation is None or ffn.down is None:
        what = "has routed experts" if ffn.experts > 1 else "is not computed by modules of its own"
        raise InputError(f"{ffn.name} {what}, and no kernel can take its place; sparse_neurons can still mask it.")
    if activation_name(ffn.activation) is None:
        raise InputError(
            f"{ffn.name} has the activation function {type(ffn.activation).__name__}, which the kernels do not know."
        )
    parts = [part for part in (ffn.gate, ffn.up) if part is not None]
    for part in parts:
        used = sum(other.matrix.size[0] for other in parts if other.module is part.module)
        if used != _outputs(part):
            raise InputError(f"{ffn.name} shares its first linear map with another part of the model.")
    own = {ffn.down, *(part.module for part in parts)}
    if own & taken:
        raise InputError(f"{ffn.name} shares a linear map with another FFN, and no kernel can take its place.")
    taken |= own


def _outputs(part: Projection) -> int:
    """How many numbers per token the module of `part` returns."""
    parameter = getattr(part.holder, part.parameter_name)
    return parameter.numel() // part.matrix.size[1]


def _check_outputs(model: nn.Module, ffns: list[FFN], inputs: Inputs | None) -> None:
    """Raises `InputError` where kernels that skip nothing compute something else than the model's own FFNs.

    Each FFN's output is compared on the x that the model gives it, and then that of the whole model, which shows
    whether anything else is made of what the bypassed modules compute.
    """
    inputs = tiny_inputs(model) if inputs is None else inputs
    given: dict[FFN, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for ffn in ffns:
            _watch(stack, ffn, given)
        expected = _output(model, inputs)
    kernels = [kernel_of(ffn, None) for ffn in ffns]
    for ffn, kernel in zip(ffns, kernels, strict=True):
        if ffn in given:
            x, y = given[ffn]
            _check_close(kernel(x), y, 1, f"{ffn.name} computes more than W_down (act(W_gate x) * W_up x)")
    with _bypass(ffns, kernels):
        y = _output(model, inputs)
    _check_close(
        y, expected, THROUGH_LAYERS, f"{type(model).__name__} makes more of the parts of its FFNs than kernels do"
    )


def _check_close(y: Tensor, expected: Tensor, factor: float, problem: str) -> None:
    size, error = (widened(part).square().mean().sqrt() for part in (expected, y - expected))
    if not error <= factor * ROUNDING[y.dtype] * size:
        raise InputError(f"{problem}, and no kernel can take their place; sparse_neurons can still mask neurons.")


def _output(model: nn.Module, inputs: Inputs) -> Tensor:
    """The first tensor that the model returns, in evaluation mode."""
    with evaluating(model), unchanged(model):
        out = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    return out if isinstance(out, Tensor) else out[0]


def _watch(stack: ExitStack, ffn: FFN, given: dict[FFN, tuple[Tensor, Tensor]]) -> None:
    """Keep the input x and the output y of an FFN's first call in `given`, (tokens, d) each."""
    pending: list[Tensor] = []

    def keep_x(module: nn.Module, args: tuple) -> None:
        pending.append(args[0].flatten(0, -2)[:MAX_TOKENS].clone())

    def keep_y(module: nn.Module, args: tuple, output: Tensor) -> None:
        if pending:
            given.setdefault(ffn, (pending.pop(), output.flatten(0, -2)[:MAX_TOKENS].clone()))

    stack.callback(ffn.gate.module.register_forward_pre_hook(keep_x).remove)
    stack.callback(ffn.down.register_forward_hook(keep_y).remove)


@contextmanager
def _bypass(ffns: list[FFN], kernels: Sequence[Kernel]) -> Iterator[None]:
    """Inside the block, the first module of each FFN computes all of it and the last returns it."""
    with ExitStack() as stack:
        last = {ffn.down for ffn in ffns}
        bypassed.update(last)
        stack.callback(bypassed.difference_update, last)
        for ffn, kernel in zip(ffns, kernels, strict=True):
            _bypass_one(stack, ffn, kernel)
        yield


def _bypass_one(stack: ExitStack, ffn: FFN, kernel: Kernel) -> None:
    outputs, own_last = threading.local(), ffn.down.forward  # one output per thread that runs the model
    widths = {part: _outputs(part) for part in (ffn.gate, ffn.up) if part is not None}
    modules = {ffn.down, *(part.module for part in widths)}

    def first(x: Tensor) -> Tensor:
        check_not_trained(ffn.name, modules, x)
        outputs.y = kernel(x)
        return zeros(x, ffn.gate)

    def zeros(x: Tensor, part: Projection) -> Tensor:
        return x.new_zeros(*x.shape[:-1], widths[part])

    def last(h: Tensor) -> Tensor:
        y, outputs.y = getattr(outputs, "y", None), None
        return own_last(h) if y is None else y  # None where the module also serves something that is no FFN

    stack.enter_context(forward_replaced(ffn.gate.module, first))
    if ffn.up is not None and ffn.up.module is not ffn.gate.module:
        stack.enter_context(forward_replaced(ffn.up.module, lambda x: zeros(x, ffn.up)))
    stack.enter_context(forward_replaced(ffn.down, last))
