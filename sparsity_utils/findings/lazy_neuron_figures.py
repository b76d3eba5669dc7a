"""Tables and figures of notebook 11, of what `lazy_neuron.analyse` found."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsity_utils.findings.style import COLOURS, Look, ShownFigure, captioned, plain_log, side_by_side, styled
from sparsity_utils.laws.data_law import LEVEL
from sparsity_utils.laws.published import PUBLISHED_LAWS, PUBLISHED_NONZEROS
from sparsity_utils.laws.trends import Estimate
from sparsity_utils.models.shapes import d_ff

ARMS = {  # in the order in which they are shown; any other arm follows under its own name
    "plain": "text, plain FFN",
    "gated": "text, gated FFN",
    "ten_passes": "text, ten passes over a tenth",
    "uniform": "text, labels uniform",
    "uniform_no_decay": "text, labels uniform, no weight decay",
    "unigram": "text, labels by word frequency",
    "unigram_no_decay": "text, labels by word frequency, no weight decay",
    "random_text": "random words, a fixed function of them",
    "fresh_pairs": "random words, labels uniform, each pair once, no decay",
}
METRICS = {"non-zeros": "final_share", "CETT-PPL": "activation_ratio"}  # in the table lazy_neuron
DATA = ("plain FFN, equal steps", "gated FFN, equal tokens per parameter")  # tables lazy_neuron and one_dimension
AXES = {"n_layers": "Layers", "d_model": "Width (d_model)", "d_ff": "Neurons per layer (d_ff)"}
FFN_RATIO = 2.5  # d_ff over d_model of the published models of 2411.02335
# Published models, by name and marker: d_model, n_layers, d_ff, share. Limits of gated ReLU (2411.02335, Table 2).
PUBLISHED = {
    ("CETT-PPL, 0.1B to 2.4B, published", "x"): [
        (law.d_model, law.n_layers, d_ff(law.d_model, FFN_RATIO), law.limit)
        for law in PUBLISHED_LAWS
        if law.activation == "relu"
    ],
    ("non-zeros, 0.8B and 1.5B, published", "+"): [
        (model.d_model, model.n_layers, model.d_ff, model.share) for model in PUBLISHED_NONZEROS
    ],
}
T5_BASE = 0.027  # mean share of non-zeros over layers (2210.06313, section 1.1); plain FFN, trained to the end


def rates_table(rates: pd.DataFrame) -> pd.DataFrame:
    """The learning rate of each arm, which were tried, and whether a wider grid might do better."""
    return rates.assign(at_edge=np.where(rates["at_edge"], "yes", "no"))


def runs_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Every arm, means over its seeds: shares in percent of both metrics, active neurons per layer, losses in nats.

    The loss is that on what an arm is trained for. CETT-PPL has the price of the profile, and is empty where it is not
    solved: random targets.
    """
    means = runs.groupby("arm", sort=False)
    columns = ["d_model", "n_layers", "d_ff", "initial_share", "final_share", "activation_ratio", "validation_loss"]
    table = means[columns].mean()
    table[["d_model", "n_layers", "d_ff"]] = table[["d_model", "n_layers", "d_ff"]].astype(int)
    counts = {"non_zeros_per_layer": table["final_share"], "CETT_neurons_per_layer": table["activation_ratio"]}
    table[["initial_share", "final_share", "activation_ratio"]] *= 100
    names = {"initial_share": "initial_%", "final_share": "final_%", "activation_ratio": "CETT-PPL_%"}
    table = table.rename(columns=names).assign(**{name: share * table["d_ff"] for name, share in counts.items()})
    return table.assign(seeds=means.size()).round(2).reset_index()


def changes_table(*changes: Mapping) -> pd.DataFrame:
    """What doubling a dimension does, by metric: to the share in points, and to the count of a layer in doublings.

    changes: for each kind of DATA, in its order, `one_dimension.Change` by dimension.
    """
    rows = []
    for data, by_dimension in zip(DATA, changes, strict=True):
        for dimension, change in by_dimension.items():
            for metric in METRICS:
                share, count = _interval(change.share[metric], 100, 1), _interval(change.count[metric], 1, 2)
                rows.append((data, dimension, f"{change.small} to {change.large}", metric, share, count))
    columns = ["data", "dimension", "from_to", "metric", "points_per_doubling", "doublings_of_the_count_per_doubling"]
    return pd.DataFrame(rows, columns=columns)


def points_table(points: pd.DataFrame) -> pd.DataFrame:
    """Every shape of `lazy_neuron.size_points`: shares in percent by both metrics, and active neurons of a layer."""
    table = points[["data", *AXES, "runs"]].copy()
    for metric in METRICS:
        table[f"{metric}_%"], table[f"{metric}_per_layer"] = 100 * points[metric], points[metric] * points["d_ff"]
    return table.sort_values("data", key=lambda data: data.map(DATA.index), kind="stable").round(1)


def _interval(estimate: Estimate, scale: float, digits: int) -> str:
    if estimate.reason:
        return "none"
    value, low, high = (scale * end for end in (estimate.value, estimate.low, estimate.high))
    return f"{value:+z.{digits}f} ({low:+z.{digits}f} to {high:+z.{digits}f})"


@styled
def layers_figure(layers: pd.DataFrame) -> ShownFigure:
    """Share of non-zeros of every layer before the first step and after the last; a panel per kind of FFN."""
    arms = [arm for arm in ("plain", "gated") if arm in set(layers["arm"])]
    if not arms:
        return captioned(ShownFigure(figsize=(6, 1)), "This study has no runs of plain or gated with every seed.")
    figure, panels = side_by_side(len(arms), share_y=True)
    for axes, arm in zip(panels, arms, strict=True):
        rows = layers[layers["arm"] == arm]
        means = rows.groupby("layer")[["initial_share", "final_share"]].mean()
        for number, (column, when) in enumerate({"initial_share": "first step", "final_share": "last step"}.items()):
            look, label = Look(number), f"{'after' if number else 'before'} the {when}, mean"
            axes.plot(rows["layer"], 100 * rows[column], look.marker, color=look.colour, fillstyle="none")
            axes.plot(means.index, 100 * means[column], look.line, color=look.colour, label=label)
        axes.axhline(50, color="grey", linewidth=0.8)
        seeds = rows["seed"].nunique()
        axes.set(xlabel="Layer", xticks=means.index, ylim=(0, None))
        axes.set_title(f"{arm.capitalize()} ReLU FFN, {seeds} seed{'s' * (seeds != 1)}")
    panels[0].set(ylabel="Neurons that are not zero (%)")
    panels[0].legend(loc="lower left")
    return captioned(figure, "Each point: one layer of one run, mean over evaluation tokens. Grey: half.")


@styled
def needs_figure(falls: Mapping[str, Estimate], margin: float) -> ShownFigure:
    """How far the share falls in every arm, with its interval, against the margin; `margin` as a share."""
    arms = [arm for arm in ARMS if arm in falls] + [arm for arm in falls if arm not in ARMS]
    figure = ShownFigure(figsize=(7.5, 0.9 + 0.32 * len(arms)), layout="constrained")
    axes = figure.subplots()
    for place, arm in enumerate(arms):
        fall = falls[arm]
        if fall.reason:
            axes.text(0.5, place, fall.reason, va="center", fontsize=8)
            continue
        reach = [[100 * (fall.value - fall.low)], [100 * (fall.high - fall.value)]]
        axes.errorbar(100 * fall.value, place, xerr=reach, fmt="o", color=COLOURS[0], capsize=3)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.axvline(100 * margin, color=COLOURS[2], linestyle="--", linewidth=1)
    axes.set_yticks(range(len(arms)), [ARMS.get(arm, arm) for arm in arms])
    axes.set(xlabel="Fall of the share of non-zeros, first step to last (points)", ylim=(len(arms) - 0.5, -0.5))
    counts = " or ".join(map(str, sorted({fall.n for fall in falls.values()})))
    about = (
        f"Mean over layers; {LEVEL:.0%} t interval over seeds ({counts}). Dashed: the margin, {100 * margin:g} points."
    )
    return captioned(figure, about)


@styled
def sizes_figure(points: pd.DataFrame) -> ShownFigure:
    """Depth, width and d_ff one at a time, by both metrics: above the percentage, below the count; published beside.

    points: `lazy_neuron.size_points`.
    """
    figure = ShownFigure(figsize=(11, 6.4), layout="constrained")
    panels = figure.subplots(2, len(AXES), sharex="col", sharey="row")
    for (upper, lower), dimension in zip(panels.T, AXES, strict=True):
        for number, (data, metric) in enumerate((data, metric) for data in DATA for metric in METRICS):
            line, look = along(points, data, dimension), Look(number)
            style = {"color": look.colour, "marker": look.marker, "linestyle": look.line, "label": f"{metric}, {data}"}
            for axes, scale in ((upper, 100), (lower, line["d_ff"])) if len(line) else ():
                axes.errorbar(
                    line[dimension], scale * line[metric], scale * line[f"{metric} reach"], capsize=2, **style
                )
        _published(upper, lower, dimension)
        if all(along(points, data, dimension).empty for data in DATA):
            upper.text(0.5, 0.9, "no runs vary it", transform=upper.transAxes, ha="center", fontsize=9)
        lower.set(xscale="log", yscale="log", xlabel=AXES[dimension])
        for axis in (lower.xaxis, lower.yaxis):
            plain_log(axis)
        upper.set_title({"n_layers": "Deeper", "d_model": "Wider", "d_ff": "More neurons per layer"}[dimension])
    panels[0, 0].set(ylabel="Active neurons (% of d_ff)", ylim=(0, None))
    panels[1, 0].set(ylabel="Active neurons of a layer")
    found = {name: line for axes in panels.flat for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=3, fontsize=8)
    runs = " or ".join(map(str, sorted(points["runs"].unique())))
    about = f"Lines: one dimension alone changes; bars: {LEVEL:.0%} t interval over seeds ({runs} a point). Black: "
    about += (
        "published, of models that\ndiffer in all three dimensions at once, CETT-PPL as limits; they join the picture, "
    )
    return captioned(figure, about + "not a line. Published CETT-PPL: at 1%.")


def along(points: pd.DataFrame, data: str, dimension: str) -> pd.DataFrame:
    """The points of one kind of data that differ in a dimension alone, in its order; the longest such line."""
    others = [name for name in AXES if name != dimension]
    lines = [rows for _, rows in points[points["data"] == data].groupby(others) if len(rows) > 1]
    return max(lines, key=len).sort_values(dimension) if lines else points.head(0)


def _published(upper: Axes, lower: Axes, dimension: str) -> None:
    """Published shares against one dimension, and their counts; T5-Base, of no shape here, as a line."""
    style = {"color": "black", "linestyle": "none", "markersize": 6}
    for (name, marker), shapes in PUBLISHED.items():
        rows = pd.DataFrame(shapes, columns=["d_model", "n_layers", "d_ff", "share"])
        upper.plot(rows[dimension], 100 * rows["share"], marker=marker, label=name, **style)
        lower.plot(rows[dimension], rows["share"] * rows["d_ff"], marker=marker, label=name, **style)
    upper.axhline(100 * T5_BASE, color="black", linestyle=":", linewidth=1, label="non-zeros, T5-Base, published")
