"""The figure of notebook 08: what a budget buys, shape by shape, and how good such predictions were. Tables in, figure
out."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsity_utils.design import Design, compact, fit_design, joined
from sparsity_utils.holdout import held_out
from sparsity_utils.profiles import ACTIVATIONS
from sparsity_utils.recipe import RATIOS, machine, recipe
from sparsity_utils.style import Look, ShownFigure, captioned, styled

NEIGHBOURS = 2.0  # measured runs are shown up to so many times larger or smaller
SHOWN = {  # column of a run: how it is predicted, its unit and its title
    "activation_ratio": ("activation_ratio", 100, "Active neurons (% of d_ff)", "Activation ratio"),
    "validation_loss": ("loss", 1, "Validation loss (nats per token)", "Loss after the decay"),
}


@styled
def design(
    ffns: pd.DataFrame,
    decoding: pd.DataFrame,
    *curves: pd.DataFrame,
    parameters: int = 100_000,
    tokens: float = 10_000_000,
    bandwidth: float = 50.0,
    dtype: str = "float32",
    vocabulary: int = 1024,
) -> Figure:
    """Predicted activation ratio, loss and speed of a budget against the width-depth ratio; held-out runs.

    ffns, decoding: of the questions sparse_ffn and sparse_decoding. curves: of the questions of `design.CURVES`.
    """
    checkpoints = joined(curves)
    fitted = fit_design(checkpoints)
    if fitted.reason:
        return _without(fitted.reason)
    figure = ShownFigure(figsize=(7.8, 6.6), layout="constrained")
    (left, right), (speeds, check) = figure.subplots(2, 2)
    for axes, column in zip((left, right), SHOWN, strict=True):
        _predicted(axes, fitted, column, parameters, tokens)
    table = recipe(fitted, machine(ffns, decoding, bandwidth, dtype), parameters, tokens, vocabulary)
    _speeds(speeds, table, f"Decoding at {bandwidth:g} GB/s, {dtype}")
    _check(check, held_out(checkpoints).query("split == 'shape' and quantity == 'activation ratio'"))
    budget = f"{compact(parameters)} parameters, {compact(tokens)} tokens"
    return captioned(
        figure,
        f"Prediction for {budget} from {len(fitted.runs)} runs, 90% intervals; dashed: beyond the fitted runs of that "
        f"function. Points above: runs within a factor of {NEIGHBOURS:g} of that\nsize, other data. Below right: every "
        "shape predicted without its own runs, one point per run, 90% intervals. Bars of speeds: of the ratio alone.",
    )


def _without(reason: str) -> Figure:
    figure = ShownFigure(figsize=(7.8, 1.2))
    figure.text(0.02, 0.5, f"No prediction: {reason}.", wrap=True)
    return figure


def _predicted(axes: Axes, fitted: Design, column: str, parameters: float, tokens: float) -> None:
    """The predicted curve with its band over the width-depth ratio, and measured runs of about that size."""
    outcome, unit, label, title = SHOWN[column]
    grid = np.geomspace(min(RATIOS), max(RATIOS), 61)
    near = fitted.runs["parameters"].between(parameters / NEIGHBOURS, parameters * NEIGHBOURS)
    for number, activation in enumerate(fitted.activations):
        look, name = Look(number), ACTIVATIONS[activation]
        found = [fitted.predict(parameters, tokens, ratio, activation) for ratio in grid]
        ends = np.array([[getattr(getattr(p, outcome), end) for end in ("value", "low", "high")] for p in found])
        inside = np.array([not p.extrapolates for p in found])
        value, low, high = unit * ends.T
        axes.fill_between(grid, low, high, color=look.colour, alpha=0.15, linewidth=0)
        axes.plot(grid, value, "--", color=look.colour, linewidth=1)
        axes.plot(grid, np.where(inside, value, np.nan), "-", color=look.colour, linewidth=2)
        runs = fitted.runs[near & (fitted.runs["activation"] == activation)]
        axes.plot(
            runs["ratio"], unit * runs[column], look.marker, color=look.colour, label=name, markeredgecolor="white"
        )
    axes.set(ylabel=label, title=title)
    _ratio_axis(axes)
    axes.legend(fontsize=8)


def _speeds(axes: Axes, table: pd.DataFrame, title: str) -> None:
    """Tokens per second of every integer shape: reading all weights, and skipping inactive neurons."""
    dense = table.drop_duplicates("ratio").sort_values("ratio")
    axes.plot(dense["ratio"], dense["dense"], "-X", color="black", label="all weights")
    for number, (activation, rows) in enumerate(table.groupby("activation", sort=True)):
        look, rows = Look(number), rows.sort_values("ratio")
        reach = [rows["sparse"] - rows["low_sparse"], rows["high_sparse"] - rows["sparse"]]
        style = {"color": look.colour, "marker": look.marker, "linestyle": look.line, "capsize": 2}
        axes.errorbar(rows["ratio"], rows["sparse"], reach, label=f"{ACTIVATIONS[activation]}, sparse", **style)
    axes.set(ylabel="Tokens per second", title=title, ylim=(0, None))
    _ratio_axis(axes)
    axes.legend(fontsize=8)


def _check(axes: Axes, held: pd.DataFrame) -> None:
    """Held-out runs: predicted with interval against measured."""
    for number, (activation, rows) in enumerate(held.groupby("activation", sort=True)):
        look, value = Look(number), 100 * rows["predicted"]
        reach = [value - 100 * rows["low"], 100 * rows["high"] - value]
        style = {"color": look.colour, "marker": look.marker, "linestyle": "none", "elinewidth": 0.8}
        inside = f"{ACTIVATIONS[activation]}, {rows['inside'].sum()} of {len(rows)} inside"
        axes.errorbar(100 * rows["measured"], value, reach, label=inside, **style)
    if held.empty:
        axes.text(0.5, 0.5, "too few runs to hold any out", ha="center", transform=axes.transAxes)
    else:
        ends = 100 * held[["low", "measured"]].min().min(), 100 * held[["high", "measured"]].max().max()
        axes.plot(ends, ends, color="grey", linewidth=0.8)
        axes.legend(fontsize=8, loc="upper left")
    labels = {"xlabel": "Measured active neurons (%)", "ylabel": "Predicted active neurons (%)"}
    axes.set(title="Shapes that were not fitted", **labels)


def _ratio_axis(axes: Axes) -> None:
    axes.set(xscale="log", xlabel="Width-depth ratio (d_model / n_layers)")
    axes.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
    axes.minorticks_off()
