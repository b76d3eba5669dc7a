"""Notebook 02, more data: loss, trend and final sparsity of ReLU beside SiLU, and the published law along a run."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsity_utils.findings.claims import MEANS, Claim, Verdict, Verdicts, form_claim, form_gaps, form_verdict, stated
from sparsity_utils.findings.style import (
    AXIS,
    Look,
    ShownFigure,
    captioned,
    parameters_name,
    plain_log,
    price_name,
    seeds_name,
    shape_name,
    side_by_side,
    styled,
    token_axis,
)
from sparsity_utils.laws.data_law import Fit, compare_forms
from sparsity_utils.laws.holdout import LAST_VALUE, forecast_table
from sparsity_utils.laws.limits import SHAPE, Curves, fit_curves, fit_points, limits_table, published_form, run_table
from sparsity_utils.laws.lines import (
    MAIN,
    SECOND,
    Lines,
    lines_of,
    loss_difference,
    means_on_lines,
    on_lines,
    relu_falls,
    relu_sparser,
    silu_rises,
)
from sparsity_utils.laws.published import PUBLISHED_LAWS, TOKENS_PER_PARAMETER
from sparsity_utils.laws.trends import mean_over_runs
from sparsity_utils.models.config import ACTIVATIONS
from sparsity_utils.models.shapes import non_embedding_parameters
from sparsity_utils.study.tables import Tables

# "Comparable" loss: 1% is what about 14% more parameters buy, at loss ~ N^-0.076 (arXiv 2001.08361, eq. 1.1).
LOSS_MARGIN = 0.01
PUBLISHED_FROM = 10.0  # tokens per parameter from which the published laws are drawn: their warm-up is over

LOSS_EQUAL = Claim(
    "loss_equal",
    "relu_vs_silu",
    "ReLU reaches the loss of SiLU",
    "comparable",
    "% of the SiLU loss",
    "equivalence (two one-sided t tests) of the relative difference of pairs of runs of equal size, seed and tokens: "
    f"{MEANS}",
    f"90% interval inside +-{100 * LOSS_MARGIN:.0f}%",
    region=(-LOSS_MARGIN, LOSS_MARGIN),
    primary=True,
)
RELU_FALLS = Claim(
    "relu_falls",
    "relu_vs_silu",
    "The ReLU activation ratio falls with data",
    "falls",
    "points fewer per decade of tokens",
    f"slope of each run on log tokens, warm-up dropped: {MEANS}",
    primary=True,
)
SILU_RISES = Claim(
    "silu_rises",
    "relu_vs_silu",
    "The SiLU activation ratio rises with data",
    "rises",
    "points more per decade of tokens",
    f"slope of each run on log tokens, warm-up dropped: {MEANS}",
    primary=True,
)
RELU_SPARSER = Claim(
    "relu_sparser",
    "relu_vs_silu",
    "ReLU ends sparser than SiLU",
    "7.1% against 39.2% active (0.1B)",
    "points fewer active",
    f"difference of the last-five means of pairs of runs of equal size and seed: {MEANS}",
    primary=True,
)
RUNS_FORECAST = Claim(
    "runs_forecast",
    "relu_vs_silu",
    "Fitted to the first half of a run, the published law forecasts the second better than the last value",
    "none",
    "log of the last value's error over the law's",
    "t interval over runs of the log ratio of two root mean square errors beyond half of a run's tokens: of the "
    "forecast that nothing changes any more, and of the published form of the run's activation function",
    scale=1.0,
)
# The claims that each line of sizes decides, and what each is a mean of: one value per run or per pair of runs.
ON_LINES = {LOSS_EQUAL: loss_difference, RELU_FALLS: relu_falls, SILU_RISES: silu_rises, RELU_SPARSER: relu_sparser}
FORM_CLAIMS = {name: form_claim(name, published_form(name), "relu_vs_silu") for name in ("relu", "silu")}


def claims() -> pd.DataFrame:
    """The claims, tests and thresholds, as the notebook states them before its results."""
    return stated([*ON_LINES, *FORM_CLAIMS.values(), RUNS_FORECAST, *(claim.on(SECOND) for claim in ON_LINES)])


@dataclass(frozen=True)
class Training:
    """What verdicts and figures of activation along training rest on."""

    lines: Lines  # the tables of checkpoints by line
    curves: Curves  # the published form fitted to the runs and sizes of the main line
    forms: pd.DataFrame  # `compare_forms` of each of these runs: its columns beside run, shape, parameters and seed
    forecasts: pd.DataFrame  # `forecast_table` of these runs


def analyse(checkpoints: pd.DataFrame, second: pd.DataFrame | None = None) -> Training:
    """Fit the laws of the main line once.

    second: the same table for sizes at another width-depth ratio. Raises InputError for missing columns, duplicates
    and NaN.
    """
    lines = lines_of(checkpoints, second)
    return Training(lines, fit_curves(checkpoints), _forms(checkpoints), forecast_table(checkpoints))


def _forms(checkpoints: pd.DataFrame) -> pd.DataFrame:
    about, tables = ["run", *SHAPE, "parameters", "seed"], []
    for run, curve in fit_points(checkpoints).groupby(about, sort=True):
        table = compare_forms(curve["tokens"], curve["activation_ratio"]).rename(columns={"parameters": "coefficients"})
        tables.append(table.assign(**dict(zip(about, run, strict=True))))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=[*about, "form", "aicc", "rmse"])


def verdicts(training: Training) -> Verdicts:
    """One verdict per claim: loss, trends and sparsity on each line of sizes, the law as description and as forecast.

    Without a second line, the claims on it are inconclusive.
    """
    lines = training.lines
    means = {claim: means_on_lines(on_lines(lines, outcome)) for claim, outcome in ON_LINES.items()}
    return Verdicts(
        [
            *(_on_line(claim, found, MAIN, lines) for claim, found in means.items()),
            *(_form_verdict(training.forms, activation) for activation in FORM_CLAIMS),
            _forecast_verdict(training.forecasts),
            *(_on_line(claim, found, SECOND, lines) for claim, found in means.items()),
        ]
    )


def _on_line(claim: Claim, means: dict, line: str, lines: Lines) -> Verdict:
    claim = claim.on(line)
    if line not in lines:
        return claim.undecided("this study has no sizes at a second width-depth ratio")
    if line not in means:
        return claim.undecided("no size has the runs that this needs")
    return claim.judged(means[line].estimate, means[line].reason)


def _form_verdict(forms: pd.DataFrame, activation: str) -> Verdict:
    """Forms are compared run by run: runs are independent, the points of one run are not."""
    rows = forms[forms["activation"] == activation]
    return form_verdict(FORM_CLAIMS[activation], *form_gaps(rows, published_form(activation), "run"), "runs")


def _forecast_verdict(table: pd.DataFrame) -> Verdict:
    published = table["form"] == table["activation"].map(published_form)
    law, last = (table[rows].set_index("run")["rmse"] for rows in (published, table["form"] == LAST_VALUE))
    gains = np.log(last / law).dropna()
    short = f"{len(last) - len(gains)} of {len(last)} runs too short for a forecast" if len(gains) < len(last) else ""
    return RUNS_FORECAST.counted(mean_over_runs(gains), "runs", short)


def final_losses(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """Validation loss of each size after the decay, nats per token over its seeds; ReLU less SiLU in percent."""
    final = checkpoints[checkpoints["role"] == "final"].groupby(["d_model", "n_layers", "activation"])
    table = final["validation_loss"].agg(["count", "mean", "min", "max"]).unstack("activation")
    table["relu to silu", "%"] = 100 * (table["mean", "relu"] / table["mean", "silu"] - 1)
    return table.round(3)


def shown_limits(curves: Curves) -> pd.DataFrame:
    """`limits_table` with the intervals of the seeds, in percent."""
    limits = limits_table(curves, seed_intervals=True).drop(columns=["parameters", "width_depth_ratio"])
    shares = ["limit", "low", "high", "spread", "last_five_mean", "last_five_spread"]
    limits[shares] = (100 * limits[shares]).round(1)
    return limits.set_index([*SHAPE, "seed"])


def shown_runs(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """`run_table`, shares in percent and slopes in points per decade of tokens."""
    runs, shares = run_table(checkpoints), ["last_five_mean", "last_five_nonzero", "slope"]
    runs[shares] = (100 * runs[shares]).round(1)
    return runs.set_index([*SHAPE, "seed"])[["final_loss", *shares, "checkpoints"]].round(3)


def figures(study: Tables) -> Iterator[tuple[str, ShownFigure]]:
    """Every figure that a study has the tables for, with its name."""
    if study.answers("relu_vs_silu"):
        curves = fit_curves(study.table("relu_vs_silu"))
        yield "02_relu_vs_silu", figure(curves)
        yield "02_published_beside_ours", published_beside_ours(curves)
        if study.answers("other_activations"):
            together = at_one_size(curves.checkpoints, study.table("other_activations"))
            yield "02_other_activations", other_activations(together)


@styled
def figure(curves: Curves) -> ShownFigure:
    """Activation ratio against training tokens with the fitted law, per activation and size, and losses (Fig. 4)."""
    checkpoints = curves.checkpoints
    activations = sorted(set(checkpoints["activation"]))
    shown, panels = side_by_side(len(activations) + 1)
    for axes, activation in zip(panels, activations, strict=False):
        for number, (fit, size) in enumerate(_sizes(curves, activation)):
            _law(axes, size[size["role"] == "stable"], fit, Look(number))
        token_axis(axes)
        axes.set_ylabel(AXIS)
        axes.set_title(f"{ACTIVATIONS[activation]} at {price_name(checkpoints)}")
    panels[0].legend(fontsize=8)
    _losses(panels[-1], checkpoints)
    return captioned(
        shown,
        f"Points: checkpoints, joined within each run, {seeds_name(checkpoints)} a size; hollow: warm-up, not fitted. "
        "Lines: published form, band: 90% block bootstrap.",
    )


def _sizes(curves: Curves, activation: str) -> Iterator[tuple[Fit, pd.DataFrame]]:
    """The common fit and the checkpoints of every size, the smallest first."""
    rows = curves.checkpoints[curves.checkpoints["activation"] == activation]
    for (_, *shape), size in rows.groupby(["parameters", *SHAPE[1:]], sort=True):
        yield curves.sizes[activation, *shape], size


@styled
def published_beside_ours(curves: Curves) -> ShownFigure:
    """Our runs and the published laws of 0.1B to 2.4B models against training tokens per parameter (Fig. 4)."""
    checkpoints = curves.checkpoints
    activations = [name for name in ("relu", "silu") if name in set(checkpoints["activation"])]
    shown, panels = side_by_side(len(activations))
    for axes, activation in zip(panels, activations, strict=True):
        for number, (fit, rows) in enumerate(_sizes(curves, activation)):
            look, size = Look(number), fit_points(rows)
            parameters = size["parameters"].iloc[0]
            x = size["tokens"] / parameters
            axes.plot(x, _percent(size), look.marker, color=look.colour, alpha=0.6, markersize=3)
            grid = np.geomspace(x.min(), x.max(), 100)
            curve = 100 * fit.predict(grid * parameters)
            axes.plot(grid, curve, look.line, color=look.colour, label=parameters_name(size))
        _published(axes, activation)
        axes.set(xscale="log", xlabel="Training tokens per parameter", title=ACTIVATIONS[activation])
        axes.set_ylim(0, 1.4 * axes.dataLim.ymax)  # room for the legend
        plain_log(axes.xaxis)
        axes.legend(fontsize=7, ncols=2, loc="upper left")
    panels[0].set_ylabel(AXIS)
    ours = f"Colours: here, {price_name(checkpoints)}, {seeds_name(checkpoints)} a size, other text and tokenizer"
    return captioned(shown, f"{ours}. Black: published laws of 0.1B to 2.4B models.")


def _published(axes: Axes, activation: str) -> None:
    """The published laws, the thicker the larger the model; the smallest and the largest are named."""
    published = [law for law in PUBLISHED_LAWS if law.activation == activation]
    grid = np.geomspace(PUBLISHED_FROM, TOKENS_PER_PARAMETER, 100)
    for number, law in enumerate(published):
        tokens = grid * non_embedding_parameters(law.d_model, law.n_layers)
        label = f"published, {law.model}" if law in (published[0], published[-1]) else None
        style = {"color": "black", "linewidth": max(0.5 + 0.3 * number, 1.2 * (number == 0)), "label": label}
        axes.plot(grid, 100 * law.predict(tokens), ":" if number == 0 else "-", **style)


@styled
def other_activations(together: pd.DataFrame) -> ShownFigure:
    """Activation ratio and loss against training tokens of all activation functions at one size, as `at_one_size`."""
    shown, (left, right) = side_by_side(2)
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
    left.set(ylabel=AXIS, title=f"{price_name(together)}, {shape_name(together)}")
    left.set_ylim(0, 1.3 * left.dataLim.ymax)  # room for the legend
    left.legend(fontsize=8, ncols=2, loc="upper left")
    right.legend(fontsize=8)
    right.set(ylabel="Validation loss (nats per token)", title="Loss, last point after the decay")
    return captioned(shown, f"One line per run, {seeds_name(together)}; {parameters_name(together)}.")


def at_one_size(main: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The runs of `others` and those of `main` that have their shapes, in one table."""
    shapes = others[["d_model", "n_layers"]].drop_duplicates()
    return pd.concat([main.merge(shapes, on=["d_model", "n_layers"]), others], ignore_index=True)


def _law(axes: Axes, size: pd.DataFrame, fit: Fit, look: Look) -> None:
    """Checkpoints of one size, the common curve of its seeds and the band of the bootstrap."""
    fitted = fit_points(size)
    points = {"color": look.colour, "marker": look.marker, "linestyle": "none"}
    for _, run in size.groupby("run"):
        axes.plot(_millions(run), _percent(run), color=look.colour, alpha=0.25, linewidth=0.8)
    axes.plot(_millions(fitted), _percent(fitted), alpha=0.7, **points)
    warm_up = size.drop(fitted.index)
    axes.plot(_millions(warm_up), _percent(warm_up), fillstyle="none", **points)
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
        for activation, line, fill, marker_size in (("relu", "-", "full", 3), ("silu", "--", "none", 6)):
            means = size[size["activation"] == activation].groupby("tokens")["validation_loss"].mean()
            style = {"color": look.colour, "marker": look.marker, "linestyle": line, "linewidth": 1}
            style |= {"fillstyle": fill, "markersize": marker_size}  # the curves all but coincide
            label = ACTIVATIONS[activation] if number == 0 else None
            axes.plot(means.index / 1e6, means, label=label, **style)
    token_axis(axes)
    axes.set_ylabel("Validation loss (nats per token)")
    axes.set_title("Loss, last point after the decay")
    axes.legend(fontsize=8)
