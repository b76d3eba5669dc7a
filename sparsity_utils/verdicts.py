"""One function per question: table in, verdicts on the claims of claims.py out.

A test whose conditions are not met is inconclusive and says why; only an unusable table is an error.
"""

import numpy as np
import pandas as pd

from sparsity_utils import claims
from sparsity_utils.claims import claims_table, form_claim, price_claim, scale_claim
from sparsity_utils.convergence import convergence_table
from sparsity_utils.errors import InputError
from sparsity_utils.forecasts import LAST_VALUE, forecast_table
from sparsity_utils.judgement import Claim, Verdict, details, to_table
from sparsity_utils.laws import LEVEL, RIVAL_FORMS, compare_forms
from sparsity_utils.limits import (
    SHAPE,
    check_checkpoints,
    fit_points,
    last_means,
    limits_table,
    published_form,
    require,
)
from sparsity_utils.metrics import SparsityReport
from sparsity_utils.profiles import ACTIVATIONS
from sparsity_utils.run_table import run_table
from sparsity_utils.trends import (
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SUPPORTED,
    Estimate,
    equivalence_of_pairs,
    equivalence_of_slope,
    fit_line,
    fit_optimum,
    fit_two_segments,
    mean_over_runs,
    run_slopes,
    supports_positive,
)

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

RIVAL_METRICS = ("top-k", "fat")
SAME_TRAINING = 1.1  # largest ratio of tokens per parameter between sizes that are compared as measured
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


def relu_vs_silu(checkpoints: pd.DataFrame) -> list[Verdict]:
    """Notebook 02: comparable loss, opposite directions with data, ReLU sparser, and the published forms of the law
    as descriptions and as forecasts.

    Raises InputError for missing columns, duplicates and NaN.
    """
    check_checkpoints(checkpoints)
    losses = _pairs(_ends(checkpoints), "validation_loss")
    loss = equivalence_of_pairs((losses["relu"] - losses["silu"]) / losses["silu"], claims.LOSS_MARGIN)
    means = _pairs(last_means(checkpoints), "last_five_mean")
    about_loss = loss.estimate.reason or f"{loss.estimate.n} pairs, TOST p = {loss.p_value:.2g}"
    return [
        claims.LOSS_EQUAL.judged(loss.estimate, loss.verdict, about_loss),
        _positive(claims.RELU_FALLS, _direction(checkpoints, "relu", -1)),
        _positive(claims.SILU_RISES, _direction(checkpoints, "silu", 1)),
        _positive(claims.RELU_SPARSER, mean_over_runs(means["silu"] - means["relu"])),
        *(_form_verdict(checkpoints, activation) for activation in ("relu", "silu")),
        _forecast_verdict(checkpoints),
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
    found = fit_two_segments(values["ratio"], values["value"], values["seed"]).breakpoint
    rising = values if found.reason else values[values["ratio"] <= found.value]
    slope = fit_line(rising["ratio"], rising["value"], rising["seed"]).slope
    ends = _ends(relu)
    optimum = fit_optimum(ends["ratio"], ends["validation_loss"], ends["seed"])
    sampled = (values["ratio"].min(), values["ratio"].max())
    return [
        _positive(claims.RATIO_RISES, slope, f"ratios up to {rising['ratio'].max():.3g}", basis),
        _located(claims.RATIO_BREAKS, found, claims.BREAKPOINT, sampled, basis),
        _located(claims.RATIO_OPTIMUM, optimum, claims.OPTIMUM, sampled),
    ]


def scale_insensitivity(checkpoints: pd.DataFrame, second_line: pd.DataFrame | None = None) -> list[Verdict]:
    """Notebook 04: slopes per decade of parameters, tested for equivalence with zero, and who converges sooner.

    For each line of sizes one row per activation; then the share of non-zero ReLU neurons, and the difference of the
    two metrics: whether sparsity depends on scale may depend on the metric (arXiv 2210.06313 counts non-zeros).
    second_line: the same table for sizes at another width-depth ratio; without one its claims are inconclusive.
    Raises InputError for missing columns, duplicates and NaN.
    """
    rows = [*_line_verdicts(checkpoints), _convergence_verdict(checkpoints)]
    if second_line is not None:
        return rows + _line_verdicts(second_line, claims.SECOND_LINE)
    nothing, reason = mean_over_runs([]), "this study has no sizes at a second width-depth ratio"
    return rows + [claim.judged(nothing, INCONCLUSIVE, reason) for claim in claims.line_claims(claims.SECOND_LINE)]


def _line_verdicts(checkpoints: pd.DataFrame, where: str = "") -> list[Verdict]:
    """The verdicts on one line of sizes; those on non-zero neurons only where the table has ReLU runs."""
    *stated, shares_claim, gap_claim = claims.line_claims(where)
    limits, known, rows = limits_table(checkpoints), {claim.claim: claim for claim in stated}, []
    for activation in sorted(set(checkpoints["activation"])):
        claim = scale_claim(f"The {ACTIVATIONS[activation]} limit", where=where)
        values, basis = one_value_per_run(limits, activation)
        rows.append(_slope_verdict(known.get(claim.claim, claim), values, basis, _unequal_data(checkpoints, values)))
    relu = checkpoints[checkpoints["activation"] == "relu"]
    if relu.empty:
        return rows
    runs = run_table(relu)
    basis, confounded = "mean of the last five stable checkpoints", _unequal_data(relu, runs)
    gap = runs["last_five_mean"] - runs["last_five_nonzero"]
    for claim, values in ((shares_claim, runs["last_five_nonzero"]), (gap_claim, gap)):
        rows.append(_slope_verdict(claim, runs.assign(value=values), basis, confounded))
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


def one_value_per_run(limits: pd.DataFrame, activation: str) -> tuple[pd.DataFrame, str]:
    """The rows of `limits_table` per seed with the `value` that verdicts rest on, and a sentence that says what it is.

    The limit A0 if every fit of the activation is sound; else, for all of them, the measured mean of the last five
    stable checkpoints: extrapolated and measured values are never mixed.
    """
    rows = limits[limits["activation"] == activation]
    by_seed, weak = rows[rows["seed"] != "all"], rows[~rows["sound"]]
    if weak.empty:
        return by_seed.assign(value=by_seed["limit"]), "rests on the limits A0 of the data law"
    first = weak.iloc[0]
    where = f"{first['d_model']}x{first['n_layers']} seed {first['seed']}"
    basis = (
        f"rests on the mean of the last five stable checkpoints: {len(weak)} of {len(rows)} fits give no sound limit "
        f"(first {where}, {first['reason']})"
    )
    return by_seed.assign(value=by_seed["last_five_mean"]), basis


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


def _unequal_data(checkpoints: pd.DataFrame, values: pd.DataFrame) -> str:
    """Why measured values of several sizes cannot be compared, or nothing: they must be equally far trained.

    The ratio moves with data, so values taken at other numbers of tokens per parameter confound size with data.
    Limits of the data law are free of this.
    """
    if "limit" in values and (values["value"] == values["limit"]).all():
        return ""
    stable = checkpoints[checkpoints["role"] == "stable"]
    per_parameter = stable.groupby("run")["tokens"].max() / stable.groupby("run")["parameters"].first()
    if per_parameter.max() <= SAME_TRAINING * per_parameter.min():
        return ""
    return f"sizes differ in tokens per parameter, {per_parameter.min():.0f} to {per_parameter.max():.0f}"


def _slope_verdict(claim: Claim, values: pd.DataFrame, basis: str, confounded: str) -> Verdict:
    result = equivalence_of_slope(values["parameters"], values["value"], values["seed"], claims.SLOPE_MARGIN)
    change = f"{100 * result.relative_change:+.0f}% from the smallest to the largest size"
    numbers = f"{result.estimate.n} runs, TOST p = {result.p_value:.2g}, {change}"
    verdict = INCONCLUSIVE if confounded else result.verdict
    return claim.judged(result.estimate, verdict, result.estimate.reason or numbers, confounded, basis)


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


def _direction(checkpoints: pd.DataFrame, activation: str, sign: int) -> Estimate:
    """`sign` times the slope of the activation ratio per decade of tokens, mean over the runs of an activation."""
    points = fit_points(checkpoints)
    points = points[points["activation"] == activation]
    slopes = run_slopes(points["tokens"], points["activation_ratio"], points["run"])
    return mean_over_runs([sign * slope for slope in slopes.values()])


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


def _ends(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """The last checkpoint of each run: after the decay if it has one, else of the stable stage."""
    return checkpoints.sort_values("tokens").groupby("run", sort=True).tail(1)


def _pairs(values: pd.DataFrame, column: str) -> pd.DataFrame:
    """`column` of ReLU and SiLU runs of equal shape, seed and, where the table has them, tokens: columns relu, silu."""
    keys = [*SHAPE[1:], "seed", *(["tokens"] if "tokens" in values else [])]
    return values.pivot_table(column, keys, "activation").reindex(columns=["relu", "silu"]).dropna()
