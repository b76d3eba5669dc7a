"""Sparse models that draft text: the model itself, inside a block in which it leaves out neurons or inputs."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from sparsity_utils.console import InputError, check
from sparsity_utils.decoding.decode import replaceable_ffns, sparse_kernels
from sparsity_utils.neurons.find import FFN, find_ffns, layer_count, widened
from sparsity_utils.neurons.hooks import observe_neurons, sparse_neurons
from sparsity_utils.neurons.input_rules import INPUT_RULES
from sparsity_utils.neurons.linears import find_linears, sparse_inputs
from sparsity_utils.neurons.modes import forward_replaced
from sparsity_utils.neurons.thresholds import Thresholds


class Drafter:
    """What a model leaves out while it drafts."""

    def reading(self, prompts: Tensor) -> AbstractContextManager:
        """The block in which the full model reads `prompts`, (sequences, length)."""
        return nullcontext()

    def drafting(self, sequences: Tensor) -> AbstractContextManager:
        """The block in which the model drafts; its rows belong to these `sequences` of the prompts, (rows,)."""
        raise NotImplementedError


class Masked(Drafter):
    """What `thresholds` calls inactive is set to zero (`sparse_neurons`, `sparse_inputs`), which saves no time."""

    def __init__(self, model: nn.Module, thresholds: Thresholds) -> None:
        self.model, self.thresholds = model, thresholds

    def drafting(self, sequences: Tensor) -> AbstractContextManager:
        if self.thresholds.rule in INPUT_RULES:
            return sparse_inputs(self.model, self.thresholds)
        return sparse_neurons(self.model, self.thresholds)


class OnKernels(Drafter):
    """The same left unread (`sparse_kernels`), for rules that kernels have.

    Kernels are made and compared with the model once. While the full model runs they are out of its way.
    """

    def __init__(self, model: nn.Module, thresholds: Thresholds | None) -> None:
        own = {module: vars(module).get("forward") for module in model.modules()}
        with sparse_kernels(model, thresholds):
            now = {module: vars(module).get("forward") for module in own}
        self.forwards = {module: forward for module, forward in now.items() if forward is not own[module]}

    @contextmanager
    def drafting(self, sequences: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            for module, forward in self.forwards.items():
                stack.enter_context(forward_replaced(module, forward))
            yield


class FromPrompt(Drafter):
    """CSparse: a share of the neurons of each layer, chosen for each prompt and kept for all its text.

    With h of each of the prompt's tokens scaled to norm 1, the chosen neurons are those with the largest norm of h_i
    over the tokens: the rule that Sirius takes from Griffin.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        """Raises `InputError` for a share outside 0 to 1 and for routed experts, which read but some tokens."""
        check(0 < share <= 1, f"The share of neurons is {share}; choose one above 0 and at most 1.")
        ffns = find_ffns(model)
        routed = next((ffn.name for ffn in ffns if ffn.experts > 1), None)
        check(routed is None, f"{routed} has routed experts: neurons are chosen from a prompt for dense FFNs alone.")
        self.model, self.share = model, share
        self.chosen: dict[int, Tensor] = {}  # layer -> whether a neuron is kept, (sequences, d_ff)

    @contextmanager
    def reading(self, prompts: Tensor) -> Iterator[None]:
        def choose(ffn: FFN, s: Tensor, h: Tensor, tokens: Tensor) -> None:
            unit = nn.functional.normalize(widened(h), dim=-1).view(len(prompts), -1, ffn.d_ff)
            kept = unit.square().sum(1).topk(kept_neurons(self.share, ffn.d_ff), dim=-1).indices
            none = torch.zeros(len(prompts), ffn.d_ff, dtype=torch.bool, device=h.device)
            self.chosen[ffn.layer] = none.scatter(1, kept, True)

        with observe_neurons(self.model, choose):
            yield

    def drafting(self, sequences: Tensor) -> AbstractContextManager:
        if not self.chosen:
            raise InputError("No neurons are chosen yet: read the prompts first.")
        return sparse_neurons(self.model, _Chosen(self.chosen, sequences))


class Shrunk(FromPrompt):
    """CSparse for one prompt, on copies of the weights of the chosen neurons, so that a step reads no others.

    Raises `InputError` where FFNs are not computed by modules of their own.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        super().__init__(model, share)
        self.ffns = replaceable_ffns(model)
        self.forwards: list[tuple[nn.Module, Callable]] = []

    @contextmanager
    def reading(self, prompts: Tensor) -> Iterator[None]:
        check(len(prompts) == 1, f"{len(prompts)} prompts have neurons of their own each: give one.")
        with super().reading(prompts):
            yield
        self.forwards = [pair for ffn in self.ffns for pair in _shrunk(ffn, self.chosen[ffn.layer][0])]

    @contextmanager
    def drafting(self, sequences: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            for module, forward in self.forwards:
                stack.enter_context(forward_replaced(module, forward))
            yield


def _shrunk(ffn: FFN, chosen: Tensor) -> Iterator[tuple[nn.Module, Callable]]:
    """The modules of an FFN, each with a map that has the `chosen` neurons alone, (d_ff,)."""
    parts = [part for part in (ffn.gate, ffn.up) if part is not None]
    parts.sort(key=lambda part: part.outputs.start or 0)  # gate and up may be two halves of one map
    for module in dict.fromkeys(part.module for part in parts):
        own = [part for part in parts if part.module is module]
        weight = torch.cat([part.weight[chosen] for part in own])
        biases = [part.bias[chosen] for part in own if part.bias is not None]
        bias = torch.cat(biases) if biases else None
        yield module, lambda x, weight=weight, bias=bias: nn.functional.linear(x, weight, bias)
    weight, bias = ffn.down_weight[:, chosen].contiguous(), ffn.down_bias
    yield ffn.down, lambda x: nn.functional.linear(x, weight, bias)


class _Chosen:
    """A `NeuronMask` of neurons that were chosen, whatever they compute."""

    def __init__(self, chosen: dict[int, Tensor], sequences: Tensor) -> None:
        self.values = [chosen[layer][sequences] for layer in range(len(chosen))]  # (rows, d_ff) of each layer

    def active(self, ffn: FFN, s: Tensor, h: Tensor) -> Tensor:
        """The neurons of each row, for all its tokens, (rows * tokens, d_ff)."""
        kept = self.values[ffn.layer]
        return kept.repeat_interleave(len(h) // len(kept), dim=0)


def kept_neurons(share: float, d_ff: int) -> int:
    """How many neurons of an FFN a share is; at least one."""
    return max(1, math.floor(share * d_ff))


def fsparse(model: nn.Module, share: float) -> Thresholds:
    """FSparse: of each token the `share` of the neurons with the largest |act(gate)|, in every layer."""
    ffns = find_ffns(model)
    sizes = {ffn.layer: ffn.d_ff for ffn in ffns}
    return Thresholds("top-k", tuple(float(kept_neurons(share, sizes[i])) for i in range(layer_count(ffns))))


def top_inputs(model: nn.Module, share: float) -> Thresholds:
    """TEAL's score, top-k: of each linear map's inputs the `share` with the largest |x_j|, of each token."""
    rule = INPUT_RULES["teal-top-k"]
    return Thresholds(rule.name, tuple(max(1.0, rule.value(linear, 1 - share, None)) for linear in find_linears(model)))
