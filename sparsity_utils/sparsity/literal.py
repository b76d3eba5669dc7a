"""CETT-PPL-p% as published: the bisections of arXiv 2411.02335, App. E, step by step, with nothing reused or guessed.

The search of `calibration.py` is timed and tested against it, and uses none of it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsity_utils.neurons.find import FFN, find_ffns
from sparsity_utils.neurons.hooks import observe_neurons, sparse_neurons
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.thresholds import Thresholds, magnitudes
from sparsity_utils.sparsity.passes import Batch, Losses, checked, mean_losses

CETT_STEPS = 20  # halvings of [0, 1]
THRESHOLD_STEPS = 16  # halvings of [0, largest magnitude], per layer and CETT


@dataclass(frozen=True)
class LiteralSolution:
    """The result of the bisections."""

    cett: float
    thresholds: Thresholds
    activation_ratio: float  # mean over layers
    ppl_ratio: float


def bisect_cett_ppl(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], p: float = 1.0) -> LiteralSolution:
    """The largest CETT found by halving whose PPL ratio on `batches` is at most 1 + p/100, in a dense model.

    Each of the CETT_STEPS runs the dense model, bisects the threshold of every layer, and runs the sparse model.
    """
    low, high, best = 0.0, 1.0, None
    with evaluating(model):
        read = list(checked(model, batches, "evaluation"))
        for _ in range(CETT_STEPS):
            cett = (low + high) / 2
            dense, activations = _dense_pass(model, read)
            values = tuple(_bisect_threshold(ffn, h, cett) for ffn, h in activations)
            thresholds = Thresholds("cett", values)
            with sparse_neurons(model, thresholds):
                ratio = math.exp(mean_losses(model, read).value - dense)
            if ratio <= 1 + p / 100:
                low, best = cett, (cett, thresholds, ratio)
            else:
                high = cett
        cett, thresholds, ratio = best
        shares = [float(thresholds.active(ffn, h, h).double().mean()) for ffn, h in activations]
    return LiteralSolution(cett, thresholds, math.fsum(shares) / len(shares), ratio)


def _dense_pass(model: nn.Module, batches: list[Batch]) -> tuple[float, list[tuple[FFN, Tensor]]]:
    """The dense loss, and h of every layer over all real tokens."""
    losses = Losses()
    kept: list[list[Tensor]] = [[] for _ in find_ffns(model)]
    for batch in batches:

        def keep(ffn: FFN, s: Tensor, h: Tensor, tokens: Tensor, batch: Batch = batch) -> None:
            kept[ffn.layer].append(h[batch.real(ffn, tokens)])

        with observe_neurons(model, keep) as ffns:
            losses.add(model, batch)
    return losses.value, [(ffn, torch.cat(h)) for ffn, h in zip(ffns, kept, strict=True)]


def _bisect_threshold(ffn: FFN, h: Tensor, cett: float) -> float:
    """The threshold at which the mean relative truncation error of a layer is `cett`."""
    sizes = magnitudes(ffn, h)  # (tokens, d_ff)
    whole = torch.linalg.vector_norm(h @ ffn.down_weight.T, dim=-1)  # (tokens,)
    low, high = 0.0, float(sizes.max())
    for _ in range(THRESHOLD_STEPS):
        middle = (low + high) / 2
        tail = torch.linalg.vector_norm(h.masked_fill(sizes >= middle, 0) @ ffn.down_weight.T, dim=-1)
        error = float((tail / whole)[whole > 0].mean())
        low, high = (middle, high) if error <= cett else (low, middle)
    return low
