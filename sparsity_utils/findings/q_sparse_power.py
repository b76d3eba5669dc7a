"""How likely each verdict of notebook 12 is before any run, from the spread of paired losses in the first study.

A difference of two arms is drawn as effect + N(0, SPREAD) for each of three seeds and judged by the verdicts' own code.
SPREAD is the standard deviation, within a size, of the final loss of ReLU less that of SiLU over paired seeds, the only
paired difference of two ways to train that the first study has: 0.010 nats from nine pairs of four sizes.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from sparsity_utils.findings import q_sparse
from sparsity_utils.findings.claims import Claim
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, means_over_runs

DRAWS, SEED, SEEDS = 2000, 0, 3
SPREAD = 0.010  # nats
LOSS = 4.0  # nats, about the loss of such models: what percentages are of
SIZES = np.log10([5888, 23552, 79488, 188416])  # of the slopes over size


class Effect(NamedTuple):
    """A simulated truth: `value` in the unit of the claim's estimate before `scale`, `spread` of it over seeds."""

    claim: Claim
    name: str
    value: float
    spread: float


def effects() -> list[Effect]:
    """Every claim on losses at no effect and at its margin, and at what is published where that is a number."""
    slope = SPREAD / math.sqrt(float(((SIZES - SIZES.mean()) ** 2).sum()))  # of a line of one seed through four sizes
    mean_of_two = (
        SPREAD * math.sqrt(1.5) / math.sqrt(2)
    )  # dense less the mean of two arms; each arm has SPREAD / sqrt 2
    twice = SPREAD * math.sqrt(2)  # a difference of two differences
    return [
        *_around(q_sparse.STRAIGHT_THROUGH, SPREAD, {"zero": 0.0, "margin: 0.02": 0.02, "twice the margin": 0.04}),
        *_around(q_sparse.MATCHES_DENSE, SPREAD / LOSS, {"zero": 0.0, "margin: 1%": 0.01, "2%": 0.02, "4%": 0.04}),
        *_around(q_sparse.INTERIOR_BEST, mean_of_two, {"zero": 0.0, "published: 1.9% of 2 nats": 0.038}),
        *_around(q_sparse.BLOCKS_AS_GOOD, SPREAD, {"zero": 0.0, "margin: 0.01": 0.01, "0.05": 0.05}),
        *_around(q_sparse.TERNARY_TOLERATES, twice, {"zero": 0.0, "-0.02": -0.02, "-0.05": -0.05}),
        *_around(q_sparse.LARGER_TOLERATES, slope, {"zero": 0.0, "-0.01 a decade": -0.01, "-0.05 a decade": -0.05}),
        *_around(q_sparse.PENALTY_IS_CHEAP, SPREAD / LOSS, {"zero": 0.0, "margin: 1%": 0.01, "4%": 0.04}),
    ]


def _around(claim: Claim, spread: float, values: dict[str, float]) -> list[Effect]:
    return [Effect(claim, name, value, spread) for name, value in values.items()]


def power() -> pd.DataFrame:
    """One row per claim and effect: the percentages of the three verdicts. The same table every time, in seconds."""
    rng, rows = np.random.default_rng(SEED), []
    for claim, name, value, spread in effects():
        drawn = means_over_runs(value + rng.normal(0, spread, (DRAWS, SEEDS)))
        words = [claim.decide(estimate) for estimate in drawn]
        shares = [round(100 * words.count(word) / DRAWS) for word in (SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE)]
        rows.append((claim.claim, claim.rank, name, *shares))
    return pd.DataFrame(rows, columns=["claim", "rank", "effect", "supported %", "not supported %", "inconclusive %"])
