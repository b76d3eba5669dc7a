"""The text that a masked model writes, by which the words of its kernels are judged, and the timing of those.

A kernel's sums are rounded otherwise than the model's, and an input near its threshold may then be judged otherwise,
which later layers can amplify. So a kernel is given the masked model's own text, and its next word is compared at each
place. Another word is admitted only where the masked model itself could have chosen it: where its two likeliest words
lie closer than its logits differ between passes of one token and one pass of all.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.head import CertifiedHead
from sparsity_utils.console import check
from sparsity_utils.decoding.decode import ReadyKernels, head_module
from sparsity_utils.decoding.speed import decoded
from sparsity_utils.neurons.find import FFN, widened
from sparsity_utils.neurons.hooks import sparse_neurons
from sparsity_utils.neurons.input_rules import INPUT_RULES
from sparsity_utils.neurons.linears import LinearMap, find_linears, sparse_inputs
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.rules import RULES
from sparsity_utils.neurons.thresholds import Thresholds


class CountedMask:
    """The mask of `thresholds`, which counts the inputs and neurons that it keeps in passes of one token."""

    def __init__(self, model: nn.Module, thresholds: Thresholds) -> None:
        """model: the one whose weights the scores of inputs are taken from, whichever copy of it runs."""
        self.thresholds, self.values = thresholds, thresholds.values
        self.maps = find_linears(model)
        self._kept, self._nonzero, self._seen = Counter[int](), Counter[int](), Counter[int]()

    def active_inputs(self, linear: LinearMap, x: Tensor) -> Tensor:
        """As `Thresholds.active_inputs`."""
        active = self.thresholds.active_inputs(self.maps[linear.index], x)
        self._count(linear.index, active)
        return active

    def active(self, ffn: FFN, s: Tensor, h: Tensor) -> Tensor:
        """As `Thresholds.active`."""
        active = self.thresholds.active(ffn, s, h)
        self._count(ffn.layer, active, s != 0)
        return active

    def _count(self, key: int, active: Tensor, nonzero: Tensor | None = None) -> None:
        if active.numel() == active.shape[-1]:
            self._seen[key] += active.numel()
            self._kept[key] += int(active.sum())
            self._nonzero[key] += 0 if nonzero is None else int(nonzero.sum())

    def read_shares(self) -> list[float]:
        """Share of its weights that a token reads of each linear map."""
        if self.thresholds.rule in INPUT_RULES:
            return [self._kept[linear.index] / self._seen[linear.index] for linear in self.maps]
        rule = RULES[self.thresholds.rule]
        layers = [linear.layer for linear in self.maps]
        shares = [(self._kept[layer] / self._seen[layer], self._nonzero[layer] / self._seen[layer]) for layer in layers]
        return [rule.map_share(linear.role, *share) for linear, share in zip(self.maps, shares, strict=True)]


@dataclass(frozen=True, eq=False)
class MaskedText:
    """What a masked model writes after a prompt, one likeliest word after the other, and how sure it is of each."""

    words: Tensor  # ids, (n,)
    second: Tensor  # second likeliest ids, (n,)
    gaps: Tensor  # logit of the likeliest less that of the second, (n,)
    rounding: float  # largest difference of a logit between passes of one token and one pass of all
    read: list[float]  # share of its weights that a token reads of each linear map
    undecided: float = math.nan  # share of the head's rows that a certified head reads in full

    def differing(self, words: Tensor) -> tuple[int, int]:
        """How many of `words`, chosen at the first places, are others; and how many of these are not admissible."""
        first = slice(len(words))
        other = words != self.words[first]
        admitted = (words == self.second[first]) & (self.gaps[first] <= self.rounding)
        return int(other.sum()), int((other & ~admitted).sum())


def masked_text(
    model: PreTrainedModel, mask: CountedMask, prompt: Tensor, words: int, head: CertifiedHead | None = None
) -> MaskedText:
    """The text of `model`, masked, after `prompt`, (1, length). The mask counts what it keeps.

    head: certified, of the model. Raises `InputError` for fewer than two words, of which the prompt's pass gives the
    first and nothing is counted, and when the mask was made for another model.
    """
    check(words >= 2, f"A masked text of {words} words has no pass of one token to measure; ask for at least 2.")
    logits, vectors = list[Tensor](), list[Tensor]()
    block = sparse_inputs(model, mask) if mask.thresholds.rule in INPUT_RULES else sparse_neurons(model, mask)
    with evaluating(model), block:
        with _given(head_module(model), vectors):
            chosen, _, _ = decoded(model, prompt, words, keep=lambda scores: logits.append(widened(scores[:, -1])))
        whole = torch.cat([prompt, chosen[:, :-1]], dim=1)
        together = widened(model(input_ids=whole, use_cache=False, logits_to_keep=words).logits[0])  # (n, vocabulary)
    alone = torch.cat(logits)  # (n, vocabulary)
    best = alone.topk(2, dim=-1)
    gaps = best.values[:, 0] - best.values[:, 1]
    rounding = float((alone - together).abs().max())
    undecided = math.nan if head is None else float(head.undecided(torch.cat(vectors[1:])).float().mean())
    return MaskedText(chosen[0], best.indices[:, 1], gaps, rounding, mask.read_shares(), undecided)


@contextmanager
def _given(module: nn.Module, vectors: list[Tensor]) -> Iterator[None]:
    """Inside the block, what `module` is given is appended to `vectors`, the last row of each call, (1, d)."""
    handle = module.register_forward_pre_hook(lambda module, args: vectors.append(args[0][:, -1].detach().clone()))
    try:
        yield
    finally:
        handle.remove()


def with_rounded_weights(model: PreTrainedModel, kernels: ReadyKernels) -> PreTrainedModel:
    """A copy of `model` whose linear maps have the numbers that `kernels`, in 8 bits, have for weights."""
    rounded = copy.deepcopy(model)
    maps = {linear.index: linear for linear in find_linears(rounded)}
    of_ffns = [(kernel.gate_up, kernel.down) for kernel in kernels.of_ffns]  # type: ignore[attr-defined]
    blocks: dict[int, list[LinearMap]] = {}
    for linear in maps.values():
        blocks.setdefault(linear.layer, []).append(linear)
    pairs: list[tuple[list[LinearMap], Any]] = [(readers, kernel) for readers, kernel in kernels.attention]
    for own, (gate_up, down) in zip(blocks.values(), of_ffns, strict=True):
        roles = {linear.role: linear for linear in own}
        pairs += [([roles["gate"], roles["up"]], gate_up), ([roles["down"]], down)]
    for readers, kernel in pairs:
        for linear, weight in zip(readers, kernel.wide_weights().split(kernel.widths, dim=1), strict=True):
            _write(maps[linear.index], weight.T)
    return rounded


@torch.no_grad()
def _write(linear: LinearMap, weight: Tensor) -> None:
    whole: Any = linear.module.weight
    (whole.T if linear.transposed else whole)[linear.outputs.to(whole.device)] = weight.to(whole)
