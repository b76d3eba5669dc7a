"""Interactive panels: sliders above a picture that follows them, for the person who runs a notebook.

A program that executes a notebook (`console.unattended`) gets nothing: no widget is made, so that none is stored.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cache
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsity_utils.console import short_number, unattended
from sparsity_utils.findings import report_figures
from sparsity_utils.findings.budget import BYTES, machine, plan_budget, readable, recorded_bandwidth
from sparsity_utils.findings.sparse_decoding import LOOKS, NAMES, largest_shape
from sparsity_utils.findings.style import AXIS, COLOURS, Look, ShownFigure, captioned, side_by_side, styled
from sparsity_utils.laws.cost import decoding_limit
from sparsity_utils.laws.design import Design
from sparsity_utils.models.config import ACTIVATIONS
from sparsity_utils.models.shapes import WIDTH_STEP, non_embedding_parameters

if TYPE_CHECKING:  # redrawing figures need not load torch, nor reading a notebook ipywidgets
    from ipywidgets import Widget  # type: ignore[import-untyped]

    from sparsity_utils.sparsity.metrics import SparsityReport

PRICES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # percent
BANDWIDTHS = (10, 20, 30, 50, 75, 100, 200, 300, 500, 1000)  # GB/s
SPARSITIES = tuple(range(0, 98))  # percent; measured are 0 to 97
DRAM = {"two channels of DDR4-3200": 2 * 3.2 * 8, "twelve channels of DDR5-4800": 12 * 4.8 * 8}  # GB/s: GT/s x 8 bytes
SIZES = {short_number(size): size for size in (10**4, 3 * 10**4, 10**5, 3 * 10**5, 10**6, 10**7, 10**8, 10**9)}
PER_PARAMETER = (20, 50, 100, 200, 500)  # training tokens
LAYERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
CAPTION = 150  # characters of a line below three panels


class Choice(NamedTuple):
    """A control: its label, what can be chosen, by name where the names are more than the numbers, and the start."""

    label: str
    options: Sequence | Mapping[str, Hashable]
    start: Hashable


def panel(draw: Callable[..., Iterable[Any]], **choices: Choice) -> "Widget | None":
    """Controls above what `draw`, called with the chosen values, returns: figures and tables from top to bottom.

    None, so that the cell of a notebook shows nothing, where no person looks on.
    """
    if unattended():
        return None
    from IPython.display import display
    from ipywidgets import Dropdown, HBox, Layout, SelectionSlider, VBox, interactive_output

    def control(choice: Choice) -> "Widget":
        kind = Dropdown if isinstance(choice.options, Mapping) else SelectionSlider
        lazy = {} if kind is Dropdown else {"continuous_update": False}
        shape = {"style": {"description_width": "initial"}, "layout": Layout(width="28em")}
        options = choice.options if kind is Dropdown else [(f"{value:,g}", value) for value in choice.options]
        return kind(options=options, value=choice.start, description=choice.label, **shape, **lazy)

    def show(**values: Any) -> None:
        for shown in draw(**values):
            display(shown)

    controls = {name: control(choice) for name, choice in choices.items()}
    return VBox(
        [HBox(list(controls.values()), layout=Layout(flex_flow="row wrap")), interactive_output(show, controls)]
    )


# Notebook 00: what a price buys


def prices(
    measure: Callable[..., "SparsityReport"], report: "SparsityReport", passage: pd.Index, pieces: Sequence[str]
) -> "Widget | None":
    """For a price p of 0.1 to 10%: activation ratio and perplexity, and a passage coloured by its activation ratio.

    Args:
        measure: given p, the report of CETT-PPL-p% with `per_token`; called once for each price that is chosen.
        report: that of p = 1%, which is known already.
        passage: which rows of `per_token` are shown. pieces: their text, as `token_texts` gives it.
    """
    from IPython.display import clear_output

    known = {1.0: report}

    def draw(p: float) -> list[Any]:
        if p not in known:
            known[p] = measure(p=p, show_progress=True)
            clear_output(wait=True)  # of the bar
        chosen = report_figures.coloured_text(known[p].per_token.loc[passage], pieces)
        return [prices_figure(known, p), chosen]

    return panel(draw, p=Choice("price p (%)", PRICES, 1.0))


@styled
def prices_figure(known: Mapping[float, "SparsityReport"], p: float) -> ShownFigure:
    """The activation ratio and the rise of perplexity at every price that was measured so far, p marked."""
    figure, (ratios, rises) = side_by_side(2)
    order = sorted(known)
    outcomes = {
        ratios: [100 * np.array([known[q].activation_ratio, *known[q].interval]) for q in order],
        rises: [100 * (np.array([known[q].ppl_ratio, *known[q].ppl_ratio_interval]) - 1) for q in order],
    }
    for axes, found in outcomes.items():
        value, low, high = np.array(found).T  # (prices,)
        axes.errorbar(order, value, [value - low, high - value], marker="o", color=COLOURS[0], capsize=2)
        axes.plot(p, value[order.index(p)], "o", markersize=10, fillstyle="none", color="black")
        axes.set(xscale="log", xlabel="Accepted rise of perplexity (%)", xlim=(0.07, 14))
        axes.set_xticks(PRICES, [f"{price:g}" for price in PRICES])
        axes.minorticks_off()
    rises.plot(PRICES, PRICES, color="grey", linewidth=0.8, label="as promised")
    rises.set(yscale="log", ylabel="Rise on unseen documents (%)", title=f"Perplexity × {known[p].ppl_ratio:.4f}")
    rises.legend()
    ratios.set(ylabel=AXIS, ylim=(0, None), title=f"{100 * known[p].activation_ratio:.1f}% active at {p:g}%")
    basis = f"{known[p].tokens:,} tokens of {known[p].documents} documents; bars: 90% intervals."
    return captioned(figure, f"{basis} A price is measured when it is first chosen, which takes some seconds.")


# Notebook 06: what sparse kernels bring


def decoding(ffns: pd.DataFrame) -> "Widget | None":
    """For a sparsity, a memory and a batch: the time of one FFN and the speed-up to expect. ffns: sparse_ffn."""
    rows = _measured(ffns)
    return panel(
        lambda **chosen: [decoding_figure(rows, **chosen)],
        sparsity=Choice("inactive neurons (%)", SPARSITIES, 90),
        bandwidth=Choice("memory (GB/s)", BANDWIDTHS, 50),
        tokens=Choice("tokens side by side", sorted(set(rows["tokens"])), 1),
    )


def _measured(ffns: pd.DataFrame) -> pd.DataFrame:
    """The calls with random patterns, float32, of the shape that was measured most."""
    rows = ffns[ffns["shape"] == largest_shape(ffns)]
    return rows.query("dtype == 'float32' and pattern == 'random'")


def expected_call(rows: pd.DataFrame, sparsity: float, bandwidth: float, tokens: int) -> pd.DataFrame:
    """What one call of an FFN takes: a row per way, columns milliseconds, limit (its bytes alone) and read_share.

    A call takes as many times as long as reading memory takes for its bytes as it took where it was measured, so that

        milliseconds = measured milliseconds * measured GB/s of reading memory / bandwidth.

    Between two measured sparsities the logarithms are interpolated linearly. Where computing, not memory, takes the
    time (several tokens), a faster memory brings less than this says.

    Args:
        rows: table sparse_ffn, one shape, dtype and pattern. sparsity: percent. bandwidth: GB/s. tokens: side by side.
    """
    found = {}
    for way, curve in rows[rows["tokens"] == tokens].groupby("way"):
        curve = curve.sort_values("sparsity")
        columns = {
            "milliseconds": curve["milliseconds"] * curve["read_gb_per_s"] / bandwidth,
            "limit": curve["megabytes"] / bandwidth,
            "read_share": 1 / curve["ideal_speedup"],
        }
        found[way] = {
            name: math.exp(np.interp(sparsity / 100, curve["sparsity"], np.log(values)))
            for name, values in columns.items()
        }
    return pd.DataFrame(found).T.reindex([way for way in NAMES if way in found])


@styled
def decoding_figure(rows: pd.DataFrame, sparsity: float, bandwidth: float, tokens: int) -> ShownFigure:
    """Speed-ups as measured against sparsity, the chosen one marked, and the expected times of one call."""
    expected = expected_call(rows, sparsity, bandwidth, tokens)
    figure, (gains, times) = side_by_side(2)
    for way in ("sparse", "certified"):
        curve = rows[(rows["way"] == way) & (rows["tokens"] == tokens)].sort_values("sparsity")
        gain, look = curve["strict_speedup"], LOOKS[way]
        reach = [gain - curve["low_strict_speedup"], curve["high_strict_speedup"] - gain]
        style = {"color": look.colour, "marker": look.marker, "capsize": 2}
        gains.errorbar(100 * curve["sparsity"], gain, reach, label=NAMES[way], **style)
        gains.plot(100 * curve["sparsity"], curve["ideal_speedup"], "--", color=look.colour, linewidth=0.9)
    gains.axvline(sparsity, color="black", linewidth=0.9)
    gains.axhline(1, color="grey", linewidth=0.8)
    gains.set(xlabel="Inactive neurons (%)", ylabel="Speed-up over the fastest full read", yscale="log")
    gains.set_yticks([0.5, 1, 2, 3, 5, 10], ["0.5", "1", "2", "3", "5", "10"])
    gains.minorticks_off()
    gains.set_title(f"Measured, {tokens} token{'s' if tokens > 1 else ''} at once")
    gains.legend(fontsize=8)
    _bars(times, expected)
    full = expected.drop(["sparse", "certified"])["milliseconds"].min()
    best = expected["milliseconds"].min()
    whole = decoding_limit(expected.loc["sparse", "read_share"])
    times.set_title(f"Expected at {bandwidth:g} GB/s: {full / best:.2f} times as fast")
    first = rows.iloc[0]
    return captioned(
        figure,
        f"One FFN of the {first['shape']} shape, float32, random patterns. Black: what its bytes alone take. A whole "
        f"model of such layers\ngains at most {whole:.2f} from the sparse kernel. Measured on {first['device']}, "
        f"{first['threads']} threads; dashed: what unread bytes allow.",
    )


def _bars(axes: Axes, expected: pd.DataFrame) -> None:
    """The time of a call per way, and of reading its bytes."""
    places = range(len(expected))
    colours = [LOOKS[way].colour for way in expected.index]
    axes.barh(places, expected["milliseconds"], color=colours, height=0.6)
    axes.scatter(expected["limit"], places, marker="|", s=300, color="black", zorder=3)
    for place, value in zip(places, expected["milliseconds"], strict=True):
        axes.text(value, place, f" {value:.3g} ms", va="center", fontsize=8)
    axes.set_yticks(places, [NAMES[way] for way in expected.index])
    axes.set(xlabel="Milliseconds per call", xlim=(0, 1.3 * expected["milliseconds"].max()))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


# Notebook 08: what a budget buys


def budgets(fitted: Design, ffns: pd.DataFrame, measured: pd.DataFrame, vocabulary: int) -> "Widget | None":
    """For a size, training tokens, layers and a device: activation ratio, loss and speed, with their intervals.

    ffns, measured: the tables sparse_ffn and sparse_decoding. vocabulary: entries of the output head.
    """
    devices = {"the machine of the kernels": recorded_bandwidth(ffns), **DRAM}
    named = {f"{name}, {bandwidth:.0f} GB/s": bandwidth for name, bandwidth in devices.items()}
    dtypes = {name: name for name in BYTES if (ffns["dtype"] == name).any()}
    on = cache(lambda bandwidth, dtype: machine(ffns, measured, bandwidth, dtype))

    def draw(parameters: int, per_parameter: int, layers: int, bandwidth: float, dtype: str) -> list[Any]:
        d_model = width(parameters, layers)
        size = non_embedding_parameters(d_model, layers)
        tokens = per_parameter * size
        models = plan_budget(fitted, on(bandwidth, dtype), size, tokens, vocabulary, ratios=(d_model / layers,))
        return [budget_figure(models, tokens), readable(models)]

    return panel(
        draw,
        parameters=Choice("parameters", SIZES, 100_000),
        per_parameter=Choice("tokens per parameter", PER_PARAMETER, 100),
        layers=Choice("layers", LAYERS, 4),
        bandwidth=Choice("device", named, next(iter(named.values()))),
        dtype=Choice("weights", dtypes, next(iter(dtypes))),
    )


def width(parameters: int, layers: int) -> int:
    """The d_model, a multiple of WIDTH_STEP, with which that many layers come nearest to a number of parameters."""
    wanted = math.sqrt(parameters / non_embedding_parameters(1000, layers)) * 1000
    return max(WIDTH_STEP, WIDTH_STEP * round(wanted / WIDTH_STEP))


@styled
def budget_figure(models: pd.DataFrame, tokens: float) -> ShownFigure:
    """Activation ratio, loss and speed of one shape, a mark per activation function. models: as `plan_budget` gives.

    Without a row, because the study has too few runs for a law, it says so.
    """
    figure, panels = side_by_side(3)
    if models.empty:
        return captioned(figure, "The study has too few runs for a prediction.")
    names = [ACTIVATIONS[activation] for activation in models["activation"]]
    _marks(panels[0], 100 * models[["activation_ratio", "low_activation_ratio", "high_activation_ratio"]], 0)
    panels[0].set_ylim(0, 100)  # so that sizes can be compared
    _marks(panels[1], models[["loss", "low_loss", "high_loss"]], 0)
    _marks(panels[2], models[["sparse", "low_sparse", "high_sparse"]], 0, "skipping inactive neurons")
    panels[2].plot(range(len(models)), models["dense"], "x", color="black", markersize=8, label="reading all weights")
    panels[2].set_ylim(0, 1.35 * max(models["dense"].max(), models["high_sparse"].max()))
    panels[2].legend(fontsize=8, loc="upper center")
    for axes, label in zip(panels, (AXIS, "Loss after the decay (nats)", "Tokens per second"), strict=True):
        axes.set_xticks(range(len(models)), names)
        axes.set(xlim=(-0.6, len(models) - 0.4), ylabel=label)
    first = models.iloc[0]
    size = f"{short_number(first['parameters'])} parameters, {short_number(tokens)} tokens"
    beyond = "; ".join(dict.fromkeys("; ".join(models["extrapolates"]).split("; ")))
    note = f"Beyond what was measured: {beyond}." if beyond.strip("; ") else "Within what was measured."
    basis = f"{first['shape']}, {size}; 90% intervals, of speed that of the activation ratio alone. {note}"
    return captioned(figure, fill(basis, CAPTION))


def _marks(axes: Axes, ends: pd.DataFrame, number: int, label: str | None = None) -> None:
    """Values with their intervals; the columns of `ends` are value, low and high."""
    value, low, high = ends.to_numpy(dtype=float).T
    look = Look(number)
    style = {"color": look.colour, "marker": look.marker, "linestyle": "none", "capsize": 4}
    axes.errorbar(range(len(ends)), value, [value - low, high - value], label=label, **style)
