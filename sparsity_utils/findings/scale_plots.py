"""The figures of notebooks 03 and 04: activation ratio against shape and against size. Table in, figure out."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from sparsity_utils.console import short_number
from sparsity_utils.findings.claims import BREAKPOINT, OPTIMUM
from sparsity_utils.findings.depth_cost import cost_beside_sparsity
from sparsity_utils.findings.labels import parameters_name, price_name, seeds_name
from sparsity_utils.findings.style import COLOURS, Look, ShownFigure, captioned, side_by_side, styled
from sparsity_utils.laws.convergence import convergence_table
from sparsity_utils.laws.limits import limits_table
from sparsity_utils.laws.outcomes import (
    OverSizes,
    limits_on_lines,
    nonzero_share,
    on_lines,
    one_value_per_run,
    slopes_on_lines,
)
from sparsity_utils.laws.published_laws import PUBLISHED_LAWS
from sparsity_utils.laws.trends import fit_line, fit_saturation, fit_two_segments
from sparsity_utils.models.config import ACTIVATIONS
from sparsity_utils.models.decoder import non_embedding_parameters

CLOSEST = 1.8  # ratio of two sizes whose labels stand side by side
LOOKS = {activation: Look(number) for number, activation in enumerate(ACTIVATIONS)}


@styled
def width_depth_ratio(checkpoints: pd.DataFrame) -> Figure:
    """Activation ratio and loss against the width-depth ratio at one size (Fig. 5 and 6)."""
    figure, (left, right) = side_by_side(2)
    values, _ = one_value_per_run(limits_table(checkpoints), "relu")
    _seeds(left, values["width_depth_ratio"], 100 * values["value"], values["seed"])
    _ratio_forms(left, values)
    left.set(
        ylabel="Active neurons (% of d_ff)", title=f"ReLU at {price_name(checkpoints)}, {parameters_name(checkpoints)}"
    )
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
    return captioned(figure, f"One point per run, {seeds_name(checkpoints)} a shape; left: {_basis(values)}.")


def _ratio_forms(axes: Axes, values: pd.DataFrame) -> None:
    """The three trends that are compared, with their AICc."""
    points = values["width_depth_ratio"], values["value"], values["seed"]
    grid = np.geomspace(values["width_depth_ratio"].min(), values["width_depth_ratio"].max(), 200)
    forms = {
        "line": (fit_line, {"color": "grey", "linestyle": "--"}),
        "slope, then flat": (fit_two_segments, {"color": COLOURS[1], "linestyle": "-"}),
        "smooth saturation": (fit_saturation, {"color": "black", "linestyle": "-.", "linewidth": 1.0}),
    }
    for name, (fit, style) in forms.items():
        found = fit(*points)
        if np.isfinite(found.aicc):
            axes.plot(grid, 100 * found.predict(grid), label=f"{name}, AICc {found.aicc:.1f}", **style)


def _published_position(axes: Axes, position: tuple[float, float], ratios: pd.Series, name: str) -> None:
    """A published ratio or range of ratios, as far as it was sampled."""
    low, high = position
    if low > ratios.max() or high < ratios.min():
        return
    if low == high:
        axes.axvline(low, color="dimgrey", linestyle=":", label=f"{name}, {low:g}")
    else:
        axes.axvspan(
            low, min(high, ratios.max()), color="grey", alpha=0.2, linewidth=0, label=f"{name}, {low:g} to {high:g}"
        )


def _basis(values: pd.DataFrame) -> str:
    sound = len(values) and (values["value"] == values["limit"]).all()
    return "limits of the data law" if sound else "means of the last five stable checkpoints"


@styled
def cost_of_depth(checkpoints: pd.DataFrame, costs: pd.DataFrame) -> Figure:
    """What a sparser shape costs: activation ratio and loss of every shape against its measured training time."""
    shapes = cost_beside_sparsity(checkpoints, costs)
    time = shapes["training"]
    reach = [time - shapes["training_low"], shapes["training_high"] - time]
    panels = (
        ("activation_ratio", "spread", 100, "Active neurons (% of d_ff)", f"ReLU at {price_name(checkpoints)}"),
        ("loss", "loss_spread", 1, "Validation loss (nats per token)", "Loss after the decay"),
    )
    figure, drawn = side_by_side(len(panels))
    for axes, (column, spread, unit, label, title) in zip(drawn, panels, strict=True):
        y = unit * shapes[column]
        axes.plot(time, y, color="lightgrey", linewidth=0.8, zorder=0)
        axes.errorbar(time, y, unit * shapes[spread] / 2, reach, fmt="o", color=COLOURS[0], linewidth=0.8, capsize=2)
        axes.set(xlabel="Training time per token (widest = 1)", ylabel=label, title=title)
    for index, shape in enumerate(_shapes(shapes)):  # left and right in turn: the times of neighbours may be equal
        end, side, away = ("training_low", "right", -4) if index % 2 else ("training_high", "left", 4)
        place = (shapes[end][index], 100 * shapes["activation_ratio"][index])
        style = {"ha": side, "va": "top" if index % 2 else "bottom", "fontsize": 7}
        drawn[0].annotate(shape, place, xytext=(away, 0), textcoords="offset points", **style)
    basis = f"Means over {seeds_name(checkpoints)}, bars: half their spread to either side"
    threads = costs["threads"].iloc[0]
    timing = f"{costs['rounds'].iloc[0]} rounds, {threads} thread{'s' if threads > 1 else ''}"
    unit = f"1 = {shapes['training_us'][0]:.0f} µs"
    return captioned(figure, f"{basis}; time: median and 90% interval, {timing}, {unit}.")


def _shapes(rows: pd.DataFrame) -> list[str]:
    return [f"{row.d_model}x{row.n_layers}" for row in rows.itertuples()]


@styled
def scale_insensitivity(checkpoints: pd.DataFrame, second: pd.DataFrame | None = None) -> Figure:
    """Activation ratio against size by two metrics and beside the published limits, and who converges sooner.

    second: sizes at another width-depth ratio. They are not drawn; the intervals of the slopes rest on the spread of
    the sizes of both lines, as in the verdicts.
    """
    figure = ShownFigure(figsize=(7.8, 6.8), layout="constrained")
    (left, right), (half, beside) = figure.subplots(2, 2)
    lines = {"": checkpoints} if second is None else {"": checkpoints, "second": second}
    for activation, values in _values(lines).items():
        if activation in set(checkpoints["activation"]):
            own = values[values["line"] == ""]
            _against_size(left, own, slopes_on_lines(values)[""], ACTIVATIONS[activation], LOOKS[activation])
            _beside_published(beside, own, activation)
    shares = on_lines(lines, nonzero_share)
    _against_size(right, shares[shares["line"] == ""], slopes_on_lines(shares)[""], ACTIVATIONS["relu"], LOOKS["relu"])
    _half_way(half, convergence_table(checkpoints))
    left.set(title=price_name(checkpoints), ylabel="Active neurons (% of d_ff)")
    right.set(title="Share of non-zero neurons", ylabel="Non-zero neurons (% of d_ff)")
    for axes in (left, right, half):
        _size_axis(axes, checkpoints["parameters"])
    for axes in (left, right):
        axes.set_ylim(0, 1.35 * axes.dataLim.ymax)  # room for the legend
    beside.set(xscale="log", xlim=(1e3, 1e10), ylim=(0, 62), xlabel="Non-embedding parameters")
    beside.set(title=f"{price_name(checkpoints)}, beside the published limits", ylabel="Active neurons (% of d_ff)")
    for axes in (left, right, half, beside):
        axes.legend(fontsize=7)
    fitted = "lines through the means of the sizes, slopes with 90% intervals"
    return captioned(figure, f"One point per run, {seeds_name(checkpoints)} a size; {fitted}.")


@styled
def second_line(checkpoints: pd.DataFrame, second: pd.DataFrame) -> Figure:
    """Both metrics against size at two width-depth ratios."""
    figure, (left, right) = side_by_side(2)
    lines = {"main": checkpoints, "second": second}
    drawn = {left: _values(lines), right: {"relu": on_lines(lines, nonzero_share)}}
    for axes, by_activation in drawn.items():
        for activation, values in by_activation.items():
            for line, found in slopes_on_lines(values).items():
                own = values[values["line"] == line]
                look = Look(2 * list(lines).index(line) + list(ACTIVATIONS).index(activation))
                _against_size(
                    axes, own, found, f"{ACTIVATIONS[activation]}, ratio {own['width_depth_ratio'].median():.3g}", look
                )
    sizes = pd.concat([checkpoints["parameters"], second["parameters"]])
    left.set(title=price_name(checkpoints), ylabel="Active neurons (% of d_ff)")
    right.set(title="Share of non-zero neurons", ylabel="Non-zero neurons (% of d_ff)")
    for axes in (left, right):
        _size_axis(axes, sizes)
        axes.set_ylim(0, 1.5 * axes.dataLim.ymax)  # room for the legend
        axes.legend(fontsize=7)
    seeds = seeds_name(pd.concat([checkpoints, second]))
    fitted = "lines through the means of the sizes, slopes with 90% intervals"
    return captioned(figure, f"One point per run, {seeds} a size; {fitted}.")


def _values(lines: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """{activation: one value per run on every line}."""
    limits = limits_on_lines(lines)
    return {name: one_value_per_run(limits, name)[0] for name in sorted(set(limits["activation"]))}


def _seeds(axes: Axes, x: pd.Series, y: pd.Series, seeds: pd.Series) -> None:
    for number, seed in enumerate(sorted(set(seeds))):
        chosen = (seeds == seed).to_numpy()
        style = {"marker": Look(number).marker, "color": COLOURS[0], "fillstyle": "none" if number else "full"}
        axes.plot(x[chosen], y[chosen], linestyle="none", label=f"seed {seed}", **style)


def _against_size(axes: Axes, values: pd.DataFrame, found: OverSizes, name: str, look: Look) -> None:
    """One value per run against size, and the line through the means of the sizes whose slope is tested."""
    ends = np.array([values["parameters"].min(), values["parameters"].max()])
    slope = [100 * part for part in (found.estimate.value, found.estimate.low, found.estimate.high)]
    label = f"{name}: {slope[0]:+.1f} [{slope[1]:+.1f}, {slope[2]:+.1f}] points per decade"
    axes.plot(values["parameters"], 100 * values["value"], look.marker, color=look.colour, alpha=0.8)
    axes.plot(ends, 100 * found.at(ends), look.line, color=look.colour, label=label)


def _half_way(axes: Axes, table: pd.DataFrame) -> None:
    """Tokens per parameter at which each run has done half of its change, in the window that all runs share."""
    for activation, rows in table.groupby("activation", sort=True):
        look = LOOKS[activation]
        style = {"color": look.colour, "marker": look.marker, "linestyle": "none", "label": ACTIVATIONS[activation]}
        axes.plot(rows["parameters"], rows["halfway_per_parameter"], **style)
    first, last = table[["first", "last"]].iloc[0]
    axes.axhline(np.sqrt(first * last), color="grey", linestyle=":", label="middle of the window (log)")
    axes.set(ylim=(first, last), yscale="log", title="Half of the change is done", ylabel="Tokens per parameter")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.minorticks_off()


def _beside_published(axes: Axes, values: pd.DataFrame, activation: str) -> None:
    """Our values and the published limits on one axis of sizes."""
    look, name = LOOKS[activation], ACTIVATIONS[activation]
    style = {"color": look.colour, "marker": look.marker, "linestyle": "none"}
    axes.plot(values["parameters"], 100 * values["value"], label=f"{name}, here", **style)
    published = [law for law in PUBLISHED_LAWS if law.activation == activation]
    sizes = [non_embedding_parameters(law.d_model, law.n_layers) for law in published]
    limits = [100 * law.limit for law in published]
    axes.plot(sizes, limits, fillstyle="none", label=f"{name}, published limit" if published else None, **style)


def _size_axis(axes: Axes, parameters: pd.Series) -> None:
    """Sizes on a log axis; of sizes too close together for their labels the first is named."""
    named: list[float] = []
    for size in sorted(set(parameters)):
        if not named or size > CLOSEST * named[-1]:
            named.append(size)
    axes.set(xscale="log", xlabel="Non-embedding parameters")
    axes.set_xticks(named, [short_number(size) for size in named])
    axes.xaxis.minorticks_off()
