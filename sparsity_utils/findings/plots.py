"""The figures of a study: which there are, and those of notebook 01. Table in, figure out."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsity_utils.findings import design_plots, law_plots, pattern_plots, published_plots, scale_plots, speed_plots
from sparsity_utils.findings.labels import shape_name
from sparsity_utils.findings.style import Look, ShownFigure, captioned, save_figure, styled
from sparsity_utils.laws.cost import with_weights_read
from sparsity_utils.laws.design import CURVES, MORE_CURVES
from sparsity_utils.models.config import ACTIVATIONS
from sparsity_utils.neurons.rules import METRICS
from sparsity_utils.study.study import Study


@styled
def metrics(table: pd.DataFrame) -> Figure:
    """Rise of perplexity for every metric at the largest size, against activation ratio (compare Fig. 2 and 3) and
    against the FFN weights that must be read."""
    largest = with_weights_read(table[table["parameters"] == table["parameters"].max()])
    activations = sorted(set(largest["activation"]))
    figure = ShownFigure(figsize=(3.7 * len(activations), 6.4), layout="constrained")
    panels = figure.subplots(2, len(activations), sharey=True, squeeze=False)
    columns = {"activation_ratio": "Active neurons (% of d_ff)", "weights_read": "FFN weights read (% of dense)"}
    for row, (column, label) in zip(panels, columns.items(), strict=True):
        for axes, activation in zip(row, activations, strict=True):
            rows = largest[largest["activation"] == activation]
            _price_curves(axes, rows, column)
            axes.set(xlabel=label)
        row[0].set_ylabel("Rise of perplexity (%)")
    for axes, activation in zip(panels[0], activations, strict=True):
        axes.set_title(f"{ACTIVATIONS[activation]}, {shape_name(largest)}")
    panels[0, 0].legend()
    return captioned(figure, f"One line per seed (n = {largest['seed'].nunique()}); last stable checkpoint.")


def _price_curves(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    """Rise of perplexity against `column`: a line per metric and seed, and a point for the metrics without a knob."""
    for look, metric in zip(map(Look, count()), ("cett", "fat", "top-k"), strict=False):
        for seed, curve in rows[rows["metric"] == metric].groupby("seed"):
            curve = curve.sort_values(column)
            style = {"color": look.colour, "marker": look.marker, "linestyle": look.line}
            label = METRICS[metric].label if seed == rows["seed"].min() else None
            axes.plot(100 * curve[column], _rise(curve), label=label, **style)
    price = rows.loc[rows["metric"] == "cett-ppl", "setting"].iloc[0]
    for metric, marker, end in (("cett-ppl", "*", f"-{price:g}%"), ("relu", "X", "")):
        point = rows[(rows["metric"] == metric) & (rows["activation_ratio"] < 0.99)]  # smooth ones have no zeros
        shown = {"marker": marker, "s": 90, "color": "black", "zorder": 5, "label": f"{METRICS[metric].label}{end}"}
        axes.scatter(100 * point[column], _rise(point), **shown)
    axes.axhline(price, color="grey", linewidth=0.8, linestyle=":")
    axes.set_yscale("symlog", linthresh=0.5)
    axes.set_ylim(-0.5, 130)
    axes.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])


class Drawing(NamedTuple):
    """How a figure is drawn: from the tables of `questions`, then those of `optional` that a study has."""

    draw: Callable[..., Figure]
    questions: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def tables(self, study: Study) -> list[pd.DataFrame] | None:
        """The arguments of `draw`; None where the study lacks a table."""
        if not all(map(study.answers, self.questions)):
            return None
        return [study.table(question) for question in (*self.questions, *filter(study.answers, self.optional))]


FIGURES = {
    "01_metrics": Drawing(metrics, ("metrics",)),
    "02_relu_vs_silu": Drawing(law_plots.relu_vs_silu, ("relu_vs_silu",)),
    "02_published_beside_ours": Drawing(law_plots.published_beside_ours, ("relu_vs_silu",)),
    "02_other_activations": Drawing(law_plots.other_activations, ("relu_vs_silu", "other_activations")),
    "03_width_depth_ratio": Drawing(scale_plots.width_depth_ratio, ("width_depth_ratio",)),
    "03_cost_of_depth": Drawing(scale_plots.cost_of_depth, ("width_depth_ratio", "depth_cost")),
    "04_scale_insensitivity": Drawing(
        scale_plots.scale_insensitivity, ("scale_insensitivity",), optional=("second_line",)
    ),
    "04_second_line": Drawing(scale_plots.second_line, ("scale_insensitivity", "second_line")),
    "05_neuron_frequencies": Drawing(pattern_plots.neuron_frequencies, ("activation_patterns",)),
    "05_token_patterns": Drawing(pattern_plots.token_patterns, ("token_patterns",)),
    "05_dead_neurons": Drawing(pattern_plots.dead_neurons, ("dead_neurons",)),
    "05_transfer": Drawing(pattern_plots.transfer, ("transfer",)),
    "06_speed_against_sparsity": Drawing(speed_plots.speed_against_sparsity, ("sparse_ffn",)),
    "06_roofline": Drawing(speed_plots.roofline, ("sparse_ffn",)),
    "06_batches": Drawing(speed_plots.batches, ("sparse_ffn",)),
    "06_decoding": Drawing(speed_plots.decoding, ("sparse_decoding",)),
    "07_published_curves": Drawing(published_plots.laws, ("published_refit",)),
    "07_limits": Drawing(published_plots.limits, ("published_stability",)),
    "07_forecasts": Drawing(published_plots.forecasts, ("published_forecasts",)),
    "08_design": Drawing(design_plots.design, ("sparse_ffn", "sparse_decoding", *CURVES), optional=MORE_CURVES),
}


def draw_all(study: Study, folder: Path) -> Iterator[Path]:
    """Draw every figure that a study has the tables for into `folder`, PNG and SVG; yield the files."""
    for name, drawing in FIGURES.items():
        tables = drawing.tables(study)
        if tables is not None:
            yield from save_figure(drawing.draw(*tables), folder / name)


def keep_figure(figure: Figure, study: Study, name: str) -> None:
    """Store a notebook's figure among its profile's; those of the recorded study are drawn by `make figures`."""
    if study.profile is not None:
        save_figure(figure, study.folder.parent / "figures" / name)


def _rise(rows: pd.DataFrame) -> pd.Series:
    return 100 * (rows["ppl_ratio"] - 1)
