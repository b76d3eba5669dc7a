"""How likely each verdict of notebook 11 is before any run: its tests on simulated studies of three seeds.

    share of a run at the end = effect + deviation of its seed, N(0, sd_seed)
    share of a layer = effect + deviation of the layer of a seed, N(0, LAYER) at the end, at the start one of STARTS

All deviations are independent: that runs of one seed share initialisation and data order can only narrow a paired
difference, and is not counted on. The spread is that of the first recorded study, whose runs are gated, longer, and
none of those judged here; sd_seed of the share of non-zeros stands in results/power_inputs.csv. What happens before the
first step that study did not record. There two cases are simulated: layers differ as they do at the end, or by as much
as chance allows: all tokens are alike to a layer, whose neurons are on or off for all of them, each by a fair coin.

Claims of one design have the same probabilities, and the first of them stands for all: plain for gated, without decay
for with decay, random input for fresh pairs.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from sparsity_utils import paths
from sparsity_utils.findings import lazy_neuron
from sparsity_utils.findings.claims import Claim
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Estimate, means_over_runs

DRAWS, SEED = 1000, 0
SEEDS, LAYERS, NEURONS, DOUBLINGS = 3, 4, 80, 2  # of the experiment in the profile long
# Deviation between seeds of the share of one layer: ReLU runs of two layers or more in the first study's table of
# single neurons, 7 degrees of freedom, at its CETT; the share of non-zeros of single layers was not stored there.
LAYER = 0.009
WIDEST = math.sqrt(0.25 / NEURONS)  # of a layer before the first step: coins, one for each neuron
STARTS = {"": LAYER, "; starts as far apart as chance allows": WIDEST}
START = 0.5  # share before the first step
FIRST_FALL = 0.14  # of the first study: to a share of non-zeros of 36%, the mean of 16x2 to 64x4
T5_FALL = 0.473
FIRST_DEEPER = -0.031  # per doubling of depth, if depth alone explains the line of ratio 8 of the first study


class Case(NamedTuple):
    """A claim, an effect that might be true, and the verdicts of simulated studies if it is."""

    claim: Claim
    effect: str
    words: list[str]


def power() -> pd.DataFrame:
    """One row per claim and effect: the percentages of the three verdicts. The same table every time, in seconds."""
    rng = np.random.default_rng(SEED)
    inputs = pd.read_csv(paths.RESULTS / "power_inputs.csv")
    run = float(inputs.loc[inputs["outcome"] == "nonzero_share", "sd_seed"].iloc[0])
    rows = []
    for claim, effect, words in (*_halves(rng), *_falls(rng, run), *_same(rng, run), *_sizes(rng, run)):
        shares = [round(100 * words.count(word) / DRAWS) for word in (SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE)]
        rows.append((claim.claim, claim.rank, effect, *shares))
    return pd.DataFrame(rows, columns=["claim", "rank", "effect", "supported %", "not supported %", "inconclusive %"])


def _halves(rng: np.random.Generator) -> list[Case]:
    cases = []
    for share in (START, lazy_neuron.HALF[1]):
        for name, spread in STARTS.items():
            layers = share + rng.normal(0, spread, (DRAWS, SEEDS, LAYERS))
            means, by_layer = means_over_runs(layers.mean(axis=2)), layers.mean(axis=1).tolist()
            words = [lazy_neuron.half_word(*pair) for pair in zip(means, by_layer, strict=True)]
            cases.append(Case(lazy_neuron.START[lazy_neuron.PLAIN], f"{100 * share:g}% of neurons{name}", words))
    return cases


def _falls(rng: np.random.Generator, run: float) -> list[Case]:
    """Falls of one size in every layer of an arm, in two arms and in one."""
    labels, _, text, _ = lazy_neuron.WITHOUT
    mean = 1 / math.sqrt(LAYERS)  # a start is the mean over layers there
    designs = (
        (lazy_neuron.EVERY_LAYER[lazy_neuron.PLAIN], LAYERS, 1.0, LAYER),
        (labels, 2, mean, run),
        (text, 1, mean, run),
    )
    effects = {"zero": 0.0, "margin: 10 points": lazy_neuron.FALL, "first study: 14 points": FIRST_FALL}
    effects |= {"published (T5-Base): 47 points": T5_FALL}
    cases = []
    for claim, parts, share, spread in designs:
        for effect, fall in effects.items():
            for name, start in STARTS.items():
                ends = START - fall + rng.normal(0, spread, (parts, DRAWS, SEEDS))
                falls = START + rng.normal(0, share * start, ends.shape) - ends
                pairs = zip(map(means_over_runs, falls), map(means_over_runs, ends), strict=True)
                words = [[lazy_neuron.fall_word(*pair) for pair in zip(*both, strict=True)] for both in pairs]
                cases.append(Case(claim, effect + name, [_worst(part) for part in zip(*words, strict=True)]))
    return cases


def _worst(words: tuple[str, ...]) -> str:
    """The verdict of an intersection-union test."""
    return next(word for word in (NOT_SUPPORTED, INCONCLUSIVE, SUPPORTED) if word in words)


def _same(rng: np.random.Generator, run: float) -> list[Case]:
    """Ten passes: a difference of two runs of each seed."""
    effects = {"zero": 0.0, "margin: 5 points": lazy_neuron.SAME, "10 points": lazy_neuron.APART, "15 points": 0.15}
    return [
        Case(lazy_neuron.FRESH_DATA, effect, list(map(lazy_neuron.same_word, _paired(rng, difference, run))))
        for effect, difference in effects.items()
    ]


def _sizes(rng: np.random.Generator, run: float) -> list[Case]:
    """Four times as deep, four times the neurons; the count from the shares of the ends."""
    slopes = {"zero": 0.0, "margin: -2 points": -0.02, "as of depth in the first study: -3.1 points": FIRST_DEEPER}
    slopes |= {"twice the margin: -4 points": -0.04}
    cases = []
    for claim in (lazy_neuron.DEEPER, lazy_neuron.MORE_NEURONS):
        cases += [
            Case(claim, effect, list(map(claim.decide, _paired(rng, slope, run, DOUBLINGS))))
            for effect, slope in slopes.items()
        ]
    for effect, rise in {"the count stays": 0.0, "it rises by half a doubling": 0.5, "the share stays": 1.0}.items():
        relative = run / (START - FIRST_FALL) / math.log(2)  # of log2 of a share, to first order
        found = _paired(rng, rise, relative, DOUBLINGS)
        cases.append(Case(lazy_neuron.COUNT, effect, list(map(lazy_neuron.COUNT.decide, found))))
    return cases


def _paired(rng: np.random.Generator, effect: float, spread: float, over: int = 1) -> list[Estimate]:
    """Estimates of a difference of two runs of each seed, divided by `over`, whose true value is `effect`."""
    return means_over_runs(effect + rng.normal(0, math.sqrt(2) * spread / over, (DRAWS, SEEDS)))
