"""What the power table is simulated from: how the runs of the first study vary, and the effects that it found.

    value of a run = mean or trend of its line of sizes + effect of its size + effect of its seed

The effect of a size is N(0, sd_fit), and all its seeds share it; that of a seed is N(0, sd_seed). The method of moments
estimates both variance components: for lines of sizes from runs of two layers or more at both width-depth ratios; for
the shapes of one size from all of them, the single layer among them, since the second study trains the same shapes.
results/power_inputs.csv holds them for the first recorded study; a later study does not replace it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparsity_utils.laws import lines
from sparsity_utils.laws.lines import Lines, size_means

COLUMNS = ["outcome", "width_depth_ratio", "mean", "first_effect", "sd_seed", "sd_fit", "degrees_seed", "degrees_fit"]
SAME_RATIO = 0.05  # relative: up to here a line of the first study has the width-depth ratio of a planned one

Array = NDArray[np.float64]


class Outcome(NamedTuple):
    """One number per run, and whether its test is of a mean or of a slope on `x`."""

    values: Callable[[pd.DataFrame], pd.DataFrame]
    x: str | None  # None: a mean; "parameters": slope per decade of them; "width_depth_ratio": slope per unit of it


OUTCOMES = {
    "loss_difference": Outcome(lines.loss_difference, None),
    "relu_falls": Outcome(lines.relu_falls, None),
    "silu_rises": Outcome(lines.silu_rises, None),
    "relu_sparser": Outcome(lines.relu_sparser, None),
    "relu_ratio": Outcome(lines.relu_ratio, "parameters"),
    "silu_ratio": Outcome(lines.silu_ratio, "parameters"),
    "nonzero_share": Outcome(lines.nonzero_share, "parameters"),
    "metric_gap": Outcome(lines.metric_gap, "parameters"),
}
RATIO_OUTCOME = "shape_ratio"  # activation ratio of the shapes of one size, on the width-depth ratio


@dataclass(frozen=True)
class Squares:
    """The sums of squares that tell what seeds and sizes vary by, in values = design b + size + seed.

    With Z the indicators of the sizes and M the residual maker of the design, their expectations are
    E[within] = degrees_seed sd_seed^2, degrees_seed = runs - sizes, and
    E[between] = degrees_fit sd_seed^2 + trace sd_fit^2, degrees_fit = sizes - columns, trace = trace(Z' M Z).
    """

    within: float  # of runs around the mean of their size
    between: float  # of sizes around the design
    degrees_seed: int
    degrees_fit: int
    trace: float

    def components(self, within: Array | float = 1.0, between: Array | float = 1.0) -> tuple[Array, Array]:
        """(sd_seed, sd_fit) that solve the expectations for these multiples of both sums.

        NaN without degrees of freedom. A negative component becomes 0.
        """
        nothing = np.asarray(np.nan)
        seed = np.asarray(within) * self.within / self.degrees_seed if self.degrees_seed else nothing
        left = np.asarray(between) * self.between - self.degrees_fit * seed
        fit = left / self.trace if self.degrees_fit else nothing
        return np.sqrt(seed), np.sqrt(np.maximum(fit, 0.0))

    def drawn(self, rng: np.random.Generator, draws: int) -> tuple[Array, Array]:
        """(sd_seed, sd_fit) that might have given these sums, (draws, 1) each: both sums over chi-squared / degrees.

        Where few sizes or seeds tell a component, this is what is not known of it. A component that was found to be
        0 is drawn above 0 too.
        """
        within, between = (
            degrees / rng.chisquare(degrees, (draws, 1)) for degrees in (self.degrees_seed, self.degrees_fit)
        )
        return self.components(within, between)


def power_inputs(tables: Lines, shapes: pd.DataFrame) -> pd.DataFrame:
    """The components and effects of a recorded study: one row per outcome and width-depth ratio, columns COLUMNS.

    tables: its checkpoints by line. shapes: its checkpoints of ReLU shapes at one size. In the result, `mean` is that
    of the sizes of the line, first_effect the same or, for an outcome with an `x`, their slope on it; the rest is from
    `Squares.components`. All are in units of the outcome (shares; slopes per decade of parameters or unit of ratio).
    """
    return pd.concat([found.rows for found in spreads(tables, shapes).values()], ignore_index=True)[COLUMNS]


class Spread(NamedTuple):
    """How the runs of a study vary in an outcome: its rows of results/power_inputs.csv, and `line` where it is known.

    With `squares` every simulated study has deviations of its own, see `Squares.drawn`.
    """

    rows: pd.DataFrame
    squares: Squares | None = None

    def deviations(self, rng: np.random.Generator, draws: int) -> tuple[Array | float, Array | float]:
        """sd_seed and sd_fit: of all draws, or of each one, (draws, 1)."""
        if self.squares is not None:
            return self.squares.drawn(rng, draws)
        return float(self.rows["sd_seed"].iloc[0]), float(self.rows["sd_fit"].iloc[0])

    def effect(self, line: str, ratio: float) -> float:
        """What the study found on a line, or on the line of its width-depth ratio where lines have no names."""
        if "line" not in self.rows:
            return self.at_ratio(ratio)
        found = self.rows.loc[self.rows["line"] == line, "first_effect"]
        return float(found.iloc[0]) if len(found) else float("nan")

    def at_ratio(self, ratio: float, column: str = "first_effect") -> float:
        """A column of the line at this width-depth ratio; NaN where the first study had none."""
        near = self.rows[(self.rows["width_depth_ratio"] / ratio - 1).abs() < SAME_RATIO]
        return float(near[column].iloc[0]) if len(near) else float("nan")


def spreads(tables: Lines, shapes: pd.DataFrame) -> dict[str, Spread]:
    """`power_inputs` by outcome; one whose runs a study lacks is left out."""
    found = {}
    for name, outcome in OUTCOMES.items():
        runs = lines.on_lines(tables, outcome.values)
        found[name] = _found(name, runs[runs["n_layers"] >= 2], outcome.x)
    runs = lines.relu_ratio(shapes).assign(line="")
    of_shapes = _found(RATIO_OUTCOME, runs, "width_depth_ratio")
    found[RATIO_OUTCOME] = Spread(of_shapes.rows.assign(width_depth_ratio=np.nan), of_shapes.squares)
    return {name: one for name, one in found.items() if len(one.rows)}


def squares(values: Array, sizes: Array, design: Array) -> Squares:
    """The sums of squares of values = design b + effect of size + effect of seed.

    values: (runs,); sizes: label of each run's size (runs,); design: equal rows for runs of one size (runs, columns).
    """
    indicators = (sizes[:, None] == np.unique(sizes)).astype(float)  # (runs, sizes)
    within = values - indicators @ (indicators.T @ values / indicators.sum(axis=0))
    maker = np.eye(values.size) - design @ np.linalg.pinv(design)
    return Squares(
        float(within @ within),
        float(values @ maker @ values - within @ within),
        values.size - indicators.shape[1],
        indicators.shape[1] - int(np.linalg.matrix_rank(design)),
        float(np.trace(indicators.T @ maker @ indicators)),
    )


def _found(name: str, runs: pd.DataFrame, x: str | None) -> Spread:
    """One row per line of an outcome's runs; the components are those of all lines together."""
    if runs.empty:
        return Spread(pd.DataFrame(columns=["line", *COLUMNS]), Squares(0.0, 0.0, 0, 0, 0.0))
    along = None if x is None else _along(runs, x)
    own = pd.get_dummies(runs["line"]).to_numpy(dtype=float)  # (runs, lines)
    design = own if along is None else np.column_stack([own, own * along.to_numpy()[:, None]])
    sizes = runs.groupby(["line", "d_model", "n_layers"]).ngroup().to_numpy()
    found = squares(runs["value"].to_numpy(), sizes, design)
    spread = (*map(float, found.components()), found.degrees_seed, found.degrees_fit)
    rows = []
    for where, line in size_means(runs).groupby("line", sort=False):
        mean = line["value"].mean()
        effect = mean if x is None else np.polyfit(_along(line, x), line["value"], 1)[0]
        rows.append((where, name, line["width_depth_ratio"].median(), mean, effect, *spread))
    return Spread(pd.DataFrame(rows, columns=["line", *COLUMNS]), found)


def _along(table: pd.DataFrame, x: str) -> pd.Series:
    return np.log10(table["parameters"]) if x == "parameters" else table[x]
