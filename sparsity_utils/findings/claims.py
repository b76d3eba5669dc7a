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

    def decide(self, estimate: Estimate) -> str:
        """The verdict of an estimate by the region; inconclusive where there is none."""
        return decide(estimate, *self.region)

    def judged(self, estimate: Estimate, *reasons: str, verdict: str | None = None) -> Verdict:
        """What an estimate says: `verdict` where the region alone does not decide, and the reasons not empty."""
        here, *interval = (self.scale * value for value in (estimate.value, estimate.low, estimate.high))
        reason = "; ".join(filter(None, reasons))
        return Verdict(self, here, tuple(interval), verdict or self.decide(estimate), reason)

    def counted(self, estimate: Estimate, unit: str, *notes: str) -> Verdict:
        """`judged`, the reason being what the estimate rests on: `9 runs`, or why there is none."""
        return self.judged(estimate, estimate.reason or f"{estimate.n} {unit}", *notes)

    def undecided(self, reason: str) -> Verdict:
        """Inconclusive, without a number, and why."""
        return self.judged(no_estimate(reason), reason)

    def judged_all(
        self, estimates: Mapping[str, Estimate], unit: str, *notes: str, words: Mapping[str, str] | None = None
    ) -> Verdict:
        """True of every estimate, an intersection-union test: each at the full level, no correction needed.

        The row shows the estimate that decides: of those with the worst verdict, one without a number, else that whose
        interval reaches furthest out of the region. words: the verdict on each where the region alone does not decide.
        """
        words = words or {name: self.decide(estimate) for name, estimate in estimates.items()}
        verdict = next(word for word in (NOT_SUPPORTED, INCONCLUSIVE, SUPPORTED) if word in words.values())
        low, high = self.region
        inside = {
            name: (not estimate.reason, min(estimate.low - low, high - estimate.high))
            for name, estimate in estimates.items()
            if words[name] == verdict
        }
        name = min(inside, key=inside.__getitem__)
        estimate = estimates[name]
        counted = estimate.reason or f"{estimate.n} {unit}"
        return self.judged(estimate, counted, f"decides: {name}", *notes, verdict=verdict)


class Verdicts(list[Verdict]):
    """The verdicts of a notebook, in the order of its claims."""

    def table(self) -> pd.DataFrame:
        """The closing table as rounded text: question, published, here, interval, verdict."""
        rows = []
        for v in self:
            known = bool(np.isfinite([v.here, *v.interval]).all())
            here = f"{_rounded(v.here)} {v.claim.unit}" if known else "none"
            interval = f"{_rounded(v.interval[0])} to {_rounded(v.interval[1])}" if known else "none"
            rows.append((v.claim.claim, v.claim.published, here, interval, v.verdict))
        return pd.DataFrame(rows, columns=["question", "published", "here", "interval", "verdict"])

    def details(self) -> pd.DataFrame:
        """How each verdict came about: question, test, threshold, reason."""
        rows = [(v.claim.claim, v.claim.test, v.claim.threshold, v.reason) for v in self]
        return pd.DataFrame(rows, columns=["question", "test", "threshold", "reason"])


def stated(claims: Iterable[Claim]) -> pd.DataFrame:
    """What a notebook states before its results: question, published, test, threshold, rank."""
    rows = [(claim.claim, claim.published, claim.test, claim.threshold, claim.rank) for claim in claims]
    return pd.DataFrame(rows, columns=["question", "published", "test", "threshold", "rank"])


def _rounded(value: float) -> str:
    """About three significant digits, without a negative zero."""
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text
