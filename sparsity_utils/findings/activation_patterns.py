"""Notebook 05, activation patterns: which neurons and tokens are active, and transfer of thresholds."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsity_utils.findings import dead_neurons
from sparsity_utils.findings.claims import Claim, Verdict, Verdicts, stated
from sparsity_utils.findings.dead_neurons import RUN
from sparsity_utils.findings.style import (
    Look,
    ShownFigure,
    captioned,
    seeds_name,
    side_by_side,
    styled,
)
from sparsity_utils.laws.limits import require
from sparsity_utils.laws.similarity import (
    PARTS,
    SIZE,
    between_domains,
    bootstrap_draws,
    frequency_distances,
    percentile_estimate,
    relative,
    seed_correlations,
    size_correlations,
    size_name,
    token_patterns,
)
from sparsity_utils.laws.trends import mean_over_runs
from sparsity_utils.models.config import ACTIVATIONS
from sparsity_utils.study.tables import Tables

OFTEN = 20  # occurrences in the measured text from which a token's mean activation ratio is compared
ALIKE = 0.5  # rank correlation of two token patterns: at least this much counts as alike
TRANSFER_FACTOR = 2.0  # thresholds that cost p% on their own domain may cost this many times p% on another
QUANTILES = np.linspace(0, 1, 101)  # at which a distribution is drawn
PART_NAMES = ("all", "first", "middle", "last")
DIFFERENCES = {"size": "sizes", "activation": "activation\nfunctions", "seed": "seeds"}  # between two models


def transfer_claim(p: float = 1.0) -> Claim:
    """Do thresholds solved for p percent more perplexity on one domain keep to it on others?"""
    return Claim(
        "thresholds_transfer",
        "activation_patterns",
        "Thresholds solved on one domain hold on others",
        "none",
        "% rise of perplexity",
        "t interval over runs of the mean rise on foreign domains, for each activation function; the highest decides",
        f"90% interval below {TRANSFER_FACTOR:g} times the p% solved for",
        region=(-math.inf, TRANSFER_FACTOR * p / 100),
    )


TOKENS_ALIKE = Claim(
    "tokens_alike",
    "activation_patterns",
    "The same vocabulary tokens activate many neurons at every size",
    "alike (Fig. 10)",
    "rank correlation",
    f"bootstrap over vocabulary tokens (seen {OFTEN} times or more) of the Spearman correlation of their activation "
    "ratios, mean over layers and seeds, for each pair of sizes and activation function; the lowest decides",
    f"90% interval above {ALIKE:g} for every pair",
    region=(ALIKE, math.inf),
    scale=1.0,
)
NEURONS_ALIKE = Claim(
    "neurons_alike",
    "activation_patterns",
    "Neuron frequencies are distributed more alike across sizes than across activation functions",
    "alike across sizes (Fig. 9)",
    "less KS distance",
    "t interval over seeds, at the sizes that all of them have, of the KS distance of relative frequencies between "
    "ReLU and SiLU at one size, less that between sizes at one activation function; means over domains",
    scale=1.0,
)
MIDDLE_ALIKE = Claim(
    "middle_alike",
    "activation_patterns",
    "First and last layers differ more across sizes than the middle layer",
    "differ more (Fig. 16)",
    "more rank correlation in the middle",
    "bootstrap over vocabulary tokens of the Spearman correlation between sizes in the middle layer, less that in the "
    "first and in the last; mean over activation functions and pairs of sizes of three layers or more",
    "90% interval above 0 for both",
    scale=1.0,
)
ALL = (TOKENS_ALIKE, NEURONS_ALIKE, MIDDLE_ALIKE, *dead_neurons.CLAIMS, transfer_claim())
CLAIMS = {claim.key: claim for claim in ALL}


def claims() -> pd.DataFrame:
    """The claims, tests and thresholds, as the notebook states them before its results."""
    return stated(CLAIMS.values())


@dataclass(frozen=True)
class Likeness:
    """How alike the patterns of a study's models are."""

    models: pd.DataFrame  # activation, d_model, n_layers and seed of each run
    distances: dict[str, pd.DataFrame]  # `similarity.frequency_distances`, by what two models differ in
    tokens: pd.DataFrame  # `similarity.token_patterns`, mean over seeds
    between_sizes: dict[str, dict]  # rank correlations of the token patterns of two sizes, by part of the layers
    between_seeds: dict[str, dict]  # likewise of two seeds of one size


def likeness(neurons: pd.DataFrame, vocabulary: pd.DataFrame) -> Likeness:
    """Compare every two models of a study.

    neurons, vocabulary: the tables of the questions activation_patterns and token_patterns (results/columns.csv).
    Raises InputError for missing columns, duplicates and NaN.
    """
    key, numbers = ["layer", "neuron", "domain"], ["count", "activation_ratio", "first", "last"]
    require(neurons, [*RUN, *key, "frequency"], ["run", *key], ["frequency"], "activation patterns")
    require(vocabulary, [*RUN, "token_id", *numbers], ["run", "token_id"], numbers, "token patterns")
    tokens = token_patterns(vocabulary, OFTEN)
    return Likeness(
        neurons[RUN[1:]].drop_duplicates(ignore_index=True),
        {against: frequency_distances(neurons, against) for against in DIFFERENCES},
        tokens,
        {part: size_correlations(tokens, part) for part in PARTS},
        {part: seed_correlations(vocabulary, OFTEN, part) for part in PARTS},
    )


def domains_alike(neurons: pd.DataFrame) -> pd.DataFrame:
    """Do two domains use the same neurons of one model? Means of `similarity.between_domains` over pairs and runs."""
    by_run = {about: between_domains(run) for about, run in neurons.groupby(["activation", "run"])}
    table = pd.concat(by_run, names=["activation", "run"])
    return table.groupby(["activation", "part"])[["spearman", "overlap"]].mean().unstack("activation")


def verdicts(alike: Likeness, dead: pd.DataFrame, transfer: pd.DataFrame) -> Verdicts:
    """One verdict per claim: on tokens and neurons across sizes, on layers, dead neurons and transfer of thresholds.

    dead: `dead_neurons.curves_of`. transfer: the table of that question. Raises InputError for missing columns,
    duplicates and NaN.
    """
    pairs = ["calibrated_on", "applied_to"]
    require(transfer, [*RUN, *pairs, "ppl_ratio", "p"], ["run", *pairs], ["ppl_ratio", "p"], "transfer")
    across_sizes = _tokens_alike(alike), _neurons_alike(alike), _middle_alike(alike)
    return Verdicts([*across_sizes, *dead_neurons.verdicts(dead), _thresholds_transfer(transfer)])


def _tokens_alike(alike: Likeness) -> Verdict:
    correlations, tokens = alike.between_sizes["activation_ratio"], alike.tokens
    if not correlations:
        return TOKENS_ALIKE.undecided("no two sizes share tokens")
    resampled = size_correlations(tokens, "activation_ratio", bootstrap_draws(tokens))
    estimates = {
        f"{ACTIVATIONS[pair[0]]} {size_name(pair[1])} and {size_name(pair[2])}": percentile_estimate(
            value, resampled[pair], len(tokens)
        )
        for pair, value in correlations.items()
    }
    return TOKENS_ALIKE.judged_all(estimates, "tokens")


def _neurons_alike(alike: Likeness) -> Verdict:
    """Mean distance between activation functions less that between sizes; one value per seed.

    The unit is a seed, since models of one seed are not independent of each other. Only sizes that every seed has with
    both ReLU and SiLU count, so that all seeds are compared on the same models.
    """
    models = alike.models[alike.models["activation"].isin(["relu", "silu"])]
    counts, everywhere = models.groupby(SIZE).size(), len(models[["activation", "seed"]].drop_duplicates())
    sizes = list(counts.index[counts == everywhere])
    across, between = alike.distances["activation"], alike.distances["size"]
    kept = pd.MultiIndex.from_frame(across[SIZE]).isin(sizes)
    across = across[kept & (across["one"] == "relu") & (across["other"] == "silu")]
    between = between[between["activation"].isin(["relu", "silu"])]
    between = between[between["one"].isin(sizes) & between["other"].isin(sizes)]
    means = [table.groupby("seed")["distance"].mean() for table in (across, between)]
    estimate = mean_over_runs((means[0] - means[1]).dropna())
    reason = estimate.reason.replace("runs", "seeds") or f"{estimate.n} seeds"
    found = f"KS {means[0].mean():.2f} between activations, {means[1].mean():.2f} between sizes"
    return NEURONS_ALIKE.judged(estimate, reason, found, f"sizes {', '.join(map(size_name, sizes))}")


def _middle_alike(alike: Likeness) -> Verdict:
    """Correlation in the middle layer less that in the first, and last, over the pairs of sizes that have a middle."""
    middle, tokens, estimates = alike.between_sizes["middle"], alike.tokens, {}
    if not middle:
        return MIDDLE_ALIKE.undecided("no two sizes have three layers or more")
    draws = bootstrap_draws(tokens)
    resampled = {part: size_correlations(tokens, part, draws) for part in ("first", "middle", "last")}
    for part in ("first", "last"):
        gap, gaps = (
            np.mean([found["middle"][pair] - found[part][pair] for pair in middle], axis=0)
            for found in (alike.between_sizes, resampled)
        )
        estimates[f"middle less {part}"] = percentile_estimate(gap, gaps, len(tokens))
    return MIDDLE_ALIKE.judged_all(estimates, "tokens", f"{len(middle)} pairs of sizes")


def _thresholds_transfer(transfer: pd.DataFrame) -> Verdict:
    claim, own = transfer_claim(transfer["p"].iloc[0]), transfer["calibrated_on"] == transfer["applied_to"]
    if own.all():
        return claim.undecided("only one domain")
    rows = transfer.assign(increase=transfer["ppl_ratio"] - 1)
    foreign = rows[~own]
    estimates = {
        ACTIVATIONS[activation]: mean_over_runs(runs.groupby("run")["increase"].mean())
        for activation, runs in foreign.groupby("activation", sort=True)
    }
    pairs = foreign.groupby(["activation", "calibrated_on", "applied_to"])["increase"].mean()
    activation, solved, applied = pairs.idxmax()
    notes = (
        f"on the own domain {100 * rows.loc[own, 'increase'].mean():.2f}% on average",
        f"highest mean {100 * pairs.max():.2f}%, {ACTIVATIONS[activation]}, {solved} on {applied}",
    )
    return claim.judged_all(estimates, "runs", *notes)


def figures(study: Tables) -> Iterator[tuple[str, ShownFigure]]:
    """Every figure that a study has the tables for, with its name."""
    if study.answers("activation_patterns") and study.answers("token_patterns"):
        neurons = study.table("activation_patterns")
        alike = likeness(neurons, study.table("token_patterns"))
        yield "05_neuron_frequencies", frequency_figure(neurons, alike)
        yield "05_token_patterns", token_figure(alike)
    if study.answers("dead_neurons"):
        yield "05_dead_neurons", dead_neurons.figure(dead_neurons.curves_of(study.table("dead_neurons")))
    if study.answers("transfer"):
        yield "05_transfer", transfer_figure(study.table("transfer"))


@styled
def frequency_figure(neurons: pd.DataFrame, alike: Likeness) -> ShownFigure:
    """Distribution of the neurons' frequencies per size and domain, and distances between distributions (Fig. 9)."""
    activations = sorted(set(neurons["activation"]))
    figure, panels = side_by_side(len(activations) + 1)
    for axes, activation in zip(panels, activations, strict=False):
        rows = neurons[neurons["activation"] == activation]
        for number, (size, models) in enumerate(rows.groupby(SIZE, sort=True)):
            look, domains = Look(number), (domain["frequency"] for _, domain in models.groupby("domain", sort=True))
            values = np.array([np.quantile(relative(found), QUANTILES) for found in domains])  # (domains, quantiles)
            axes.fill_betweenx(100 * QUANTILES, values.min(axis=0), values.max(axis=0), color=look.colour, alpha=0.15)
            axes.plot(values.mean(axis=0), 100 * QUANTILES, look.line, color=look.colour, label=size_name(size))
        axes.set(xlabel="Frequency / mean frequency", xlim=(0, 5), ylim=(0, 100), title=ACTIVATIONS[activation])
    panels[0].set_ylabel("Neurons at or below (%)")
    panels[0].legend(loc="lower right")
    _distances(panels[-1], alike)
    count, seeds = neurons["domain"].nunique(), seeds_name(alike.models)
    about = (
        f"Lines: mean over {count} domains, bands: from the lowest to the highest; all layers, {seeds} a size together."
    )
    return captioned(figure, about)


def _distances(axes: Axes, alike: Likeness) -> None:
    """KS distances between models that differ in size, in activation function or in seed, one point per pair."""
    names: list[str] = []
    for against, name in DIFFERENCES.items():
        distances = alike.distances[against]["distance"]
        if len(distances):
            place, look = len(names), Look(len(names))
            spread = place + np.linspace(-0.25, 0.25, len(distances))
            axes.plot(spread, np.sort(distances), look.marker, color=look.colour, alpha=0.5, markersize=3)
            axes.hlines(distances.mean(), place - 0.35, place + 0.35, color="black", linewidth=1.2)
            names.append(name)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="Kolmogorov-Smirnov distance", title="Between models that differ in", ylim=(0, None))


@styled
def token_figure(alike: Likeness) -> ShownFigure:
    """Activation ratio of vocabulary tokens, smallest against largest model; correlations by layer (Fig. 10, 16)."""
    activations = sorted(set(alike.models["activation"]))
    sizes = sorted(set(alike.models[SIZE].itertuples(index=False, name=None)))
    figure, panels = side_by_side(len(activations) + 1)
    for number, (axes, activation) in enumerate(zip(panels, activations, strict=False)):
        x, y = (100 * alike.tokens[activation, *size, "activation_ratio"] for size in (sizes[0], sizes[-1]))
        axes.plot(x, y, Look(number).marker, color=Look(number).colour, alpha=0.4, markersize=3)
        axes.set(xlabel=f"Active neurons in {size_name(sizes[0])} (%)", ylabel=f"in {size_name(sizes[-1])} (%)")
        correlation = alike.between_sizes["activation_ratio"].get((activation, sizes[0], sizes[-1]), math.nan)
        axes.set_title(f"{ACTIVATIONS[activation]}, ρ = {correlation:.2f}")
    _correlations(panels[-1], activations, alike)
    return captioned(
        figure,
        f"One point per vocabulary token seen {OFTEN} times or more (n = {len(alike.tokens)}), mean "
        f"over {seeds_name(alike.models)} a size. "
        "Right: one point per pair of sizes; hollow: per pair of seeds of one size.",
    )


def _correlations(axes: Axes, activations: list[str], alike: Likeness) -> None:
    """Rank correlation between sizes, and between seeds of one size, in all layers together and in single ones."""
    shift, lowest = 0.3 / max(1, len(activations) - 1), 0.0
    for place, part in enumerate(PARTS):
        for number, activation in enumerate(activations):
            look, at = Look(number), place - 0.15 + number * shift
            for found, fill, nudge in ((alike.between_sizes, "full", -0.06), (alike.between_seeds, "none", 0.06)):
                values = sorted(value for (kind, *_), value in found[part].items() if kind == activation)
                x = at + nudge + np.linspace(-0.04, 0.04, len(values))
                lowest = min([lowest, *(value - 0.05 for value in values)])
                style = {"color": look.colour, "fillstyle": fill, "linestyle": "none", "alpha": 0.8, "markersize": 3.5}
                label = ACTIVATIONS[activation] if place == 0 and fill == "full" else None
                axes.plot(x, values, look.marker, label=label, **style)
    axes.set_xticks(range(len(PARTS)), PART_NAMES)
    axes.set(ylim=(lowest, 1), xlabel="Layers", title="Between sizes (hollow: seeds)")
    axes.set_ylabel("Rank correlation of token ratios")
    axes.legend()


@styled
def transfer_figure(table: pd.DataFrame) -> ShownFigure:
    """Increase of perplexity when thresholds of one domain (row) are applied to another (column), per activation."""
    activations = sorted(set(table["activation"]))
    figure, panels = side_by_side(len(activations))
    domains, p = sorted(set(table["calibrated_on"])), table["p"].iloc[0]
    for axes, activation in zip(panels, activations, strict=True):
        rows = table[table["activation"] == activation].assign(increase=100 * (table["ppl_ratio"] - 1))
        wide = rows.pivot_table("increase", "calibrated_on", "applied_to").loc[domains, domains]
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
