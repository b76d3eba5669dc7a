"""Notebook 11, one dimension at a time: which of width, depth and d_ff moves sparsity, and how much.

The runs are ReLU shapes that differ from a centre in one dimension each, and the two lines of sizes. All have equally
many training tokens per parameter. The claims are frozen before the runs: results change neither tests nor margins.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from sparsity_utils.console import InputError
from sparsity_utils.findings.claims import Claim, Verdict, Verdicts, stated
from sparsity_utils.laws.limits import COLUMNS, SHAPE, require
from sparsity_utils.laws.lines import (
    Lines,
    coefficients,
    lines_of,
    nonzero_share,
    on_lines,
    relu_ratio,
    size_means,
    slopes_on_lines,
    unequal_data,
    weak_tail,
)
from sparsity_utils.laws.trends import (
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SMALLEST_DOF,
    SUPPORTED,
    Estimate,
    no_estimate,
)
from sparsity_utils.study.tables import Tables

DIMENSIONS = ("d_model", "n_layers", "d_ff")
NAMES = {"d_model": "width", "n_layers": "depth", "d_ff": "d_ff"}
NONZEROS = "non-zeros"
SHARES = {NONZEROS: nonzero_share, "CETT-PPL": relu_ratio}  # by metric: the share of each ReLU run
WIDTH_MARGIN, DEPTH_MARGIN = -0.03, -0.05  # share of non-zeros per decade of parameters
FALL = -0.02  # share of non-zeros per doubling
QUESTION = "one_dimension"
REGRESSION = (
    "one regression of the means over the seeds of each shape: an intercept at the centre and a slope for each "
)
REGRESSION += "of width, depth and d_ff (degrees of freedom: shapes less 4); "
DEPTH_DRIVES = Claim(
    "depth_drives",
    QUESTION,
    "Depth drives the trend of non-zero ReLU neurons with size",
    "none",
    "points per decade of parameters",
    f"{REGRESSION}of the share of non-zeros on log parameters, widened at fixed depth and deepened at fixed width; the "
    "slope that decides is shown",
    "90% interval of the width slope above -3 and of the depth slope below -5; not supported if the first is wholly "
    "below -3 or the second wholly above -5",
)
TAIL_SHRINKS = Claim(
    "tail_shrinks",
    QUESTION,
    "The weak tail shrinks with size",
    "none",
    "points per decade of parameters",
    "slope, on log parameters, of the weak tail: the share of ReLU neurons that are non-zero but dropped by CETT-PPL; "
    "means over the seeds of each size of two layers or more, own intercept and slope for each line of sizes, residual "
    "variance pooled over the lines (degrees of freedom: sizes less twice the lines); the line nearest to a rise is "
    "shown",
    "90% interval below 0 on both lines; not supported if wholly above 0 on either",
    region=(-math.inf, 0.0),
)
DEEPER_SPARSER = Claim(
    "deeper_sparser",
    QUESTION,
    "Deeper is sparser, counted by non-zero ReLU neurons",
    "sparser (2210.06313, Fig. 4)",
    "points per doubling of depth",
    f"{REGRESSION}of the share of non-zeros on log2 of each dimension",
    "90% interval below -2 points; not supported if wholly above 0",
)
MORE_NEURONS_SPARSER = replace(
    DEEPER_SPARSER,
    key="more_neurons_sparser",
    claim="More neurons per layer are sparser, counted by non-zero ReLU neurons",
    unit="points per doubling of d_ff",
)
COUNT_RISES = Claim(
    "count_rises",
    QUESTION,
    "The number of non-zero ReLU neurons still rises with the neurons per layer",
    "lower percentage, higher count (2210.06313, Fig. 4)",
    "doublings per doubling of d_ff",
    f"{REGRESSION}of log2 of the number of non-zeros, share times d_ff, on log2 of each dimension",
    scale=1.0,
)
DOUBLINGS = (DEEPER_SPARSER, MORE_NEURONS_SPARSER, COUNT_RISES)
CLAIMS = (DEPTH_DRIVES, TAIL_SHRINKS, *DOUBLINGS)
MISSING = "this study has no shapes that differ in one dimension"
APART = "the lines of sizes are of another study: no run of the shapes is on them"


def claims() -> pd.DataFrame:
    """The claims, tests and thresholds, as they were frozen before the runs."""
    return stated(CLAIMS)


def of_study(study: Tables) -> Verdicts:
    """`verdicts` on the tables of a study.

    Without its shapes nothing is judged, the weak tail neither: lines alone are those that the claims were drawn from.
    The weak tail is not judged either where none of the shapes is a run of the lines: they are of different studies.
    """
    if not study.answers(QUESTION):
        return Verdicts(claim.undecided(MISSING) for claim in CLAIMS)
    lines = lines_of(study.table("relu_vs_silu"), study.table_or_none("second_line"))
    return verdicts(study.table(QUESTION), lines)


def verdicts(shapes: pd.DataFrame | None, lines: Lines) -> Verdicts:
    """One verdict per claim: depth drives the trend of non-zeros, the weak tail shrinks, larger is sparser.

    shapes: a table of checkpoints with the column d_ff, of ReLU shapes that differ from one of them in one dimension;
    if it is None, its claims are inconclusive. lines: the tables of the lines of sizes, as `lines.lines_of`; if no run
    of the shapes is on them, the weak tail is inconclusive.
    Raises InputError for missing columns, duplicates, NaN, and shapes without a centre.
    """
    apart = shapes is not None and not any(shapes["run"].isin(line["run"]).any() for line in lines.values())
    tail = TAIL_SHRINKS.undecided(APART) if apart else _tail_verdict(lines)
    if shapes is None:
        depth, *doublings = (claim.undecided(MISSING) for claim in (DEPTH_DRIVES, *DOUBLINGS))
        return Verdicts([depth, tail, *doublings])
    means = shape_means(shapes)
    confounded = unequal_data(shapes)
    about = f"{len(means)} shapes, {means['runs'].sum()} runs"
    slopes = parameter_slopes(means)
    word, shown = depth_drives(slopes)
    both = ", ".join(f"{NAMES[name]} {_interval(slopes[name])}" for name in ("d_model", "n_layers"))
    depth = DEPTH_DRIVES.judged(
        shown, shown.reason or about, both, confounded, verdict=INCONCLUSIVE if confounded else word
    )
    doublings = [
        claim.judged(estimate, estimate.reason or about, confounded, verdict=INCONCLUSIVE if confounded else word)
        for claim, (estimate, word) in doubling_verdicts(means).items()
    ]
    return Verdicts([depth, tail, *doublings])


def shape_means(shapes: pd.DataFrame, metric: str = NONZEROS) -> pd.DataFrame:
    """One row per shape: d_model, n_layers, d_ff, parameters, `value` (share by a metric, mean over seeds), runs."""
    require(
        shapes, [*COLUMNS, "d_ff", "nonzero_share"], ["run", "step"], ["parameters", "d_ff", "nonzero_share"], QUESTION
    )
    runs = shapes[["run", *SHAPE, "d_ff", "seed"]].drop_duplicates()
    require(runs, [], [*SHAPE, "d_ff", "seed"], [], f"{QUESTION} (one row per run)")
    values = SHARES[metric](shapes)
    if values.empty:
        raise InputError(f"The {QUESTION} table has no relu runs; its claims are about ReLU models.")
    if (values["value"] <= 0).any():
        raise InputError(f"The {QUESTION} table has a run without a share of {metric} above 0; measure it again.")
    return size_means(values.assign(d_ff=values["run"].map(runs.set_index("run")["d_ff"])), DIMENSIONS)


def centre(means: pd.DataFrame) -> pd.Series:
    """The shape from which every other differs in exactly one dimension; InputError where there is none.

    If only one dimension varies, every shape is such a centre; the slope does not depend on which one is taken.
    """
    shapes = means[list(DIMENSIONS)].to_numpy()
    differing = (shapes[:, None] != shapes[None]).sum(axis=2)  # (shapes, shapes)
    alone = np.flatnonzero((differing == 1).sum(axis=1) == len(shapes) - 1)
    if not alone.size:
        named = ", ".join("x".join(f"{size:g}" for size in shape) for shape in shapes)
        raise InputError(f"No shape differs from all others in one dimension of d_model x n_layers x d_ff: {named}.")
    return means.iloc[alone[0]]


def parameter_slopes(means: pd.DataFrame) -> dict[str, Estimate]:
    """{dimension: slope of `value` per decade of parameters along it}."""
    middle = centre(means)
    return _slopes(means, middle, {name: np.log10(means["parameters"] / middle["parameters"]) for name in DIMENSIONS})


def doubling_slopes(means: pd.DataFrame) -> dict[str, Estimate]:
    """{dimension: slope of `value` per doubling of it}."""
    middle = centre(means)
    return _slopes(means, middle, {name: np.log2(means[name] / middle[name]) for name in DIMENSIONS})


def count_slopes(means: pd.DataFrame) -> dict[str, Estimate]:
    """{dimension: doublings of the number of active neurons of a layer, `value` times d_ff, per doubling of it}."""
    return doubling_slopes(means.assign(value=np.log2(means["value"] * means["d_ff"])))


@dataclass(frozen=True)
class Change:
    """What one dimension of the shape does per doubling of it, from the smallest to the largest that there is.

    Estimates by metric: of the share, and of log2 of the count of a layer, share times d_ff.
    """

    small: str
    large: str
    share: dict[str, Estimate]
    count: dict[str, Estimate]


def changes(shapes: pd.DataFrame) -> dict[str, Change]:
    """What each dimension does at equal tokens per parameter, of those that shapes vary: a description by both metrics.

    The slopes are those of the regression by which the claims are judged. Raises InputError as `shape_means` does.
    """
    means = {metric: shape_means(shapes, metric) for metric in SHARES}
    shares = {metric: doubling_slopes(one) for metric, one in means.items()}
    counts = {metric: count_slopes(one) for metric, one in means.items()}
    sizes = means[NONZEROS]
    return {
        name: Change(
            f"{sizes[name].min():g}",
            f"{sizes[name].max():g}",
            {metric: shares[metric][name] for metric in SHARES},
            {metric: counts[metric][name] for metric in SHARES},
        )
        for name in DIMENSIONS
        if sizes[name].nunique() > 1
    }


def _slopes(means: pd.DataFrame, middle: pd.Series, along: dict[str, pd.Series]) -> dict[str, Estimate]:
    """Slopes in value = intercept + slope * along, of the dimension in which a shape differs from `middle`."""
    columns = {name: np.where(means[name] != middle[name], x, 0.0) for name, x in along.items()}
    varied = [name for name in DIMENSIONS if np.any(columns[name])]
    nothing = {name: no_estimate(f"no shape differs in {name} alone") for name in DIMENSIONS}
    dof = len(means) - 1 - len(varied)
    if dof < SMALLEST_DOF:
        reason = f"too few shapes: {len(means)} leave {max(dof, 0)} degrees of freedom"
        return nothing | {name: no_estimate(reason, len(means)) for name in varied}
    design = np.column_stack([np.ones(len(means)), *(columns[name] for name in varied)])
    found, ends = coefficients(design, means["value"].to_numpy(dtype=float))
    return nothing | {
        name: Estimate(float(found[at]), float(ends[at, 0]), float(ends[at, 1]), len(means))
        for at, name in enumerate(varied, start=1)
    }


def depth_drives(slopes: dict[str, Estimate]) -> tuple[str, Estimate]:
    """Verdict of DEPTH_DRIVES from the slopes per decade of parameters, and the slope that decides it."""
    width, depth = slopes["d_model"], slopes["n_layers"]
    if width.high < WIDTH_MARGIN:
        return NOT_SUPPORTED, width
    if depth.low > DEPTH_MARGIN:
        return NOT_SUPPORTED, depth
    if depth.high < DEPTH_MARGIN:
        return (SUPPORTED, depth) if width.low > WIDTH_MARGIN else (INCONCLUSIVE, width)
    return INCONCLUSIVE, depth


def share_falls(estimate: Estimate) -> str:
    """Verdict on the claim that a share falls by at least two points per doubling."""
    if estimate.high < FALL:
        return SUPPORTED
    return NOT_SUPPORTED if estimate.low > 0 else INCONCLUSIVE


def doubling_verdicts(means: pd.DataFrame) -> dict[Claim, tuple[Estimate, str]]:
    """Estimate and verdict of each claim per doubling; means: one row per shape, `value` its share of non-zeros."""
    shares, count = doubling_slopes(means), count_slopes(means)["d_ff"]
    return {
        DEEPER_SPARSER: (shares["n_layers"], share_falls(shares["n_layers"])),
        MORE_NEURONS_SPARSER: (shares["d_ff"], share_falls(shares["d_ff"])),
        COUNT_RISES: (count, COUNT_RISES.decide(count)),
    }


def _tail_verdict(lines: Lines) -> Verdict:
    found = slopes_on_lines(on_lines(lines, weak_tail))
    if len(found) < 2:
        return TAIL_SHRINKS.undecided("this study has no ReLU sizes of two layers on two lines")
    estimates = {f"{name} line": line.estimate for name, line in found.items()}
    both = ", ".join(f"{name} {_interval(estimate)}" for name, estimate in estimates.items())
    confounded = next(filter(None, map(unequal_data, lines.values())), "")
    verdict = TAIL_SHRINKS.judged_all(estimates, "sizes", both, confounded)
    return replace(verdict, verdict=INCONCLUSIVE) if confounded else verdict


def _interval(estimate: Estimate) -> str:
    if estimate.reason:
        return "none"
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"
