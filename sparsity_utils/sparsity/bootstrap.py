"""Standard errors over documents in one pass: a Poisson bootstrap, which keeps no values of single documents.

Each document enters each replicate a Poisson(1) number of times, which for many documents is resampling with
replacement (Hanley & MacGibbon 2006, doi:10.1016/j.cmpb.2006.04.006). The weights are a function of the document's
number alone, so that a document may come in several parts, with others between them.
"""

import math

import numpy as np

REPLICATES = 400  # their spread is known to 3.5%
COVERAGE = (5, 95)  # percentiles: a 90% interval


class DocumentBootstrap:
    """Sums over resampled documents."""

    def __init__(self, columns: int, seed: int = 0) -> None:
        """`columns`: quantities summed. Bootstraps with one seed resample the same documents alike."""
        self.seed, self.replicates = seed, np.zeros((REPLICATES, columns))
        self._seen: set[int] = set()
        self._last: int | None = None
        self._weights: np.ndarray = np.empty(0)

    def add(self, document: int, values: np.ndarray) -> None:
        """Add a part of `document`: `values`, (columns,)."""
        if document != self._last:
            self._weights = np.random.default_rng([self.seed, document]).poisson(1.0, REPLICATES)
            self._last = document
            self._seen.add(document)
        self.replicates += self._weights[:, None] * values

    @property
    def documents(self) -> int:
        """Number of different documents added."""
        return len(self._seen)


def standard_error(replicates: np.ndarray, documents: int) -> float:
    """Standard deviation of an estimate over its replicates, (REPLICATES,); NaN with fewer than two documents."""
    known = replicates[np.isfinite(replicates)]  # with few documents a replicate may be empty
    return float(known.std(ddof=1)) if documents > 1 and len(known) > 1 else math.nan


def interval(replicates: np.ndarray, documents: int) -> tuple[float, float]:
    """90% percentile interval of an estimate; NaN with fewer than two documents."""
    known = replicates[np.isfinite(replicates)]
    if documents < 2 or len(known) < 2:
        return math.nan, math.nan
    low, high = np.percentile(known, COVERAGE)
    return float(low), float(high)
