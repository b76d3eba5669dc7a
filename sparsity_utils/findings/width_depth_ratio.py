"""Notebook 03, wide or deep: activation ratio and loss against the width-depth ratio, and what depth costs."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsity_utils.console import InputError
from sparsity_utils.findings.claims import Claim, Verdict, Verdicts, stated
from sparsity_utils.findings.style import (
    AXIS,
    COLOURS,
    Look,
    ShownFigure,
    captioned,
    parameters_name,
    price_name,
    seeds_name,
    side_by_side,
    styled,
)
from sparsity_utils.laws.limits import check_checkpoints, fit_curves, limits_table, require, run_table
from sparsity_utils.laws.lines import last_checkpoints, one_value_per_run, pooled_slopes, size_means
from sparsity_utils.laws.trends import (
    DISTINCT,
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SUPPORTED,
    Estimate,
    Trends,
    compare_trends,
    fit_optimum,
    fit_trends,
)
from sparsity_utils.study.tables import Tables

BREAKPOINT = (114.0, 114.0)  # d_model / n_layers (arXiv 2411.02335, Fig. 5)
OPTIMUM = (74.0, 282.0)  # d_model / n_layers of the lowest loss (Fig. 6)
SIZE = ["d_model", "n_layers"]

RATIO_RISES = Claim(
    "ratio_rises",
    "width_depth_ratio",
    "The limit rises with the width-depth ratio below the breakpoint",
    "rises",
    "points per 100 of d_model / n_layers",
    "t interval of the slope of a line through the means over the seeds of each shape, shapes up to the breakpoint "
    "where there is one (degrees of freedom: shapes less 2)",
    scale=1e4,
    primary=True,
)
RATIO_BREAKS = Claim(
    "ratio_breaks",
    "width_depth_ratio",
    "Beyond a width-depth ratio of about 114 the limit is flat",
    "114",
    "d_model / n_layers",
    f"profile F interval of the breakpoint, once two segments are {DISTINCT:g} AICc below both a straight line and a "
    "smooth saturating curve",
    "114 inside the 90% interval, the interval inside the sampled ratios",
    scale=1.0,
)
RATIO_OPTIMUM = Claim(
    "ratio_optimum",
    "width_depth_ratio",
    "The loss is lowest at a width-depth ratio of 74 to 282",
    "74 to 282",
    "d_model / n_layers",
    "profile F interval of the minimum of a parabola in log ratio",
    "90% interval inside 74 to 282 and inside the sampled ratios",
    scale=1.0,
)


def claims() -> pd.DataFrame:
    """The claims, tests and thresholds, as the notebook states them before its results."""
    return stated([RATIO_RISES, RATIO_BREAKS, RATIO_OPTIMUM])


@dataclass(frozen=True)
class Shapes:
    """ReLU runs of one size and many shapes, and the trends of their activation ratio on the width-depth ratio."""

    checkpoints: pd.DataFrame
    limits: pd.DataFrame  # `limits_table`
    values: pd.DataFrame  # one row per run, `value` being what the analysis rests on
    basis: str  # says what that is
    trends: Trends  # of the values on the width-depth ratio

    @property
    def measured(self) -> bool:
        """Whether the values are measured means, not extrapolated limits."""
        return bool((self.values["value"] != self.values["limit"]).any())


def analyse(checkpoints: pd.DataFrame) -> Shapes:
    """Fit the limits and the trends that verdicts and figure rest on.

    Raises InputError for missing columns, duplicates, NaN, or a table without ReLU runs.
    """
    check_checkpoints(checkpoints)
    relu = checkpoints[checkpoints["activation"] == "relu"]
    if relu.empty:
        raise InputError("The checkpoints table has no relu runs; the width-depth claims are about ReLU models.")
    limits = limits_table(fit_curves(relu))
    values, basis = one_value_per_run(limits, "relu")
    return Shapes(relu, limits, values, basis, fit_trends(values["width_depth_ratio"], values["value"], values["seed"]))


def verdicts(shapes: Shapes) -> Verdicts:
    """Does the limit rise with d_model / n_layers up to a breakpoint, is it flat beyond, where is the loss lowest?"""
    values, ends = shapes.values, last_checkpoints(shapes.checkpoints)
    breakpoint_ = shapes.trends.segments.breakpoint
    slope, furthest = ratio_slope(values, breakpoint_)
    optimum = fit_optimum(ends["width_depth_ratio"], ends["validation_loss"], ends["seed"])
    sampled = (values["width_depth_ratio"].min(), values["width_depth_ratio"].max())
    rests_on = slope.reason or f"{slope.n} shapes, {len(values)} runs"
    return Verdicts(
        [
            RATIO_RISES.judged(slope, rests_on, f"ratios up to {furthest:.3g}", shapes.basis),
            _located(RATIO_BREAKS, breakpoint_, BREAKPOINT, sampled, shapes.basis),
            _located(RATIO_OPTIMUM, optimum, OPTIMUM, sampled),
        ]
    )


def ratio_slope(values: pd.DataFrame, breakpoint_: Estimate) -> tuple[Estimate, float]:
    """Slope of `value` per unit of width-depth ratio over the shapes up to the breakpoint, and their largest ratio.

    values: one row per run with d_model, n_layers, width_depth_ratio, seed and value. Where the breakpoint has a
    reason not to be used, all shapes count.
    """
    shapes = size_means(values, SIZE)
    rising = shapes if breakpoint_.reason else shapes[shapes["width_depth_ratio"] <= breakpoint_.value]
    slope = pooled_slopes(rising["width_depth_ratio"], rising["value"], [""] * len(rising))[""]
    return slope, rising["width_depth_ratio"].max()


def _located(
    claim: Claim, found: Estimate, published: tuple[float, float], sampled: tuple[float, float], *notes: str
) -> Verdict:
    """The verdict on a published position: supported if the interval holds the point, or lies inside the range.

    A published position beyond the sampled ratios cannot be tested: the verdict is inconclusive, whatever was found.
    """
    low, high = published
    notes = (f"sampled ratios {sampled[0]:.3g} to {sampled[1]:.3g}", *notes)
    untested = low > sampled[1] or high < sampled[0]
    inside = found.low <= low <= found.high if low == high else low <= found.low and found.high <= high
    if found.reason or untested:
        verdict = INCONCLUSIVE
        notes = ("the published position lies outside the sampled ratios", *notes) if untested else notes
    elif found.high < low or found.low > high:
        verdict = NOT_SUPPORTED
    else:
        verdict = SUPPORTED if inside else INCONCLUSIVE
    return claim.judged(found, found.reason or f"{found.n} runs", *notes, verdict=verdict)


def shape_table(shapes: Shapes) -> pd.DataFrame:
    """Limit and loss of each shape, the deepest first: shares in percent, intervals and spreads in points."""
    table = shapes.limits.query("seed == 'all'").set_index(SIZE)
    final = shapes.checkpoints[shapes.checkpoints["role"] == "final"].groupby(SIZE)["validation_loss"]
    loss = pd.DataFrame({"loss": final.mean(), "loss_spread": final.agg(np.ptp)}).round(3)
    shares = ["limit", "low", "high", "spread", "last_five_mean", "last_five_spread"]
    shown = (100 * table[shares]).round(1).assign(width_depth_ratio=table["width_depth_ratio"].round(2))
    return (
        shown.assign(sound=table["sound"])[["width_depth_ratio", *shares, "sound"]]
        .join(loss)
        .sort_values("width_depth_ratio")
    )


def trend_table(shapes: Shapes) -> pd.DataFrame:
    """The trends that describe the values, best first: form, parameters, rmse, aicc, delta_aicc."""
    return compare_trends(shapes.trends).round({"rmse": 4, "aicc": 1, "delta_aicc": 1})


def cost_beside_sparsity(checkpoints: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """Activation ratio and loss of each shape beside what it costs to train and run, widest first.

    Columns: d_model, n_layers, width_depth_ratio, seeds, activation_ratio and spread (last-five means over seeds, and
    largest minus smallest), loss and loss_spread (final validation loss, nats per token), training_us (microseconds
    per token), flops, training_low, training_high, training, forward (each as a multiple of the widest shape's).
    Raises InputError for unusable tables and for a shape without costs.
    """
    numbers = ["training_us", "forward_us"]
    columns = [*SIZE, "width_depth_ratio", "flops_per_token", *numbers, "training_low", "training_high"]
    require(costs, columns, SIZE, numbers, "depth_cost")
    shapes = (
        run_table(checkpoints)
        .groupby([*SIZE, "width_depth_ratio"], as_index=False)
        .agg(
            seeds=("seed", "nunique"),
            activation_ratio=("last_five_mean", "mean"),
            spread=("last_five_mean", np.ptp),
            loss=("final_loss", "mean"),
            loss_spread=("final_loss", np.ptp),
        )
        .merge(costs.drop(columns="width_depth_ratio"), on=SIZE, how="left")
    )
    unknown = shapes[shapes["training_us"].isna()]
    if len(unknown):
        first = "x".join(str(number) for number in unknown.iloc[0][SIZE].astype(int))
        raise InputError(f"The depth_cost table has no row for {first}; delete it and measure again.")
    shapes = shapes.sort_values("width_depth_ratio", ascending=False, ignore_index=True)
    bought = ["seeds", "activation_ratio", "spread", "loss", "loss_spread"]
    widest, shown = shapes.iloc[0], shapes[[*SIZE, "width_depth_ratio", *bought, "training_us"]]
    return shown.assign(
        flops=shapes["flops_per_token"] / widest["flops_per_token"],
        **{name: shapes[name] / widest["training_us"] for name in ("training_low", "training_high")},
        training=shapes["training_us"] / widest["training_us"],
        forward=shapes["forward_us"] / widest["forward_us"],
    )


def figures(study: Tables) -> Iterator[tuple[str, ShownFigure]]:
    """Every figure that a study has the tables for, with its name."""
    if study.answers("width_depth_ratio"):
        table = study.table("width_depth_ratio")
        yield "03_width_depth_ratio", figure(analyse(table))
        if study.answers("depth_cost"):
            costs = study.table("depth_cost")
            yield "03_cost_of_depth", cost_of_depth(table, costs, cost_beside_sparsity(table, costs))


@styled
def figure(shapes: Shapes) -> ShownFigure:
    """Activation ratio and loss against the width-depth ratio at one size (Fig. 5 and 6)."""
    shown, (left, right) = side_by_side(2)
    checkpoints, values = shapes.checkpoints, shapes.values
    _seeds(left, values["width_depth_ratio"], 100 * values["value"], values["seed"])
    _trends(left, shapes)
    left.set(ylabel=AXIS, title=f"ReLU at {price_name(checkpoints)}, {parameters_name(checkpoints)}")
    final = checkpoints[checkpoints["role"] == "final"]
    _seeds(right, final["width_depth_ratio"], final["validation_loss"], final["seed"])
    right.set(ylabel="Validation loss (nats per token)", title="Loss after the decay")
    _published_position(left, BREAKPOINT, values["width_depth_ratio"], "published breakpoint")
    _published_position(right, OPTIMUM, values["width_depth_ratio"], "published optimum")
    for axes in (left, right):
        axes.set_xscale("log")
        ticks = sorted(set(values["width_depth_ratio"].round(1)))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("Width-depth ratio (d_model / n_layers)")
        axes.legend(fontsize=7)
    basis = "means of the last five stable checkpoints" if shapes.measured else "limits of the data law"
    return captioned(shown, f"One point per run, {seeds_name(checkpoints)} a shape; left: {basis}.")


def _trends(axes: Axes, shapes: Shapes) -> None:
    """The trends that are compared, with their AICc."""
    ratios = shapes.values["width_depth_ratio"]
    grid = np.geomspace(ratios.min(), ratios.max(), 200)
    styles: dict[str, dict] = {
        "straight line": {"color": "grey", "linestyle": "--"},
        "slope, then flat": {"color": COLOURS[1], "linestyle": "-"},
        "smooth saturation": {"color": "black", "linestyle": "-.", "linewidth": 1.0},
    }
    for name, trend in shapes.trends.named().items():
        if np.isfinite(trend.aicc):
            axes.plot(grid, 100 * trend.predict(grid), label=f"{name}, AICc {trend.aicc:.1f}", **styles[name])


def _seeds(axes: Axes, x: pd.Series, y: pd.Series, seeds: pd.Series) -> None:
    for number, seed in enumerate(sorted(set(seeds))):
        chosen = (seeds == seed).to_numpy()
        style = {"marker": Look(number).marker, "color": COLOURS[0], "fillstyle": "none" if number else "full"}
        axes.plot(x[chosen], y[chosen], linestyle="none", label=f"seed {seed}", **style)


def _published_position(axes: Axes, position: tuple[float, float], ratios: pd.Series, name: str) -> None:
    """A published ratio or range of ratios, as far as it was sampled."""
    low, high = position
    if low > ratios.max() or high < ratios.min():
        return
    if low == high:
        axes.axvline(low, color="dimgrey", linestyle=":", label=f"{name}, {low:g}")
    else:
        label = f"{name}, {low:g} to {high:g}"
        axes.axvspan(low, min(high, ratios.max()), color="grey", alpha=0.2, linewidth=0, label=label)


@styled
def cost_of_depth(checkpoints: pd.DataFrame, costs: pd.DataFrame, shapes: pd.DataFrame) -> ShownFigure:
    """What a sparser shape costs: activation ratio and loss of every shape against its measured training time.

    shapes: `cost_beside_sparsity` of the two tables.
    """
    time = shapes["training"]
    reach = [time - shapes["training_low"], shapes["training_high"] - time]
    panels = (
        ("activation_ratio", "spread", 100, AXIS, f"ReLU at {price_name(checkpoints)}"),
        ("loss", "loss_spread", 1, "Validation loss (nats per token)", "Loss after the decay"),
    )
    shown, drawn = side_by_side(len(panels))
    for axes, (column, spread, unit, label, title) in zip(drawn, panels, strict=True):
        y = unit * shapes[column]
        axes.plot(time, y, color="lightgrey", linewidth=0.8, zorder=0)
        axes.errorbar(time, y, unit * shapes[spread] / 2, reach, fmt="o", color=COLOURS[0], linewidth=0.8, capsize=2)
        axes.set(xlabel="Training time per token (widest = 1)", ylabel=label, title=title)
    for row in shapes.itertuples():  # left and right in turn: the times of neighbours may be equal
        end, side, away = (row.training_low, "right", -4) if row.Index % 2 else (row.training_high, "left", 4)
        style = {"ha": side, "va": "top" if row.Index % 2 else "bottom", "fontsize": 7}
        place = (end, 100 * row.activation_ratio)
        name = f"{row.d_model}x{row.n_layers}"
        drawn[0].annotate(name, place, xytext=(away, 0), textcoords="offset points", **style)
    basis = f"Means over {seeds_name(checkpoints)}, bars: half their spread to either side"
    threads = costs["threads"].iloc[0]
    timing = f"{costs['rounds'].iloc[0]} rounds, {threads} thread{'s' if threads > 1 else ''}"
    scale = f"1 = {shapes['training_us'][0]:.0f} µs"
    return captioned(shown, f"{basis}; time: median and 90% interval, {timing}, {scale}.")
