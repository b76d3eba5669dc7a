"""How alike two activation patterns are: between domains on one model, and between models of different size."""

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from sparsity_utils.console import InputError
from sparsity_utils.laws.data_law import LEVEL
from sparsity_utils.laws.trends import Estimate, no_estimate
from sparsity_utils.models.shapes import representative_layers

MOST_ACTIVE = 0.1  # share of neurons whose overlap between domains is compared
RESAMPLES = 1000  # of the bootstrap over vocabulary tokens
FEWEST_TOKENS = 30  # that a bootstrap over vocabulary tokens rests on
SIZE = ["d_model", "n_layers"]
PARTS = ["activation_ratio", "first", "middle", "last"]  # of all layers, and of one (`representative_layers`)

Array = NDArray[np.float64]


def size_name(size: tuple[int, int]) -> str:
    """`48x4`."""
    return f"{size[0]}x{size[1]}"


def spearman(x: ArrayLike, y: ArrayLike) -> Array | np.float64:
    """Spearman's rank correlation along the last axis; equal values share their mean rank. NaN for constant values."""
    if np.shape(x)[-1] == 0:
        return np.full(np.shape(x)[:-1], np.nan)[()]
    ranked = (stats.rankdata(values, axis=-1) for values in (x, y))
    one, other = (ranks - ranks.mean(-1, keepdims=True) for ranks in ranked)
    with np.errstate(invalid="ignore"):
        return (one * other).sum(-1) / np.sqrt((one**2).sum(-1) * (other**2).sum(-1))


def overlap(x: ArrayLike, y: ArrayLike, share: float = MOST_ACTIVE) -> float:
    """Jaccard index of the `share` largest entries of `x` and of `y`: |both| / |either|.

    Entries that equal the smallest one chosen are chosen too, so that the order of the neurons does not matter. For
    unrelated patterns it is about share / (2 - share): 0.05 at 10%.
    """
    x, y = np.asarray(x), np.asarray(y)
    count = max(1, round(share * x.size))
    chosen_x, chosen_y = (values >= np.sort(values)[-count] for values in (x, y))
    return float((chosen_x & chosen_y).sum() / (chosen_x | chosen_y).sum())


def relative(frequencies: ArrayLike) -> Array:
    """Frequencies over their mean, so that models of different activation ratio can be compared in shape.

    They stay zero where no neuron is ever active.
    """
    values = np.asarray(frequencies, dtype=float)
    return values / values.mean() if values.any() else values


def between_domains(neurons: pd.DataFrame) -> pd.DataFrame:
    """How alike every two domains are on one model, in all layers and in the first, middle and last one.

    `neurons`: layer, neuron, domain and frequency of one run. Returns one, other (domains), part, spearman, overlap.
    """
    wide = neurons.pivot_table("frequency", ["layer", "neuron"], "domain")
    layers = wide.index.get_level_values("layer")
    parts = {"all": slice(None)} | {p: layers == at for p, at in representative_layers(layers.max() + 1).items()}
    rows = [
        (one, other, part, float(spearman(*pair)), overlap(*pair))
        for one, other in combinations(wide.columns, 2)
        for part, chosen in parts.items()
        for pair in [(wide.loc[chosen, one], wide.loc[chosen, other])]
    ]
    table = pd.DataFrame(rows, columns=["one", "other", "part", "spearman", "overlap"])
    return table.astype({"spearman": float, "overlap": float})


def frequency_distances(neurons: pd.DataFrame, against: str) -> pd.DataFrame:
    """KS distances of relative neuron frequencies, over all layers, between models that differ in one thing.

    neurons: activation, d_model, n_layers, seed, domain and frequency of every neuron of every run.
    against: "size", "activation" or "seed": what the two models differ in; the rest is the same. The Kolmogorov-Smirnov
    distance is the largest difference of two cumulative distributions. Returns one row per pair and domain: what the
    two share, one, other (sizes as tuples), distance.
    """
    names = {"size": SIZE, "activation": ["activation"], "seed": ["seed"]}
    if against not in names:
        raise InputError(f"against is {against!r}; choose one of {', '.join(names)}.")
    differs = names[against]
    shared = [name for name in ("activation", *SIZE, "seed", "domain") if name not in differs]
    rows = []
    for about, models in neurons.groupby(shared, sort=True):
        found = {key: relative(rows["frequency"]) for key, rows in models.groupby(differs, sort=True)}
        found = found if len(differs) > 1 else {key: values for (key,), values in found.items()}
        for one, other in combinations(found, 2):
            distance = stats.ks_2samp(found[one], found[other], method="asymp").statistic  # the p-value is not asked
            rows.append((*about, one, other, float(distance)))
    return pd.DataFrame(rows, columns=[*shared, "one", "other", "distance"])


def token_patterns(vocabulary: pd.DataFrame, often: int) -> pd.DataFrame:
    """Activation ratios of the vocabulary tokens that every run saw at least `often` times, mean over seeds.

    Returns one row per token and one column per activation, d_model, n_layers and part (`PARTS`).
    """
    fewest = vocabulary.groupby("token_id")["count"].agg(["min", "size"])
    common = fewest.index[(fewest["min"] >= often) & (fewest["size"] == vocabulary["run"].nunique())]
    rows = vocabulary[vocabulary["token_id"].isin(common)]
    models = ["activation", *SIZE]
    wide = rows.pivot_table(PARTS, "token_id", models).reorder_levels([1, 2, 3, 0], axis=1)
    known = vocabulary[models].drop_duplicates().itertuples(index=False, name=None)
    return wide.reindex(columns=pd.MultiIndex.from_tuples((*model, part) for model in sorted(known) for part in PARTS))


def size_pairs(patterns: pd.DataFrame, part: str) -> list[tuple]:
    """(activation, one size, another size) for every two sizes whose models have the `part`."""
    measured = patterns.loc[:, patterns.notna().any()].columns
    models = sorted({column[:3] for column in measured if column[3] == part})
    return [(one[0], one[1:], other[1:]) for one, other in combinations(models, 2) if one[0] == other[0]]


def size_correlations(patterns: pd.DataFrame, part: str, draws: NDArray | slice = slice(None)) -> dict[tuple, Array]:
    """Spearman correlation of the token patterns of every two sizes, {pair: correlation}.

    `draws`, (resamples, tokens): positions of the tokens of each bootstrap resample; the correlations are then
    (resamples,).
    """
    correlations: dict[tuple, Any] = {}
    for activation, one, other in size_pairs(patterns, part):
        x, y = (patterns[activation, *size, part].to_numpy()[draws] for size in (one, other))
        correlations[activation, one, other] = spearman(x, y)
    return correlations


def seed_correlations(vocabulary: pd.DataFrame, often: int, part: str) -> dict[tuple, Array]:
    """Spearman correlation of the token patterns of every two seeds of one model, {(activation, size, seeds): value}.

    What two runs of one size agree on is the most that two sizes can be expected to agree on.
    """
    models = {
        seed: token_patterns(rows.assign(seed=0), often).xs(part, axis=1, level=3)
        for seed, rows in vocabulary.groupby("seed", sort=True)
    }
    correlations: dict[tuple, Any] = {}
    for one, other in combinations(models, 2):
        common = models[one].index.intersection(models[other].index)
        for model in models[one].columns.intersection(models[other].columns):
            x, y = (models[seed].loc[common, model] for seed in (one, other))
            correlations[model[0], model[1:], (one, other)] = spearman(x, y)
    return {pair: value for pair, value in correlations.items() if np.isfinite(value)}


def bootstrap_draws(patterns: pd.DataFrame) -> NDArray[np.int64]:
    """Tokens drawn with replacement, the same ones for every model: positions, (RESAMPLES, tokens)."""
    return np.random.default_rng(0).integers(len(patterns), size=(RESAMPLES, len(patterns)))


def percentile_estimate(value: float, resampled: Iterable[float], tokens: int) -> Estimate:
    """`value` with the percentile interval of its bootstrap resamples; too few tokens give a reason instead."""
    if tokens < FEWEST_TOKENS:
        return no_estimate(f"only {tokens} vocabulary tokens; at least {FEWEST_TOKENS} are needed", tokens)
    low, high = np.nanquantile(np.asarray(resampled), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high), tokens)
