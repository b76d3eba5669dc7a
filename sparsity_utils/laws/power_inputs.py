"""What the power table is simulated from: how the runs of the first study vary, and the effects that it found.

    value of a run = mean or trend of its line of sizes + effect of its size + effect of its seed

The effect of a size is N(0, sd_fit), and all its seeds share it; that of a seed is N(0, sd_seed). The method of moments
estimates both variance components: for lines of sizes from runs of two layers or more at both width-depth ratios; for
the shapes of one size from all of them, the single layer among them, since the second study trains the same shapes.
results/power_inputs.csv holds them for the first recorded study; a later study does not replace it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd

from sparsity_utils.laws import lines
from sparsity_utils.laws.lines import Lines, size_means

COLUMNS = ["outcome", "width_depth_ratio", "mean", "first_effect", "sd_seed", "sd_fit", "degrees_seed", "degrees_fit"]


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


def power_inputs(tables: Lines, shapes: pd.DataFrame) -> pd.DataFrame:
    """The components and effects of a recorded study: one row per outcome and width-depth ratio, columns COLUMNS.

    tables: its checkpoints by line. shapes: its checkpoints of ReLU shapes at one size. In the result, `mean` is that
    of the sizes of the line, first_effect the same or, for an outcome with an `x`, their slope on it; the rest is from
    `variance_components`. All are in units of the outcome (shares; slopes per decade of parameters or unit of ratio).
    """
    rows = []
    for name, outcome in OUTCOMES.items():
        runs = lines.on_lines(tables, outcome.values)
        rows += _rows(name, runs[runs["n_layers"] >= 2], outcome.x)
    runs = lines.relu_ratio(shapes).assign(line="")
    rows += [row | {"width_depth_ratio": np.nan} for row in _rows(RATIO_OUTCOME, runs, "width_depth_ratio")]
    return pd.DataFrame(rows)[COLUMNS]


def variance_components(values: np.ndarray, sizes: np.ndarray, design: np.ndarray) -> tuple[float, float, int, int]:
    """(sd_seed, sd_fit, their degrees of freedom) of values = design b + effect of size + effect of seed.

    values: (runs,); sizes: label of each run's size (runs,); design: equal rows for runs of one size (runs, columns).
    With Z the indicators of the sizes and M the residual maker of the design, the expected squares are
    E[within sizes] = (runs - sizes) sd_seed^2 and
    E[between sizes, around the design] = (sizes - columns) sd_seed^2 + trace(Z' M Z) sd_fit^2;
    both are solved for the components, a negative one becomes 0.
    """
    indicators = (sizes[:, None] == np.unique(sizes)).astype(float)  # (runs, sizes)
    within = values - indicators @ (indicators.T @ values / indicators.sum(axis=0))
    maker = np.eye(values.size) - design @ np.linalg.pinv(design)
    degrees_seed = values.size - indicators.shape[1]
    degrees_fit = indicators.shape[1] - int(np.linalg.matrix_rank(design))
    seed = within @ within / degrees_seed if degrees_seed else np.nan
    between = values @ maker @ values - within @ within
    fit = (between - degrees_fit * seed) / np.trace(indicators.T @ maker @ indicators) if degrees_fit else np.nan
    return float(np.sqrt(seed)), float(np.sqrt(max(fit, 0.0))), degrees_seed, degrees_fit


def _rows(name: str, runs: pd.DataFrame, x: str | None) -> list[dict[str, object]]:
    """One row per line of an outcome's runs; the components are those of all lines together."""
    along = None if x is None else _along(runs, x)
    own = pd.get_dummies(runs["line"]).to_numpy(dtype=float)  # (runs, lines)
    design = own if along is None else np.column_stack([own, own * along.to_numpy()[:, None]])
    sizes = runs.groupby(["line", "d_model", "n_layers"]).ngroup().to_numpy()
    components = variance_components(runs["value"].to_numpy(), sizes, design)
    spread = dict(zip(COLUMNS[4:], components, strict=True))
    rows = []
    for _, line in size_means(runs).groupby("line", sort=False):
        mean = line["value"].mean()
        effect = mean if x is None else np.polyfit(_along(line, x), line["value"], 1)[0]
        rows.append(
            {
                "outcome": name,
                "width_depth_ratio": line["width_depth_ratio"].median(),
                "mean": mean,
                "first_effect": effect,
                **spread,
            }
        )
    return rows


def _along(table: pd.DataFrame, x: str) -> pd.Series:
    return np.log10(table["parameters"]) if x == "parameters" else table[x]
