"""Notebook 08: predictions of held-out runs in, verdicts on the claims of claims.py out.

A test whose conditions are not met is inconclusive and says why; only an unusable table is an error.
"""

import math

import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from sparsity_utils.findings import claims
from sparsity_utils.findings.judgement import Verdict
from sparsity_utils.laws.data_law import LEVEL
from sparsity_utils.laws.holdout import COLUMNS, errors
from sparsity_utils.laws.limits import SHAPE, require
from sparsity_utils.laws.trends import (
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SUPPORTED,
    Estimate,
    equivalence_of_pairs,
    mean_over_runs,
    supports_positive,
)

KEY = ["split", "quantity", *SHAPE, "parameters", "seed"]


def design(held: pd.DataFrame) -> list[Verdict]:
    """Do the intervals hold, do the predictions beat a mean, and do they reach a size beyond the fit?

    held: as `holdout.held_out` gives it; a study too small to hold anything out gives no rows, and nothing is
    decided. Raises InputError for missing columns, duplicates and NaN.
    """
    if len(held):
        require(held, COLUMNS, KEY, ["predicted", "low", "high", "measured", "mean_of_others"], "held-out runs")
    table = held.assign(**errors(held))
    by_shape, by_size = (table[table["split"] == split] for split in ("shape", "size"))
    ratio, loss = "activation ratio", "loss"
    return [
        _covers(by_shape, ratio),
        _better(by_shape[by_shape["quantity"] == ratio]),
        _reaches(by_size, ratio, 100 * claims.SLOPE_MARGIN),
        _covers(by_shape, loss),
        _reaches(by_size, loss, 100 * claims.PREDICTED_LOSS_MARGIN),
    ]


def _covers(rows: pd.DataFrame, quantity: str) -> Verdict:
    rows, claim = rows[rows["quantity"] == quantity], claims.cover_claim(quantity)
    if rows.empty:
        nothing = Estimate(math.nan, math.nan, math.nan, LEVEL, 0)
        return claim.judged(nothing, INCONCLUSIVE, "without a shape the other runs are too few for an interval")
    inside = int(rows["inside"].sum())
    low, high = proportion_confint(inside, len(rows), 1 - LEVEL, method="beta")
    estimate = Estimate(inside / len(rows), float(low), float(high), LEVEL, len(rows))
    verdict = NOT_SUPPORTED if high < LEVEL else SUPPORTED if low > claims.COVERED else INCONCLUSIVE
    shapes = len(rows[SHAPE[1:]].drop_duplicates())
    return claim.judged(estimate, verdict, f"{inside} of {len(rows)} runs of {shapes} shapes")


def _better(rows: pd.DataFrame) -> Verdict:
    nearer = rows.assign(nearer=rows["error_of_mean"].abs() - rows["error"].abs()).groupby(SHAPE)["nearer"].mean()
    estimate = mean_over_runs(nearer)
    reason = f"{len(nearer)} pairs of shape and activation function" + "; at least 2 are needed" * bool(estimate.reason)
    return claims.BETTER_THAN_MEAN.judged(estimate, supports_positive(estimate), reason)


def _reaches(rows: pd.DataFrame, quantity: str, margin: float) -> Verdict:
    """One value per shape and activation function: their seeds share a prediction."""
    off = rows[rows["quantity"] == quantity].groupby([*SHAPE, "parameters"])["error"].mean()
    result, claim = equivalence_of_pairs(off, margin), claims.size_claim(quantity)
    if result.estimate.reason:
        reason = f"{len(off)} pairs could be predicted from runs of at most half their size; at least 2 are needed"
        return claim.judged(result.estimate, result.verdict, reason)
    sizes = sorted(set(off.index.get_level_values("parameters")))
    reach = f"{len(off)} pairs of shape and activation function, {sizes[0]:,} to {sizes[-1]:,} parameters"
    return claim.judged(result.estimate, result.verdict, reach, f"TOST p = {result.p_value:.2g}")
