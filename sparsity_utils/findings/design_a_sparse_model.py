"""Notebook 08, design a sparse model: how far predictions before training hold, what a budget buys in each shape."""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from sparsity_utils.console import short_number
from sparsity_utils.findings.budget import RATIOS, Machine, machine, plan_budget
from sparsity_utils.findings.claims import SLOPE_MARGIN, Claim, Verdict, Verdicts, stated
from sparsity_utils.findings.style import AXIS, Look, ShownFigure, captioned, styled
from sparsity_utils.laws.data_law import LEVEL
from sparsity_utils.laws.design import CURVES, Design, fit_design, joined
from sparsity_utils.laws.holdout import COLUMNS, RUN, errors, held_out
from sparsity_utils.laws.limits import SHAPE, require
from sparsity_utils.laws.outcome_law import Law
from sparsity_utils.laws.trends import NOT_SUPPORTED, Estimate, mean_over_runs
from sparsity_utils.models.config import ACTIVATIONS
from sparsity_utils.study.tables import Tables

COVERED = 0.8  # share of held-out runs that 90% intervals must at least hold
MARGINS = {  # within which a size beyond the fit is predicted, in the units of `holdout.errors`
    "activation ratio": 100 * SLOPE_MARGIN,  # points
    "loss": 5.0,  # percent: what a factor of two in parameters buys, at loss ~ N^-0.076 (arXiv 2001.08361, eq. 1.1)
}


def cover_claim(quantity: str) -> Claim:
    """Do the intervals of the predicted `quantity` hold on shapes that were not fitted?"""
    return Claim(
        f"{quantity.replace(' ', '_')}_covered",
        "design_a_sparse_model",
        f"The 90% intervals of the predicted {quantity} hold on shapes that were not fitted",
        "none",
        "% of the runs inside",
        "exact binomial interval of the share of runs inside, every shape left out in turn",
        f"90% interval above {100 * COVERED:.0f}%; not supported if wholly below 90%",
        region=(COVERED, math.inf),
    )


def size_claim(quantity: str) -> Claim:
    """Is a size beyond the fit predicted within the margin of a quantity?"""
    loss, margin = quantity == "loss", MARGINS[quantity]
    return Claim(
        f"{quantity.replace(' ', '_')}_reached",
        "design_a_sparse_model",
        f"The {quantity} of a size beyond the fit is predicted within {margin:.0f}{'%' if loss else ' points'}",
        "none",
        "% above the measured" if loss else "points above the measured",
        "equivalence (two one-sided t tests) of predicted less measured, one value per shape and activation function, "
        "fitted to runs of at most half the size",
        f"90% interval inside +-{margin:.0f}{'%' if loss else ' points'}",
        region=(-margin, margin),
        scale=1.0,
    )


BETTER_THAN_MEAN = Claim(
    "better_than_mean",
    "design_a_sparse_model",
    "The recipe predicts the activation ratio better than the mean of the other runs",
    "none",
    "points nearer",
    "t interval over shapes and activation functions, each left out in turn, of the error of the mean less that of the "
    "recipe (sizes of errors, mean over seeds; 0 where the recipe is a mean)",
    scale=1.0,
)
COVERS = {quantity: cover_claim(quantity) for quantity in MARGINS}
REACHES = {quantity: size_claim(quantity) for quantity in MARGINS}
ALL = (
    *(COVERS["activation ratio"], BETTER_THAN_MEAN, REACHES["activation ratio"]),
    *(COVERS["loss"], REACHES["loss"]),
)
CLAIMS = {claim.key: claim for claim in ALL}


def claims() -> pd.DataFrame:
    """The claims, tests and thresholds, as the notebook states them before its results."""
    return stated(CLAIMS.values())


def beyond_the_fit(held: pd.DataFrame) -> pd.DataFrame:
    """Predicted and measured activation ratio of runs of held-out sizes; of held-out shapes if no size was held out.

    held: as `holdout.held_out` gives it.
    """
    split = "size" if (held["split"] == "size").any() else "shape"
    columns = ["activation", "d_model", "n_layers", "seed", "tokens", "predicted", "low", "high", "measured", "inside"]
    chosen = (held["split"] == split) & (held["quantity"] == "activation ratio")
    return held.loc[chosen, [*columns, "extrapolates"]].assign(tokens=lambda rows: rows["tokens"].map(short_number))


def verdicts(held: pd.DataFrame) -> Verdicts:
    """Do the intervals hold, do the predictions beat a mean, and do they reach a size beyond the fit?

    held: as `holdout.held_out` gives it; a study too small to hold anything out gives no rows, and nothing is
    decided. Raises InputError for missing columns, duplicates and NaN.
    """
    if len(held):
        key = ["split", "quantity", *RUN]
        require(held, COLUMNS, key, ["predicted", "low", "high", "measured", "mean_of_others"], "held-out runs")
    table = held.assign(**errors(held))
    ratio, loss = (table[table["quantity"] == quantity] for quantity in MARGINS)
    return Verdicts(
        [
            _covers(ratio, COVERS["activation ratio"]),
            _better(ratio),
            _reaches(ratio, REACHES["activation ratio"]),
            _covers(loss, COVERS["loss"]),
            _reaches(loss, REACHES["loss"]),
        ]
    )


def _covers(rows: pd.DataFrame, claim: Claim) -> Verdict:
    rows = rows[rows["split"] == "shape"]
    if rows.empty:
        return claim.undecided("without a shape the other runs are too few for an interval")
    inside = int(rows["inside"].sum())
    low, high = proportion_confint(inside, len(rows), 1 - LEVEL, method="beta")
    estimate = Estimate(inside / len(rows), float(low), float(high), len(rows))
    reason = f"{inside} of {len(rows)} runs of {len(rows[SHAPE[1:]].drop_duplicates())} shapes"
    return claim.judged(estimate, reason, verdict=NOT_SUPPORTED if high < LEVEL else None)


def _better(rows: pd.DataFrame) -> Verdict:
    rows = rows[rows["split"] == "shape"]
    nearer = rows.assign(nearer=rows["error_of_mean"].abs() - rows["error"].abs()).groupby(SHAPE)["nearer"].mean()
    estimate = mean_over_runs(nearer)
    reason = f"{len(nearer)} pairs of shape and activation function" + "; at least 2 are needed" * bool(estimate.reason)
    return BETTER_THAN_MEAN.judged(estimate, reason)


def _reaches(rows: pd.DataFrame, claim: Claim) -> Verdict:
    """One value per shape and activation function, the mean over its runs, which err together."""
    off = rows[rows["split"] == "size"].groupby([*SHAPE, "parameters"])["error"].mean()
    estimate = mean_over_runs(off)
    if estimate.reason:
        reason = f"{len(off)} pairs could be predicted from runs of at most half their size; at least 2 are needed"
        return claim.undecided(reason)
    with np.errstate(divide="ignore", invalid="ignore"):  # equal errors have no spread
        p_value = DescrStatsW(off.to_numpy()).ttost_mean(*claim.region)[0]
    sizes = sorted(set(off.index.get_level_values("parameters")))
    reach = f"{len(off)} pairs of shape and activation function, {sizes[0]:,} to {sizes[-1]:,} parameters"
    return claim.judged(estimate, reach, f"TOST p = {p_value:.2g}")


def figures(study: Tables) -> Iterator[tuple[str, ShownFigure]]:
    """The figure, with its name, of the notebook's budget, if the study has the tables for it."""
    if all(map(study.answers, ("sparse_ffn", "sparse_decoding", *CURVES[:2]))):
        checkpoints = joined(map(study.table, filter(study.answers, CURVES)))
        parameters, tokens = 100_000, 10_000_000
        fitted, on = fit_design(checkpoints), machine(study.table("sparse_ffn"), study.table("sparse_decoding"), 50.0)
        models = plan_budget(fitted, on, parameters, tokens, vocabulary=1024)
        yield "08_design", figure(fitted, held_out(checkpoints), models, on, parameters, tokens)


@styled
def figure(
    fitted: Design, held: pd.DataFrame, models: pd.DataFrame, on: Machine, parameters: int, tokens: float
) -> ShownFigure:
    """Predicted activation ratio, loss and speed against the width-depth ratio, for one budget; held-out runs.

    held: as `holdout.held_out` gives it. models: as `budget.plan_budget` gives them for that budget on that machine.
    """
    if fitted.reason:
        return _without(fitted.reason)
    shown = ShownFigure(figsize=(7.8, 6.6), layout="constrained")
    (left, right), (speeds, check) = shown.subplots(2, 2)
    _predicted(left, fitted, fitted.activation_ratio, parameters, tokens, 100)
    left.set(ylabel=AXIS, title="Activation ratio, stable stage")
    _predicted(right, fitted, fitted.loss, parameters, tokens, 1)
    right.set(ylabel="Validation loss (nats per token)", title="Loss after the decay")
    _speeds(speeds, models, f"Decoding at {on.bandwidth:g} GB/s, {on.dtype}")
    _check(check, held.query("split == 'shape' and quantity == 'activation ratio'"))
    budget = f"{short_number(parameters)} parameters, {short_number(tokens)} tokens"
    runs = f"{len(fitted.runs)} runs"
    return captioned(
        shown,
        f"Prediction for {budget}, 90% intervals; dashed: beyond what that function was trained at. Filled: all\n"
        f"{runs}, carried to that budget by the fit. Speeds: every integer shape, bars: interval of the "
        "activation ratio alone.\nBelow right: one point per run of a shape that was left out of the fit with all its "
        "runs, 90% intervals.",
    )


def _without(reason: str) -> ShownFigure:
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
    """A run's value moved to another budget along the fit: link(measured) - link(fit here) + link(fit there)."""
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
