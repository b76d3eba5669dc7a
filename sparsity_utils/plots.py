"""The figures of a study: one function per figure, tables in, figure out."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsity_utils import design_plots, pattern_plots, speed_plots
from sparsity_utils.cost import with_weights_read
from sparsity_utils.design import CURVES
from sparsity_utils.laws import fit_data_law
from sparsity_utils.limits import fit_points, last_means, limits_table, published_form
from sparsity_utils.profiles import ACTIVATIONS
from sparsity_utils.study import Study
from sparsity_utils.style import (
    COLOURS,
    Look,
    ShownFigure,
    captioned,
    save_figure,
    side_by_side,
    styled,
    token_axis,
)
from sparsity_utils.trends import fit_line, fit_two_segments
from sparsity_utils.verdicts import one_value_per_run

METRIC_NAMES = {"top-k": "Top-k", "fat": "FAT-ε", "cett": "CETT"}


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
        axes.set_title(f"{ACTIVATIONS[activation]}, {_shape(largest)}")
    panels[0, 0].legend()
    return captioned(figure, f"One line per seed (n = {largest['seed'].nunique()}); last stable checkpoint.")


def _price_curves(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    """Rise of perplexity against `column`: a line per metric and seed, and a point for the metrics without a knob."""
    for look, metric in zip(map(Look, count()), ("cett", "fat", "top-k"), strict=False):
        for seed, curve in rows[rows["metric"] == metric].groupby("seed"):
            curve = curve.sort_values(column)
            style = {"color": look.colour, "marker": look.marker, "linestyle": look.line}
            label = METRIC_NAMES[metric] if seed == rows["seed"].min() else None
            axes.plot(100 * curve[column], _rise(curve), label=label, **style)
    price = rows.loc[rows["metric"] == "cett-ppl", "setting"].iloc[0]
    for metric, marker, label in (("cett-ppl", "*", f"CETT-PPL-{price:g}%"), ("relu", "X", "non-zero")):
        point = rows[(rows["metric"] == metric) & (rows["activation_ratio"] < 0.99)]  # smooth ones have no zeros
        shown = {"marker": marker, "s": 90, "color": "black", "zorder": 5, "label": label}
        axes.scatter(100 * point[column], _rise(point), **shown)
    axes.axhline(price, color="grey", linewidth=0.8, linestyle=":")
    axes.set_yscale("symlog", linthresh=0.5)
    axes.set_ylim(-0.5, 130)
    axes.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])


@styled
def relu_vs_silu(checkpoints: pd.DataFrame) -> Figure:
    """Activation ratio against training tokens with the fitted law, per activation and size, and losses (Fig. 4)."""
    activations = sorted(set(checkpoints["activation"]))
    figure, panels = side_by_side(len(activations) + 1)
    for axes, activation in zip(panels, activations, strict=False):
        rows = checkpoints[(checkpoints["activation"] == activation) & (checkpoints["role"] == "stable")]
        for number, (_, size) in enumerate(rows.groupby("parameters", sort=True)):
            _law(axes, size, activation, Look(number))
        token_axis(axes)
        axes.set_ylabel("Active neurons (% of d_ff)")
        axes.set_title(f"{ACTIVATIONS[activation]} at {_price(checkpoints)}")
    panels[0].legend(fontsize=8)
    _losses(panels[-1], checkpoints)
    seeds = checkpoints["seed"].nunique()
    return captioned(
        figure,
        f"Points: checkpoints, joined within each of {seeds} seeds; hollow: warm-up, not fitted. "
        "Lines: published form, band: 90% block bootstrap.",
    )


@styled
def width_depth_ratio(checkpoints: pd.DataFrame) -> Figure:
    """Activation ratio and loss against the width-depth ratio at one size (Fig. 5 and 6)."""
    figure, (left, right) = side_by_side(2)
    values, _ = one_value_per_run(limits_table(checkpoints), "relu")
    _seeds(left, values["ratio"], 100 * values["value"], values["seed"])
    grid = np.geomspace(values["ratio"].min(), values["ratio"].max(), 200)
    line = fit_line(values["ratio"], values["value"], values["seed"])
    bent = fit_two_segments(values["ratio"], values["value"], values["seed"])
    left.plot(grid, 100 * line.predict(grid), color="grey", linestyle="--", label=f"line, AICc {line.aicc:.1f}")
    if np.isfinite(bent.aicc):
        label = f"slope, then flat, AICc {bent.aicc:.1f}"
        left.plot(grid, 100 * bent.predict(grid), color=COLOURS[1], linestyle="-", label=label)
    left.set(ylabel="Active neurons (% of d_ff)", title=f"ReLU at {_price(checkpoints)}, {_parameters(checkpoints)}")
    final = checkpoints[checkpoints["role"] == "final"]
    _seeds(right, final["ratio"], final["validation_loss"], final["seed"])
    right.set(ylabel="Validation loss (nats per token)", title="Loss after the decay")
    for axes in (left, right):
        axes.set_xscale("log")
        ticks = sorted(set(values["ratio"].round(1)))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("Width-depth ratio (d_model / n_layers)")
        axes.legend(fontsize=8)
    basis = (
        "limits of the data law"
        if len(values) and (values["value"] == values["limit"]).all()
        else "means of the last five stable checkpoints"
    )
    return captioned(figure, f"One point per run, {values['seed'].nunique()} seeds; left: {basis}.")


@styled
def scale_insensitivity(checkpoints: pd.DataFrame) -> Figure:
    """Activation ratio against size by two metrics, with the slope that the equivalence test judges (Fig. 7)."""
    figure, (left, right) = side_by_side(2)
    limits = limits_table(checkpoints)
    for number, activation in enumerate(sorted(set(checkpoints["activation"]))):
        values, _ = one_value_per_run(limits, activation)
        _against_size(left, values, ACTIVATIONS[activation], Look(number))
    shares = last_means(checkpoints[checkpoints["activation"] == "relu"], "nonzero_share")
    _against_size(right, shares.rename(columns={"last_five_mean": "value"}), ACTIVATIONS["relu"], Look(0))
    left.set(title=_price(checkpoints), ylabel="Active neurons (% of d_ff)")
    right.set(title="Share of non-zero neurons", ylabel="Non-zero neurons (% of d_ff)")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="Non-embedding parameters")
        sizes = sorted(set(shares["parameters"]))
        axes.set_xticks(sizes, [f"{size / 1e3:.3g}k" if size < 1e6 else f"{size / 1e6:.3g}M" for size in sizes])
        axes.minorticks_off()
        axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
        axes.legend(fontsize=8)
    return captioned(figure, f"One point per run, {checkpoints['seed'].nunique()} seeds; slopes with 90% intervals.")


# Name of the figure -> the questions whose tables it shows, and how they are drawn.
FIGURES = {
    "01_metrics": (("metrics",), metrics),
    "02_relu_vs_silu": (("relu_vs_silu",), relu_vs_silu),
    "03_width_depth_ratio": (("width_depth_ratio",), width_depth_ratio),
    "04_scale_insensitivity": (("scale_insensitivity",), scale_insensitivity),
    "05_neuron_frequencies": (("activation_patterns",), pattern_plots.neuron_frequencies),
    "05_token_patterns": (("token_patterns",), pattern_plots.token_patterns),
    "05_dead_neurons": (("dead_neurons",), pattern_plots.dead_neurons),
    "05_transfer": (("transfer",), pattern_plots.transfer),
    "06_speed_against_sparsity": (("sparse_ffn",), speed_plots.speed_against_sparsity),
    "06_roofline": (("sparse_ffn",), speed_plots.roofline),
    "06_batches": (("sparse_ffn",), speed_plots.batches),
    "06_decoding": (("sparse_decoding",), speed_plots.decoding),
    "08_design": (("sparse_ffn", "sparse_decoding", *CURVES), design_plots.design),
}


def draw_all(study: Study, folder: Path) -> Iterator[Path]:
    """Draw every figure of a study into `folder`, PNG and SVG; yield the files."""
    for name, (questions, draw) in FIGURES.items():
        yield from save_figure(draw(*map(study.table, questions)), folder / name)


def keep_figure(figure: Figure, study: Study, name: str) -> None:
    """Store a notebook's figure among its profile's; those of the recorded study are drawn by `make figures`."""
    if study.profile is not None:
        save_figure(figure, study.folder.parent / "figures" / name)


def _law(axes: Axes, size: pd.DataFrame, activation: str, look: Look) -> None:
    """Checkpoints of one size, the common curve of its seeds and the band of the bootstrap."""
    fitted = fit_points(size)
    points = {"color": look.colour, "marker": look.marker, "linestyle": "none"}
    for _, run in size.groupby("run"):
        axes.plot(_millions(run), _percent(run), color=look.colour, alpha=0.25, linewidth=0.8)
    axes.plot(_millions(fitted), _percent(fitted), alpha=0.7, **points)
    warm_up = size.drop(fitted.index)
    axes.plot(_millions(warm_up), _percent(warm_up), fillstyle="none", **points)
    fit = fit_data_law(fitted["tokens"], fitted["activation_ratio"], published_form(activation), fitted["seed"])
    grid = np.geomspace(fitted["tokens"].min(), fitted["tokens"].max(), 100)
    label = f"{_shape(size)}, {_parameters(size)}"
    axes.plot(grid / 1e6, 100 * fit.predict(grid), look.line, color=look.colour, label=label)
    if fit.limit is not None:
        band = fit.interval
        low, high = 100 * band.band_low, 100 * band.band_high
        axes.fill_between(band.tokens / 1e6, low, high, color=look.colour, alpha=0.2, linewidth=0)


def _millions(checkpoints: pd.DataFrame) -> pd.Series:
    return checkpoints["tokens"] / 1e6


def _percent(checkpoints: pd.DataFrame) -> pd.Series:
    return 100 * checkpoints["activation_ratio"]


def _losses(axes: Axes, checkpoints: pd.DataFrame) -> None:
    for number, (_, size) in enumerate(checkpoints.groupby("parameters", sort=True)):
        look = Look(number)
        for activation, line in (("relu", "-"), ("silu", "--")):
            means = size[size["activation"] == activation].groupby("tokens")["validation_loss"].mean()
            style = {"color": look.colour, "marker": look.marker, "linestyle": line, "markersize": 3}
            label = ACTIVATIONS[activation] if number == 0 else None
            axes.plot(means.index / 1e6, means, label=label, **style)
    token_axis(axes)
    axes.set_ylabel("Validation loss (nats per token)")
    axes.set_title("Loss, last point after the decay")
    axes.legend(fontsize=8)


def _seeds(axes: Axes, x: pd.Series, y: pd.Series, seeds: pd.Series) -> None:
    for number, seed in enumerate(sorted(set(seeds))):
        chosen = (seeds == seed).to_numpy()
        style = {"marker": Look(number).marker, "color": COLOURS[0], "fillstyle": "none" if number else "full"}
        axes.plot(x[chosen], y[chosen], linestyle="none", label=f"seed {seed}", **style)


def _against_size(axes: Axes, values: pd.DataFrame, name: str, look: Look) -> None:
    """One value per run against size, and the line whose slope is tested."""
    decades = np.log10(values["parameters"])
    line = fit_line(decades, values["value"], values["seed"])
    ends = np.array([decades.min(), decades.max()])
    slope = [100 * part for part in (line.slope.value, line.slope.low, line.slope.high)]
    label = f"{name}: {slope[0]:+.1f} [{slope[1]:+.1f}, {slope[2]:+.1f}] points per decade"
    axes.plot(values["parameters"], 100 * values["value"], look.marker, color=look.colour, alpha=0.8)
    axes.plot(10**ends, 100 * line.predict(ends), look.line, color=look.colour, label=label)


def _price(checkpoints: pd.DataFrame) -> str:
    return f"CETT-PPL-{checkpoints['p'].iloc[0]:g}%"


def _rise(rows: pd.DataFrame) -> pd.Series:
    return 100 * (rows["ppl_ratio"] - 1)


def _shape(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    return f"{first['d_model']}x{first['n_layers']}"


def _parameters(rows: pd.DataFrame) -> str:
    """`45k parameters`, or the mean where shapes differ a little."""
    count = rows.drop_duplicates(["d_model", "n_layers"])["parameters"].mean()
    return f"{count / 1e6:.3g}M parameters" if count >= 1e6 else f"{count / 1e3:.3g}k parameters"
