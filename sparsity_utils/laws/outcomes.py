"""One number per run for each claim about lines of sizes, and its mean and slope over the sizes of every line.

Verdicts, figures and the power table all read their numbers here. A line is the runs at one width-depth ratio; `lines`
is {name of the line: its table of checkpoints}, the names being MAIN and SECOND.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sparsity_utils.laws.limits import SHAPE, check_checkpoints, fit_points, last_means, require
from sparsity_utils.laws.pooled import line_at, pooled_means, pooled_slopes, size_means
from sparsity_utils.laws.trends import Estimate, run_slopes

SAME_TRAINING = 1.1  # largest ratio of tokens per parameter between sizes that are compared as measured
SIZE = [*SHAPE[1:], "parameters", "width_depth_ratio"]

MAIN, SECOND = "main", "second"

Lines = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class OverSizes:
    """A mean or a slope on one line, the sizes that it rests on, and how many sizes and lines gave the spread."""

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
        """Height of the fitted line, whose slope is `estimate`, at these numbers of parameters."""
        decades = np.log10(self.sizes["parameters"])
        return line_at(decades, self.sizes["value"], self.estimate.value, np.log10(parameters))


def loss_difference(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """Validation loss of ReLU less that of SiLU, as a share of the latter, at the last checkpoint of pairs of runs.

    Pairs have equal size, seed and tokens.
    """
    losses = _pairs(last_checkpoints(checkpoints), "validation_loss", ["tokens"])
    return losses.assign(value=(losses["relu"] - losses["silu"]) / losses["silu"])


def relu_falls(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """Fall of the ReLU activation ratio per decade of tokens, the slope along each run, warm-up dropped."""
    return _direction(checkpoints, "relu", -1)


def silu_rises(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """Rise of the SiLU activation ratio per decade of tokens, the slope along each run, warm-up dropped."""
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
    """{line: mean of `value` over its sizes}, the spread of the sizes pooled over the lines."""
    sizes = size_means(runs)
    return _by_line(sizes, sizes, pooled_means(sizes["value"], sizes["line"]))


def slopes_on_lines(runs: pd.DataFrame) -> dict[str, OverSizes]:
    """{line: slope of `value` per decade of parameters over its sizes}, the spread pooled over the lines."""
    sizes = size_means(runs)
    sloping = sizes[sizes.groupby("line")["parameters"].transform("nunique") > 1]
    return _by_line(sizes, sloping, pooled_slopes(np.log10(sizes["parameters"]), sizes["value"], sizes["line"]))


def one_value_per_run(limits: pd.DataFrame, activation: str) -> tuple[pd.DataFrame, str]:
    """The rows of `limits_table` per seed with the `value` that verdicts rest on, and a sentence that says what it is.

    The limit A0 if every fit of the activation in the table is sound; else, for all of them, the measured mean of the
    last five stable checkpoints: extrapolated and measured values are never mixed, nor pooled over lines.
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
    """Why measured values of several sizes cannot be compared, or nothing: they must be equally far trained.

    The ratio moves with data, so values taken at other numbers of tokens per parameter confound size with data.
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
    """The tables of checkpoints of the lines that a study has, by name.

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
    """`column` of ReLU and SiLU runs of equal size, seed and what else must be `equal`: columns relu, silu."""
    table = values.pivot_table(column, [*SIZE, "seed", *equal], "activation")
    return table.reindex(columns=["relu", "silu"]).dropna().reset_index()
