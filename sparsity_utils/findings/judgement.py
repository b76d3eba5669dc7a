"""What a claim is, what a verdict on it is, and the tables that show them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sparsity_utils.laws.trends import Estimate


@dataclass(frozen=True)
class Verdict:
    """One row of a notebook's last table. `here` and its 90% interval are in `unit`; NaN where there is no number."""

    question: str
    claim: str
    published: str
    here: float
    interval: tuple[float, float]
    unit: str
    test: str
    threshold: str
    verdict: str
    reason: str


@dataclass(frozen=True)
class Claim:
    """A published claim and the test that decides it. An estimate times `scale` is in `unit`.

    A primary claim is one of the few that the study is planned for; all others are secondary.
    """

    question: str
    claim: str
    published: str
    unit: str
    test: str
    threshold: str = "90% interval above 0"
    scale: float = 100.0  # shares are shown in points or percent
    primary: bool = False

    @property
    def rank(self) -> str:
        """The word for it in a table."""
        return "primary" if self.primary else "secondary"

    def judged(self, estimate: Estimate, verdict: str, *reasons: str) -> Verdict:
        """The verdict on this claim, with the reasons that are not empty."""
        return Verdict(
            self.question,
            self.claim,
            self.published,
            self.scale * estimate.value,
            (self.scale * estimate.low, self.scale * estimate.high),
            self.unit,
            self.test,
            self.threshold,
            verdict,
            "; ".join(reason for reason in reasons if reason),
        )


def to_table(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """The closing table as rounded text: question, published, here, interval, verdict."""
    rows = []
    for v in verdicts:
        known = bool(np.isfinite([v.here, *v.interval]).all())
        here = f"{_rounded(v.here)} {v.unit}" if known else "none"
        interval = f"{_rounded(v.interval[0])} to {_rounded(v.interval[1])}" if known else "none"
        rows.append((v.claim, v.published, here, interval, v.verdict))
    return pd.DataFrame(rows, columns=["question", "published", "here", "interval", "verdict"])


def details(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """How each verdict came about: question, test, threshold, reason."""
    rows = [(v.claim, v.test, v.threshold, v.reason) for v in verdicts]
    return pd.DataFrame(rows, columns=["question", "test", "threshold", "reason"])


def _rounded(value: float) -> str:
    """About three significant digits, without a negative zero."""
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text
