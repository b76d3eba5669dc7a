"""Notebook 05: tables of activation patterns in, verdicts on the claims of claims.py out.

A test whose conditions are not met is inconclusive and says why; only an unusable table is an error.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from sparsity_utils.findings import claims
from sparsity_utils.findings.judgement import Claim, Verdict
from sparsity_utils.laws.data_law import LEVEL
from sparsity_utils.laws.limits import require
from sparsity_utils.laws.similarity import (
    SIZE,
    bootstrap_draws,
    frequency_distances,
    percentile_estimate,
    size_correlations,
    size_name,
    token_patterns,
)
from sparsity_utils.laws.trends import (
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SUPPORTED,
    Estimate,
    mean_over_runs,
    run_slopes,
    supports_positive,
)
from sparsity_utils.models.config import ACTIVATIONS

RUN = ["run", "activation", "d_model", "n_layers", "seed"]


def activation_patterns(
    neurons: pd.DataFrame, vocabulary: pd.DataFrame, dead: pd.DataFrame, transfer: pd.DataFrame
) -> list[Verdict]:
    """Tokens and neurons across sizes, layers, dead neurons, transfer of thresholds: one verdict per claim.

    The tables of the questions activation_patterns, token_patterns, dead_neurons and transfer, as results/columns.csv
    describes them. Raises InputError for missing columns, duplicates and NaN.
    """
    shares = ["dead_share", "activation_ratio", "dying_ratio"]
    pairs = ["calibrated_on", "applied_to"]
    for table, what, key, numbers in (
        (neurons, "activation patterns", ["layer", "neuron", "domain"], ["frequency"]),
        (vocabulary, "token patterns", ["token_id"], ["count", "activation_ratio", "first", "last"]),
        (dead, "dead neurons", ["step", "layer"], ["neurons", "tokens", "fit", *shares]),
        (transfer, "transfer", pairs, ["ppl_ratio", "p"]),
    ):
        require(table, [*RUN, *key, *numbers], ["run", *key], numbers, what)
    patterns = token_patterns(vocabulary, claims.OFTEN)
    return [
        _tokens_alike(patterns),
        _neurons_alike(neurons),
        _middle_alike(patterns),
        *_dead(dead),
        _transfers(transfer),
    ]


def _tokens_alike(patterns: pd.DataFrame) -> Verdict:
    value, resampled = size_correlations(patterns, "activation_ratio"), {}
    if len(patterns):
        resampled = size_correlations(patterns, "activation_ratio", bootstrap_draws(patterns))
    estimates = {
        f"{ACTIVATIONS[activation]} {size_name(one)} and {size_name(other)}": percentile_estimate(
            value[activation, one, other], draws, len(patterns)
        )
        for (activation, one, other), draws in resampled.items()
    }
    return _all_of(claims.TOKENS_ALIKE, estimates, _above(claims.ALIKE), "no two sizes share tokens", "tokens")


def _neurons_alike(neurons: pd.DataFrame) -> Verdict:
    """One value per seed: its models share no weights with those of another seed, whatever their size and domain."""
    both = _sizes_of_all_seeds(neurons[neurons["activation"].isin(["relu", "silu"])])
    means = {
        against: frequency_distances(both, against).groupby("seed")["distance"].mean()
        for against in ("activation", "size")
    }
    estimate = mean_over_runs((means["activation"] - means["size"]).dropna())
    found = ", ".join(f"{mean.mean():.2f} between {against}s" for against, mean in means.items())
    reason = estimate.reason.replace("runs", "seeds") or f"{estimate.n} seeds"
    sizes = ", ".join(map(size_name, both[SIZE].drop_duplicates().sort_values(SIZE).itertuples(index=False)))
    return claims.NEURONS_ALIKE.judged(estimate, supports_positive(estimate), reason, f"KS {found}", f"sizes {sizes}")


def _sizes_of_all_seeds(neurons: pd.DataFrame) -> pd.DataFrame:
    """The rows of the sizes that every seed has with every activation function, so that seeds are like for like."""
    models = neurons[[*SIZE, "activation", "seed"]].drop_duplicates()
    everywhere = len(models[["activation", "seed"]].drop_duplicates())
    counts = pd.MultiIndex.from_frame(neurons[SIZE]).map(models.groupby(SIZE).size())
    return neurons[counts == everywhere]


def _middle_alike(patterns: pd.DataFrame) -> Verdict:
    """The middle layer against the first and the last, on the same pairs of sizes: those that have a middle."""
    estimates, draws = {}, bootstrap_draws(patterns) if len(patterns) else slice(None)
    middles = [size_correlations(patterns, "middle", chosen) for chosen in (slice(None), draws)]
    for part in ("first", "last") if middles[0] else ():
        gaps = []
        for middle, chosen in zip(middles, (slice(None), draws), strict=True):
            others = size_correlations(patterns, part, chosen)
            gaps.append(np.mean([middle[pair] - others[pair] for pair in middle], axis=0))
        estimates[f"middle less {part}"] = percentile_estimate(*gaps, len(patterns))
    pairs = f"{len(middles[0])} pairs of sizes"
    reason = "no two sizes have three layers or more"
    return _all_of(claims.MIDDLE_ALIKE, estimates, supports_positive, reason, "tokens", pairs)


def _dead(layers: pd.DataFrame) -> list[Verdict]:
    """Share of dead neurons against tokens, and the part of the fall that lies in neurons which died."""
    relu = layers[layers["activation"] == "relu"]
    shares = ["dead_share", "activation_ratio", "dying_ratio"]
    totals = relu[shares].mul(relu["neurons"], axis=0).assign(neurons=relu["neurons"])
    sums = totals.groupby([relu[name] for name in ("run", "step", "tokens", "fit")], sort=True).sum()
    curve = sums[shares].div(sums["neurons"], axis=0).reset_index()
    fitted = curve[curve["fit"].astype(bool)]
    slopes = mean_over_runs(list(run_slopes(fitted["tokens"], fitted["dead_share"], fitted["run"]).values()))
    end = curve.groupby("run")["dead_share"].last()
    at_end = f"{100 * end.mean():.2f}% dead at the end, {100 * end.min():.2f} to {100 * end.max():.2f}"
    rises = claims.DEAD_RISES.judged(slopes, supports_positive(slopes), slopes.reason or f"{slopes.n} runs", at_end)
    return [rises, _explained(fitted)]


def _explained(fitted: pd.DataFrame) -> Verdict:
    ends = fitted.groupby("run")[["activation_ratio", "dying_ratio"]]
    fall = ends.first() - ends.last()
    rising = int((fall["activation_ratio"] <= 0).sum())
    estimate = mean_over_runs([] if rising else fall["dying_ratio"] / fall["activation_ratio"])
    reason = f"the activation ratio of {rising} runs did not fall" if rising else estimate.reason
    verdict = _below(claims.LITTLE)(estimate)
    about = f"the ratio fell by {100 * fall['activation_ratio'].mean():.1f} points"
    return claims.DEAD_EXPLAIN_LITTLE.judged(estimate, verdict, reason or f"{estimate.n} runs", about)


def _transfers(transfer: pd.DataFrame) -> Verdict:
    p = transfer["p"].iloc[0]
    rows = transfer.assign(rise=transfer["ppl_ratio"] - 1)
    own = rows[rows["calibrated_on"] == rows["applied_to"]]
    foreign = rows.drop(own.index)
    estimates = {
        ACTIVATIONS[activation]: mean_over_runs(runs.groupby("run")["rise"].mean())
        for activation, runs in foreign.groupby("activation", sort=True)
    }
    notes = [f"on the own domain {100 * own['rise'].mean():.2f}% on average"]
    if len(foreign):
        pairs = foreign.groupby(["activation", "calibrated_on", "applied_to"])["rise"].mean()
        activation, solved, applied = pairs.idxmax()
        notes.append(f"highest mean {100 * pairs.max():.2f}%, {ACTIVATIONS[activation]}, {solved} on {applied}")
    bound = claims.TRANSFER_FACTOR * p / 100
    return _all_of(claims.THRESHOLDS_TRANSFER, estimates, _below(bound), "only one domain", "runs", *notes, worst=max)


def _all_of(
    claim: Claim,
    estimates: dict[str, Estimate],
    judge: Callable[[Estimate], str],
    none: str,
    unit: str,
    *notes: str,
    worst: Callable = min,
) -> Verdict:
    """True of every estimate, an intersection-union test: each at the full level. The row shows the one that decides.

    none: the reason when there is no estimate at all. worst: which value, `min` or `max`, is furthest from the claim.
    """
    if not estimates:
        missing = Estimate(float("nan"), float("nan"), float("nan"), LEVEL, 0, none)
        return claim.judged(missing, INCONCLUSIVE, none)
    words = {name: judge(estimate) for name, estimate in estimates.items()}
    verdict = next(word for word in (NOT_SUPPORTED, INCONCLUSIVE, SUPPORTED) if word in words.values())
    deciding = {name: estimates[name] for name, word in words.items() if word == verdict}
    name = worst(deciding, key=lambda name: deciding[name].value)
    found = deciding[name]
    return claim.judged(found, verdict, found.reason or f"{found.n} {unit}", f"decides: {name}", *notes)


def _above(bound: float) -> Callable[[Estimate], str]:
    def judge(found: Estimate) -> str:
        return SUPPORTED if found.low > bound else NOT_SUPPORTED if found.high < bound else INCONCLUSIVE

    return judge


def _below(bound: float) -> Callable[[Estimate], str]:
    def judge(found: Estimate) -> str:
        return SUPPORTED if found.high < bound else NOT_SUPPORTED if found.low > bound else INCONCLUSIVE

    return judge
