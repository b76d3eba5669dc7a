"""One function per question: table in, verdicts on the claims of claims.py out.

A test whose conditions are not met is inconclusive and says why; only an unusable table is an error.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from sparsity_utils.console import InputError
from sparsity_utils.findings import claims
from sparsity_utils.findings.claims import claims_table, form_claim, price_claim, scale_claim
from sparsity_utils.findings.judgement import Claim, Verdict, details, to_table
from sparsity_utils.laws.convergence import convergence_table
from sparsity_utils.laws.data_law import LEVEL, RIVAL_FORMS, compare_forms
from sparsity_utils.laws.forecasts import LAST_VALUE, forecast_table
from sparsity_utils.laws.limits import check_checkpoints, fit_points, limits_table, published_form, require
from sparsity_utils.laws.outcomes import (
    Lines,
    OverSizes,
    check_lines,
    last_checkpoints,
    limits_on_lines,
    loss_difference,
    means_on_lines,
    metric_gap,
    no_sizes,
    nonzero_share,
    on_lines,
    one_value_per_run,
    relu_falls,
    relu_sparser,
    silu_rises,
    slopes_on_lines,
    unequal_data,
)
from sparsity_utils.laws.pooled import pooled_slopes, size_means
from sparsity_utils.laws.trends import (
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SUPPORTED,
    Estimate,
    fit_line,
    fit_optimum,
    fit_two_segments,
    mean_over_runs,
    supports_positive,
    supports_within,
)
from sparsity_utils.models.config import ACTIVATIONS
from sparsity_utils.sparsity.metrics import SparsityReport

__all__ = [
    "claims_table",
    "details",
    "metrics",
    "quickstart",
    "relu_vs_silu",
    "scale_insensitivity",
    "to_table",
    "width_depth",
]

# What each claim of claims.PAIRED is a mean of, one value per run or per pair of runs.
PAIRED_OUTCOMES = dict(zip(claims.PAIRED, (loss_difference, relu_falls, silu_rises, relu_sparser), strict=True))
NO_RUNS = no_sizes("no size has the runs that this needs")
RIVAL_METRICS = ("top-k", "fat")
RATIO_GRID = 9  # activation ratios at which two metrics are compared, over the range both cover


def quickstart(report: SparsityReport, p: float = 1.0) -> list[Verdict]:
    """Notebook 00: a price of p percent met on the calibration documents is about the price on others.

    Raises InputError for a report that was not made by CETT-PPL-p% with calibration batches of its own.
    """
    if report.metric != "cett-ppl" or report.calibrated_on != "calibration":
        raise InputError(
            f"The report is of metric {report.metric!r} solved on {report.calibrated_on!r} batches; the promise of a "
            "price is about 'cett-ppl' with other documents as calibration."
        )
    low, high = (end - 1 for end in report.ppl_ratio_interval)
    reason = "" if np.isfinite([low, high]).all() else "one document: no interval"
    rise = Estimate(report.ppl_ratio - 1, low, high, LEVEL, report.documents, reason)
    allowed = 2 * p / 100
    if reason:
        verdict = INCONCLUSIVE
    elif high < 0 or low > allowed:
        verdict = NOT_SUPPORTED
    else:
        verdict = SUPPORTED if low >= 0 and high <= allowed else INCONCLUSIVE
    return [price_claim(p).judged(rise, verdict, reason or f"{report.documents} documents", report.note)]


def metrics(table: pd.DataFrame) -> list[Verdict]:
    """Notebook 01: CETT has the lowest perplexity at equal activation ratio, and cuts the ratio of plain ReLU.

    table: run, activation, metric ("relu", "top-k", "fat", "cett", "cett-ppl"), setting, activation_ratio, ppl_ratio.
    Raises InputError for missing columns, duplicates and NaN.
    """
    columns = ["run", "activation", "metric", "setting", "activation_ratio", "ppl_ratio"]
    require(table, columns, ["run", "metric", "setting"], ["activation_ratio", "ppl_ratio"], "metrics")
    gaps = {run: _loss_gaps(rows) for run, rows in table.groupby("run", sort=True)}
    relu = table[table["activation"] == "relu"].pivot_table("activation_ratio", "run", "metric")
    relu = relu.reindex(columns=["relu", "cett-ppl"]).dropna()
    return [
        best_of_all(claims.CETT_LOWEST, pd.DataFrame.from_dict(gaps, orient="index", columns=RIVAL_METRICS)),
        _positive(claims.CETT_CUT, mean_over_runs(1 - relu["cett-ppl"] / relu["relu"])),
    ]


def relu_vs_silu(checkpoints: pd.DataFrame, second_line: pd.DataFrame | None = None) -> list[Verdict]:
    """Notebook 02: comparable loss, opposite directions with data, ReLU sparser, on each line of sizes; and the
    published forms of the law as descriptions and as forecasts.

    second_line: the same table for sizes at another width-depth ratio; without one its claims are inconclusive.
    Raises InputError for missing columns, duplicates and NaN.
    """
    lines = _lines(checkpoints, second_line)
    paired = {where: [] for where in lines}
    for claim, outcome in PAIRED_OUTCOMES.items():
        found = means_on_lines(on_lines(lines, outcome))
        for where, rows in paired.items():
            rows.append(_paired_verdict(claim, found.get(where, NO_RUNS), where))
    main, second = paired.pop(""), paired.pop(claims.SECOND_LINE, None)
    return [
        *main,
        *(_form_verdict(checkpoints, activation) for activation in ("relu", "silu")),
        _forecast_verdict(checkpoints),
        *(second or _without_second_line(map(claims.at_second_line, claims.PAIRED))),
    ]


def width_depth(checkpoints: pd.DataFrame) -> list[Verdict]:
    """Notebook 03: the limit rises with d_model / n_layers to a breakpoint, then is flat; the ratio of lowest loss.

    ReLU runs of one size. Raises InputError for missing columns, duplicates, NaN, or a table without ReLU runs.
    """
    check_checkpoints(checkpoints)
    relu = checkpoints[checkpoints["activation"] == "relu"]
    if relu.empty:
        raise InputError("The checkpoints table has no relu runs; the width-depth claims are about ReLU models.")
    values, basis = one_value_per_run(limits_table(relu), "relu")
    slope, found, furthest = ratio_slope(values)
    ends = last_checkpoints(relu)
    optimum = fit_optimum(ends["width_depth_ratio"], ends["validation_loss"], ends["seed"])
    sampled = (values["width_depth_ratio"].min(), values["width_depth_ratio"].max())
    return [
        claims.RATIO_RISES.judged(
            slope,
            supports_positive(slope),
            slope.reason or f"{slope.n} shapes, {len(values)} runs",
            f"ratios up to {furthest:.3g}",
            basis,
        ),
        _located(claims.RATIO_BREAKS, found, claims.BREAKPOINT, sampled, basis),
        _located(claims.RATIO_OPTIMUM, optimum, claims.OPTIMUM, sampled),
    ]


def ratio_slope(values: pd.DataFrame) -> tuple[Estimate, Estimate, float]:
    """Slope of `value` per unit of width-depth ratio over shapes up to the breakpoint, the breakpoint, the last ratio.

    values: one row per run with d_model, n_layers, width_depth_ratio, seed and value. All shapes where no breakpoint is
    found.
    """
    found = fit_two_segments(values["width_depth_ratio"], values["value"], values["seed"]).breakpoint
    shapes = size_means(values, ("d_model", "n_layers"))
    rising = shapes if found.reason else shapes[shapes["width_depth_ratio"] <= found.value]
    slope = pooled_slopes(rising["width_depth_ratio"], rising["value"], [""] * len(rising))[""]
    return slope, found, rising["width_depth_ratio"].max()


def scale_insensitivity(checkpoints: pd.DataFrame, second_line: pd.DataFrame | None = None) -> list[Verdict]:
    """Notebook 04: slopes per decade of parameters, tested for equivalence with zero, and who converges sooner.

    For each line of sizes one row per activation; then the share of non-zero ReLU neurons, and the difference of the
    two metrics: whether sparsity depends on scale may depend on the metric (arXiv 2210.06313 counts non-zeros).
    second_line: the same table for sizes at another width-depth ratio; without one its claims are inconclusive.
    Raises InputError for missing columns, duplicates and NaN.
    """
    lines = _lines(checkpoints, second_line)
    main, *second = _line_verdicts(lines).values()
    beyond = second[0] if second else _without_second_line(claims.line_claims(claims.SECOND_LINE))
    return [*main, _convergence_verdict(checkpoints), *beyond]


def _lines(checkpoints: pd.DataFrame, second_line: pd.DataFrame | None) -> Lines:
    """The tables of the lines of sizes by the words that name them in a claim."""
    lines = {"": checkpoints} if second_line is None else {"": checkpoints, claims.SECOND_LINE: second_line}
    check_lines(lines)
    return lines


def _without_second_line(stated: Iterable[Claim]) -> list[Verdict]:
    nothing, reason = mean_over_runs([]), "this study has no sizes at a second width-depth ratio"
    return [claim.judged(nothing, INCONCLUSIVE, reason) for claim in stated]


def _paired_verdict(claim: Claim, found: OverSizes, where: str) -> Verdict:
    """One claim on ReLU beside SiLU on one line of sizes."""
    stated = claims.at_second_line(claim) if where else claim
    return stated.judged(found.estimate, judge(claim, found.estimate), found.reason)


def judge(claim: Claim, estimate: Estimate) -> str:
    """The verdict of a claim on lines of sizes: equivalence within the claim's margin, or a value above 0."""
    if claim == claims.LOSS_EQUAL:
        return supports_within(estimate, claims.LOSS_MARGIN)
    return supports_positive(estimate)


def _line_verdicts(lines: Lines) -> dict[str, list[Verdict]]:
    """The verdicts on each line of sizes; those on non-zero neurons only where the table has ReLU runs."""
    limits, rows = limits_on_lines(lines), {where: [] for where in lines}
    for activation in sorted(set(limits["activation"])):
        values, basis = one_value_per_run(limits, activation)
        measured = not (values["value"] == values["limit"]).all()
        name = f"The {ACTIVATIONS[activation]} limit"
        for where, found in slopes_on_lines(values).items():
            known = {claim.claim: claim for claim in claims.line_claims(where)}
            claim = scale_claim(name, where=where)
            confounded = unequal_data(lines[where]) if measured else ""
            rows[where].append(_slope_verdict(known.get(claim.claim, claim), found, basis, confounded))
    relu = {where: table for where, table in lines.items() if (table["activation"] == "relu").any()}
    basis = "mean of the last five stable checkpoints"
    for number, outcome in ((-2, nonzero_share), (-1, metric_gap)):
        for where, found in slopes_on_lines(on_lines(relu, outcome)).items() if relu else ():
            confounded = unequal_data(lines[where][lines[where]["activation"] == "relu"])
            rows[where].append(_slope_verdict(claims.line_claims(where)[number], found, basis, confounded))
    return rows


def _convergence_verdict(checkpoints: pd.DataFrame) -> Verdict:
    """Runs of both activation functions together: each activation and seed is a block with its own level."""
    table = convergence_table(checkpoints)
    known = table[table["reason"] == ""]
    levels = known["activation"] + known["seed"].astype(str)
    slope = fit_line(np.log10(known["parameters"]), np.log10(known["halfway_per_parameter"]), levels).slope
    weak = table[table["reason"] != ""]
    left_out = f"{len(weak)} of {len(table)} runs left out (first: {weak.iloc[0]['reason']})" if len(weak) else ""
    return _positive(claims.SMALL_CONVERGE_FASTER, slope, left_out)


def _positive(claim: Claim, estimate: Estimate, *notes: str) -> Verdict:
    return claim.judged(estimate, supports_positive(estimate), estimate.reason or f"{estimate.n} runs", *notes)


def _located(
    claim: Claim, found: Estimate, published: tuple[float, float], sampled: tuple[float, float], *notes: str
) -> Verdict:
    """A position against a published one: a point inside the interval, or the interval inside a published range.

    A published position beyond the sampled ones cannot be tested, whatever was found elsewhere: inconclusive.
    """
    low, high = published
    notes = (f"sampled ratios {sampled[0]:.3g} to {sampled[1]:.3g}", *notes)
    untested = low > sampled[1] or high < sampled[0]
    inside = found.low <= low <= found.high if low == high else low <= found.low and found.high <= high
    if found.reason or untested:
        verdict = INCONCLUSIVE
        notes = ("the published position lies outside the sampled ratios", *notes) if untested else notes
    elif found.high < low or found.low > high:
        verdict = NOT_SUPPORTED
    else:
        verdict = SUPPORTED if inside else INCONCLUSIVE
    return claim.judged(found, verdict, found.reason or f"{found.n} runs", *notes)


def _slope_verdict(claim: Claim, found: OverSizes, basis: str, confounded: str) -> Verdict:
    verdict = INCONCLUSIVE if confounded else supports_within(found.estimate, claims.SLOPE_MARGIN)
    notes = []
    if not found.estimate.reason:
        start, end = found.at(np.array([found.sizes["parameters"].min(), found.sizes["parameters"].max()]))
        notes = [f"{100 * (end / start - 1):+.0f}% from the smallest to the largest size"]
    return claim.judged(found.estimate, verdict, found.reason, *notes, confounded, basis)


def _form_verdict(checkpoints: pd.DataFrame, activation: str) -> Verdict:
    """Forms are compared run by run: runs are independent, the points of one run are not.

    AICc on a dozen points prefers a simpler form even where the published one is true: that a simpler form does well
    is not evidence against it. Against it counts a form that fits better before parameters are counted.
    """
    form, points, aicc, fit = published_form(activation), fit_points(checkpoints), {}, {}
    for run, curve in points[points["activation"] == activation].groupby("run", sort=True):
        table = compare_forms(curve["tokens"], curve["activation_ratio"], (form, *RIVAL_FORMS)).set_index("form")
        misfit = np.log(table["rmse"].clip(lower=1e-9))
        aicc[run] = {rival: table["aicc"][rival] - table["aicc"][form] for rival in RIVAL_FORMS}
        fit[run] = {rival: misfit[rival] - misfit[form] for rival in RIVAL_FORMS}
    frames = (pd.DataFrame.from_dict(gaps, orient="index", columns=RIVAL_FORMS) for gaps in (aicc, fit))
    return best_of_all(form_claim(activation, form), *frames)


def _forecast_verdict(checkpoints: pd.DataFrame) -> Verdict:
    table = forecast_table(checkpoints)
    published = table["form"] == table["activation"].map(published_form)
    law, last = (table[rows].set_index("run")["rmse"] for rows in (published, table["form"] == LAST_VALUE))
    gains = np.log(last / law).dropna()
    left_out = (
        f"{len(last) - len(gains)} of {len(last)} runs too short for a forecast" if len(gains) < len(last) else ""
    )
    return _positive(claims.RUNS_FORECAST, mean_over_runs(gains), left_out)


def best_of_all(claim: Claim, gaps: pd.DataFrame, against: pd.DataFrame | None = None) -> Verdict:
    """Best of all rivals, an intersection-union test: each rival at the full level, no correction needed.

    gaps: one row per run, one column per rival, positive where the claim holds. against: gaps that can speak against
    the claim, if others. The row shows the rival that decides.
    """
    estimates = {rival: mean_over_runs(gaps[rival].dropna().astype(float)) for rival in gaps}
    words = {rival: supports_positive(estimate) for rival, estimate in estimates.items()}
    if against is not None:
        better = {rival: mean_over_runs(against[rival].dropna().astype(float)) for rival in against}
        for rival, word in words.items():
            worse = supports_positive(better[rival]) == NOT_SUPPORTED
            words[rival] = NOT_SUPPORTED if worse else INCONCLUSIVE if word == NOT_SUPPORTED else word
    verdict = next(word for word in (NOT_SUPPORTED, INCONCLUSIVE, SUPPORTED) if word in words.values())
    deciding = [rival for rival, word in words.items() if word == verdict]
    closest = min(deciding, key=lambda rival: (not estimates[rival].reason, estimates[rival].low))
    estimate = estimates[closest]
    return claim.judged(estimate, verdict, estimate.reason or f"{estimate.n} runs", f"closest: {closest}")


def _loss_gaps(rows: pd.DataFrame) -> dict[str, float]:
    """Mean loss gap (nats per token) of Top-k and FAT to CETT over the activation ratios that both cover in one run."""
    ratios, cett = _curve(rows, "cett")
    useful = np.flatnonzero(cett <= np.log(claims.USEFUL_PPL_RATIO))
    gaps = dict.fromkeys(RIVAL_METRICS, float("nan"))
    for rival in RIVAL_METRICS:
        x, y = _curve(rows, rival)
        if useful.size and x.size:
            low, high = max(x[0], ratios[useful[0]]), min(x[-1], ratios[-1])
            if low < high:
                grid = np.geomspace(low, high, RATIO_GRID)
                gaps[rival] = float(np.mean(_at(grid, x, y) - _at(grid, ratios, cett)))
    return gaps


def _curve(rows: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Activation ratios of a metric, rising, and log PPL ratio there: the loss added by sparsity, in nats per token."""
    rows = rows[(rows["metric"] == metric) & (rows["activation_ratio"] > 0)]
    means = np.log(rows.groupby("activation_ratio", sort=True)["ppl_ratio"].mean())
    return means.index.to_numpy(dtype=float), means.to_numpy(dtype=float)


def _at(grid: np.ndarray, ratios: np.ndarray, heights: np.ndarray) -> np.ndarray:
    return np.interp(np.log(grid), np.log(ratios), heights)
