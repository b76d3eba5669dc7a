"""Figures of notebook 04, of what `scale_insensitivity.analyse` found."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsity_utils.console import short_number
from sparsity_utils.findings.style import (
    AXIS,
    Look,
    ShownFigure,
    captioned,
    dodged,
    plain_log,
    price_name,
    seeds_name,
    side_by_side,
    styled,
)
from sparsity_utils.laws.lines import MAIN
from sparsity_utils.laws.published import PUBLISHED_LAWS, PUBLISHED_NONZEROS
from sparsity_utils.models.config import ACTIVATIONS
from sparsity_utils.models.shapes import non_embedding_parameters

if TYPE_CHECKING:
    from sparsity_utils.findings.scale_insensitivity import OverScale, Scale

CLOSEST = 1.8  # ratio of two sizes from which on the labels of both fit on an axis
LOOKS = {activation: Look(number) for number, activation in enumerate(ACTIVATIONS)}
NONZEROS = Look(5)  # apart from the activation functions
FITTED = "lines through the means of the sizes, slopes with 90% intervals"
MARKERS = "os"  # of the lines, in their order


@styled
def figure(scale: "Scale") -> ShownFigure:
    """Activation ratio against size by two metrics, and who converges sooner.

    The sizes of a second line are not drawn, but the intervals rest on the residuals of both lines, as in the verdicts.
    """
    shown, (left, right, half) = side_by_side(3)
    checkpoints = scale.lines[MAIN]
    for activation in sorted(set(checkpoints["activation"])):
        _against_size(left, scale.outcomes[activation], MAIN, ACTIVATIONS[activation], LOOKS[activation])
    if "nonzero" in scale.outcomes:
        _against_size(right, scale.outcomes["nonzero"], MAIN, ACTIVATIONS["relu"], LOOKS["relu"])
    _half_way(half, scale.convergence)
    left.set(title=price_name(checkpoints), ylabel=AXIS)
    right.set(title="Share of non-zero neurons", ylabel="Non-zero neurons (% of d_ff)")
    for axes in (left, right, half):
        _size_axis(axes, checkpoints["parameters"])
        axes.legend(fontsize=7)
    for axes in (left, right):
        axes.set_ylim(0, 1.35 * axes.dataLim.ymax)  # room for the legend
    return captioned(shown, f"One point per run, {seeds_name(checkpoints)} a size, side by side; {FITTED}.")


@styled
def second_line(scale: "Scale") -> ShownFigure:
    """Both metrics against size at two width-depth ratios."""
    shown, (left, right) = side_by_side(2)
    for axes, names in ((left, scale.activations), (right, scale.outcomes.keys() & {"nonzero"})):
        for name in names:
            activation = "relu" if name == "nonzero" else name
            for number, line in enumerate(scale.outcomes[name].slopes):
                look = Look(2 * number + list(ACTIVATIONS).index(activation))
                ratio = scale.lines[line]["width_depth_ratio"].median()
                _against_size(axes, scale.outcomes[name], line, f"{ACTIVATIONS[activation]}, ratio {ratio:.3g}", look)
    both = pd.concat(scale.lines.values())
    left.set(title=price_name(both), ylabel=AXIS)
    right.set(title="Share of non-zero neurons", ylabel="Non-zero neurons (% of d_ff)")
    for axes in (left, right):
        _size_axis(axes, both["parameters"])
        axes.set_ylim(0, 1.5 * axes.dataLim.ymax)  # room for the legend
        axes.legend(fontsize=7)
    return captioned(shown, f"One point per run, {seeds_name(both)} a size, side by side; {FITTED}.")


@styled
def one_axis(scale: "Scale", pretrained: pd.DataFrame | None = None) -> ShownFigure:
    """Both metrics on all lines of sizes, the published values, and a model that was not trained here, on one axis.

    pretrained: the table of a pretrained model, which is drawn as it is: a description, of which nothing is claimed.
    """
    shown = ShownFigure(figsize=(9.2, 4.6), layout="constrained")
    axes, price = shown.subplots(), price_name(scale.lines[MAIN])
    drawn = {name: (f"{ACTIVATIONS[name]}, {price}", LOOKS[name]) for name in scale.activations}
    drawn |= {"nonzero": ("ReLU, not zero", NONZEROS)} if "nonzero" in scale.outcomes else {}
    for name, (about, look) in drawn.items():
        _sizes_of_lines(axes, scale, name, about, look)
        _published(axes, name, look)
    if pretrained is not None:
        _pretrained(axes, pretrained[pretrained["p"] == scale.lines[MAIN]["p"].iloc[0]])
    axes.set(xscale="log", xlim=(1e3, 1e10), ylim=(0, None), xlabel="Non-embedding parameters", ylabel=AXIS)
    shown.legend(loc="outside right upper", fontsize=7)
    about = (
        "Filled: means of sizes; lines join those of one width-depth ratio. Hollow: published; limits at CETT-PPL-1%,\n"
    )
    about += "and shares of 0.8B and 1.5B models that are not zero, calculated from printed numbers."
    return captioned(shown, about)


def _sizes_of_lines(axes: Axes, scale: "Scale", name: str, about: str, look: Look) -> None:
    """The means of the sizes of every line, joined."""
    for (line, found), marker in zip(scale.outcomes[name].slopes.items(), MARKERS, strict=False):
        sizes, ratio = found.sizes.sort_values("parameters"), scale.lines[line]["width_depth_ratio"].median()
        style = {"color": look.colour, "marker": marker, "linestyle": look.line, "linewidth": 1}
        axes.plot(sizes["parameters"], 100 * sizes["value"], label=f"{about}, ratio {ratio:.3g}", **style)


def _published(axes: Axes, name: str, look: Look) -> None:
    """Published limits of an activation function, at CETT-PPL-1%, or shares of neurons that are not zero."""
    about = "ReLU, not zero" if name == "nonzero" else f"{ACTIVATIONS[name]}, CETT-PPL-1%"
    if name == "nonzero":
        found = [(model.parameters, model.share) for model in PUBLISHED_NONZEROS]
    else:
        laws = [law for law in PUBLISHED_LAWS if law.activation == name]
        found = [(non_embedding_parameters(law.d_model, law.n_layers), law.limit) for law in laws]
    if found:
        style = {"color": look.colour, "marker": "D", "fillstyle": "none", "linestyle": "none"}
        axes.plot(
            *zip(*((size, 100 * share) for size, share in found), strict=True), label=f"{about}, published", **style
        )


def _pretrained(axes: Axes, table: pd.DataFrame) -> None:
    """A model that was opened: its ratio on each text, with the interval over documents."""
    for number, row in enumerate(table.drop_duplicates("text").itertuples()):
        reach = [[100 * (row.activation_ratio - row.low)], [100 * (row.high - row.activation_ratio)]]
        colour = LOOKS[row.activation].colour if row.activation in LOOKS else "black"
        style = {"color": colour, "capsize": 2, "markersize": 7, "linewidth": 1}
        label = f"{row.model}, {ACTIVATIONS.get(row.activation, row.activation)}, {row.text}"
        axes.errorbar(
            row.parameters * 1.25**number, 100 * row.activation_ratio, reach, fmt="*P"[number % 2], label=label, **style
        )


def _against_size(axes: Axes, outcome: "OverScale", line: str, name: str, look: Look) -> None:
    """One value per run against size, and the line through the means of the sizes whose slope is tested."""
    values, found = outcome.values[outcome.values["line"] == line], outcome.slopes[line]
    ends = np.array([values["parameters"].min(), values["parameters"].max()])
    slope = [100 * part for part in (found.estimate.value, found.estimate.low, found.estimate.high)]
    label = f"{name}: {slope[0]:+.1f} [{slope[1]:+.1f}, {slope[2]:+.1f}] points per decade"
    axes.plot(dodged(values["parameters"]), 100 * values["value"], look.marker, color=look.colour, alpha=0.8)
    axes.plot(ends, 100 * found.at(ends), look.line, color=look.colour, label=label)


def _half_way(axes: Axes, table: pd.DataFrame) -> None:
    """Tokens per parameter at which each run has done half of its change, in the window that all runs share."""
    table = table.sort_values("activation", kind="stable")
    for activation, rows in table.assign(x=dodged(table["parameters"])).groupby("activation", sort=True):
        look = LOOKS[activation]
        style = {"color": look.colour, "marker": look.marker, "linestyle": "none", "label": ACTIVATIONS[activation]}
        axes.plot(rows["x"], rows["halfway_per_parameter"], **style)
    first, last = table[["first", "last"]].iloc[0]
    axes.axhline(np.sqrt(first * last), color="grey", linestyle=":", label="middle of the window (log)")
    axes.set(ylim=(first, last), yscale="log", title="Half of the change is done", ylabel="Tokens per parameter")
    plain_log(axes.yaxis, (1, 2, 3, 5))


def _size_axis(axes: Axes, parameters: pd.Series) -> None:
    """Sizes on a log axis; of sizes too close together for their labels the first is named."""
    named: list[float] = []
    for size in sorted(set(parameters)):
        if not named or size > CLOSEST * named[-1]:
            named.append(size)
    axes.set(xscale="log", xlabel="Non-embedding parameters")
    axes.set_xticks(named, [short_number(size) for size in named])
    axes.xaxis.minorticks_off()
