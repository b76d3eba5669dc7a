"""Notebook 07, the published curves: printed and refitted laws, what limits rest on, forms, forecasts.

The unit of a test is a curve.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsity_utils.findings.claims import Claim, Verdict, Verdicts, form_claim, form_gaps, form_verdict, stated
from sparsity_utils.findings.style import AXIS, COLOURS, Look, ShownFigure, captioned, side_by_side, styled
from sparsity_utils.laws.data_law import TOKEN_UNIT
from sparsity_utils.laws.holdout import LAST_VALUE
from sparsity_utils.laws.limits import published_form, require
from sparsity_utils.laws.published import PublishedLaw
from sparsity_utils.laws.refit import PRINTED, SCRIPTS, WITHOUT
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Estimate, mean_over_runs
from sparsity_utils.models.config import ACTIVATIONS
from sparsity_utils.study.tables import Tables

DETERMINED = 0.01  # width of the 90% interval of a limit (1 point of activation ratio) up to which it counts as known
PRINTED_ERROR = 0.005  # activation ratio (half a point): root mean square error of a law printed for its own curve
CURVE = ["activation", "model"]
LIMIT = ["limit", "limit_low", "limit_high", "published_limit"]
PARAMETERS = ("alpha", "b", "c", "limit")
PRINTED_MODEL = "activation == 'relu' and model == '2.4B'"  # its limit sparsity of 93.52% is published (app. L)
FIRST_PART = "first 75% of the tokens"


def refit_claim(activation: str) -> Claim:
    """Does a refit of the published curves give the published limits?"""
    return Claim(
        f"refit_{activation}",
        "published_curves",
        f"The published {ACTIVATIONS[activation]} limits are reproduced by a refit",
        "as printed (Fig. 4)",
        "points, printed less refitted",
        "block bootstrap of each curve's limit (residuals of the refit in blocks); the curve furthest off decides",
        f"printed limit inside the 90% interval on every curve, no interval wider than {100 * DETERMINED:g} point",
    )


PRINTED_LAWS = Claim(
    "printed_laws",
    "published_curves",
    "The printed laws pass through the published points",
    "fitted to them (Fig. 4)",
    "points of root mean square error",
    "printed coefficients against the points of their own curve; the worst curve decides",
    f"at or below {100 * PRINTED_ERROR:g} points",
    region=(-math.inf, PRINTED_ERROR),
)
SPARSITY_KNOWN = Claim(
    "sparsity_known",
    "published_curves",
    "The limit behind the published 93.52% sparsity is determined by its curve",
    "93.52% (2.4B)",
    "% sparsity in the limit",
    "block bootstrap of the refitted 2.4B limit, and the same fit to the first 75% of its tokens",
    f"sound fit, 90% interval at most {100 * DETERMINED:g} point wide, the limit of the first 75% inside it",
)
LAW_FORECASTS = Claim(
    "law_forecasts",
    "published_curves",
    "The law forecasts the second half of its curve better than the last value does",
    "a law",
    "ln of the last value's error over the law's",
    "fitted up to half of the tokens; t interval over curves of the log ratio of the root mean square errors beyond it",
    scale=1.0,
)
REFITTED = {name: refit_claim(name) for name in ("relu", "silu")}
FORM_CLAIMS = {name: form_claim(name, published_form(name), "published_curves") for name in REFITTED}
ALL = (PRINTED_LAWS, *REFITTED.values(), SPARSITY_KNOWN, *FORM_CLAIMS.values(), LAW_FORECASTS)
CLAIMS = {claim.key: claim for claim in ALL}


def claims() -> pd.DataFrame:
    """The claims, tests and thresholds, as the notebook states them before its results."""
    return stated(CLAIMS.values())


def verdicts(refit: pd.DataFrame, forms: pd.DataFrame, forecasts: pd.DataFrame, stability: pd.DataFrame) -> Verdicts:
    """One verdict per claim, from the tables of refit.TABLES.

    Raises InputError for missing columns, duplicates and NaN.
    """
    require(refit, [*CURVE, *LIMIT, "published_rmse", "dropped", "reason"], CURVE, ["published_limit"], "refit")
    require(forms, [*CURVE, "form", "aicc", "rmse"], [*CURVE, "form"], [], "forms")
    require(forecasts, [*CURVE, "form", "rmse"], [*CURVE, "form"], [], "forecasts")
    require(stability, [*CURVE, "source", "limit"], [*CURVE, "source"], [], "stability")
    gaps = {name: form_gaps(forms[forms["activation"] == name], published_form(name), "model") for name in FORM_CLAIMS}
    return Verdicts(
        [
            _printed_laws(refit),
            *(_limits_again(refit[refit["activation"] == name], claim) for name, claim in REFITTED.items()),
            _sparsity_known(refit, stability),
            *(form_verdict(claim, *gaps[name], "curves") for name, claim in FORM_CLAIMS.items()),
            _forecast(forecasts),
        ]
    )


def _printed_laws(refit: pd.DataFrame) -> Verdict:
    worst = refit.loc[refit["published_rmse"].idxmax()]
    error, within = worst["published_rmse"], int((refit["published_rmse"] <= PRINTED_ERROR).sum())
    reasons = f"{within} of {len(refit)} curves", f"worst: {_name(worst)}", _protocol(refit)
    return PRINTED_LAWS.judged(Estimate(error, error, error, len(refit)), *reasons)


def _limits_again(refit: pd.DataFrame, claim: Claim) -> Verdict:
    """The printed limit less the refitted one, on the curve where it is furthest off for the width of its interval."""
    known = refit.dropna(subset=LIMIT)
    if known.empty:
        return claim.undecided("no curve gives a limit")
    width = known["limit_high"] - known["limit_low"]
    outside = (known["published_limit"] < known["limit_low"]) | (known["published_limit"] > known["limit_high"])
    off = known["published_limit"] - known["limit"]
    worst = known.loc[(off.abs() / width).idxmax()]
    value, low, high = (worst["published_limit"] - worst[name] for name in ("limit", "limit_high", "limit_low"))
    vague = len(refit) - int((width <= DETERMINED).sum())
    verdict = NOT_SUPPORTED if outside.any() else INCONCLUSIVE if vague else SUPPORTED
    inside = f"{int((~outside).sum())} of {len(refit)} printed limits inside"
    unknown = f"{vague} without an interval of {100 * DETERMINED:g} point" if vague else ""
    reasons = inside, unknown, f"furthest off: {_name(worst)}", _protocol(refit)
    return claim.judged(Estimate(value, low, high, len(known)), *reasons, verdict=verdict)


def _protocol(refit: pd.DataFrame) -> str:
    """How many printed laws come back once first points are left out, and how many points that takes."""
    dropped = refit["dropped"].dropna().astype(int)
    if dropped.empty:
        return "no printed law comes back without some first points"
    return (
        f"{len(dropped)} of {len(refit)} printed laws come back when the first {dropped.min()} to {dropped.max()} "
        "points are left out"
    )


def _sparsity_known(refit: pd.DataFrame, stability: pd.DataFrame) -> Verdict:
    row = refit.query(PRINTED_MODEL)
    if row.empty or row[LIMIT].isna().any(axis=None):
        return SPARSITY_KNOWN.undecided("no limit of the 2.4B curve")
    row = row.iloc[0]
    part = stability.query(f"{PRINTED_MODEL} and source == @FIRST_PART")["limit"]
    early = part.iloc[0] if len(part) else math.nan
    width = row["limit_high"] - row["limit_low"]
    holds = row["limit_low"] <= early <= row["limit_high"]  # not so without an early limit
    sound = not isinstance(row["reason"], str) or not row["reason"]
    verdict = SUPPORTED if sound and holds and width <= DETERMINED else NOT_SUPPORTED
    estimate = Estimate(1 - row["limit"], 1 - row["limit_high"], 1 - row["limit_low"], 1)
    from_part = f"{100 * (1 - early):.2f}%" if np.isfinite(early) else "no limit"
    reasons = f"interval {100 * width:.1f} points wide", f"{FIRST_PART}: {from_part}", "" if sound else row["reason"]
    return SPARSITY_KNOWN.judged(estimate, *reasons, verdict=verdict)


def _forecast(forecasts: pd.DataFrame) -> Verdict:
    """ln of the last value's error over that of the published form, one per curve."""
    errors = forecasts.set_index([*CURVE, "form"])["rmse"].unstack("form")
    law = pd.Series({curve: errors.at[curve, published_form(curve[0])] for curve in errors.index})
    ratio = np.log(errors[LAST_VALUE].to_numpy() / law.to_numpy(dtype=float))
    estimate = mean_over_runs(ratio[np.isfinite(ratio)])
    better = f"better on {int((ratio > 0).sum())} of {ratio.size} curves"
    return LAW_FORECASTS.judged(estimate, estimate.reason or better)


def _name(row: pd.Series) -> str:
    return f"{ACTIVATIONS[row['activation']]} {row['model']}"


def refitted_limits(refit: pd.DataFrame) -> pd.DataFrame:
    """alpha, and the limit in percent with its interval, of each curve, printed and refitted."""
    limits = ["published_limit", "limit", "limit_low", "limit_high"]
    table = refit.set_index(CURVE)[["published_alpha", "alpha", *limits]]
    return table.assign(**(100 * table[limits]).round(2)).round({"alpha": 3})


def misfits(refit: pd.DataFrame) -> pd.DataFrame:
    """Root mean square errors of each curve in points, refitted and printed; first points that must be left out."""
    errors = ["rmse", "published_rmse", "late_rmse", "published_late_rmse"]
    table = refit.set_index(CURVE)[[*errors, "dropped"]]
    return table.assign(**(100 * table[errors]).round(3)).astype({"dropped": "Int64"})


def limits_by_part(stability: pd.DataFrame) -> pd.DataFrame:
    """The limit of the 2.4B curve in percent: printed, in the authors' scripts, and by the points that are fitted."""
    rows = stability.query(PRINTED_MODEL).set_index("source")
    shares = 100 * rows[["limit", "low", "high", "rmse", "unseen"]]
    return shares.round(2).join(rows["points"].astype("Int64"))


def distance_to_limit(refit: pd.DataFrame) -> pd.DataFrame:
    """Tokens after which a law stays near its limit, over the last tokens of its curve, as refitted and as printed.

    unseen_percent: share of the refitted change from first point to limit that lies beyond the last point.
    """
    rows = refit.set_index(CURVE)
    tokens = {"refitted": rows["tokens_to_limit"], "as printed": rows["published_tokens_to_limit"]}
    table = pd.DataFrame(tokens).div(rows["last_tokens"], axis=0).round(1)
    return table.assign(unseen_percent=(100 * rows["unseen"]).round(0))


def figures(study: Tables) -> Iterator[tuple[str, ShownFigure]]:
    """Every figure, with its name: all studies have these tables."""
    yield "07_published_curves", laws_figure(study.table("published_refit"))
    yield "07_limits", limits_figure(study.table("published_stability"))
    yield "07_forecasts", forecasts_figure(study.table("published_forecasts"))


@styled
def laws_figure(refit: pd.DataFrame, curves: pd.DataFrame | None = None) -> ShownFigure:
    """Published and refitted laws over the tokens seen, and their limits (compare Fig. 4).

    curves: the points themselves, drawn as well if given (the recorded study does not hold them).
    """
    figure = ShownFigure(figsize=(7.4, 6.2), layout="constrained")
    panels = figure.subplots(2, 2, height_ratios=[1.4, 1])
    for (upper, lower), (activation, rows) in zip(panels.T, refit.groupby("activation", sort=True), strict=True):
        for number, row in enumerate(rows.itertuples()):
            points = None if curves is None else curves.query("activation == @activation and model == @row.model")
            _law(upper, row, Look(number), points)
            _limit(lower, row, len(rows) - number, Look(number))
        upper.set(xscale="log", xlabel="Training tokens (billions)", title=f"{ACTIVATIONS[activation]}, laws")
        upper.xaxis.set_major_formatter("{x:g}")
        upper.set_ylabel(AXIS)
        lower.set(xlabel="Limit activation ratio (% of d_ff)", title=f"{ACTIVATIONS[activation]}, limits")
        lower.set_yticks(range(len(rows), 0, -1), rows["model"])
        lower.margins(y=0.12)
        upper.legend(fontsize=7, ncols=2)
    return captioned(
        figure,
        "Solid: refitted to all points of a curve (24 to 42); dashed and ×: as printed. Bars: 90% block bootstrap.\n"
        "No refitted line or limit where the points do not determine one.",
    )


def _law(axes: Axes, row: Any, look: Look, points: pd.DataFrame | None) -> None:
    grid = np.geomspace(row.first_tokens, row.last_tokens, 100)
    for source, line in (("", "-"), ("published_", "--")):
        values = [getattr(row, source + name) for name in PARAMETERS]
        law = PublishedLaw(row.activation, row.model, 0, 0, *values)
        label = None if source else row.model
        style = {"color": look.colour, "marker": look.marker, "markevery": [0, 99], "linewidth": 1.2}
        axes.plot(grid / TOKEN_UNIT, 100 * law.predict(grid), line, label=label, **style)
    if points is not None:
        style = {"color": look.colour, "marker": look.marker, "linestyle": "none", "alpha": 0.4}
        axes.plot(points["tokens"] / TOKEN_UNIT, 100 * points["activation_ratio"], **style)


def _limit(axes: Axes, row: Any, height: float, look: Look) -> None:
    value, low, high = (100 * x for x in (row.limit, row.limit_low, row.limit_high))
    axes.errorbar(value, height, xerr=[[value - low], [high - value]], fmt=look.marker, color=look.colour, capsize=3)
    axes.plot(100 * row.published_limit, height, "x", color="black", markersize=6)


@styled
def limits_figure(stability: pd.DataFrame) -> ShownFigure:
    """The limit that one curve gives, by which of its points are fitted: 2.4B in full, then all curves."""
    figure, (left, *others) = side_by_side(3)
    rows = stability.query(PRINTED_MODEL)
    fitted = rows[rows["points"].notna()]
    heights = np.arange(len(fitted), 0, -1)
    errors = 100 * np.array([fitted["limit"] - fitted["low"], fitted["high"] - fitted["limit"]])
    left.errorbar(100 * fitted["limit"], heights, xerr=errors, fmt="o", color=COLOURS[0], capsize=2)
    for height in heights[fitted["limit"].isna().to_numpy()]:
        left.text(0, height, "no limit", fontsize=7, va="center")
    left.set_yticks(heights, fitted["source"], fontsize=7)
    left.set_ylim(0.4, len(fitted) + 0.6)
    for source, line in ((PRINTED, "--"), (SCRIPTS, ":")):
        for limit in rows.loc[rows["source"] == source, "limit"]:
            left.axvline(100 * limit, color="black", linestyle=line, linewidth=1, label=source)
    left.set(title="ReLU 2.4B, by points fitted", xlabel="Limit activation ratio (% of d_ff)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=7)
    for axes, (activation, curves) in zip(others, stability.groupby("activation", sort=True), strict=True):
        _left_out(axes, curves)
        axes.set_title(f"{ACTIVATIONS[activation]}, by first points left out")
    note = "No mark where the points do not determine a limit."
    return captioned(figure, f"Bars: 90% block bootstrap within the curve. 24 to 42 points per curve. {note}")


def _left_out(axes: Axes, stability: pd.DataFrame) -> None:
    """Refitted less printed limit against the number of first points left out, one line per curve."""
    count = stability["source"].where(stability["source"] != "all points", f"{WITHOUT}0")
    rows = stability.assign(count=count.str.removeprefix(WITHOUT))[count.str.startswith(WITHOUT)]
    rows = rows.astype({"count": int}).sort_values("count")
    printed = stability[stability["source"] == PRINTED].set_index("model")["limit"]
    for number, (model, curve) in enumerate(rows.groupby("model", sort=True)):
        look, off = Look(number), 100 * (curve["limit"] - printed[model])
        axes.plot(curve["count"], off, look.line, color=look.colour, marker=look.marker, label=model)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="First points left out", ylabel="Refitted less printed limit (points)")
    axes.legend(fontsize=7, ncols=2)


@styled
def forecasts_figure(table: pd.DataFrame) -> ShownFigure:
    """Error of each form on the second half of a curve, fitted to the first; the last value is the one to beat."""
    figure, panels = side_by_side(2, share_y=True)
    for axes, (activation, rows) in zip(panels, table.groupby("activation", sort=True), strict=True):
        forms = list(dict.fromkeys(rows["form"]))
        for number, (model, curve) in enumerate(rows.groupby("model", sort=True)):
            look, errors = Look(number), curve.set_index("form")["rmse"].reindex(forms)
            style = {"color": look.colour, "marker": look.marker, "alpha": 0.8}
            axes.plot(range(len(forms)), 100 * errors, linestyle="none", label=model, **style)
        means = 100 * rows.groupby("form")["rmse"].median().reindex(forms)
        axes.plot(range(len(forms)), means, "_", color="black", markersize=18)
        axes.set_xticks(range(len(forms)), forms, rotation=35, ha="right")
        axes.set(yscale="log", title=ACTIVATIONS[activation])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=7, ncols=2)
    panels[0].set_ylabel("RMS error of the second half (points)")
    beyond = f"{table['predicted'].min()} to {table['predicted'].max()}"
    return captioned(figure, f"One mark per curve, bar: median. {beyond} points predicted per curve.")
