"""Lines of sizes: one number per run for each claim, and its mean and slope over the sizes of every line.

A line is a set of runs of several sizes at one width-depth ratio; `lines` is {name of the line: its table of
checkpoints}, with the names MAIN and SECOND. Verdicts, figures and the power table all take their numbers from here.

The unit of these tests is a size, not a run. Each size deviates a little from the mean, or the trend, of its line, and
all seeds of the size share that deviation. Runs are therefore averaged over the seeds of a size first, so that each
size counts once, however many seeds it has. The residual of a size then holds its own deviation and what its seeds
leave in their mean. A few sizes estimate the variance of residuals poorly, so it is taken to be equal on every line and
estimated from all of them together:

    means:   value of a size = intercept of its line + residual                 degrees of freedom: sizes - lines
    slopes:  value of a size = intercept of its line + slope of its line * x + residual             sizes - 2 lines

Ordinary least squares then gives t intervals. They are exact where all sizes have equally many seeds. Elsewhere they
are nearly exact, since a mean of fewer seeds varies a little more (simulated in tests/laws/test_lines.py).
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from numpy.typing import ArrayLike, NDArray

from sparsity_utils.console import InputError
from sparsity_utils.laws.data_law import LEVEL
from sparsity_utils.laws.limits import SHAPE, check_checkpoints, fit_points, last_means, require
from sparsity_utils.laws.trends import SMALLEST_DOF, Estimate, finite, no_estimate, run_slopes

SAME_TRAINING = 1.1  # largest ratio of tokens per parameter between sizes that are compared as measured
SIZE = [*SHAPE[1:], "parameters", "width_depth_ratio"]

MAIN, SECOND = "main", "second"

Lines = dict[str, pd.DataFrame]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class OverSizes:
    """A mean or a slope on one line, the sizes that it rests on, and how many sizes and lines gave the variance."""

    estimate: Estimate
    sizes: pd.DataFrame  # one row per size of this line: d_model, n_layers, parameters, value, runs
    pooled_sizes: int
    pooled_lines: int

    @property
    def reason(self) -> str:
        """Why there is no number, or how many sizes and runs there are."""
        if self.estimate.reason:
            return self.estimate.reason
        own = f"{len(self.sizes)} sizes, {self.sizes['runs'].sum()} runs"
        if self.pooled_lines == 1:
            return own
        return f"{own}; spread of {self.pooled_sizes} sizes on {self.pooled_lines} lines"

    def at(self, parameters: np.ndarray) -> np.ndarray:
        """Value at these numbers of parameters on the fitted line, whose slope per decade is `estimate`."""
        decades = np.log10(self.sizes["parameters"])
        return line_at(decades, self.sizes["value"], self.estimate.value, np.log10(parameters))


def loss_difference(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """(loss of ReLU - loss of SiLU) / loss of SiLU on validation text, at the last checkpoint of each pair of runs.

    The runs of a pair have equal size, seed and tokens.
    """
    losses = _pairs(last_checkpoints(checkpoints), "validation_loss", ["tokens"])
    return losses.assign(value=(losses["relu"] - losses["silu"]) / losses["silu"])


def relu_falls(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """Decrease of the ReLU activation ratio per decade of tokens: minus the slope of each run, warm-up dropped."""
    return _direction(checkpoints, "relu", -1)


def silu_rises(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """Increase of the SiLU activation ratio per decade of tokens: the slope of each run, warm-up dropped."""
    return _direction(checkpoints, "silu", 1)


def relu_sparser(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """Activation ratio of SiLU less that of ReLU, last-five means of pairs of runs of equal size and seed."""
    means = _pairs(last_means(checkpoints), "last_five_mean")
    return means.assign(value=means["silu"] - means["relu"])


def relu_ratio(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """ReLU activation ratio, mean over each run's last five stable checkpoints."""
    return _last(checkpoints, "relu", "activation_ratio")


def silu_ratio(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """SiLU activation ratio, mean over each run's last five stable checkpoints."""
    return _last(checkpoints, "silu", "activation_ratio")


def nonzero_share(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """Share of non-zero ReLU neurons, mean over each run's last five stable checkpoints."""
    require(checkpoints, ["nonzero_share"], ["run", "step"], ["nonzero_share"], "checkpoints")
    return _last(checkpoints, "relu", "nonzero_share")


def metric_gap(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """ReLU activation ratio less the share of non-zero neurons, last-five means of each run."""
    both, shares = relu_ratio(checkpoints), nonzero_share(checkpoints)
    return both.assign(value=both["value"] - shares["value"])


def weak_tail(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """Share of non-zero ReLU neurons less the activation ratio: active neurons that CETT-PPL drops.

    Runs of two layers or more.
    """
    gap = metric_gap(checkpoints)
    return gap.assign(value=-gap["value"])[gap["n_layers"] >= 2]


def on_lines(lines: Lines, outcome: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
    """`outcome` of every run of every line: its columns and `line`."""
    return pd.concat([outcome(table).assign(line=where) for where, table in lines.items()], ignore_index=True)


def means_on_lines(runs: pd.DataFrame) -> dict[str, OverSizes]:
    """{line: mean of `value` over its sizes}, the residual variance pooled over the lines."""
    sizes = size_means(runs)
    return _by_line(sizes, sizes, pooled_means(sizes["value"], sizes["line"]))


def slopes_on_lines(runs: pd.DataFrame) -> dict[str, OverSizes]:
    """{line: slope of `value` per decade of parameters over its sizes}, the residual variance pooled over the lines."""
    sizes = size_means(runs)
    sloping = sizes[sizes.groupby("line")["parameters"].transform("nunique") > 1]
    return _by_line(sizes, sloping, pooled_slopes(np.log10(sizes["parameters"]), sizes["value"], sizes["line"]))


def one_value_per_run(limits: pd.DataFrame, activation: str) -> tuple[pd.DataFrame, str]:
    """The rows of `limits_table` per seed with the `value` that verdicts rest on, and a sentence that says what it is.

    It is the limit A0 if every fit of the activation in the table is sound. Otherwise it is, for all rows, the measured
    mean of the last five stable checkpoints: extrapolated and measured values are never mixed, even across lines.
    """
    rows = limits[limits["activation"] == activation]
    by_seed, weak = rows[rows["seed"] != "all"], rows[~rows["sound"].astype(bool)]
    if weak.empty:
        return by_seed.assign(value=by_seed["limit"]), "rests on the limits A0 of the data law"
    first = weak.iloc[0]
    where = f"{first['d_model']}x{first['n_layers']} seed {first['seed']}"
    basis = (
        f"rests on the mean of the last five stable checkpoints: {len(weak)} of {len(rows)} fits give no sound limit "
        f"(first {where}, {first['reason']})"
    )
    return by_seed.assign(value=by_seed["last_five_mean"]), basis


def unequal_data(checkpoints: pd.DataFrame) -> str:
    """Why measured values of several sizes cannot be compared; empty if all sizes are trained equally far.

    The activation ratio depends on data, so values at unequal tokens per parameter confound size with data.
    """
    stable = checkpoints[checkpoints["role"] == "stable"]
    per_parameter = stable.groupby("run")["tokens"].max() / stable.groupby("run")["parameters"].first()
    if per_parameter.max() <= SAME_TRAINING * per_parameter.min():
        return ""
    return f"sizes differ in tokens per parameter, {per_parameter.min():.0f} to {per_parameter.max():.0f}"


def last_checkpoints(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """The last checkpoint of each run: after the decay if it has one, else of the stable stage."""
    return checkpoints.sort_values("tokens").groupby("run", sort=True).tail(1)


def lines_of(main: pd.DataFrame, second: pd.DataFrame | None = None) -> Lines:
    """{name of a line: its table of checkpoints}, of the lines that a study has.

    Raises InputError for a table that lacks columns, gives a checkpoint or a run twice, or has gaps.
    """
    lines = {MAIN: main} if second is None else {MAIN: main, SECOND: second}
    for table in lines.values():
        check_checkpoints(table)
    return lines


def _by_line(sizes: pd.DataFrame, pooled: pd.DataFrame, estimates: dict[str, Estimate]) -> dict[str, OverSizes]:
    counted = len(pooled), pooled["line"].nunique()
    return {line: OverSizes(estimate, sizes[sizes["line"] == line], *counted) for line, estimate in estimates.items()}


def _direction(checkpoints: pd.DataFrame, activation: str, sign: int) -> pd.DataFrame:
    """`sign` times the slope of the activation ratio per decade of tokens along each run that has one."""
    points = fit_points(checkpoints[checkpoints["activation"] == activation])
    slopes = run_slopes(points["tokens"], points["activation_ratio"], points["run"])
    runs = points.drop_duplicates("run")[["run", *SIZE, "seed"]]
    return runs.assign(value=sign * runs["run"].map(slopes).astype(float)).dropna(subset="value")


def _last(checkpoints: pd.DataFrame, activation: str, column: str) -> pd.DataFrame:
    means = last_means(checkpoints[checkpoints["activation"] == activation], column)
    return means.rename(columns={"last_five_mean": "value"})


def _pairs(values: pd.DataFrame, column: str, equal: tuple[str, ...] | list[str] = ()) -> pd.DataFrame:
    """Columns relu and silu: `column` of a ReLU and a SiLU run of the same size, seed and columns `equal`."""
    table = values.pivot_table(column, [*SIZE, "seed", *equal], "activation")
    return table.reindex(columns=["relu", "silu"]).dropna().reset_index()


def size_means(runs: pd.DataFrame, keys: Sequence[str] = ("line", "d_model", "n_layers")) -> pd.DataFrame:
    """One row per size: the mean over its runs (seeds) of every other column of numbers, and `runs`, their count."""
    groups = runs.drop(columns="seed").groupby(list(keys), sort=True)
    return groups.mean(numeric_only=True).assign(runs=groups.size()).reset_index()


def pooled_means(values: ArrayLike, lines: ArrayLike) -> dict[Any, Estimate]:
    """{line: mean over its sizes}, with t intervals from the residual variance that all lines share.

    values: one per size; lines: the line of each. `n` of an estimate counts the sizes of its line.
    """
    values = finite(values, "values")
    labels = _labels(lines, values)
    names = list(dict.fromkeys(labels))
    design = np.column_stack([labels == name for name in names]).astype(float) if names else np.empty((0, 0))
    return _estimates(design, values, dict(enumerate(names)), labels)


def pooled_slopes(x: ArrayLike, values: ArrayLike, lines: ArrayLike) -> dict[Any, Estimate]:
    """{line: slope of `values` on `x` over its sizes}, each line with its own intercept; intervals as `pooled_means`.

    A line whose sizes share one `x` has no slope and says nothing of the variance: its estimate holds a reason.
    """
    x, values = finite(x, "x"), finite(values, "values")
    if x.size != values.size:
        raise InputError(f"x has {x.size} numbers and values {values.size}; give as many of one as of the other.")
    labels = _labels(lines, values)
    names = list(dict.fromkeys(labels))
    spread = [name for name in names if np.unique(x[labels == name]).size > 1]
    kept = np.isin(labels, spread)
    own = [labels[kept] == name for name in spread]
    columns = [np.where(at, x[kept] - x[kept][at].mean(), 0) for at in own] + [at.astype(float) for at in own]
    design = np.column_stack(columns) if columns else np.empty((0, 0))
    found = _estimates(design, values[kept], dict(enumerate(spread)), labels[kept])
    reason = "sizes at one position have no slope"
    nothing = {name: no_estimate(reason, int(np.sum(labels == name))) for name in names}
    return nothing | found


def line_at(x: Array, values: Array, slope: float, at: ArrayLike) -> Array:
    """mean(values) + slope (at - mean(x)): a least-squares line passes through the mean of its points."""
    return np.mean(values) + slope * (np.asarray(at, dtype=float) - np.mean(x))


def coefficients(design: Array, values: Array) -> tuple[Array, Array]:
    """Ordinary least squares: coefficients (columns,) and the ends of their t intervals (columns, 2)."""
    fit = sm.OLS(values, design).fit()
    return np.asarray(fit.params), np.asarray(fit.conf_int(1 - LEVEL))


def _estimates(design: Array, values: Array, named: dict[int, Hashable], labels: NDArray) -> dict[Any, Estimate]:
    """{name: coefficient of its column of `design`}, each with its interval or the reason why it has none."""
    sizes = {name: int(np.sum(labels == name)) for name in named.values()}
    dof = values.size - design.shape[1]
    if dof < SMALLEST_DOF:
        reason = f"too few sizes: {values.size} on {len(sizes)} line{'s' * (len(sizes) != 1)} leave {max(dof, 0)} "
        reason += "degrees of freedom"
        return {name: no_estimate(reason, count) for name, count in sizes.items()}
    found, ends = coefficients(design, values)
    return {
        name: Estimate(float(found[column]), float(ends[column, 0]), float(ends[column, 1]), sizes[name])
        for column, name in named.items()
    }


def _labels(lines: ArrayLike, values: Array) -> NDArray:
    labels = np.asarray(lines)
    if labels.shape != values.shape:
        raise InputError(f"lines has shape {labels.shape} for {values.size} sizes; give one label per size.")
    return labels
