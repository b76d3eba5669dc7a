"""Out-of-sample forecasts: a law fitted to the first half of a run's tokens, asked for the second.

A fit is judged by what it says about points that it has not seen, beside the simplest forecast there is: that nothing
changes any more. The rows of one curve share their points, so the unit of a test is a curve.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from sparsity_utils.laws.data_law import FORMS, RIVAL_FORMS, fit_data_law
from sparsity_utils.laws.limits import SHAPE, check_checkpoints, fit_points, published_form

LAST_VALUE = "last value"  # the forecast that nothing changes any more
FORECAST = ["form", "fitted", "predicted", "rmse", "bias", "reason"]


def forecast_errors(
    tokens: ArrayLike, activation_ratio: ArrayLike, forms: Iterable[str] = tuple(FORMS), groups: ArrayLike | None = None
) -> pd.DataFrame:
    """Fit each form to the points up to half of the last tokens and predict those beyond.

    tokens, activation_ratio, groups: as for `data_law.fit_data_law`. The reference "last value" comes first: the last
    fitted value of each group, their mean. Columns: form, fitted and predicted (number of points), rmse and bias
    (predicted less measured) in activation ratio, reason (why there is no forecast; the errors are then NaN).
    Checkpoints spaced evenly in log tokens leave few points beyond the half: read `predicted` beside the errors.
    Raises InputError as `fit_data_law` does.
    """
    known = fit_data_law(tokens, activation_ratio, "constant", groups)  # checks the input
    d, a, g = known.tokens, known.activation_ratio, known.groups
    early = d <= d.max(initial=0.0) / 2
    rows = [_row(LAST_VALUE, _last_value(d[early], a[early], g[early], d[~early]), a[~early], early, "no fitted point")]
    for form in forms:
        fit = fit_data_law(d[early], a[early], form, g[early])
        rows.append(_row(form, fit.predict(d[~early]), a[~early], early, fit.reason))
    return pd.DataFrame(rows, columns=FORECAST)


def forecast_table(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """`forecast_errors` of every run of a study: the published form of its activation, its rivals, the last value.

    checkpoints: the table of a question of curves; warm-up and decay are left out, as for every fit. Columns: run,
    activation, d_model, n_layers, seed, then those of `forecast_errors`. Raises InputError for missing columns,
    duplicates and NaN.
    """
    check_checkpoints(checkpoints)
    tables = []
    for about, curve in fit_points(checkpoints).groupby(["run", *SHAPE, "seed"], sort=True):
        named = dict(zip(["run", *SHAPE, "seed"], about, strict=True))
        forms = (published_form(named["activation"]), *RIVAL_FORMS)
        tables.append(forecast_errors(curve["tokens"], curve["activation_ratio"], forms).assign(**named))
    columns = ["run", *SHAPE, "seed", *FORECAST]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _last_value(tokens: NDArray, ratio: NDArray, groups: NDArray, later: NDArray) -> NDArray[np.float64]:
    """The last value of each group, their mean, for all later tokens; NaN without a value. (later,)"""
    lasts = [ratio[groups == group][np.argmax(tokens[groups == group])] for group in np.unique(groups)]
    return np.full(later.shape, np.mean(lasts) if lasts else np.nan)


def _row(form: str, predicted: NDArray, measured: NDArray, early: NDArray, reason: str) -> dict[str, object]:
    row = {"form": form, "fitted": int(early.sum()), "predicted": measured.size, "rmse": np.nan, "bias": np.nan}
    if measured.size == 0:
        return row | {"reason": "no point lies beyond half of the last tokens"}
    errors = predicted - measured
    if np.isnan(errors).any():
        return row | {"reason": reason}
    return row | {"rmse": float(np.sqrt(np.mean(errors**2))), "bias": float(errors.mean()), "reason": ""}
