"""FFNs for the bench: random weights of a published shape, adjusted so that a given pattern of neurons is active."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import SparseFFN, naive
from kernels.shapes import SHAPES


@dataclass(frozen=True)
class Pattern:
    """Which neurons are active on each of some tokens, in the order of the text."""

    name: str
    act: str
    rule: str
    nonzero: np.ndarray  # (tokens, neurons), bool: s is not zero
    active: np.ndarray  # (tokens, neurons), bool: a part of nonzero


@dataclass(frozen=True)
class Case:
    """One point of the bench."""

    shape: str  # a key of SHAPES
    pattern: Pattern
    tokens: int = 1  # decoded side by side
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False)
class Problem:
    """The input and the weights of one case, the same for all ways of computing it."""

    x: Tensor  # (tokens, d)
    ffn: SparseFFN
    w_down: Tensor  # (d, d_ff): as a dense model keeps it

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of the dense FFN."""
        return 3 * self.w_down.nbytes

    def copied(self) -> "Problem":
        """The same numbers at another place in memory."""
        ffn = self.ffn
        weights = (weight.clone() for weight in (ffn.w_gate, ffn.w_up, ffn.w_down_t))
        return Problem(self.x, SparseFFN(*weights, ffn.threshold, ffn.act, ffn.rule), self.w_down.clone())


def random_pattern(sparsity: float, neurons: int, tokens: int) -> Pattern:
    """Random active neurons for each token, of a ReLU FFN under the rule "gate".

    This is the worst case for several tokens, because they have few active neurons in common.
    """
    ranks = np.random.default_rng(0).random((tokens, neurons)).argsort(axis=1)
    active = ranks >= round(sparsity * neurons)
    return Pattern("random", "relu", "gate", active, active)


def build(case: Case, device: str) -> Problem:
    """Random x and random weights, W_gate and W_up adjusted a little so that x activates the neurons of the pattern."""
    d, d_ff = SHAPES[case.shape]
    random = torch.Generator().manual_seed(0)
    x = torch.randn(case.tokens, d, generator=random)
    gate, up, down = (torch.randn(d_ff, d, generator=random) * d**-0.5 for _ in range(3))
    nonzero, active = (spread(part, d_ff, case.tokens) for part in (case.pattern.nonzero, case.pattern.active))
    g = shifted_normal(nonzero if case.pattern.act == "relu" else torch.ones_like(nonzero), active, random)
    threshold = 0.0
    gate = steered(gate, x, g)
    if case.pattern.rule == "neuron":  # |h| is 1.5 for active neurons and at most 0.5 for others; the threshold is 1
        s = naive.ACTIVATIONS[case.pattern.act](g).abs().clamp(min=1e-3)
        up = steered(up, x, torch.where(active, 1.5 / s, (0.5 / s).clamp(max=3)))
        threshold = 1.0
    x, gate, up, down = (part.to(device, case.dtype) for part in (x, gate, up, down))
    ffn = SparseFFN(gate, up, down, threshold, case.pattern.act, case.pattern.rule)
    return Problem(x, ffn, ffn.w_down_t.t().contiguous())


def spread(mask: np.ndarray, d_ff: int, tokens: int) -> Tensor:
    """The first `tokens` of a mask, (d_ff, tokens); a mask of more neurons is sampled, one of fewer is repeated."""
    order = np.arange(d_ff)
    if mask.shape[1] != d_ff:
        order = np.resize(np.random.default_rng(0).permutation(mask.shape[1]), d_ff)
    return torch.from_numpy(np.ascontiguousarray(mask[:tokens, order].T))


def shifted_normal(positive: Tensor, active: Tensor, random: torch.Generator) -> Tensor:
    """Normally distributed numbers, shifted for each token so that just those in `positive`, (d_ff, tokens), are > 0.

    Gates of trained models look like this, and how near they lie to zero decides what a certified gate can prove. The
    largest numbers go to the neurons in `active`, a part of `positive`.
    """
    g = torch.empty(positive.shape)
    for token in range(positive.shape[1]):
        drawn = torch.randn(len(g), generator=random).sort().values
        off = int((~positive[:, token]).sum())
        if 0 < off < len(g):
            drawn -= (drawn[off - 1] + drawn[off]) / 2
        else:  # all or none are positive
            drawn = drawn.abs().sort().values if off == 0 else -drawn.abs()
        places = torch.randperm(len(g), generator=random)
        rank = positive[places, token].int() + active[places, token].int()
        g[places[rank.argsort(stable=True)], token] = drawn
    return g


def steered(weight: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """The weights nearest to `weight`, (d_ff, d), with weight @ x.T = target, (d_ff, tokens)."""
    return weight + (target - weight @ x.T) @ torch.linalg.solve(x @ x.T, x)
