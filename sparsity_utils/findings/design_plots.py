"""The figure of notebook 08: what a budget buys in each shape, and how good predictions are. Tables in, figure out."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsity_utils.console import short_number
from sparsity_utils.findings.recipe import RATIOS, machine, recipe
from sparsity_utils.findings.style import Look, ShownFigure, captioned, styled
from sparsity_utils.laws.design import Design, Law, fit_design, joined
from sparsity_utils.laws.holdout import held_out
from sparsity_utils.models.config import ACTIVATIONS


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
    _predicted(left, fitted, fitted.activation_ratio, parameters, tokens, 100)
    left.set(ylabel="Active neurons (% of d_ff)", title="Activation ratio, stable stage")
    _predicted(right, fitted, fitted.loss, parameters, tokens, 1)
    right.set(ylabel="Validation loss (nats per token)", title="Loss after the decay")
    table = recipe(fitted, machine(ffns, decoding, bandwidth, dtype), parameters, tokens, vocabulary)
    _speeds(speeds, table, f"Decoding at {bandwidth:g} GB/s, {dtype}")
    _check(check, held_out(checkpoints).query("split == 'shape' and quantity == 'activation ratio'"))
    budget = f"{short_number(parameters)} parameters, {short_number(tokens)} tokens"
    runs = f"{len(fitted.runs)} runs"
    return captioned(
        figure,
        f"Prediction for {budget}, 90% intervals; dashed: beyond what that function was trained at. Filled: all\n"
        f"{runs}, carried to that budget by the fit. Speeds: every integer shape, bars: interval of the "
        "activation ratio alone.\nBelow right: one point per run of a shape that was left out of the fit with all its "
        "runs, 90% intervals.",
    )


def _without(reason: str) -> Figure:
    figure = ShownFigure(figsize=(7.8, 1.2))
    figure.text(0.02, 0.5, f"No prediction: {reason}.", wrap=True)
    return figure


def _predicted(axes: Axes, fitted: Design, law: Law, parameters: float, tokens: float, unit: float) -> None:
    """The predicted curve with its band over the width-depth ratio, and all runs, carried to that budget."""
    grid = np.geomspace(min(RATIOS), max(RATIOS), 61)
    for number, activation in enumerate(fitted.activations):
        look, name = Look(number), ACTIVATIONS[activation]
        found = [law.predict(parameters, tokens, ratio, activation) for ratio in grid]
        value, low, high = unit * np.array([(e.value, e.low, e.high) for e in found]).T
        inside = [not fitted.extrapolates(parameters, tokens, ratio, activation) for ratio in grid]
        style = {"color": look.colour, "marker": look.marker, "fillstyle": "none", "markevery": 10}
        axes.fill_between(grid, low, high, color=look.colour, alpha=0.15, linewidth=0)
        axes.plot(grid, value, "--", linewidth=1, label=name, **style)
        axes.plot(grid, np.where(inside, value, np.nan), "-", color=look.colour, linewidth=2)
        runs = fitted.runs[fitted.runs["activation"] == activation]
        carried = [_carried(law, run, parameters, tokens) for run in runs.to_dict("records")]
        axes.plot(runs["width_depth_ratio"], unit * np.array(carried), look.marker, color=look.colour, alpha=0.6)
    _ratio_axis(axes)
    axes.legend(fontsize=8)


def _carried(law: Law, run: dict, parameters: float, tokens: float) -> float:
    """What a run measured, moved to another budget along the fit: its distance from the curve is that of the run."""
    here = law.predict(run["parameters"], run["tokens"], run["width_depth_ratio"], run["activation"]).value
    there = law.predict(parameters, tokens, run["width_depth_ratio"], run["activation"]).value
    here, there, measured = law.outcome.link(np.array([here, there, run[law.outcome.column]]))
    return float(law.outcome.inverse(there + measured - here))


def _speeds(axes: Axes, table: pd.DataFrame, title: str) -> None:
    """Tokens per second of every integer shape: reading all weights, and skipping inactive neurons."""
    dense = table.drop_duplicates("width_depth_ratio").sort_values("width_depth_ratio")
    axes.plot(dense["width_depth_ratio"], dense["dense"], "-X", color="black", label="all weights")
    for number, (activation, rows) in enumerate(table.groupby("activation", sort=True)):
        look, rows = Look(number), rows.sort_values("width_depth_ratio")
        reach = [rows["sparse"] - rows["low_sparse"], rows["high_sparse"] - rows["sparse"]]
        style = {"color": look.colour, "marker": look.marker, "linestyle": look.line, "capsize": 2}
        style |= {"fillstyle": "none", "markersize": 9 - 4 * number}  # speeds of two functions may lie on each other
        axes.errorbar(
            rows["width_depth_ratio"], rows["sparse"], reach, label=f"{ACTIVATIONS[activation]}, sparse", **style
        )
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
        axes.set_ylim(0, 1.25 * ends[1])  # room for the legend
        axes.legend(fontsize=8, loc="upper left")
    labels = {"xlabel": "Measured active neurons (%)", "ylabel": "Predicted active neurons (%)"}
    axes.set(title="Shapes that were not fitted", **labels)


def _ratio_axis(axes: Axes) -> None:
    axes.set(xscale="log", xlabel="Width-depth ratio (d_model / n_layers)")
    axes.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
    axes.minorticks_off()
