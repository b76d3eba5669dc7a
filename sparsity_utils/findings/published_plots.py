"""The figures of notebook 07: published and refitted laws, what limits rest on, forecasts. Table in, figure out."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsity_utils.findings.style import COLOURS, Look, ShownFigure, captioned, side_by_side, styled
from sparsity_utils.laws.data_law import TOKEN_UNIT
from sparsity_utils.laws.published_laws import PublishedLaw
from sparsity_utils.laws.refit import PRINTED, SCRIPTS, WITHOUT
from sparsity_utils.models.config import ACTIVATIONS

PARAMETERS = ("alpha", "b", "c", "limit")


@styled
def laws(refit: pd.DataFrame, curves: pd.DataFrame | None = None) -> Figure:
    """Published and refitted laws over the tokens seen, and their limits (compare Fig. 4).

    curves: the points themselves, drawn as well if given (the recorded study does not hold them).
    """
    figure = ShownFigure(figsize=(7.4, 6.2), layout="constrained")
    panels = figure.subplots(2, 2, height_ratios=[1.4, 1])
    for (upper, lower), (activation, rows) in zip(panels.T, refit.groupby("activation", sort=True), strict=True):
        for number, row in enumerate(rows.itertuples()):
            points = None if curves is None else curves.query("activation == @activation and model == @row.model")
            _law(upper, row, Look(number), points)
            _limit(lower, row, len(rows) - number, Look(number))
        upper.set(xscale="log", xlabel="Training tokens (billions)", title=f"{ACTIVATIONS[activation]}, laws")
        upper.xaxis.set_major_formatter("{x:g}")
        upper.set_ylabel("Active neurons (% of d_ff)")
        lower.set(xlabel="Limit activation ratio (% of d_ff)", title=f"{ACTIVATIONS[activation]}, limits")
        lower.set_yticks(range(len(rows), 0, -1), rows["model"])
        lower.margins(y=0.12)
        upper.legend(fontsize=7, ncols=2)
    return captioned(
        figure,
        "Solid: refitted to all points of a curve (24 to 42); dashed and ×: as printed. Bars: 90% block bootstrap.\n"
        "No refitted line or limit where the points do not determine one.",
    )


def _law(axes: Axes, row: tuple, look: Look, points: pd.DataFrame | None) -> None:
    grid = np.geomspace(row.first_tokens, row.last_tokens, 100)
    for source, line in (("", "-"), ("published_", "--")):
        values = [getattr(row, source + name) for name in PARAMETERS]
        law = PublishedLaw(row.activation, row.model, 0, 0, *values)
        label = None if source else row.model
        style = {"color": look.colour, "marker": look.marker, "markevery": [0, 99], "linewidth": 1.2}
        axes.plot(grid / TOKEN_UNIT, 100 * law.predict(grid), line, label=label, **style)
    if points is not None:
        style = {"color": look.colour, "marker": look.marker, "linestyle": "none", "alpha": 0.4}
        axes.plot(points["tokens"] / TOKEN_UNIT, 100 * points["activation_ratio"], **style)


def _limit(axes: Axes, row: tuple, height: float, look: Look) -> None:
    value, low, high = (100 * x for x in (row.limit, row.limit_low, row.limit_high))
    axes.errorbar(value, height, xerr=[[value - low], [high - value]], fmt=look.marker, color=look.colour, capsize=3)
    axes.plot(100 * row.published_limit, height, "x", color="black", markersize=6)


@styled
def limits(stability: pd.DataFrame) -> Figure:
    """The limit that one curve gives, by which of its points are fitted: 2.4B in full, then all curves."""
    figure, (left, *others) = side_by_side(3)
    rows = stability.query("activation == 'relu' and model == '2.4B'")
    fitted = rows[rows["points"].notna()]
    heights = np.arange(len(fitted), 0, -1)
    errors = 100 * np.array([fitted["limit"] - fitted["low"], fitted["high"] - fitted["limit"]])
    left.errorbar(100 * fitted["limit"], heights, xerr=errors, fmt="o", color=COLOURS[0], capsize=2)
    for height in heights[fitted["limit"].isna().to_numpy()]:
        left.text(0, height, "no limit", fontsize=7, va="center")
    left.set_yticks(heights, fitted["source"], fontsize=7)
    left.set_ylim(0.4, len(fitted) + 0.6)
    for source, line in ((PRINTED, "--"), (SCRIPTS, ":")):
        for limit in rows.loc[rows["source"] == source, "limit"]:
            left.axvline(100 * limit, color="black", linestyle=line, linewidth=1, label=source)
    left.set(title="ReLU 2.4B, by points fitted", xlabel="Limit activation ratio (% of d_ff)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=7)
    for axes, (activation, curves) in zip(others, stability.groupby("activation", sort=True), strict=True):
        _left_out(axes, curves)
        axes.set_title(f"{ACTIVATIONS[activation]}, by first points left out")
    note = "No mark where the points do not determine a limit."
    return captioned(figure, f"Bars: 90% block bootstrap within the curve. 24 to 42 points per curve. {note}")


def _left_out(axes: Axes, stability: pd.DataFrame) -> None:
    """Refitted less printed limit against the number of first points left out, one line per curve."""
    count = stability["source"].where(stability["source"] != "all points", f"{WITHOUT}0")
    rows = stability.assign(count=count.str.removeprefix(WITHOUT))[count.str.startswith(WITHOUT)]
    rows = rows.astype({"count": int}).sort_values("count")
    printed = stability[stability["source"] == PRINTED].set_index("model")["limit"]
    for number, (model, curve) in enumerate(rows.groupby("model", sort=True)):
        look, off = Look(number), 100 * (curve["limit"] - printed[model])
        axes.plot(curve["count"], off, look.line, color=look.colour, marker=look.marker, label=model)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="First points left out", ylabel="Refitted less printed limit (points)")
    axes.legend(fontsize=7, ncols=2)


@styled
def forecasts(table: pd.DataFrame) -> Figure:
    """Error of each form on the second half of a curve, fitted to the first; the last value is the floor to beat."""
    figure, panels = side_by_side(2, share_y=True)
    for axes, (activation, rows) in zip(panels, table.groupby("activation", sort=True), strict=True):
        forms = list(dict.fromkeys(rows["form"]))
        for number, (model, curve) in enumerate(rows.groupby("model", sort=True)):
            look, errors = Look(number), curve.set_index("form")["rmse"].reindex(forms)
            style = {"color": look.colour, "marker": look.marker, "alpha": 0.8}
            axes.plot(range(len(forms)), 100 * errors, linestyle="none", label=model, **style)
        means = 100 * rows.groupby("form")["rmse"].median().reindex(forms)
        axes.plot(range(len(forms)), means, "_", color="black", markersize=18)
        axes.set_xticks(range(len(forms)), forms, rotation=35, ha="right")
        axes.set(yscale="log", title=ACTIVATIONS[activation])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=7, ncols=2)
    panels[0].set_ylabel("RMS error of the second half (points)")
    beyond = f"{table['predicted'].min()} to {table['predicted'].max()}"
    return captioned(figure, f"One mark per curve, bar: median. {beyond} points predicted per curve.")
