"""Notebook 11, Lazy Neuron: from half of the neurons to few, what that needs, and whether larger is sparser.

A share is that of the neurons of a ReLU FFN that are not zero, mean over the tokens of evaluation text; a fall is the
share before the first step less the share after the last, of one layer of one run. The arms of the experiment
`lazy_neuron` differ in what a run is trained on, or in one number of its shape; runs of one seed are pairs. The claims
were fixed before any of these runs was trained. Three are primary: half at initialisation, the fall in every layer, and
the fall with random labels where nothing but the labels can cause it (no weight decay). The theorem on the gradient at
initialisation is in `initial_gradient`, sizes at equal tokens per parameter in `one_dimension`, top-k in `digits`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import t

from sparsity_utils.findings import digits, initial_gradient, one_dimension
from sparsity_utils.findings.claims import Claim, Verdict, Verdicts, stated
from sparsity_utils.findings.lazy_neuron_figures import DATA, METRICS, layers_figure, needs_figure, sizes_figure
from sparsity_utils.findings.one_dimension import FALL as PER_DOUBLING
from sparsity_utils.findings.one_dimension import Change
from sparsity_utils.findings.style import ShownFigure
from sparsity_utils.laws.arms import at_chosen_rates, chosen_rates, mean_of_arm, paired, run_means
from sparsity_utils.laws.data_law import LEVEL
from sparsity_utils.laws.limits import require
from sparsity_utils.laws.lines import nonzero_share, relu_ratio
from sparsity_utils.laws.trends import (
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SUPPORTED,
    Estimate,
    decide,
    mean_over_runs,
    no_estimate,
)
from sparsity_utils.study.tables import Tables

QUESTION = "lazy_neuron"
HALF = (0.47, 0.53)  # share at initialisation
FALL = 0.10  # share
STILL_HALF = 0.45  # a final share from here on refutes a fall
SAME, APART = 0.05, 0.10  # difference of final shares: up to here the same, from here on refuted
PLAIN, GATED, TEN_PASSES = "plain", "gated", "ten_passes"  # arms that claims name
SHAPE = ("d_model", "n_layers", "d_ff")

_SEEDS = "t interval over seeds, each arm at the learning rate of its lowest mean validation loss; "
_REFUTED = "; not supported if the final share is wholly above 45%"
_NONE = "this study has no runs of {} with every seed"


def _start(arm: str, name: str, primary: bool = False) -> Claim:
    return Claim(
        f"half_at_start_{arm}",
        QUESTION,
        f"At initialisation half of the neurons of a {name} FFN are not zero",
        "about 50% (2210.06313, section 1.1)",
        "% of neurons",
        _SEEDS + "share of non-zeros before the first step, mean over layers",
        "90% interval inside 47 to 53%, and so is the mean over seeds of every layer; not supported if the interval is "
        "wholly outside",
        region=HALF,
        primary=primary,
    )


def _falls(key: str, sentence: str, published: str, what: str, primary: bool = False) -> Claim:
    return Claim(
        key,
        QUESTION,
        sentence,
        published,
        "points that the share falls",
        f"{_SEEDS}share of non-zeros before the first step less after the last, {what}; the arm or layer that decides",
        f"90% interval above 10 points for each{_REFUTED} for one",
        region=(FALL, math.inf),
        primary=primary,
    )


START = {PLAIN: _start(PLAIN, "plain ReLU", primary=True), GATED: _start(GATED, "gated ReLU")}
EVERY_LAYER = {
    arm: _falls(
        f"falls_in_every_layer_{arm}",
        f"Training makes every layer of a {name} FFN sparser",
        "from 50% to 2.7%, layers 1.1 to 12% (T5-Base; 2210.06313, section 1.1)",
        "each layer",
        primary=arm == PLAIN,
    )
    for arm, name in ((PLAIN, "plain ReLU"), (GATED, "gated ReLU"))
}
MEAN = "mean over layers, each arm"
WITHOUT = {  # arms of each claim on what sparsity does not need
    _falls(
        "random_labels_no_decay",
        "Sparsity comes with labels drawn at random too, without weight decay",
        "becomes sparse (ViT, labels redrawn uniformly; 2210.06313)",
        f"{MEAN}: labels uniform, and drawn by word frequency; learnt by heart, weight decay 0",
        primary=True,
    ): ("uniform_no_decay", "unigram_no_decay"),
    _falls(
        "random_labels",
        "Sparsity comes with labels drawn at random too, with weight decay",
        "becomes sparse (ViT, labels redrawn uniformly; 2210.06313)",
        f"{MEAN}: labels uniform, and drawn by word frequency; learnt by heart, weight decay 0.1",
    ): ("uniform", "unigram"),
    _falls(
        "random_input",
        "Sparsity comes with random input too",
        "becomes sparse (ViT, pixels uniform; 2210.06313)",
        f"{MEAN}: words drawn one by one by their frequency, targets a fixed random function of them",
    ): ("random_text",),
    _falls(
        "fresh_pairs",
        "Sparsity comes where nothing can be learnt, from endless random pairs",
        "becomes sparse (ViT, a new random pair at every step; 2210.06313)",
        f"{MEAN}: random words with uniform labels, each pair once, weight decay 0",
    ): ("fresh_pairs",),
}
FRESH_DATA = Claim(
    "fresh_data",
    QUESTION,
    "Sparsity does not come from reading a text again: fresh text once is as sparse as ten passes",
    "sparse with endless data (2210.06313)",
    "points above ten passes",
    "paired over seeds, equal steps: final share of non-zeros of text read once less that of a tenth of it read ten "
    "times, mean over layers, t interval",
    "90% interval inside -5 to 5 points; not supported if wholly beyond 10 to one side",
    region=(-SAME, SAME),
)
_SHAPES = "paired over seeds, equal steps: from the smallest {0} to the largest, all else equal, t interval of the "
_SHAPES += "change of {1}, over the doublings of {0}"
_PUBLISHED = "sparser (2210.06313, Fig. 4)"
DEEPER = Claim(
    "deeper_sparser_equal_steps",
    QUESTION,
    "Deeper is sparser at equal steps, counted by non-zeros",
    _PUBLISHED,
    "points per doubling of depth",
    _SHAPES.format("depth", "the final share of non-zeros"),
    "90% interval below -2 points; not supported if wholly above 0",
    region=(-math.inf, PER_DOUBLING),
    against=(0.0, math.inf),
)
MORE_NEURONS = replace(
    DEEPER,
    key="more_neurons_sparser_equal_steps",
    claim="More neurons per layer are sparser at equal steps, counted by non-zeros",
    unit="points per doubling of d_ff",
    test=_SHAPES.format("d_ff", "the final share of non-zeros"),
)
COUNT = Claim(
    "count_rises_equal_steps",
    QUESTION,
    "The number of non-zero neurons rises with the neurons per layer at equal steps",
    "lower percentage, higher count (2210.06313, Fig. 4)",
    "doublings per doubling of d_ff",
    _SHAPES.format("d_ff", "log2 of the non-zeros of a layer, share times d_ff"),
    scale=1.0,
)
CLAIMS = (
    *(START[PLAIN], EVERY_LAYER[PLAIN], START[GATED], EVERY_LAYER[GATED]),
    *WITHOUT,
    *(FRESH_DATA, DEEPER, MORE_NEURONS, COUNT),
)


def claims() -> pd.DataFrame:
    """The claims, tests and thresholds, as the notebook states them before its results."""
    return stated(CLAIMS)


@dataclass(frozen=True, eq=False)
class Found:
    """What verdicts, tables and figures rest on: all at the learning rate that counts of each arm."""

    layers: pd.DataFrame  # one row per run and layer, with the `fall`
    runs: pd.DataFrame  # one row per run, means over its layers
    rates: pd.DataFrame  # `chosen_rates`
    falls: dict[str, Estimate]  # by arm of the shape of `plain`, mean over layers
    finals: dict[str, Estimate]  # likewise, the final share
    changes: dict[str, Change]  # at equal steps, by dimension, of those that arms vary; paired by seed
    at_equal_tokens: dict[str, Change]  # per parameter, by dimension, of those that one_dimension varies
    points: pd.DataFrame  # `size_points`


def analyse(table: pd.DataFrame | None, shapes: pd.DataFrame | None = None) -> Found | None:
    """What follows from the tables lazy_neuron and one_dimension of a study; None where it has not the first.

    An arm without a learning rate at which every seed was trained to its end is left out.
    Raises InputError for missing columns, duplicates and NaN.
    """
    if table is None:
        return None
    numbers = ["initial_share", "final_share", "tokens", *SHAPE]
    require(table, [*numbers, "activation_ratio"], ["run", "layer"], numbers, QUESTION)
    layers = at_chosen_rates(table)
    layers = layers.assign(fall=layers["initial_share"] - layers["final_share"])
    runs = run_means(layers)
    runs["fall"] = runs["initial_share"] - runs["final_share"]  # mean over layers
    arms = _of_one_shape(runs)
    falls, finals = ({arm: mean_of_arm(runs, arm, name) for arm in arms} for name in ("fall", "final_share"))
    changes = {name: _change(runs, name) for name in ("n_layers", "d_ff") if _ends(runs, name)}
    at_equal_tokens = {} if shapes is None else one_dimension.changes(shapes)
    points = size_points(runs, shapes)
    return Found(layers, runs, chosen_rates(table), falls, finals, changes, at_equal_tokens, points)


def _of_one_shape(runs: pd.DataFrame) -> list[str]:
    """The arms of the shape of `plain`, which differ from it in data, labels, decay or FFN; all arms without it."""
    shapes = runs.drop_duplicates("arm").set_index("arm")[list(SHAPE)]
    return list(shapes[(shapes == shapes.loc[PLAIN]).all(axis=1)].index if PLAIN in shapes.index else shapes.index)


def _ends(runs: pd.DataFrame, dimension: str) -> tuple[str, str] | None:
    """The arms with the least and the most of a dimension, of `plain` and those that differ from it in that alone.

    Arms of another shape than `plain` are trained as it is, to as many tokens.
    """
    shapes = runs.drop_duplicates("arm").set_index("arm")
    if PLAIN not in shapes.index:
        return None
    base, others = shapes.loc[PLAIN], [name for name in SHAPE if name != dimension]
    alike = (shapes[[*others, "tokens"]] == base[[*others, "tokens"]]).all(axis=1)
    varied = shapes[alike & ((shapes[dimension] != base[dimension]) | (shapes.index == PLAIN))][dimension]
    return (varied.idxmin(), varied.idxmax()) if varied.nunique() > 1 else None


def _change(runs: pd.DataFrame, dimension: str) -> Change:
    small, large = _ends(runs, dimension)
    sizes = runs.drop_duplicates("arm").set_index("arm")[dimension]
    doublings = math.log2(sizes[large] / sizes[small])
    share, count = {}, {}
    for name, column in METRICS.items():
        values = runs.assign(share=runs[column] / doublings, count=np.log2(runs[column] * runs["d_ff"]) / doublings)
        share[name], count[name] = (paired(values, large, small, what) for what in ("share", "count"))
    return Change(small, large, share, count)


def size_points(runs: pd.DataFrame, shapes: pd.DataFrame | None) -> pd.DataFrame:
    """Shares of shapes, means over seeds, of which dimensions are varied one at a time.

    Columns: data (one of DATA), d_model, n_layers, d_ff, runs, the share by each of METRICS, and with ` reach` how far
    its t interval reaches to each side, NaN for a single run.
    """
    steps = [arm for name in ("n_layers", "d_ff") if (ends := _ends(runs, name)) for arm in (*ends, PLAIN)]
    own = runs[runs["arm"].isin(steps)].rename(columns={column: name for name, column in METRICS.items()})
    both = [own.assign(data=DATA[0])]
    if shapes is not None:
        found = nonzero_share(shapes).rename(columns={"value": "non-zeros"})
        found["CETT-PPL"] = found["run"].map(relu_ratio(shapes).set_index("run")["value"])
        found["d_ff"] = found["run"].map(shapes.drop_duplicates("run").set_index("run")["d_ff"])
        both.append(found.assign(data=DATA[1]))
    groups = pd.concat(both).groupby(["data", *SHAPE], sort=True)
    runs, shares = groups.size(), groups[list(METRICS)]
    reach = shares.sem().mul(t.ppf((1 + LEVEL) / 2, (runs - 1).clip(lower=1)), axis=0).add_suffix(" reach")
    return shares.mean().join(reach).assign(runs=runs).reset_index()


def verdicts(found: Found | None) -> Verdicts:
    """The verdict on every claim, in the order of `claims`; inconclusive where the arms of one were not trained."""
    if found is None:
        return Verdicts(claim.undecided("not measured") for claim in CLAIMS)
    own = {FRESH_DATA: _fresh_data(found)}
    for arm in (PLAIN, GATED):
        own |= {START[arm]: _half(START[arm], found, arm), EVERY_LAYER[arm]: _layers(EVERY_LAYER[arm], found, arm)}
    own |= {claim: _without(claim, found, arms) for claim, arms in WITHOUT.items()}
    own |= {
        DEEPER: _sized(DEEPER, found.changes.get("n_layers"), "share", "depth"),
        MORE_NEURONS: _sized(MORE_NEURONS, found.changes.get("d_ff"), "share", "d_ff"),
        COUNT: _sized(COUNT, found.changes.get("d_ff"), "count", "d_ff"),
    }
    return Verdicts(own[claim] for claim in CLAIMS)


def half_word(mean: Estimate, layers: list[float]) -> str:
    """Verdict of START from the interval of the mean over layers and the mean over seeds of each layer."""
    word = decide(mean, *HALF)
    return INCONCLUSIVE if word == SUPPORTED and not all(HALF[0] < one < HALF[1] for one in layers) else word


def fall_word(fall: Estimate, final: Estimate) -> str:
    """Supported if the fall is wholly above the margin; not supported if the final share is wholly above 45%."""
    if decide(fall, FALL) == SUPPORTED:
        return SUPPORTED
    return NOT_SUPPORTED if final.low > STILL_HALF else INCONCLUSIVE


def same_word(difference: Estimate) -> str:
    """Verdict of FRESH_DATA: the same inside the inner margin, not the same wholly beyond the outer one."""
    if decide(difference, -SAME, SAME) == SUPPORTED:
        return SUPPORTED
    return NOT_SUPPORTED if decide(difference, -APART, APART) == NOT_SUPPORTED else INCONCLUSIVE


def of_layers(found: Found, arm: str, column: str) -> dict[str, Estimate]:
    """Mean over seeds of a number of each layer of an arm, with its interval; by `layer 0` and so on."""
    rows = found.layers[found.layers["arm"] == arm]
    return {f"layer {layer}": mean_over_runs(one[column]) for layer, one in rows.groupby("layer")}


def _half(claim: Claim, found: Found, arm: str) -> Verdict:
    mean = mean_of_arm(found.runs, arm, "initial_share")
    layers = {
        name: rows["initial_share"].mean() for name, rows in found.layers[found.layers["arm"] == arm].groupby("layer")
    }
    outside = [f"layer {name} {100 * share:.1f}%" for name, share in layers.items() if not HALF[0] < share < HALF[1]]
    about = f"outside: {', '.join(outside)}" if outside else ""
    return claim.judged(mean, _seeds(mean), about, verdict=half_word(mean, list(layers.values())))


def _layers(claim: Claim, found: Found, arm: str) -> Verdict:
    falls, finals = of_layers(found, arm, "fall"), of_layers(found, arm, "final_share")
    if not falls:
        return claim.undecided(_NONE.format(arm))
    return claim.judged_all(falls, "seeds", words={name: fall_word(falls[name], finals[name]) for name in falls})


def _without(claim: Claim, found: Found, arms: tuple[str, ...]) -> Verdict:
    nothing = {arm: no_estimate(_NONE.format(arm)) for arm in arms}
    falls, finals = nothing | found.falls, nothing | found.finals
    words = {arm: fall_word(falls[arm], finals[arm]) for arm in arms}
    return claim.judged_all({arm: falls[arm] for arm in arms}, "seeds", words=words)


def _fresh_data(found: Found) -> Verdict:
    difference = paired(found.runs, PLAIN, TEN_PASSES, "final_share")
    return FRESH_DATA.judged(difference, difference.reason or f"{difference.n} pairs", verdict=same_word(difference))


def _sized(claim: Claim, change: Change | None, what: str, dimension: str) -> Verdict:
    """The verdict on what doubling a dimension does to non-zeros: to their share, or to the log2 of their count."""
    if change is None:
        return claim.undecided(f"this study has no arms that differ in {dimension} alone")
    estimate = getattr(change, what)["non-zeros"]
    return claim.counted(estimate, "pairs", f"{change.small} to {change.large}")


def _seeds(estimate: Estimate) -> str:
    return estimate.reason or f"{estimate.n} seeds"


def figures(study: Tables) -> Iterator[tuple[str, ShownFigure]]:
    """Every figure that a study has the tables for, with its name; that of the theorem needs none."""
    yield "11_gradient", initial_gradient.figure(initial_gradient.analyse())
    if study.answers(QUESTION):
        shapes = study.table("one_dimension") if study.answers("one_dimension") else None
        found = analyse(study.table(QUESTION), shapes)
        yield "11_layers", layers_figure(found.layers)
        yield "11_needs", needs_figure(found.falls, FALL)
        if len(found.points):
            yield "11_sizes", sizes_figure(found.points)
    if study.answers("digits"):
        yield "11_digits", digits.figure(study.table("digits"))
