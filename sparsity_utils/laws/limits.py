"""The limit A0 extrapolated from the curve of each run and of each shape, and what was measured beside it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sparsity_utils.console import InputError
from sparsity_utils.laws.data_law import Fit, fit_data_law
from sparsity_utils.laws.trends import run_slopes
from sparsity_utils.models.config import LAST_CHECKPOINTS

# The published form of each activation (arXiv 2411.02335, section 4.1). ReLU^2 and GELU are not in the paper: ReLU^2,
# which has exact zeros, takes the form of ReLU; GELU, which is smooth, takes that of SiLU.
PUBLISHED_FORM = {"relu": "logspace", "relu2": "logspace", "silu": "power", "gelu": "power"}
WIDEST_INTERVAL = 0.06  # of a sound limit: the whole +-3 points of the scale test; a wider one cannot decide it

SHAPE = ["activation", "d_model", "n_layers"]
COLUMNS = [
    *("run", "role", *SHAPE, "parameters", "width_depth_ratio", "seed", "step", "tokens"),
    *("validation_loss", "activation_ratio", "fit"),
]
LIMITS = [
    *(*SHAPE, "parameters", "width_depth_ratio", "seed"),
    *("limit", "low", "high", "spread", "last_five_mean", "last_five_spread", "sound", "reason"),
]


def require(table: pd.DataFrame, columns: Iterable[str], key: list[str], numbers: Iterable[str], what: str) -> None:
    """Raise InputError unless `table` has rows and `columns`, no `key` twice, and no gap in the columns `numbers`."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InputError(f"The {what} table lacks the columns {', '.join(missing)}; measure the study again.")
    if table.empty:
        raise InputError(f"The {what} table has no rows; run the study first.")
    doubled = table[table.duplicated(key)]
    if len(doubled):
        where = ", ".join(f"{name} {doubled.iloc[0][name]}" for name in key)
        raise InputError(f"The {what} table has two rows for {where}; keep one of them.")
    for column in numbers:
        gaps = table[table[column].isna()]
        if len(gaps):
            row = ", ".join(f"{name} {gaps.iloc[0][name]}" for name in key)
            raise InputError(f"The {what} table has no {column} (NaN) at {row}; measure that row or drop it.")


def check_checkpoints(checkpoints: pd.DataFrame) -> None:
    """Raise InputError for missing columns, a checkpoint or a run given twice, or gaps in the numbers used here."""
    numbers = ["tokens", "parameters", "width_depth_ratio", "validation_loss", "activation_ratio"]
    require(checkpoints, COLUMNS, ["run", "step"], numbers, "checkpoints")
    runs = checkpoints[["run", *SHAPE, "seed"]].drop_duplicates()
    require(runs, [], [*SHAPE, "seed"], [], "checkpoints (one row per run)")


def last_means(checkpoints: pd.DataFrame, column: str = "activation_ratio") -> pd.DataFrame:
    """Mean of `column` over each run's last five stable checkpoints, as `last_five_mean` beside run, shape and seed."""
    stable = checkpoints[checkpoints["role"] == "stable"].sort_values("tokens")
    about = ["run", *SHAPE, "parameters", "width_depth_ratio", "seed"]
    means = stable.groupby(about, sort=True)[column].apply(lambda values: values.tail(LAST_CHECKPOINTS).mean())
    return means.rename("last_five_mean").reset_index()


def fit_points(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """The stable checkpoints that a law is fitted to: warm-up points dropped."""
    return checkpoints[(checkpoints["role"] == "stable") & checkpoints["fit"].astype(bool)]


@dataclass(frozen=True)
class Curves:
    """The published form of the data law, fitted once to every run of a table and to the seeds of a size together."""

    checkpoints: pd.DataFrame
    runs: dict[str, Fit]  # by run
    sizes: dict[tuple[str, int, int], Fit]  # by activation, d_model and n_layers; seeds share the curve


def fit_curves(checkpoints: pd.DataFrame) -> Curves:
    """Fit the curves of a table of checkpoints. Raises InputError for missing columns, duplicates and NaN."""
    check_checkpoints(checkpoints)
    points, runs, sizes = fit_points(checkpoints), {}, {}
    for shape, members in checkpoints[["run", *SHAPE]].drop_duplicates().groupby(SHAPE, sort=True):
        form, curve = published_form(shape[0]), points[points["run"].isin(members["run"])]
        for run in members["run"]:
            own = curve[curve["run"] == run]
            runs[run] = fit_data_law(own["tokens"], own["activation_ratio"], form)
        sizes[shape] = fit_data_law(curve["tokens"], curve["activation_ratio"], form, curve["seed"])
    return Curves(checkpoints, runs, sizes)


def limits_table(curves: Curves, seed_intervals: bool = False) -> pd.DataFrame:
    """Limit activation ratio of every shape and activation: a row per seed, and "all" for the curve that seeds share.

    Columns: activation, d_model, n_layers, parameters, width_depth_ratio, seed ("all" or the seed as text), limit (A0
    of the published form; NaN if there is none), low, high (90% block bootstrap within runs), spread (largest minus
    smallest sound limit of the seeds; "all" only), last_five_mean (measured, nothing extrapolated), last_five_spread
    (the same over the seeds; "all" only), sound, reason. A limit is sound when its fit is and, for "all", its interval
    is at most 6 points wide. low and high of single seeds are NaN without `seed_intervals`: each bootstrap takes up to
    a second.
    """
    rows, size = [], [*SHAPE, "parameters", "width_depth_ratio"]
    for shape, runs in last_means(curves.checkpoints).groupby(size, sort=True):
        about, seeds = dict(zip(size, shape, strict=True)), []
        for run in runs.sort_values("seed").itertuples():
            fit = curves.runs[run.run]
            entry = _with_interval(fit) if seed_intervals else _entry(fit)
            seeds.append({**about, "seed": str(run.seed), **entry, "last_five_mean": run.last_five_mean})
        common = _common(curves.sizes[shape[: len(SHAPE)]])
        common |= {"spread": _spread(row["limit"] for row in seeds if row["sound"])}
        measured = runs["last_five_mean"]
        common |= {"last_five_mean": measured.mean(), "last_five_spread": _spread(measured)}
        rows += [{**about, "seed": "all", **common}, *seeds]
    return pd.DataFrame(rows).reindex(columns=LIMITS)


def _spread(values: Iterable[float]) -> float:
    """Largest minus smallest value of the seeds; NaN with fewer than two (too few for a deviation)."""
    values = list(values)
    return max(values) - min(values) if len(values) > 1 else float("nan")


def published_form(activation: str) -> str:
    """The form of the data law that belongs to an activation function; InputError for one without."""
    if activation not in PUBLISHED_FORM:
        raise InputError(f"No form of the data law is known for {activation!r}; add it to limits.PUBLISHED_FORM.")
    return PUBLISHED_FORM[activation]


def _entry(fit: Fit) -> dict[str, Any]:
    return {"limit": float("nan") if fit.limit is None else fit.limit, "sound": fit.sound, "reason": fit.reason}


def _with_interval(fit: Fit) -> dict[str, Any]:
    return {**_entry(fit), "low": fit.interval.low, "high": fit.interval.high}


def _common(fit: Fit) -> dict[str, Any]:
    entry = _with_interval(fit)
    width = entry["high"] - entry["low"]
    if fit.sound and width > WIDEST_INTERVAL:
        reason = f"the interval of the limit spans {100 * width:.1f} points, more than {100 * WIDEST_INTERVAL:.0f}"
        entry |= {"sound": False, "reason": reason}
    return entry


def run_table(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """One row per run, by activation, size and seed.

    Columns: run, activation, d_model, n_layers, parameters, width_depth_ratio, seed, final_loss (validation loss of the
    last checkpoint, nats per token), last_five_mean and last_five_nonzero (activation ratio and non-zero share, mean
    over the last five stable checkpoints), slope (of the activation ratio per decade of tokens, warm-up dropped; NaN
    with fewer than three fitted points), checkpoints (fitted ones). Raises InputError for missing columns, duplicates
    and NaN.
    """
    check_checkpoints(checkpoints)
    require(checkpoints, ["nonzero_share"], ["run", "step"], ["nonzero_share"], "checkpoints")
    points = fit_points(checkpoints)
    slopes = run_slopes(points["tokens"], points["activation_ratio"], points["run"])
    loss = checkpoints.sort_values("tokens").groupby("run")["validation_loss"].last()
    nonzero = last_means(checkpoints, "nonzero_share").set_index("run")["last_five_mean"]
    table = last_means(checkpoints).sort_values([*SHAPE, "seed"], ignore_index=True)
    runs = table["run"]
    table.insert(table.columns.get_loc("seed") + 1, "final_loss", runs.map(loss))
    return table.assign(
        last_five_nonzero=runs.map(nonzero),
        slope=runs.map(lambda run: slopes.get(run, np.nan)),
        checkpoints=runs.map(points["run"].value_counts()).fillna(0).astype(int),
    )
