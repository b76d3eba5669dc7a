"""Intervals over documents, for what was measured on one model: a quantity made of sums over documents, resampled."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from sparsity_utils.laws.trends import Estimate, no_estimate

REPLICATES = 2000
COVERAGE = (5, 95)  # percentiles: a 90% interval


def over_documents(sums: pd.DataFrame, statistic: Callable[[pd.DataFrame], pd.Series]) -> Estimate:
    """`statistic` of the sums of all documents, with the percentile interval of a Poisson bootstrap over documents.

    In each replicate a document counts a Poisson(1) number of times (as in `sparsity.evaluation`). Documents of equal
    rank have equal weights in every call, so that two estimates on the same documents are paired.

    Args:
        sums: one row per document, one column per summed quantity.
        statistic: makes a number of each row of such sums.
    """
    if len(sums) < 2:
        return no_estimate(f"only {len(sums)} documents; at least 2 are needed", len(sums))
    weights = np.random.default_rng(0).poisson(1.0, (REPLICATES, len(sums)))
    replicates = pd.DataFrame(weights @ sums.to_numpy(dtype=float), columns=sums.columns)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(replicates).to_numpy(dtype=float)
    low, high = np.percentile(values[np.isfinite(values)], COVERAGE)
    return Estimate(float(statistic(sums.sum().to_frame().T).iloc[0]), float(low), float(high), len(sums))
