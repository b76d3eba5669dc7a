"""Notebook 04, larger models: do activation ratio and share of non-zeros depend on scale, and who converges sooner?"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sparsity_utils.findings.claims import SLOPE_MARGIN, SLOPES, Claim, Verdict, Verdicts, stated
from sparsity_utils.findings.scale_insensitivity_figures import figure, one_axis, second_line
from sparsity_utils.findings.style import ShownFigure
from sparsity_utils.laws.convergence import convergence_table
from sparsity_utils.laws.limits import Curves, fit_curves, limits_table
from sparsity_utils.laws.lines import (
    MAIN,
    SECOND,
    Lines,
    OverSizes,
    lines_of,
    metric_gap,
    nonzero_share,
    on_lines,
    one_value_per_run,
    slopes_on_lines,
    unequal_data,
)
from sparsity_utils.laws.trends import INCONCLUSIVE, fit_line
from sparsity_utils.models.config import ACTIVATIONS
from sparsity_utils.study.tables import Tables

MEASURED = "mean of the last five stable checkpoints"


def scale_claim(key: str, what: str, published: str = "none", primary: bool = False, more: str = "") -> Claim:
    """Is a quantity insensitive to scale? `more` says what its test adds to that of every slope."""
    return Claim(
        key,
        "scale_insensitivity",
        f"{what} does not depend on scale",
        published,
        "points per decade",
        f"equivalence (two one-sided t tests) of the slope, on log parameters, of {SLOPES}{more}",
        f"90% interval inside +-{100 * SLOPE_MARGIN:.0f} points per decade",
        region=(-SLOPE_MARGIN, SLOPE_MARGIN),
        primary=primary,
    )


# The claims that each line of sizes decides, in the order of their verdicts; by the quantity whose slope is tested.
ON_LINES = {
    "relu": scale_claim("relu_scale", "The ReLU limit", "+1.6 points per decade", primary=True),
    "silu": scale_claim("silu_scale", "The SiLU limit", "-2.6 points per decade", primary=True),
    "nonzero": scale_claim("nonzero_scale", "The ReLU share of non-zero neurons", "sparser (2210.06313)"),
    "gap": scale_claim(
        "gap_scale",
        "The gap between CETT-PPL and the share of non-zero ReLU neurons",
        more="; of the activation ratio at CETT-PPL less the non-zero share, paired by run (last-five means): do both "
        "metrics see the same dependence on scale?",
    ),
}
SMALL_CONVERGE_FASTER = Claim(
    "small_converge_faster",
    "scale_insensitivity",
    "Small models converge faster, counted in tokens per parameter",
    "faster (Fig. 8)",
    "decades of tokens per parameter, per decade of parameters",
    "t interval of the slope, on log parameters, of the log tokens per parameter at which a run's fitted curve has "
    "done half of its change over the window of tokens per parameter that all runs share; seeds and activation "
    "functions as blocks, runs without a trend left out",
    scale=1.0,
)


def claims() -> pd.DataFrame:
    """The claims, tests and thresholds, as the notebook states them before its results."""
    return stated([*ON_LINES.values(), SMALL_CONVERGE_FASTER, *(claim.on(SECOND) for claim in ON_LINES.values())])


@dataclass(frozen=True)
class OverScale:
    """A quantity of every run on every line, and its slope over the sizes of each line."""

    values: pd.DataFrame  # one row per run: its size, seed, line and `value`
    slopes: dict[str, OverSizes]  # by line
    basis: str  # says what the values are
    confounded: dict[str, str]  # by line: why its sizes cannot be compared, or nothing


@dataclass(frozen=True)
class Scale:
    """What verdicts and figures of the lines of sizes rest on."""

    lines: Lines
    curves: dict[str, Curves]  # by line
    outcomes: dict[str, OverScale]  # the limit by activation function, then "nonzero" and "gap" of ReLU runs
    convergence: pd.DataFrame  # `convergence_table` of the main line

    @property
    def activations(self) -> list[str]:
        """The activation functions that have a limit."""
        return [name for name in self.outcomes if name in ACTIVATIONS]


def analyse(checkpoints: pd.DataFrame, second: pd.DataFrame | None = None) -> Scale:
    """Fit the curves of both lines once, and the slopes on log parameters of all that is claimed of them.

    second: the table of the sizes at another width-depth ratio. Raises InputError for missing columns, duplicates and
    NaN.
    """
    lines = lines_of(checkpoints, second)
    curves = {line: fit_curves(table) for line, table in lines.items()}
    limits = pd.concat([limits_table(fitted).assign(line=line) for line, fitted in curves.items()], ignore_index=True)
    outcomes = {name: _limit_over_scale(limits, lines, name) for name in sorted(set(limits["activation"]))}
    relu = {line: table[table["activation"] == "relu"] for line, table in lines.items()}
    relu = {line: table for line, table in relu.items() if len(table)}
    if relu:
        confounded = {line: unequal_data(table) for line, table in relu.items()}
        for name, outcome in (("nonzero", nonzero_share), ("gap", metric_gap)):
            values = on_lines(relu, outcome)
            outcomes[name] = OverScale(values, slopes_on_lines(values), MEASURED, confounded)
    return Scale(lines, curves, outcomes, convergence_table(curves[MAIN]))


def _limit_over_scale(limits: pd.DataFrame, lines: Lines, activation: str) -> OverScale:
    values, basis = one_value_per_run(limits, activation)
    measured = (values["value"] != values["limit"]).any()
    confounded = {line: unequal_data(table) if measured else "" for line, table in lines.items()}
    return OverScale(values, slopes_on_lines(values), basis, confounded)


def verdicts(scale: Scale) -> Verdicts:
    """Are slopes per decade of parameters equivalent to zero on each line, and who converges sooner?

    Whether sparsity depends on scale may depend on the metric: arXiv 2210.06313 counts non-zeros. Without a second
    line, the claims on it are inconclusive.
    """
    second = _on_line(scale, SECOND)
    if SECOND not in scale.lines:
        reason = "this study has no sizes at a second width-depth ratio"
        second = [claim.on(SECOND).undecided(reason) for claim in ON_LINES.values()]
    return Verdicts([*_on_line(scale, MAIN), _convergence_verdict(scale.convergence), *second])


def _on_line(scale: Scale, line: str) -> list[Verdict]:
    rows = []
    for name, outcome in scale.outcomes.items():
        claim = ON_LINES.get(name) or scale_claim(f"{name}_scale", f"The {ACTIVATIONS[name]} limit")
        if line in outcome.slopes:
            rows.append(_slope_verdict(claim.on(line), outcome.slopes[line], outcome.confounded[line], outcome.basis))
    return rows


def _slope_verdict(claim: Claim, found: OverSizes, confounded: str, basis: str) -> Verdict:
    change = ""
    if not found.estimate.reason:
        start, end = found.at(np.array([found.sizes["parameters"].min(), found.sizes["parameters"].max()]))
        change = f"{100 * (end / start - 1):+.0f}% from the smallest to the largest size"
    verdict = INCONCLUSIVE if confounded else ""
    return claim.judged(found.estimate, found.reason, change, confounded, basis, verdict=verdict)


def _convergence_verdict(table: pd.DataFrame) -> Verdict:
    """Runs of both activation functions together: each activation and seed is a block with its own intercept."""
    known, weak = table[table["reason"] == ""], table[table["reason"] != ""]
    blocks = known["activation"] + known["seed"].astype(str)
    slope = fit_line(np.log10(known["parameters"]), np.log10(known["halfway_per_parameter"]), blocks).slope
    left_out = f"{len(weak)} of {len(table)} runs left out (first: {weak.iloc[0]['reason']})" if len(weak) else ""
    return SMALL_CONVERGE_FASTER.counted(slope, "runs", left_out)


def seed_limits(scale: Scale) -> pd.DataFrame:
    """Limits of every run of the main line with their intervals, and what was measured beside them, in percent."""
    rows = limits_table(scale.curves[MAIN], seed_intervals=True).query("seed != 'all'")
    shares = ["limit", "low", "high", "last_five_mean"]
    rows = rows.set_index(["activation", "parameters", "seed"]).sort_index()
    return (100 * rows[shares]).round(1).join(rows["sound"])


def figures(study: Tables) -> Iterator[tuple[str, ShownFigure]]:
    """Every figure that a study has the tables for, with its name."""
    if study.answers("scale_insensitivity"):
        second = study.table("second_line") if study.answers("second_line") else None
        scale = analyse(study.table("scale_insensitivity"), second)
        yield "04_scale_insensitivity", figure(scale)
        if second is not None:
            yield "04_second_line", second_line(scale)
        yield "04_one_axis", one_axis(scale, study.kept("pretrained"))
