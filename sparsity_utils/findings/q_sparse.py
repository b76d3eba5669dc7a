"""Claims on models trained to read few of their inputs, and their verdicts (Q-Sparse, arXiv 2407.10969).

A difference between two arms is one of paired seeds, each arm at the learning rate that its own validation loss chose.
S is the share of the inputs of every linear map that a token does not read. Tests and margins were fixed before the
runs; results change neither.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sparsity_utils.findings.claims import Claim, Verdict, Verdicts, stated
from sparsity_utils.findings.q_sparse_arms import DENSE, KEPT, LEVELS, NEAR_BEST, as_sizes, gaps_of_sizes
from sparsity_utils.findings.q_sparse_figures import frontier_figure, gradients_figure, loss_figure, sizes_figure
from sparsity_utils.findings.style import ShownFigure
from sparsity_utils.laws.arms import at_chosen_rates, chosen_rates, of_arm, paired, run_means
from sparsity_utils.laws.sparsity_law import held_out_errors
from sparsity_utils.laws.trends import Estimate, mean_over_runs, no_estimate
from sparsity_utils.study.tables import Tables

QUESTION = "q_sparse"
BOTTOM = 0  # the layer next to the embedding

STRAIGHT_THROUGH = Claim(
    "straight_through",
    QUESTION,
    "Straight-through gradients train a better model than gradients of the kept inputs alone",
    "clearly better at 300M (2407.10969, Fig. 8)",
    "nats per token",
    "loss without less loss with the straight-through estimator, half of the inputs kept; mean over paired seeds",
    "90% interval above 0.02; not supported if wholly below 0",
    region=(0.02, math.inf),
    against=(-math.inf, 0.0),
    scale=1.0,
    decimals=3,
    primary=True,
)
MATCHES_DENSE = Claim(
    "matches_dense",
    QUESTION,
    "A model that reads 69% of its inputs matches the dense one",
    "matches at 40% overall sparsity (2407.10969, Fig. 5)",
    "% of the loss",
    "loss of keep_11 over that of the dense model, less 1; mean over paired seeds",
    "90% interval below 1%; not supported if wholly above 2%",
    region=(-math.inf, 0.01),
    against=(0.02, math.inf),
    primary=True,
)
INTERIOR_BEST = Claim(
    "interior_best",
    QUESTION,
    "At equally many active parameters, leaving out about half is better than leaving out nothing",
    "best at 45.58% (2407.10969, section 3.4)",
    "nats per token",
    "loss of the dense model less the mean loss of the two wider ones that leave out 38% and 56%, less what they read "
    "beyond it, their larger heads, may be worth by the slope of the loss of dense models of four sizes over the "
    "logarithm of the weights that a token reads; mean over paired seeds",
    "90% interval above 0",
    scale=1.0,
    decimals=3,
    primary=True,
)
GRADIENTS_VANISH = Claim(
    "gradients_vanish",
    QUESTION,
    "Without straight-through gradients the lowest of many layers learns less",
    "vanish (2407.10969, Fig. 2)",
    "of the dense model's gradient",
    "norm of the gradient of the lowest layer of 12, before the first step, without the estimator over that of the "
    "dense model; mean over seeds",
    "90% interval below 0.7; not supported if wholly above 1",
    region=(-math.inf, 0.7),
    against=(1.0, math.inf),
    scale=1.0,
    decimals=3,
)
GRADIENTS_KEPT = Claim(
    "gradients_kept",
    QUESTION,
    "With straight-through gradients it learns about as much as in the dense model",
    "kept (2407.10969, Fig. 2)",
    "of the dense model's gradient",
    "the same with the estimator",
    "90% interval within 0.7 to 1.4",
    region=(0.7, 1.4),
    scale=1.0,
    decimals=3,
)
GAP_SHRINKS = Claim(
    "gap_shrinks",
    QUESTION,
    "The gap to the dense model shrinks with size as a power of -0.1",
    "-0.1 (2407.10969, section 3.4)",
    "decades of the gap per decade of parameters",
    "slope of log10 of the gap, 63% of the inputs left out, over log10 of the parameters, a line per seed; mean over "
    "seeds; a seed with a gap of zero or less has no line, and then nothing is decided",
    "90% interval within -0.187 to -0.036, which is a ratio of 0.66 +- 0.2 over 1.8 decades; not supported if wholly "
    "above 0",
    region=(math.log10(0.46) / 1.8, math.log10(0.86) / 1.8),
    against=(0.0, math.inf),
    scale=1.0,
    decimals=3,
)
CONVEX = Claim(
    "convex",
    QUESTION,
    "Loss grows with S as exp(beta / (1 - S)), and not along a line",
    "exp(beta / (1 - S)) (2407.10969, section 3.4)",
    "nats per token",
    "error of a line less that of the form, at the three inner ones of five S, each left out of the fit in turn; mean "
    "over seeds",
    "90% interval above 0",
    scale=1.0,
    decimals=3,
)
BLOCKS_AS_GOOD = Claim(
    "blocks_as_good",
    QUESTION,
    "Choosing half of every block of 32 is as good as choosing half of all",
    "comparable (2407.10969, Fig. 7)",
    "nats per token",
    "loss of block less loss of keep_8; mean over paired seeds",
    "90% interval below 0.01; not supported if wholly above 0.03",
    region=(-math.inf, 0.01),
    against=(0.03, math.inf),
    scale=1.0,
    decimals=3,
)
RESCALING_HELPS = Claim(
    "rescaling_helps",
    QUESTION,
    "Making up for the norm of what is left out helps",
    "used, not tested (2407.10969, section 2.1)",
    "nats per token",
    "loss of keep_8 less that of ratio, and of unit; both must be; mean over paired seeds",
    scale=1.0,
    decimals=3,
)
TERNARY_TOLERATES = Claim(
    "ternary_tolerates",
    QUESTION,
    "Ternary weights and inputs of 8 bits lose less by leaving out half of the inputs",
    "best at 61.25% in place of 45.58% (2407.10969, section 3.4)",
    "nats per token",
    "(loss of ternary less that of ternary_dense) less (loss of keep_8 less that of dense); mean over paired seeds",
    "90% interval below 0",
    region=(-math.inf, 0.0),
    scale=1.0,
    decimals=3,
)
LARGER_TOLERATES = Claim(
    "larger_tolerates",
    QUESTION,
    "Larger dense models lose less when 38% of the inputs of all maps are cut without training",
    "more tolerant (TMLR 2026, Q-Sparse retitled)",
    "nats per decade of parameters",
    "slope of the rise of the loss over log10 of the parameters, a line per seed; mean over seeds",
    "90% interval below 0",
    region=(-math.inf, 0.0),
    scale=1.0,
    decimals=3,
)
PENALTY_PUSHES = Claim(
    "penalty_pushes",
    QUESTION,
    "An L1 penalty leaves a tenth of the non-zero ReLU neurons",
    "a thirtieth: 29 of 911 (2603.23198)",
    "of the neurons without a penalty",
    "share of non-zero neurons of relu_l1_strong over that of relu; mean over paired seeds",
    "90% interval below 0.1; not supported if wholly above 0.5",
    region=(-math.inf, 0.1),
    against=(0.5, math.inf),
    scale=1.0,
    decimals=3,
)
PENALTY_IS_CHEAP = Claim(
    "penalty_is_cheap",
    QUESTION,
    "That penalty costs at most 1% of the loss",
    "accuracy 46.4 to 46.2 (2603.23198)",
    "% of the loss",
    "loss of relu_l1_strong, penalty not counted, over that of relu, less 1; mean over paired seeds",
    "90% interval below 1%; not supported if wholly above 2%",
    region=(-math.inf, 0.01),
    against=(0.02, math.inf),
)
CLAIMS = (
    *(STRAIGHT_THROUGH, MATCHES_DENSE, INTERIOR_BEST, GRADIENTS_VANISH, GRADIENTS_KEPT, GAP_SHRINKS, CONVEX),
    *(BLOCKS_AS_GOOD, RESCALING_HELPS, TERNARY_TOLERATES, LARGER_TOLERATES, PENALTY_PUSHES, PENALTY_IS_CHEAP),
)


@dataclass(frozen=True)
class Found:
    """What the tables say, computed once. Each table has one row per run at the learning rate that counts."""

    runs: pd.DataFrame  # of q_sparse
    sizes: pd.DataFrame | None  # of q_sparse_sizes, and the arms of q_sparse that are of 64x4
    active: pd.DataFrame | None  # of equal_active
    flow: pd.DataFrame | None  # the table gradient_flow
    rates: pd.DataFrame  # `chosen_rates` of all experiments


def claims() -> pd.DataFrame:
    """The claims, tests and thresholds, as they were frozen before the runs."""
    return stated(CLAIMS)


def analyse(
    table: pd.DataFrame | None,
    sizes: pd.DataFrame | None = None,
    active: pd.DataFrame | None = None,
    flow: pd.DataFrame | None = None,
) -> Found | None:
    """What the tables q_sparse, q_sparse_sizes, equal_active and gradient_flow say; None without the first.

    Raises InputError for missing columns, duplicates and NaN.
    """
    if table is None:
        return None
    runs = run_means(at_chosen_rates(table))
    given = {"q_sparse": table, "q_sparse_sizes": sizes, "equal_active": active}
    rates = [chosen_rates(one).assign(experiment=name) for name, one in given.items() if one is not None]
    return Found(
        runs,
        None if sizes is None else pd.concat([run_means(at_chosen_rates(sizes)), as_sizes(runs)], ignore_index=True),
        None if active is None else run_means(at_chosen_rates(active)),
        flow,
        pd.concat(rates, ignore_index=True),
    )


def verdicts(found: Found | None) -> Verdicts:
    """One verdict per claim; all are inconclusive where nothing was measured."""
    if found is None:
        return Verdicts([claim.undecided("this study has no runs of q_sparse") for claim in CLAIMS])
    runs = found.runs

    def gap(claim: Claim, arm: str, base: str, relative: bool = False, column: str = "loss") -> Verdict:
        return claim.counted(paired(runs, arm, base, column, relative), "seeds")

    rescaled = {arm: paired(runs, "keep_8", arm, "loss") for arm in ("ratio", "unit")}
    left = paired(runs, "relu_l1_strong", "relu", "final_share", relative=True)
    remaining = Estimate(1 + left.value, 1 + left.low, 1 + left.high, left.n, left.reason)
    return Verdicts(
        [
            gap(STRAIGHT_THROUGH, "no_straight_through", "keep_8"),
            gap(MATCHES_DENSE, "keep_11", "dense", relative=True),
            _interior_best(found),
            _flow(GRADIENTS_VANISH, found.flow, "no straight-through"),
            _flow(GRADIENTS_KEPT, found.flow, "straight-through"),
            _gap_shrinks(found),
            _convex(runs),
            gap(BLOCKS_AS_GOOD, "block", "keep_8"),
            RESCALING_HELPS.judged_all(rescaled, "seeds"),
            _ternary(runs),
            _larger_tolerates(found),
            PENALTY_PUSHES.counted(remaining, "seeds"),
            gap(PENALTY_IS_CHEAP, "relu_l1_strong", "relu", relative=True),
        ]
    )


def over_seeds(tables: dict[str, pd.Series], combine: Callable[..., float]) -> Estimate:
    """The mean over seeds of `combine(*values of a seed)` of the series of `tables`, by seed.

    A table without rows gives an estimate with a reason.
    """
    missing = [name for name, values in tables.items() if values.empty]
    if missing:
        return no_estimate(f"this study has no runs of {', '.join(missing)} with every seed")
    values = pd.concat(tables, axis=1).dropna()
    return mean_over_runs([combine(*row) for row in values.to_numpy()])


def arm_losses(runs: pd.DataFrame, *arms: str) -> dict[str, pd.Series]:
    """The losses of arms by seed."""
    return {arm: of_arm(runs, arm, "loss") for arm in arms}


def _interior_best(found: Found) -> Verdict:
    if found.active is None or found.sizes is None:
        return INTERIOR_BEST.undecided("this study has no runs of equal_active or of q_sparse_sizes")
    size = np.log(found.sizes["read_parameters"])
    slopes = _slopes(found.sizes, DENSE, "loss", size)  # nats per e-fold of what a token reads, by seed
    read = np.log(found.active.groupby("arm")["read_parameters"].first()).reindex(["dense", *NEAR_BEST])
    beyond = read[[*NEAR_BEST]].mean() - read["dense"]
    tables = {"three sizes": slopes, **arm_losses(found.active, "dense", *NEAR_BEST)}
    gain = over_seeds(tables, lambda slope, dense, *wider: dense - np.mean(wider) + slope * beyond)
    worth = f"what they read beyond the dense one may be worth {-slopes.mean() * beyond:.4f} nats"
    return INTERIOR_BEST.counted(gain, "seeds", *() if gain.reason else (worth,))


def _slopes(sizes: pd.DataFrame, kind: str, column: str, x: pd.Series) -> pd.Series:
    """The slope of `column` over `x` of the arms of a kind, for each seed that has three sizes."""
    rows = sizes.assign(x=x)[sizes["arm"].str.endswith(kind)].dropna(subset=[column])
    seeds = {number: seed for number, seed in rows.groupby("seed") if seed["x"].nunique() >= 3}
    return pd.Series({number: np.polyfit(seed["x"], seed[column], 1)[0] for number, seed in seeds.items()}, dtype=float)


def _flow(claim: Claim, flow: pd.DataFrame | None, way: str) -> Verdict:
    if flow is None:
        return claim.undecided("gradients at initialisation were not measured")
    bottom = flow[flow["layer"] == BOTTOM].pivot(index="seed", columns="way", values="norm")
    return claim.counted(mean_over_runs(bottom[way] / bottom["dense"]), "seeds", f"{flow['layer'].max() + 1} layers")


def _gap_shrinks(found: Found) -> Verdict:
    if found.sizes is None:
        return GAP_SHRINKS.undecided("this study has no runs of q_sparse_sizes")
    gaps = gaps_of_sizes(found.sizes)
    if (gaps["gap"] <= 0).any():
        return GAP_SHRINKS.undecided(f"{(gaps['gap'] <= 0).sum()} of {len(gaps)} gaps are not above zero")
    rows = gaps.assign(arm=KEPT, gap=np.log10(gaps["gap"]))
    slope = over_seeds({"three sizes": _slopes(rows, KEPT, "gap", np.log10(rows["parameters"]))}, float)
    decades = np.log10(gaps["parameters"].max() / gaps["parameters"].min())
    return GAP_SHRINKS.counted(slope, "seeds", f"{gaps['shape'].nunique()} sizes over {decades:.1f} decades")


def _convex(runs: pd.DataFrame) -> Verdict:
    def better(*losses: float) -> float:
        errors = held_out_errors(list(LEVELS.values()), losses)
        return errors["line"] - errors["exponential"]

    return CONVEX.counted(over_seeds(arm_losses(runs, *LEVELS), better), "seeds")


def _ternary(runs: pd.DataFrame) -> Verdict:
    arms = arm_losses(runs, "ternary", "ternary_dense", "keep_8", "dense")
    return TERNARY_TOLERATES.counted(over_seeds(arms, lambda a, b, c, d: (a - b) - (c - d)), "seeds")


def _larger_tolerates(found: Found) -> Verdict:
    if found.sizes is None:
        return LARGER_TOLERATES.undecided("this study has no runs of q_sparse_sizes")
    slopes = _slopes(found.sizes, DENSE, "rise_untrained", np.log10(found.sizes["parameters"]))
    slope = over_seeds({"three sizes": slopes}, float)
    return LARGER_TOLERATES.counted(slope, "seeds")


def figures(study: Tables) -> Iterator[tuple[str, ShownFigure]]:
    """The figures of a study that has the tables for them, by name."""
    names = ("q_sparse", "q_sparse_sizes", "equal_active", "gradient_flow")
    found = analyse(*map(study.table_or_none, names))
    if found is None:
        return
    yield "12_loss", loss_figure(found)
    yield "12_frontier", frontier_figure(found)
    if found.sizes is not None:
        yield "12_sizes", sizes_figure(found)
    if found.flow is not None:
        yield "12_gradients", gradients_figure(found.flow)
