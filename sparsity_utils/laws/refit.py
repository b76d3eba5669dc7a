"""The published curves fitted again: coefficients with intervals, rival forms, forecasts, and what a limit rests on.

Each function takes a table of curves as `published.read_curves` gives it and returns a table that results/columns.csv
describes. Any curves with these columns will do; those of models in PUBLISHED_LAWS are compared with what was printed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparsity_utils import paths
from sparsity_utils.laws.data_law import RIVAL_FORMS, TOKEN_UNIT, Array, compare_forms, fit_data_law
from sparsity_utils.laws.holdout import forecast_errors
from sparsity_utils.laws.limits import published_form
from sparsity_utils.laws.published import PUBLISHED_LAWS, REVISED_LAW, PublishedLaw

NEAR = 0.001  # activation ratio (0.1 points): a curve this close to its limit has reached it
CURVE = ["activation", "model"]
SAME = 0.01  # relative difference up to which a coefficient counts as the printed one; three digits are printed
MOST_DROPPED = 8  # first points of a curve left out in search of the printed coefficients
PRINTED, SCRIPTS, WITHOUT = "printed in the paper", "in the authors' scripts", "without the first "


def _without_first(k: int, d: Array) -> NDArray[np.bool_]:
    return np.arange(d.size) >= k


# Which points of a curve a limit is fitted to; (tokens,) -> (tokens,) of bool
PARTS: dict[str, Callable[[Array], NDArray[np.bool_]]] = {
    "all points": lambda d: d > 0,
    "first half of the tokens": lambda d: d <= 0.50 * d[-1],
    "first 75% of the tokens": lambda d: d <= 0.75 * d[-1],
    "first 90% of the tokens": lambda d: d <= 0.90 * d[-1],
    **{f"{WITHOUT}{k}": partial(_without_first, k) for k in range(1, MOST_DROPPED + 1)},
}


def refit_laws(curves: pd.DataFrame) -> pd.DataFrame:
    """The published form fitted to each curve, beside what was printed for it: one row per curve.

    Columns as of published_refit in results/columns.csv. Limits and errors are activation ratios, D is in 1e9 tokens.
    `<parameter>_low` and `_high` are ends of the 90% block bootstrap interval. `late` errors are of the points beyond
    half of the tokens. `dropped` is the smallest number of first points without which the refit gives the printed
    alpha, c and A0.
    """
    rows = [_law_row(activation, model, curve) for activation, model, curve in _each(curves)]
    return pd.DataFrame(rows).astype({"dropped": "Int64"})


def compare_rivals(curves: pd.DataFrame) -> pd.DataFrame:
    """`compare_forms` of every curve: of its published form and the rivals."""
    tables = []
    for activation, model, curve in _each(curves):
        forms = (published_form(activation), *RIVAL_FORMS)
        table = compare_forms(curve["tokens"], curve["activation_ratio"], forms)
        tables.append(_about(activation, model, table))
    return pd.concat(tables, ignore_index=True)


def forecast_curves(curves: pd.DataFrame) -> pd.DataFrame:
    """`holdout.forecast_errors` of every curve: its published form, the rivals, and the last value."""
    tables = []
    for activation, model, curve in _each(curves):
        forms = (published_form(activation), *RIVAL_FORMS)
        found = forecast_errors(curve["tokens"], curve["activation_ratio"], forms)
        tables.append(_about(activation, model, found))
    return pd.concat(tables, ignore_index=True)


def limit_stability(curves: pd.DataFrame) -> pd.DataFrame:
    """The limits of each curve: as printed, and those of the published form fitted to PARTS of its points.

    Columns: activation, model, source (PRINTED, SCRIPTS or the part), points and last_tokens (what was fitted), limit
    with its 90% interval low to high, rmse (over the whole curve), unseen (`Fit.unseen`), reason.
    """
    rows = []
    for activation, model, curve in _each(curves):
        d, a = curve["tokens"].to_numpy(), curve["activation_ratio"].to_numpy()
        about, form = {"activation": activation, "model": model}, published_form(activation)
        for law, source in ((_printed(activation, model), PRINTED), (REVISED_LAW, SCRIPTS)):
            if law is not None and (law.activation, law.model) == (activation, model):
                rows.append(about | {"source": source, "limit": law.limit, "rmse": _rmse(law.predict(d), a)})
        for part, chosen in PARTS.items():
            keep = chosen(d)
            fit = fit_data_law(d[keep], a[keep], form)
            entry = {"points": fit.n, "last_tokens": d[keep].max(initial=0), "limit": _number(fit.limit)}
            ends = {"low": fit.interval.low, "high": fit.interval.high}
            errors = {"rmse": _rmse(fit.predict(d), a), "unseen": fit.unseen, "reason": fit.reason}
            rows.append(about | {"source": part} | entry | ends | errors)
    columns = [*CURVE, "source", "points", "last_tokens", "limit", "low", "high", "rmse", "unseen", "reason"]
    return pd.DataFrame(rows).reindex(columns=columns).astype({"points": "Int64"})


TABLES: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "published_refit": refit_laws,
    "published_forms": compare_rivals,
    "published_forecasts": forecast_curves,
    "published_stability": limit_stability,
}


def write_tables(curves: pd.DataFrame, folder: Path) -> Iterator[Path]:
    """Write every table of TABLES into `folder`; yield the files."""
    for name, make in TABLES.items():
        table, file = make(curves), folder / f"{name}.csv"
        with paths.written_aside(file) as aside:
            table.to_csv(aside, index=False, float_format="%.6g")
        yield file


def tokens_to_limit(form: str, params: dict[str, float], within: float = NEAR) -> float:
    """Tokens after which a law of a published form stays within `within` (activation ratio) of its limit.

    It solves |A(D) - A0| = within for D; 0 where the law is that close from the start.
    """
    power = params["c"] / within  # c / D^alpha = within
    if form == "logspace":  # exp(-c D^alpha + b) = within
        power = max(params["b"] - np.log(within), 0) / params["c"]
    with np.errstate(over="ignore"):
        return float(TOKEN_UNIT * np.power(power, 1 / params["alpha"]))


def _law_row(activation: str, model: str, curve: pd.DataFrame) -> dict[str, object]:
    d, a, form = curve["tokens"].to_numpy(), curve["activation_ratio"].to_numpy(), published_form(activation)
    fit, law = fit_data_law(d, a, form), _printed(activation, model)
    row = {"activation": activation, "model": model, "form": form, "points": d.size}
    row |= {"first_tokens": d[0], "last_tokens": d[-1]}
    for name in ("alpha", "b", "c", "A0"):
        column = "limit" if name == "A0" else name
        low, high = fit.interval.params.get(name, (np.nan, np.nan))
        row |= {column: fit.params.get(name, np.nan), f"{column}_low": low, f"{column}_high": high}
        row[f"published_{column}"] = getattr(law, column, np.nan)
    row["limit"] = _number(fit.limit)
    late = d > d[-1] / 2
    row |= {"rmse": fit.rmse, "late_rmse": _rmse(fit.predict(d[late]), a[late]), "unseen": fit.unseen}
    row["tokens_to_limit"] = np.nan if fit.limit is None else tokens_to_limit(form, fit.params)
    row |= dict.fromkeys(("published_rmse", "published_late_rmse", "published_tokens_to_limit"), np.nan)
    row |= {"dropped": pd.NA, "reason": fit.reason}
    if law is not None:
        row |= {"published_rmse": _rmse(law.predict(d), a), "published_late_rmse": _rmse(law.predict(d[late]), a[late])}
        row |= {"published_tokens_to_limit": tokens_to_limit(form, law._asdict()), "dropped": _dropped(d, a, law)}
    return row


def _dropped(tokens: Array, ratio: Array, law: PublishedLaw) -> int | None:
    """How many first points must be left out for the refit to give the printed coefficients; None if nothing does."""
    for k in range(MOST_DROPPED + 1):
        params = fit_data_law(tokens[k:], ratio[k:], published_form(law.activation)).params
        pairs = ((law.alpha, "alpha"), (law.c, "c"), (law.limit, "A0"))
        if params and all(abs(params[name] / printed - 1) <= SAME for printed, name in pairs):
            return k
    return None


def _each(curves: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Activation, model and points of each curve, in rising tokens."""
    for (activation, model), curve in curves.groupby(CURVE, sort=True):
        yield activation, model, curve.sort_values("tokens")


def _about(activation: str, model: str, table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(activation=activation, model=model)[[*CURVE, *table.columns]]


def _printed(activation: str, model: str) -> PublishedLaw | None:
    return next((law for law in PUBLISHED_LAWS if (law.activation, law.model) == (activation, model)), None)


def _rmse(predicted: Array, measured: Array) -> float:
    return float(np.sqrt(np.mean((predicted - measured) ** 2)))


def _number(limit: float | None) -> float:
    return float("nan") if limit is None else limit
