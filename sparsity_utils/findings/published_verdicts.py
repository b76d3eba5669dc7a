"""Notebook 07: tables of the refitted published curves in, verdicts on the claims of claims.py out.

The unit of a test is a curve. A test whose conditions are not met is inconclusive and says why; only an unusable
table is an error.
"""

import math

import numpy as np
import pandas as pd

from sparsity_utils.findings import claims
from sparsity_utils.findings.judgement import Claim, Verdict
from sparsity_utils.findings.verdicts import best_of_all
from sparsity_utils.laws.data_law import LEVEL, RIVAL_FORMS
from sparsity_utils.laws.forecasts import LAST_VALUE
from sparsity_utils.laws.limits import published_form, require
from sparsity_utils.laws.trends import (
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SUPPORTED,
    Estimate,
    mean_over_runs,
    supports_positive,
)
from sparsity_utils.models.config import ACTIVATIONS

CURVE = ["activation", "model"]
LIMIT = ["limit", "limit_low", "limit_high", "published_limit"]
RECIPE = "activation == 'relu' and model == '2.4B'"  # its limit sparsity of 93.52% is published (app. L)
FIRST_PART = "first 75% of the tokens"


def published_curves(
    refit: pd.DataFrame, forms: pd.DataFrame, forecasts: pd.DataFrame, stability: pd.DataFrame
) -> list[Verdict]:
    """One verdict per claim, from the tables of refit.TABLES.

    Raises InputError for missing columns, duplicates and NaN.
    """
    require(refit, [*CURVE, *LIMIT, "published_rmse", "dropped", "reason"], CURVE, ["published_limit"], "refit")
    require(forms, [*CURVE, "form", "aicc", "rmse"], [*CURVE, "form"], [], "forms")
    require(forecasts, [*CURVE, "form", "rmse"], [*CURVE, "form"], [], "forecasts")
    require(stability, [*CURVE, "source", "limit"], [*CURVE, "source"], [], "stability")
    return [
        _printed_laws(refit),
        *(_limits_again(refit[refit["activation"] == name], claims.refit_claim(name)) for name in ("relu", "silu")),
        _sparsity_known(refit, stability),
        *(_best_form(forms[forms["activation"] == name], name) for name in ("relu", "silu")),
        _forecast(forecasts),
    ]


def _printed_laws(refit: pd.DataFrame) -> Verdict:
    worst = refit.loc[refit["published_rmse"].idxmax()]
    error = worst["published_rmse"]
    verdict = SUPPORTED if error <= claims.PRINTED_ERROR else NOT_SUPPORTED
    within = int((refit["published_rmse"] <= claims.PRINTED_ERROR).sum())
    reasons = f"{within} of {len(refit)} curves", f"worst: {_name(worst)}", _protocol(refit)
    return claims.PRINTED_LAWS.judged(Estimate(error, error, error, LEVEL, len(refit)), verdict, *reasons)


def _limits_again(refit: pd.DataFrame, claim: Claim) -> Verdict:
    """The printed limit less the refitted one, on the curve where it is furthest off for the width of its interval."""
    known = refit.dropna(subset=LIMIT)
    if known.empty:
        return claim.judged(_nothing(), INCONCLUSIVE, "no curve gives a limit")
    width = known["limit_high"] - known["limit_low"]
    outside = (known["published_limit"] < known["limit_low"]) | (known["published_limit"] > known["limit_high"])
    off = known["published_limit"] - known["limit"]
    worst = known.loc[(off.abs() / width).idxmax()]
    ends = (worst["published_limit"] - worst[name] for name in ("limit", "limit_high", "limit_low"))
    vague = len(refit) - int((width <= claims.DETERMINED).sum())
    verdict = NOT_SUPPORTED if outside.any() else INCONCLUSIVE if vague else SUPPORTED
    inside = f"{int((~outside).sum())} of {len(refit)} printed limits inside"
    unknown = f"{vague} without an interval of {100 * claims.DETERMINED:g} point" if vague else ""
    estimate = Estimate(*map(float, ends), LEVEL, len(known))
    return claim.judged(estimate, verdict, inside, unknown, f"furthest off: {_name(worst)}", _protocol(refit))


def _protocol(refit: pd.DataFrame) -> str:
    """How many printed laws come back once first points are left out, and how many points that takes."""
    dropped = refit["dropped"].dropna().astype(int)
    if dropped.empty:
        return "no printed law comes back without some first points"
    return (
        f"{len(dropped)} of {len(refit)} printed laws come back when the first {dropped.min()} to {dropped.max()} "
        "points are left out"
    )


def _sparsity_known(refit: pd.DataFrame, stability: pd.DataFrame) -> Verdict:
    claim, row = claims.SPARSITY_KNOWN, refit.query(RECIPE)
    if row.empty or row[LIMIT].isna().any(axis=None):
        return claim.judged(_nothing(), INCONCLUSIVE, "no limit of the 2.4B curve")
    row = row.iloc[0]
    part = stability.query(f"{RECIPE} and source == @FIRST_PART")["limit"]
    early = part.iloc[0] if len(part) else math.nan
    width = row["limit_high"] - row["limit_low"]
    holds = row["limit_low"] <= early <= row["limit_high"]  # not so without an early limit
    sound = not isinstance(row["reason"], str) or not row["reason"]
    verdict = SUPPORTED if sound and holds and width <= claims.DETERMINED else NOT_SUPPORTED
    estimate = Estimate(*(1 - row[name] for name in ("limit", "limit_high", "limit_low")), LEVEL, 1)
    from_part = f"{100 * (1 - early):.2f}%" if np.isfinite(early) else "no limit"
    reasons = f"interval {100 * width:.1f} points wide", f"{FIRST_PART}: {from_part}", "" if sound else row["reason"]
    return claim.judged(estimate, verdict, *reasons)


def _best_form(forms: pd.DataFrame, activation: str) -> Verdict:
    """The test of notebook 02, on curves instead of runs."""
    form = published_form(activation)
    aicc, rmse = (forms.pivot_table(column, "model", "form") for column in ("aicc", "rmse"))
    columns = {"index": aicc.index, "columns": RIVAL_FORMS}
    gaps = aicc.sub(aicc[form], axis=0).reindex(**columns) if form in aicc else pd.DataFrame(**columns, dtype=float)
    fit = np.log(rmse.clip(lower=1e-9))
    against = fit.sub(fit[form], axis=0).reindex(**columns) if form in fit else gaps
    return best_of_all(claims.form_claim(activation, form, "published_curves"), gaps, against)


def _forecast(forecasts: pd.DataFrame) -> Verdict:
    """ln of the last value's error over that of the published form, one per curve."""
    errors = forecasts.set_index([*CURVE, "form"])["rmse"].unstack("form")
    law = pd.Series({curve: errors.at[curve, published_form(curve[0])] for curve in errors.index})
    ratio = np.log(errors[LAST_VALUE].to_numpy() / law.to_numpy(dtype=float))
    estimate = mean_over_runs(ratio[np.isfinite(ratio)])
    better = f"better on {int((ratio > 0).sum())} of {ratio.size} curves"
    return claims.LAW_FORECASTS.judged(estimate, supports_positive(estimate), estimate.reason or better)


def _name(row: pd.Series) -> str:
    return f"{ACTIVATIONS[row['activation']]} {row['model']}"


def _nothing() -> Estimate:
    return Estimate(math.nan, math.nan, math.nan, LEVEL, 0)
