"""Notebook 01, definitions of an active neuron: which costs least perplexity, and which reads the fewest weights."""

from collections.abc import Iterator
from itertools import count

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsity_utils.findings.claims import Claim, Verdicts, stated
from sparsity_utils.findings.style import AXIS, SMOOTH, Look, ShownFigure, captioned, shape_name, styled
from sparsity_utils.laws.cost import with_weights_read
from sparsity_utils.laws.limits import require
from sparsity_utils.laws.trends import mean_over_runs
from sparsity_utils.models.config import ACTIVATIONS
from sparsity_utils.neurons.rules import METRICS
from sparsity_utils.study.tables import Tables

USEFUL_PPL_RATIO = 2.0  # metrics are compared where CETT at most doubles perplexity, the largest p that is measured
RIVALS = ("top-k", "fat")
RATIO_GRID = 9  # activation ratios at which two metrics are compared, over the range both cover

CETT_LOWEST = Claim(
    "cett_lowest",
    "metrics",
    "At equal activation ratio CETT has the lowest perplexity",
    "lowest of four",
    "nats per token below the closest metric",
    "t interval over runs of the mean loss gap to Top-k and to FAT (plain ReLU is one point, see the next claim)",
    "90% interval above 0 for both",
    scale=1.0,
)
CETT_CUT = Claim(
    "cett_cut",
    "metrics",
    "CETT-PPL-1% keeps fewer neurons active than the zero threshold of ReLU",
    "61% fewer (0.8B)",
    "% fewer",
    "t interval over ReLU runs of the relative cut",
)


def claims() -> pd.DataFrame:
    """The claims, tests and thresholds, as the notebook states them before its results."""
    return stated([CETT_LOWEST, CETT_CUT])


def verdicts(table: pd.DataFrame) -> Verdicts:
    """Has CETT the lowest perplexity at equal activation ratio, and does it cut the ratio of plain ReLU?

    table: run, activation, metric ("relu", "top-k", "fat", "cett", "cett-ppl"), setting, activation_ratio, ppl_ratio.
    Raises InputError for missing columns, duplicates and NaN.
    """
    columns = ["run", "activation", "metric", "setting", "activation_ratio", "ppl_ratio"]
    require(table, columns, ["run", "metric", "setting"], ["activation_ratio", "ppl_ratio"], "metrics")
    gaps = pd.DataFrame({run: _loss_gaps(rows) for run, rows in table.groupby("run", sort=True)}).T
    relu = table[table["activation"] == "relu"].pivot_table("activation_ratio", "run", "metric")
    relu = relu.reindex(columns=["relu", "cett-ppl"]).dropna()
    by_rival = {rival: mean_over_runs(gaps[rival].dropna()) for rival in RIVALS}
    cut = mean_over_runs(1 - relu["cett-ppl"] / relu["relu"])
    return Verdicts([CETT_LOWEST.judged_all(by_rival, "runs"), CETT_CUT.counted(cut, "runs")])


def figures(study: Tables) -> Iterator[tuple[str, ShownFigure]]:
    """Every figure that a study has the tables for, with its name."""
    if study.answers("metrics"):
        yield "01_metrics", figure(study.table("metrics"))


@styled
def figure(table: pd.DataFrame) -> ShownFigure:
    """Increase of perplexity under every metric at the largest size (compare Fig. 2 and 3).

    Above, it is drawn against the activation ratio; below, against the share of the FFN weights that must be read.
    """
    largest = with_weights_read(table[table["parameters"] == table["parameters"].max()])
    activations = sorted(set(largest["activation"]))
    shown = ShownFigure(figsize=(3.7 * len(activations), 6.4), layout="constrained")
    panels = shown.subplots(2, len(activations), sharey=True, squeeze=False)
    columns = {"activation_ratio": AXIS, "weights_read": "FFN weights read (% of dense)"}
    for row, (column, label) in zip(panels, columns.items(), strict=True):
        for axes, activation in zip(row, activations, strict=True):
            _price_curves(axes, largest[largest["activation"] == activation], column)
            axes.set(xlabel=label)
        row[0].set_ylabel("Rise of perplexity (%)")
    for axes, activation in zip(panels[0], activations, strict=True):
        axes.set_title(f"{ACTIVATIONS[activation]}, {shape_name(largest)}")
    panels[0, 0].legend()
    return captioned(shown, f"One line per seed (n = {largest['seed'].nunique()}); last stable checkpoint.")


def _price_curves(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    """Increase of perplexity against `column`: a line per metric and seed, and a point for metrics without a knob."""
    for look, metric in zip(map(Look, count()), ("cett", "fat", "top-k"), strict=False):
        for seed, curve in rows[rows["metric"] == metric].groupby("seed"):
            curve = curve.sort_values(column)
            style = {"color": look.colour, "marker": look.marker, "linestyle": look.line}
            label = METRICS[metric].label if seed == rows["seed"].min() else None
            axes.plot(100 * curve[column], _increase(curve), label=label, **style)
    price = rows.loc[rows["metric"] == "cett-ppl", "setting"].iloc[0]
    for metric, marker, end in (("cett-ppl", "*", f"-{price:g}%"), ("relu", "X", "")):
        point = rows[(rows["metric"] == metric) & (rows["activation_ratio"] < SMOOTH)]
        shown = {"marker": marker, "s": 90, "color": "black", "zorder": 5, "label": f"{METRICS[metric].label}{end}"}
        axes.scatter(100 * point[column], _increase(point), **shown)
    axes.axhline(price, color="grey", linewidth=0.8, linestyle=":")
    axes.set_yscale("symlog", linthresh=0.5)
    axes.set_ylim(-0.5, 130)
    axes.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])


def _increase(rows: pd.DataFrame) -> pd.Series:
    return 100 * (rows["ppl_ratio"] - 1)


def _loss_gaps(rows: pd.DataFrame) -> dict[str, float]:
    """{rival: ln(PPL ratio) less that of CETT, mean over the activation ratios that both cover}, nats per token."""
    ratios, cett = _curve(rows, "cett")
    useful = np.flatnonzero(cett <= np.log(USEFUL_PPL_RATIO))
    gaps = dict.fromkeys(RIVALS, float("nan"))
    for rival in RIVALS:
        x, y = _curve(rows, rival)
        if useful.size and x.size:
            low, high = max(x[0], ratios[useful[0]]), min(x[-1], ratios[-1])
            if low < high:
                grid = np.geomspace(low, high, RATIO_GRID)
                gaps[rival] = float(np.mean(_at(grid, x, y) - _at(grid, ratios, cett)))
    return gaps


def _curve(rows: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Activation ratios of a metric, in order, and log PPL ratio there: loss added by sparsity, in nats per token."""
    rows = rows[(rows["metric"] == metric) & (rows["activation_ratio"] > 0)]
    means = np.log(rows.groupby("activation_ratio", sort=True)["ppl_ratio"].mean())
    return means.index.to_numpy(dtype=float), means.to_numpy(dtype=float)


def _at(grid: np.ndarray, ratios: np.ndarray, heights: np.ndarray) -> np.ndarray:
    return np.interp(np.log(grid), np.log(ratios), heights)
