"""What a claim is, how an estimate decides it, and the tables that show claims and verdicts.

Thirteen claims of the collection are primary: the study's sizes and seeds are planned for them. Six are made at each of
two width-depth ratios:

- ReLU reaches the loss of SiLU,
- the ReLU activation ratio falls with data,
- the SiLU activation ratio rises with data,
- ReLU ends sparser,
- the ReLU limit does not depend on scale,
- the SiLU limit does not depend on scale.

The thirteenth is that at one size the limit rises with the width-depth ratio. Each primary claim is judged at its own
90% interval, without correction for their number, by a test whose unit is a size. All other claims are secondary; most
of their tests are means over runs or regressions with seeds as blocks. If all seeds of a size share a deviation, such
an interval is too narrow: a secondary verdict says where to look, not what holds.

Beside them, three experiments with designs of their own have primary claims, and the unit of their tests is a seed:

- three of `findings.lazy_neuron`, three seeds: a plain FFN begins with half of its neurons, every layer grows sparser,
  and does so with random labels without weight decay;
- three of `findings.q_sparse`, three seeds: straight-through gradients, the price of leaving a third of the inputs out,
  and the best share to leave out at equally many active parameters;
- the seven of `findings.digits` on a two-layer network, 20 seeds.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from sparsity_utils.laws.data_law import LEVEL, RIVAL_FORMS
from sparsity_utils.laws.lines import MAIN
from sparsity_utils.laws.trends import (
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SUPPORTED,
    Estimate,
    decide,
    mean_over_runs,
    no_estimate,
)
from sparsity_utils.models.config import ACTIVATIONS

INTERVAL = f"{LEVEL:.0%} interval"  # heading; an interval of another level says so beside its ends
SLOPE_MARGIN = 0.03  # activation ratio per decade of parameters: just above both published slopes, +1.6 and -2.6 points
# How every test over sizes counts: t intervals of `lines.pooled_means` and `lines.pooled_slopes`.
MEANS = "mean over the sizes of a line, each size the mean over its seeds; t interval, the variance of sizes pooled "
MEANS += "over the lines of sizes (degrees of freedom: sizes less lines)"
SLOPES = "the means over the seeds of each size; own intercept and slope for each line of sizes, residual variance "
SLOPES += "pooled over the lines (degrees of freedom: sizes less twice the lines)"


@dataclass(frozen=True)
class Verdict:
    """One row of a notebook's last table. `here` and its interval are in `unit`; NaN where there is no number."""

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
    threshold: str = f"{LEVEL:.0%} interval above 0"
    region: tuple[float, float] = (0.0, math.inf)
    scale: float = 100.0  # an estimate times this is in `unit`: shares are shown in points or percent
    primary: bool = False
    level: float = LEVEL  # of its interval
    against: tuple[float, float] | None = None  # where an interval must lie to count against; None: outside `region`
    decimals: int = 2  # that are shown of numbers below 10

    @property
    def rank(self) -> str:
        """The word for `primary` in a table."""
        return "primary" if self.primary else "secondary"

    def on(self, line: str) -> "Claim":
        """The same claim on the sizes of a line; its key and sentence name any line but the main one."""
        if line == MAIN:
            return self
        return replace(self, key=f"{self.key}_{line}", claim=f"{self.claim}, at a second width-depth ratio")

    def decide(self, estimate: Estimate) -> str:
        """Supported if the interval lies inside the region, not supported if it counts against; else inconclusive.

        It counts against the claim if it lies wholly outside the region, or inside `against` where that is given.
        """
        word = decide(estimate, *self.region)
        if word != NOT_SUPPORTED or self.against is None:
            return word
        return NOT_SUPPORTED if decide(estimate, *self.against) == SUPPORTED else INCONCLUSIVE

    def judged(self, estimate: Estimate, *reasons: str, verdict: str = "") -> Verdict:
        """The verdict on this claim, by `decide` unless one is given, with the reasons that are not empty."""
        here, low, high = (self.scale * end for end in (estimate.value, estimate.low, estimate.high))
        why = "; ".join(reason for reason in reasons if reason)
        return Verdict(self, here, (low, high), verdict or self.decide(estimate), why)

    def counted(self, estimate: Estimate, unit: str, *reasons: str) -> Verdict:
        """`judged`, the first reason being how many units the estimate rests on, or why there is none."""
        return self.judged(estimate, estimate.reason or f"{estimate.n} {unit}", *reasons)

    def undecided(self, reason: str) -> Verdict:
        """The verdict where there is nothing to estimate from."""
        return self.judged(no_estimate(reason), reason)

    def judged_all(
        self, estimates: Mapping[str, Estimate], unit: str, *notes: str, words: Mapping[str, str] | None = None
    ) -> Verdict:
        """The verdict on the claim that every estimate lies in the region.

        It is an intersection-union test: each estimate is judged at the full level, without correction, and the worst
        verdict counts. The row shows the estimate that decides: of those with that verdict, one without a number,
        or else the one whose interval comes nearest to the wrong side of the region.

        Args:
            estimates: by name; at least one.
            unit: what an estimate counts, such as runs.
            words: the verdict on each estimate; that of `decide` by default.
        """
        words = words or {name: self.decide(estimate) for name, estimate in estimates.items()}
        verdict = next(word for word in (NOT_SUPPORTED, INCONCLUSIVE, SUPPORTED) if word in words.values())
        deciding = {name: estimate for name, estimate in estimates.items() if words[name] == verdict}
        name = min(deciding, key=lambda name: self._room(deciding[name]))
        found = deciding[name]
        return self.judged(found, found.reason or f"{found.n} {unit}", f"decides: {name}", *notes, verdict=verdict)

    def _room(self, estimate: Estimate) -> float:
        """Distance of the interval from the nearer end of the region; minus infinity where there is no number."""
        low, high = self.region
        return -math.inf if estimate.reason else min(estimate.low - low, high - estimate.high)


class Verdicts(list[Verdict]):
    """The verdicts of a finding, in the order of its claims."""

    def table(self) -> pd.DataFrame:
        """The closing table as rounded text: question, published, here, interval, verdict.

        An interval whose level is not LEVEL is followed by its level.
        """
        rows = []
        for found in self:
            known = bool(np.isfinite([found.here, *found.interval]).all())
            here, *ends = (_rounded(one, found.claim.decimals) for one in (found.here, *found.interval))
            level = "" if found.claim.level == LEVEL else f" ({100 * found.claim.level:.3g}%)"
            shown = (f"{here} {found.claim.unit}", " to ".join(ends) + level) if known else ("none", "none")
            rows.append((found.claim.claim, found.claim.published, *shown, found.verdict))
        table = pd.DataFrame(rows, columns=["question", "published", "here", "interval", "verdict"])
        table.attrs["reasons"] = [found.reason for found in self]  # kept beside it, but told in `details`
        return table

    def details(self) -> pd.DataFrame:
        """How each verdict came about: question, test, threshold, reason."""
        rows = [(found.claim.claim, found.claim.test, found.claim.threshold, found.reason) for found in self]
        return pd.DataFrame(rows, columns=["question", "test", "threshold", "reason"])


def stated(claims: Iterable[Claim]) -> pd.DataFrame:
    """What a notebook states before its results: question, published, test, threshold, rank."""
    rows = [(claim.claim, claim.published, claim.test, claim.threshold, claim.rank) for claim in claims]
    return pd.DataFrame(rows, columns=["question", "published", "test", "threshold", "rank"])


def _rounded(value: float, decimals: int) -> str:
    """About three significant digits, without a negative zero; `decimals` of numbers below 10."""
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.{decimals}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text


def form_claim(activation: str, form: str, question: str) -> Claim:
    """Does the published form describe an activation's curves better than its rivals: ours, or the published ones?"""
    ours = question == "relu_vs_silu"
    name, unit = (ACTIVATIONS[activation], "runs") if ours else (f"its {ACTIVATIONS[activation]} curves", "curves")
    return Claim(
        f"{activation}_form" if ours else f"published_{activation}_form",
        question,
        f"The published {form} law describes {name} best",
        "fits best",
        "AICc below the closest form",
        f"t interval over {unit} of the AICc difference to each of constant, log, exponential, plain power and sigmoid",
        "90% interval above 0 for every form; not supported if a form has smaller residuals, parameters not counted",
        scale=1.0,
    )


def form_gaps(forms: pd.DataFrame, form: str, curve: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tables, of AICc and of the logarithm of the root mean square error: each rival's less that of `form`.

    forms: form, aicc and rmse of every curve, named in the column `curve`. One row per curve and one column per rival;
    NaN where a form could not be fitted.
    """
    gaps = []
    for values in (forms["aicc"], np.log(forms["rmse"].clip(lower=1e-9))):
        wide = forms.assign(value=values).pivot(index=curve, columns="form", values="value")
        wide = wide.reindex(columns=[form, *RIVAL_FORMS])
        gaps.append(wide[[*RIVAL_FORMS]].sub(wide[form], axis=0))
    return gaps[0], gaps[1]


def form_verdict(claim: Claim, aicc: pd.DataFrame, misfit: pd.DataFrame, unit: str) -> Verdict:
    """The published form must be better than each rival.

    On a dozen points AICc prefers a simpler form even where the published one is true, so a simpler form with a lower
    AICc is no evidence against it. A form with smaller residuals, parameters not counted, is.

    aicc, misfit: as `form_gaps` gives them for the published form, one row per `unit`: runs or curves.
    """
    estimates = {rival: mean_over_runs(aicc[rival].dropna().astype(float)) for rival in aicc}
    words = {}
    for rival, estimate in estimates.items():
        closer = claim.decide(mean_over_runs(misfit[rival].dropna().astype(float))) == NOT_SUPPORTED
        word = claim.decide(estimate)
        words[rival] = NOT_SUPPORTED if closer else INCONCLUSIVE if word == NOT_SUPPORTED else word
    return claim.judged_all(estimates, unit, words=words)
