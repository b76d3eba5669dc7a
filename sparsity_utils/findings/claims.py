"""What a claim is, how an estimate decides it, and the tables that show claims and verdicts.

Thirteen claims of the collection are primary: the study's sizes and seeds are planned for them. At each of two
width-depth ratios they are that ReLU reaches the loss of SiLU, that the ReLU activation ratio falls with data, that the
SiLU activation ratio rises, that ReLU ends sparser, and that the limits of either do not depend on scale; at one size,
that the limit rises with the width-depth ratio. Each is judged at its own 90% interval, without correction for their
number, by a test whose unit is a size. All other claims are secondary; most of their tests are means over runs or
regressions with seeds as blocks. Where the seeds of a size share what the size has of its own, such an interval is too
narrow: a secondary verdict says where to look, not what holds.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from sparsity_utils.laws.outcomes import MAIN
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Estimate, decide, no_estimate

SLOPE_MARGIN = 0.03  # activation ratio per decade of parameters: just above both published slopes, +1.6 and -2.6 points
# How every test over sizes counts: t intervals of `pooled.pooled_means` and `pooled.pooled_slopes`.
MEANS = "mean over the sizes of a line, each size the mean over its seeds; t interval, the variance of sizes pooled "
MEANS += "over the lines of sizes (degrees of freedom: sizes less lines)"
SLOPES = "the means over the seeds of each size; own intercept and slope for each line of sizes, residual variance "
SLOPES += "pooled over the lines (degrees of freedom: sizes less twice the lines)"


@dataclass(frozen=True)
class Verdict:
    """One row of a notebook's last table. `here` and its 90% interval are in `unit`; NaN where there is no number."""

    claim: "Claim"
    here: float
    interval: tuple[float, float]
    verdict: str
    reason: str


@dataclass(frozen=True)
class Claim:
    """A published claim and the test that decides it: that an estimated quantity lies inside `region`.

    A primary claim is one of the few that the study is planned for; all others are secondary.
    """

    key: str  # names the claim, whatever becomes of its sentence
    question: str  # the finding that it belongs to
    claim: str
    published: str
    unit: str
    test: str
    threshold: str = "90% interval above 0"
    region: tuple[float, float] = (0.0, math.inf)
    scale: float = 100.0  # an estimate times this is in `unit`: shares are shown in points or percent
    primary: bool = False

    @property
    def rank(self) -> str:
        """The word for it in a table."""
        return "primary" if self.primary else "secondary"

    def on(self, line: str) -> "Claim":
        """The same claim on the sizes of a line: on that at a second width-depth ratio its sentence says so."""
        if line == MAIN:
            return self
        return replace(self, key=f"{self.key}_{line}", claim=f"{self.claim}, at a second width-depth ratio")

    def _rounded(value: float) -> str:
    """About three significant digits, without a negative zero."""
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text
