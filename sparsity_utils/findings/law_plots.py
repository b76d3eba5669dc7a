"""The figures of notebook 02: activation ratio and loss against training tokens. Table in, figure out."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from sparsity_utils.findings.labels import parameters_name, price_name, seeds_name, shape_name
from sparsity_utils.findings.style import Look, captioned, side_by_side, styled, token_axis
from sparsity_utils.laws.data_law import fit_data_law
from sparsity_utils.laws.limits import fit_points, published_form
from sparsity_utils.laws.published_laws import PUBLISHED_LAWS, TOKENS_PER_PARAMETER
from sparsity_utils.models.config import ACTIVATIONS
from sparsity_utils.models.decoder import non_embedding_parameters

PUBLISHED_FROM = 10.0  # tokens per parameter from which the published laws are drawn: their warm-up is over


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
        axes.set_title(f"{ACTIVATIONS[activation]} at {price_name(checkpoints)}")
    panels[0].legend(fontsize=8)
    _losses(panels[-1], checkpoints)
    return captioned(
        figure,
        f"Points: checkpoints, joined within each run, {seeds_name(checkpoints)} a size; hollow: warm-up, not fitted. "
        "Lines: published form, band: 90% block bootstrap.",
    )


@styled
def published_beside_ours(checkpoints: pd.DataFrame) -> Figure:
    """Our runs and the published laws of 0.1B to 2.4B models against training tokens per parameter (Fig. 4)."""
    activations = [name for name in ("relu", "silu") if name in set(checkpoints["activation"])]
    figure, panels = side_by_side(len(activations))
    for axes, activation in zip(panels, activations, strict=True):
        fitted = fit_points(checkpoints[checkpoints["activation"] == activation])
        for number, (parameters, size) in enumerate(fitted.groupby("parameters", sort=True)):
            look, x = Look(number), size["tokens"] / parameters
            axes.plot(x, _percent(size), look.marker, color=look.colour, alpha=0.6, markersize=3)
            fit = fit_data_law(size["tokens"], size["activation_ratio"], published_form(activation), size["seed"])
            grid = np.geomspace(x.min(), x.max(), 100)
            curve = 100 * fit.predict(grid * parameters)
            axes.plot(grid, curve, look.line, color=look.colour, label=parameters_name(size))
        _published(axes, activation)
        axes.set(xscale="log", xlabel="Training tokens per parameter", title=ACTIVATIONS[activation])
        axes.set_ylim(0, 1.4 * axes.dataLim.ymax)  # room for the legend
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.legend(fontsize=7, ncols=2, loc="upper left")
    panels[0].set_ylabel("Active neurons (% of d_ff)")
    ours = f"Colours: here, {price_name(checkpoints)}, {seeds_name(checkpoints)} a size, other text and tokenizer"
    return captioned(figure, f"{ours}. Black: published laws of 0.1B to 2.4B models.")


def _published(axes: Axes, activation: str) -> None:
    """The published laws, the thicker the larger the model; the smallest and the largest are named."""
    published = [law for law in PUBLISHED_LAWS if law.activation == activation]
    grid = np.geomspace(PUBLISHED_FROM, TOKENS_PER_PARAMETER, 100)
    for number, law in enumerate(published):
        tokens = grid * non_embedding_parameters(law.d_model, law.n_layers)
        label = f"published, {law.model}" if law in (published[0], published[-1]) else None
        line = ":" if number == 0 else "-"
        width = 0.5 + 0.3 * number
        axes.plot(
            grid, 100 * law.predict(tokens), line, color="black", linewidth=max(width, 1.2 * (number == 0)), label=label
        )


@styled
def other_activations(main: pd.DataFrame, others: pd.DataFrame) -> Figure:
    """Activation ratio and loss against training tokens of activation functions the paper does not have, at one size.

    main: checkpoints that hold ReLU and SiLU runs of the same shape; others: those of the other functions.
    """
    together = at_one_size(main, others)
    figure, (left, right) = side_by_side(2)
    for number, (activation, rows) in enumerate(together.groupby("activation", sort=True)):
        look = Look(number)
        for index, (_, run) in enumerate(rows.sort_values("tokens").groupby("seed")):
            style = {"color": look.colour, "marker": look.marker, "linestyle": look.line, "markersize": 3}
            label = None if index else ACTIVATIONS[activation]
            stable = run[run["role"] == "stable"]
            left.plot(_millions(stable), _percent(stable), label=label, **style)
            right.plot(_millions(run), run["validation_loss"], label=label, **style)
    for axes in (left, right):
        token_axis(axes)
    left.set(ylabel="Active neurons (% of d_ff)", title=f"{price_name(together)}, {shape_name(together)}")
    left.set_ylim(0, 1.3 * left.dataLim.ymax)  # room for the legend
    left.legend(fontsize=8, ncols=2, loc="upper left")
    right.legend(fontsize=8)
    right.set(ylabel="Validation loss (nats per token)", title="Loss, last point after the decay")
    return captioned(figure, f"One line per run, {seeds_name(together)}; {parameters_name(together)}.")


def at_one_size(main: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The runs of `others` and those of `main` that have their shapes, in one table."""
    shapes = others[["d_model", "n_layers"]].drop_duplicates()
    return pd.concat([main.merge(shapes, on=["d_model", "n_layers"]), others], ignore_index=True)


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
    label = f"{shape_name(size)}, {parameters_name(size)}"
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
