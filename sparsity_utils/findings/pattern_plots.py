"""The figures of notebook 05: which neurons and tokens are active, dead neurons, transfer. Table in, figure out."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsity_utils.findings.claims import OFTEN, TRANSFER_FACTOR
from sparsity_utils.findings.labels import seeds_name
from sparsity_utils.findings.style import Look, captioned, side_by_side, styled, token_axis
from sparsity_utils.laws.similarity import (
    PARTS,
    SIZE,
    frequency_distances,
    relative,
    seed_correlations,
    size_correlations,
    size_name,
    spearman,
)
from sparsity_utils.laws.similarity import token_patterns as common_tokens
from sparsity_utils.models.config import ACTIVATIONS

PART_NAMES = ("all", "first", "middle", "last")
SHARES = np.linspace(0, 1, 101)  # of neurons, at which a distribution is drawn
DISTANCES = {"size": "sizes", "activation": "activation\nfunctions", "seed": "seeds"}


@styled
def neuron_frequencies(neurons: pd.DataFrame) -> Figure:
    """Distribution of the neurons' frequencies per size and domain, and how far distributions are apart (Fig. 9)."""
    activations = sorted(set(neurons["activation"]))
    figure, panels = side_by_side(len(activations) + 1)
    for axes, activation in zip(panels, activations, strict=False):
        rows = neurons[neurons["activation"] == activation]
        for number, (size, models) in enumerate(rows.groupby(SIZE, sort=True)):
            look = Look(number)
            for index, (_, domain) in enumerate(models.groupby("domain", sort=True)):
                values = np.quantile(relative(domain["frequency"]), SHARES)
                label = None if index else size_name(size)
                axes.plot(values, 100 * SHARES, look.line, color=look.colour, alpha=0.6, lw=0.9, label=label)
        axes.set(xlabel="Frequency / mean frequency", xlim=(0, 5), ylim=(0, 100), title=ACTIVATIONS[activation])
    panels[0].set_ylabel("Neurons at or below (%)")
    panels[0].legend(loc="lower right")
    _distances(panels[-1], neurons)
    domains, seeds = neurons["domain"].nunique(), seeds_name(neurons)
    return captioned(figure, f"One line per size and each of {domains} domains, all layers; {seeds} a size together.")


@styled
def token_patterns(vocabulary: pd.DataFrame) -> Figure:
    """Mean activation ratio of vocabulary tokens, smallest against largest model, and by layer (Fig. 10 and 16)."""
    patterns = common_tokens(vocabulary, OFTEN)
    activations = sorted(set(vocabulary["activation"]))
    sizes = sorted(set(vocabulary[SIZE].itertuples(index=False, name=None)))
    figure, panels = side_by_side(len(activations) + 1)
    for number, (axes, activation) in enumerate(zip(panels, activations, strict=False)):
        x, y = (100 * patterns[activation, *size, "activation_ratio"] for size in (sizes[0], sizes[-1]))
        axes.plot(x, y, Look(number).marker, color=Look(number).colour, alpha=0.4, markersize=3)
        axes.set(xlabel=f"Active neurons in {size_name(sizes[0])} (%)", ylabel=f"in {size_name(sizes[-1])} (%)")
        axes.set_title(f"{ACTIVATIONS[activation]}, ρ = {spearman(x, y):.2f}")
    _correlations(panels[-1], vocabulary, patterns)
    return captioned(
        figure,
        f"One point per vocabulary token seen {OFTEN} times or more (n = {len(patterns)}), "
        f"mean over {seeds_name(vocabulary)} a size. "
        "Right: one point per pair of sizes; hollow: per pair of seeds of one size.",
    )


@styled
def dead_neurons(layers: pd.DataFrame) -> Figure:
    """Share of dead ReLU neurons against training tokens, and where the fall of the activation ratio lies."""
    figure, (left, right) = side_by_side(2)
    numbers = ["dead_share", "dead_share_zero", "activation_ratio", "dying_ratio"]
    totals = layers[numbers].mul(layers["neurons"], axis=0).assign(neurons=layers["neurons"])
    sums = totals.groupby([layers[name] for name in (*SIZE, "tokens")], sort=True).sum()
    curves = 100 * sums[numbers].div(sums["neurons"], axis=0)
    for number, (size, curve) in enumerate(curves.groupby(level=SIZE, sort=True)):
        look, curve = Look(number), curve.droplevel(SIZE)
        style = {"color": look.colour, "marker": look.marker, "markersize": 3}
        x = curve.index / 1e6
        left.plot(x, curve["dead_share"], "-", label=size_name(size), **style)
        left.plot(x, curve["dead_share_zero"], ":", fillstyle="none", **style)
        right.plot(x, curve["activation_ratio"], "-", label=size_name(size), **style)
        right.plot(x, curve["dying_ratio"], ":", fillstyle="none", **style)
    left.set(ylabel="Dead neurons (%)", title="Solid: at the CETT; dotted: zero threshold")
    right.set(ylabel="Active neurons (% of d_ff)", title="Solid: all neurons; dotted: those dead at the end")
    for axes in (left, right):
        token_axis(axes)
        axes.set_ylim(bottom=0)
        axes.legend()
    about = f"ReLU, mean over {seeds_name(layers)} a size; dead: active on less than 0.1% of the evaluation tokens."
    return captioned(figure, about)


@styled
def transfer(table: pd.DataFrame) -> Figure:
    """Rise of perplexity when thresholds of one domain (row) are applied to another (column), per activation."""
    activations = sorted(set(table["activation"]))
    figure, panels = side_by_side(len(activations))
    domains, p = sorted(set(table["calibrated_on"])), table["p"].iloc[0]
    for axes, activation in zip(panels, activations, strict=True):
        rows = table[table["activation"] == activation].assign(rise=100 * (table["ppl_ratio"] - 1))
        wide = rows.pivot_table("rise", "calibrated_on", "applied_to").loc[domains, domains]
        image = axes.imshow(wide, cmap="RdBu_r", vmin=0, vmax=2 * p, aspect="auto")
        for (row, column), value in np.ndenumerate(wide.to_numpy()):
            light = abs(value - p) > 0.6 * p
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color="w" if light else "k")
        axes.set_xticks(range(len(domains)), domains, rotation=40, ha="right")
        axes.set_yticks(range(len(domains)), domains if axes is panels[0] else [])
        axes.grid(False)
        axes.set(xlabel="Applied to", title=f"{ACTIVATIONS[activation]}: rise of perplexity (%)")
    panels[0].set_ylabel("Calibrated on")
    figure.colorbar(image, ax=panels, shrink=0.8)
    runs = table.groupby("activation")["run"].nunique().min()
    claim = f"claim: foreign domains on average below {TRANSFER_FACTOR * p:g}%"
    return captioned(figure, f"Mean over {runs} runs; thresholds of CETT-PPL-{p:g}% solved on the row; {claim}.")


def _distances(axes: Axes, neurons: pd.DataFrame) -> None:
    """KS distances between models that differ in size, in activation function or in seed, one point per pair."""
    names = []
    for against, name in DISTANCES.items():
        distances = frequency_distances(neurons, against)["distance"]
        if len(distances):
            place, look = len(names), Look(len(names))
            spread = place + np.linspace(-0.25, 0.25, len(distances))
            axes.plot(spread, np.sort(distances), look.marker, color=look.colour, alpha=0.5, markersize=3)
            axes.hlines(distances.mean(), place - 0.35, place + 0.35, color="black", linewidth=1.2)
            names.append(name)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="Kolmogorov-Smirnov distance", title="Between models that differ in", ylim=(0, None))


def _correlations(axes: Axes, vocabulary: pd.DataFrame, patterns: pd.DataFrame) -> None:
    """Rank correlation between sizes, and between seeds of one size, in all layers together and in single ones."""
    activations = sorted(set(vocabulary["activation"]))
    shift, lowest = 0.3 / max(1, len(activations) - 1), 0.0
    for place, part in enumerate(PARTS):
        sizes, seeds = size_correlations(patterns, part), seed_correlations(vocabulary, OFTEN, part)
        for number, activation in enumerate(activations):
            look, at = Look(number), place - 0.15 + number * shift
            for found, fill, nudge in ((sizes, "full", -0.03), (seeds, "none", 0.03)):
                values = [value for (kind, *_), value in found.items() if kind == activation]
                lowest = min([lowest, *(value - 0.05 for value in values)])
                style = {"color": look.colour, "fillstyle": fill, "linestyle": "none", "alpha": 0.8}
                label = ACTIVATIONS[activation] if place == 0 and fill == "full" else None
                axes.plot([at + nudge] * len(values), values, look.marker, label=label, **style)
    axes.set_xticks(range(len(PARTS)), PART_NAMES)
    axes.set(ylim=(lowest, 1), xlabel="Layers", title="Between sizes (hollow: seeds)")
    axes.set_ylabel("Rank correlation of token ratios")
    axes.legend()
