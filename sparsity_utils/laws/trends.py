"""Trends across runs: lines, breakpoints, saturating curves, optima, their intervals, and the verdict on an interval.

The unit of every test here is a run (one shape, one seed): checkpoints along a run are correlated and never counted as
independent. Tests whose unit is a size are in `lines`. Runs of one seed share initialisation and data order, so seeds
enter regressions as fixed effects (blocks). Two or three seeds are too few for a random effect or for cluster-robust
errors, both of which would come out too small; the fixed effects cost one degree of freedom per seed and the interval
is an exact t interval.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import statsmodels.api as sm
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW

from sparsity_utils.console import InputError
from sparsity_utils.laws.data_law import LEVEL, information

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE = "supported", "not supported", "inconclusive"
SMALLEST_DOF = 1  # residual degrees of freedom of a t interval: exact at one, if wide (6.3 standard errors at 90%)
PROFILE_DOF = 3  # of a profile over a breakpoint or an optimum: AICc is defined from here
GRID = 401  # candidate values of a breakpoint, a scale or an optimum
SCALES = (0.01, 10.0)  # of a saturating curve, in spans of the sampled x: from a step at the first x to a straight line
DISTINCT = 2.0  # AICc by which one form must be lower than another to describe the points better

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 90% interval from `n` runs; `reason` says why there is none (values are then NaN)."""

    value: float
    low: float
    high: float
    n: int
    reason: str = ""


@dataclass(frozen=True)
class Line:
    """y = intercept + slope x, with the interval of the slope; the intercept is the mean over the groups' effects."""

    slope: Estimate
    intercept: float
    rmse: float
    aicc: float
    parameters: int  # fitted, the groups' effects among them

    def predict(self, x: ArrayLike) -> Array:
        return self.intercept + self.slope.value * np.asarray(x, dtype=float)


@dataclass(frozen=True)
class Segments:
    """y = plateau + slope min(x - breakpoint, 0): a slope up to the breakpoint, flat beyond it.

    `breakpoint.reason` says why the breakpoint must not be used: it is then inconclusive, the numbers stay for a plot.
    """

    breakpoint: Estimate
    slope: float
    plateau: float  # mean over the groups' effects
    rmse: float
    aicc: float
    parameters: int

    def predict(self, x: ArrayLike) -> Array:
        return self.plateau + self.slope * np.minimum(np.asarray(x, dtype=float) - self.breakpoint.value, 0)


@dataclass(frozen=True)
class Saturation:
    """y = plateau - gap exp(-(x - start) / scale): no breakpoint anywhere; `start` is the smallest x.

    `scale` is the x over which the distance to the plateau falls to 1/e; its interval is that of a profile.
    """

    scale: Estimate
    gap: float
    plateau: float  # mean over the groups' effects
    start: float
    rmse: float
    aicc: float
    parameters: int

    def predict(self, x: ArrayLike) -> Array:
        return self.plateau - self.gap * np.exp((self.start - np.asarray(x, dtype=float)) / self.scale.value)


Trend = Line | Segments | Saturation


def decide(estimate: Estimate, low: float = 0.0, high: float = math.inf) -> str:
    """The verdict on the claim that a quantity lies between `low` and `high`.

    It is supported if the whole interval lies inside, not supported if the whole interval lies outside, and
    inconclusive otherwise, also for an unknown interval.
    """
    if low < estimate.low and estimate.high < high:
        return SUPPORTED
    return NOT_SUPPORTED if estimate.low > high or estimate.high < low else INCONCLUSIVE


def mean_over_runs(values: ArrayLike) -> Estimate:
    """Mean of one value per run (or per pair of runs) with its interval; fewer than two runs give a reason.

    The interval is mean +- t sd / sqrt(n), with the quantile t of n - 1 degrees of freedom.
    """
    values = finite(values, "values")
    if values.size < SMALLEST_DOF + 1:
        return no_estimate(f"only {values.size} runs; at least {SMALLEST_DOF + 1} are needed", values.size)
    described = DescrStatsW(values)
    low, high = described.tconfint_mean(1 - LEVEL)
    return Estimate(float(described.mean), float(low), float(high), values.size)


def means_over_runs(values: Array) -> list[Estimate]:
    """`mean_over_runs` of every row of `values`, (draws, runs), which has no gaps and two runs or more."""
    mean, count = values.mean(axis=1), values.shape[1]
    reach = stats.t.ppf((1 + LEVEL) / 2, count - 1) * values.std(axis=1, ddof=1) / math.sqrt(count)
    return [Estimate(m, m - r, m + r, count) for m, r in zip(mean.tolist(), reach.tolist(), strict=True)]


def fit_line(x: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> Line:
    """y = slope x + intercept of the group, by ordinary least squares; `groups` become fixed effects."""
    x, y = _xy(x, y)
    blocks, dof = _blocks(x.size, groups), _dof(x.size, groups)
    if np.unique(x).size < 2 or dof < SMALLEST_DOF:
        reason = f"too few runs: {x.size} at {np.unique(x).size} positions leave {max(dof, 0)} degrees of freedom"
        return Line(no_estimate(reason, x.size), np.nan, np.nan, np.nan, blocks.shape[1] + 1)
    design = np.column_stack([x, blocks])  # (n, 1 + groups)
    result = sm.OLS(y, design).fit()
    low, high = result.conf_int(1 - LEVEL)[0]
    rss = float(np.sum(np.asarray(result.resid) ** 2))
    slope = Estimate(float(result.params[0]), float(low), float(high), x.size)
    aicc = information(rss, x.size, design.shape[1])[1]
    return Line(slope, float(result.params[1:].mean()), float(np.sqrt(rss / x.size)), aicc, design.shape[1])


def run_slopes(tokens: ArrayLike, values: ArrayLike, runs: ArrayLike) -> dict[object, float]:
    """Slope of `values` per decade of tokens along each run: {run: slope}; with fewer than three points none.

    Only the slope is used, never its standard error: the errors along a run are correlated.
    """
    tokens, values, runs = finite(tokens, "tokens"), finite(values, "values"), np.asarray(runs)
    lines = {run: fit_line(np.log10(tokens[runs == run]), values[runs == run]) for run in np.unique(runs)}
    return {run: line.slope.value for run, line in lines.items() if not line.slope.reason}


def fit_two_segments(x: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> Segments:
    """Continuous two-segment regression as published: a slope, then flat (arXiv 2411.02335, Fig. 5).

    The breakpoint runs over a grid inside the sampled x (its second smallest to its largest value); its interval holds
    the values that a profile F test at LEVEL does not reject. The breakpoint has a reason not to be used

    - with fewer than five positions, or too few runs for AICc,
    - unless AICc is at least DISTINCT below that of a straight line and that of a smooth saturating curve,
    - if the interval reaches an end of the grid: the breakpoint may lie outside the sampled positions,
    - if a single position lies beyond it.
    """
    x, y = _xy(x, y)
    positions = np.unique(x)
    reason = _too_few(positions, x.size, groups)
    if reason:
        unknown = no_estimate(reason, x.size)
        return Segments(unknown, np.nan, np.nan, np.nan, np.nan, _blocks(x.size, groups).shape[1] + 2)
    grid = np.linspace(positions[1], positions[-1], GRID)
    found, coefficients, rss = _profile(lambda at: np.minimum(x - at, 0), y, grid, groups)
    aicc = information(rss, x.size, coefficients.size + 1)[1]
    rivals = {
        "a straight line": fit_line(x, y, groups).aicc,
        "a smooth saturating curve": fit_saturation(x, y, groups).aicc,
    }
    as_good = [name for name, rival in rivals.items() if not aicc <= rival - DISTINCT]
    if as_good:
        verb = "describe" if len(as_good) > 1 else "describes"
        reason = f"{' and '.join(as_good)} {verb} the points as well (AICc)"
    elif found.low <= grid[0] or found.high >= grid[-1]:
        reason = f"the interval reaches an end of the sampled range, {positions[0]:.3g} to {positions[-1]:.3g}"
    elif found.value > positions[-2]:
        reason = f"only one position lies beyond {found.value:.3g}: that the trend changes there is not seen"
    estimate = Estimate(found.value, found.low, found.high, x.size, reason)
    plateau, rmse = float(coefficients[1:].mean()), float(np.sqrt(rss / x.size))
    return Segments(estimate, float(coefficients[0]), plateau, rmse, aicc, coefficients.size + 1)


def fit_saturation(x: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> Saturation:
    """Smooth rival of `fit_two_segments` with as many parameters: an exponential approach to a plateau.

    The scale runs over a grid of SCALES. Its interval is a profile F interval; if that reaches an end of the grid, the
    scale has a reason not to be used.
    """
    x, y = _xy(x, y)
    positions = np.unique(x)
    reason = _too_few(positions, x.size, groups)
    if reason:
        unknown = no_estimate(reason, x.size)
        return Saturation(unknown, np.nan, np.nan, np.nan, np.nan, np.nan, _blocks(x.size, groups).shape[1] + 2)
    start, span = positions[0], positions[-1] - positions[0]
    grid = np.geomspace(SCALES[0] * span, SCALES[1] * span, GRID)
    found, coefficients, rss = _profile(lambda scale: np.exp((start - x) / scale), y, grid, groups)
    if found.low <= grid[0] or found.high >= grid[-1]:
        reason = "the interval of the scale reaches an end of its range: the points hardly bend, or bend at once"
    scale = Estimate(found.value, found.low, found.high, x.size, reason)
    aicc = information(rss, x.size, coefficients.size + 1)[1]
    plateau, rmse = float(coefficients[1:].mean()), float(np.sqrt(rss / x.size))
    return Saturation(scale, -float(coefficients[0]), plateau, float(start), rmse, aicc, coefficients.size + 1)


@dataclass(frozen=True)
class Trends:
    """A straight line, a slope that ends in a plateau, and a smooth approach to one, on the same points."""

    line: Line
    segments: Segments
    saturation: Saturation

    def named(self) -> dict[str, Trend]:
        """{name in tables and figures: trend}."""
        return {
            "straight line": self.line,
            "slope, then flat": self.segments,
            "smooth saturation": self.saturation,
        }


def fit_trends(x: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> Trends:
    """All three trends on the same points; `groups` become fixed effects."""
    return Trends(fit_line(x, y, groups), fit_two_segments(x, y, groups), fit_saturation(x, y, groups))


def compare_trends(trends: Trends) -> pd.DataFrame:
    """The trends of `fit_trends`, best first.

    Columns: form, parameters (the groups' effects among them, without the error variance), rmse (units of y), aicc,
    delta_aicc (to the best). A form with too few points has NaN and comes last.
    """
    rows = [(name, trend.parameters, trend.rmse, trend.aicc) for name, trend in trends.named().items()]
    table = pd.DataFrame(rows, columns=["form", "parameters", "rmse", "aicc"])
    table["delta_aicc"] = table["aicc"] - table["aicc"].min()
    return table.sort_values("aicc", kind="stable", ignore_index=True)


def fit_optimum(x: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> Estimate:
    """The optimum in y = lowest + curvature ln(x / optimum)^2, with its profile interval; `groups` are fixed effects.

    It has a reason not to be used with fewer than five positions, without a minimum, or if the interval reaches an end
    of the range.
    """
    x, y = _xy(x, y)
    positions = np.unique(x)
    reason = _too_few(positions, x.size, groups)
    if reason:
        return no_estimate(reason, x.size)
    grid = np.geomspace(positions[0], positions[-1], GRID)
    found, coefficients, _ = _profile(lambda at: np.log(x / at) ** 2, y, grid, groups)
    if coefficients[0] <= 0:
        reason = "the parabola has no minimum inside the sampled range"
    elif found.low <= grid[0] or found.high >= grid[-1]:
        reason = f"the interval reaches an end of the sampled range, {positions[0]:.3g} to {positions[-1]:.3g}"
    return Estimate(found.value, found.low, found.high, x.size, reason)


def _profile(
    regressor: Callable[[Array], Array], y: Array, grid: Array, groups: ArrayLike | None
) -> tuple[Estimate, Array, float]:
    """Fit y = slope regressor(value) + effect of the group for each value of the grid, and choose the best value.

    Returns that value with its interval, the slope and the group effects, and the residual sum of squares (rss). The
    interval holds the values with rss <= lowest rss * (1 + F(1, dof) / dof), rounded outwards to the grid.

    regressor: (grid, 1) to (grid, n). With the means within groups taken off regressor and y, slope and rss have a
    closed form for each value.
    """
    blocks = _blocks(y.size, groups)
    within = blocks / blocks.sum(axis=0)  # (n, groups): means of groups
    columns = regressor(grid[:, None])
    centred, left = columns - columns @ within @ blocks.T, y - blocks @ (within.T @ y)
    slopes = centred @ left / np.sum(centred**2, axis=1)
    rss = np.sum((left - slopes[:, None] * centred) ** 2, axis=1)
    best = int(np.argmin(rss))
    dof = y.size - blocks.shape[1] - 2
    accepted = np.flatnonzero(rss <= rss[best] * (1 + stats.f.ppf(LEVEL, 1, dof) / dof))
    first, last = max(accepted[0] - 1, 0), min(accepted[-1] + 1, grid.size - 1)  # rounded outwards to the grid
    found = Estimate(float(grid[best]), float(grid[first]), float(grid[last]), y.size)
    effects = within.T @ (y - slopes[best] * columns[best])
    return found, np.append(slopes[best], effects), float(rss[best])


def _too_few(positions: Array, n: int, groups: ArrayLike | None) -> str:
    """Why a profile over one value cannot be fitted; empty if it can."""
    if positions.size < 5:
        return f"only {positions.size} positions; at least 5 are needed"
    dof = _dof(n, groups) - 1
    return f"too few runs: {n} leave {max(dof, 0)} degrees of freedom" if dof < PROFILE_DOF else ""


def _blocks(n: int, groups: ArrayLike | None) -> Array:
    """One indicator column per group (a column of ones without groups). (n, groups)"""
    labels = np.zeros(n) if groups is None else np.asarray(groups)
    if labels.shape != (n,):
        raise InputError(f"groups has shape {labels.shape} for {n} points; give one label per point.")
    return (labels[:, None] == np.unique(labels)).astype(float)


def _dof(n: int, groups: ArrayLike | None) -> int:
    """Residual degrees of freedom of a line with fixed effects: n - 1 - groups."""
    return n - 1 - _blocks(n, groups).shape[1]


def _xy(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    x, y = finite(x, "x"), finite(y, "y")
    if x.size != y.size:
        raise InputError(f"x has {x.size} numbers and y {y.size}; give as many of one as of the other.")
    return x, y


def finite(values: ArrayLike, name: str) -> Array:
    """`values` as a one-dimensional array; InputError with their `name` where one is not finite."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise InputError(f"{name} must be one row of finite numbers; drop or measure the missing ones first.")
    return array


def no_estimate(reason: str, n: int = 0) -> Estimate:
    """An estimate without numbers, and the reason for it."""
    return Estimate(float("nan"), float("nan"), float("nan"), n, reason)
