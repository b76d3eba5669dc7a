"""The data law: activation ratio against training tokens, its limit, and how sure the limit is.

Every form is a basis function of u = D / D_ref (D_ref: the geometric mean of the tokens seen) times an amplitude,
plus an offset where the form has one. In u all parameters are of order one, whether the curve ends at 1e6 or at
1e12 tokens; results are reported in the published parameters, with D in 1e9 tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import product

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares
from scipy.special import expit
from statsmodels.tools import eval_measures

from sparsity_utils.console import InputError

TOKEN_UNIT = 1e9  # the unit of D in every published parameter
RESAMPLES = 200  # of the block bootstrap: enough for a 90% interval, fast enough for a notebook
LEVEL = 0.90  # of every interval; its ends are one-sided tests at 5%
LARGEST_UNSEEN = 0.5  # share of the change from the first point to the limit that may lie beyond the last point
REMEMBERED = 1 << 14  # local solutions that a process keeps, of about a kilobyte each
AT_BOUND = 1e-4  # a limit this close to 0 or 1 is set by its bound, not by the data
POLISHED_STARTS = 5  # starts handed to the optimiser, the best ones of each form's grid

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Form:
    """A = amplitude * basis(u, shape) + offset; `publish` turns these and D_ref into the published parameters."""

    basis: Callable[[Array, Array], tuple[Array, list[Array]]]  # -> basis (n,), its derivatives by each shape parameter
    publish: Callable[[Array, float], dict[str, float]]
    amplitude: tuple[float, float]  # bounds
    shape: tuple[tuple[float, float], ...] = ()  # bounds
    starts: tuple[tuple[float, ...], ...] = ()  # one tuple of values per shape parameter
    offset: tuple[float, float] | None = (0.0, 1.0)  # bounds; None: no offset
    has_limit: bool = False  # the offset (without one: the amplitude) is the limit A0

    @property
    def size(self) -> int:
        return len(self.shape) + 1 + (self.offset is not None)

    @property
    def bounds(self) -> tuple[Array, Array]:
        pairs = [*self.shape, self.amplitude, *([self.offset] if self.offset is not None else [])]
        low, high = np.array(pairs, dtype=float).T
        return low, high

    def curve(self, u: Array, theta: Array) -> Array:
        basis, _ = self.basis(u, theta)
        return theta[len(self.shape)] * basis + (theta[-1] if self.offset is not None else 0.0)

    def jacobian(self, u: Array, theta: Array) -> Array:
        basis, slopes = self.basis(u, theta)
        columns = [theta[len(self.shape)] * slope for slope in slopes] + [basis]
        return np.column_stack(columns + ([np.ones_like(u)] if self.offset is not None else []))  # (n, size)


def _logspace(u: Array, shape: Array) -> tuple[Array, list[Array]]:
    """exp(-k (u^alpha - 1) / alpha), of relative slope -k at u = 1: u^-k for alpha -> 0, exp(-k (u - 1)) for 1."""
    alpha, k = shape[:2]
    power = u**alpha
    z = (power - 1) / alpha
    basis = np.exp(-k * z)
    return basis, [-k * basis * (power * np.log(u) - z) / alpha, -z * basis]


def _falling_power(u: Array, shape: Array) -> tuple[Array, list[Array]]:
    """u^-alpha."""
    basis = u ** -shape[0]
    return basis, [-basis * np.log(u)]


def _rising_power(u: Array, shape: Array) -> tuple[Array, list[Array]]:
    """-u^-alpha."""
    basis, slopes = _falling_power(u, shape)
    return -basis, [-slopes[0]]


def _exponential(u: Array, shape: Array) -> tuple[Array, list[Array]]:
    """exp(-k (u - 1))."""
    basis = np.exp(-shape[0] * (u - 1))
    return basis, [(1 - u) * basis]


def _sigmoid(u: Array, shape: Array) -> tuple[Array, list[Array]]:
    """1 / (1 + (u / s)^k): logistic in ln u with its middle at ln s, which is the second parameter."""
    k, middle = shape[:2]
    z = np.log(u) - middle
    basis = expit(-k * z)
    slope = basis * expit(k * z)  # p (1 - p)
    return basis, [-slope * z, k * slope]


def _publish_logspace(theta: Array, ref: float) -> dict[str, float]:
    """c = k / (alpha D_ref^alpha) and b = ln(amplitude) + k / alpha give amplitude * basis = exp(-c D^alpha + b)."""
    alpha, k, amplitude, limit = theta
    with np.errstate(divide="ignore"):  # a curve without a trend has amplitude 0 and b = -inf
        return {"alpha": alpha, "b": np.log(amplitude) + k / alpha, "c": k / alpha / ref**alpha, "A0": limit}


FORMS: dict[str, _Form] = {
    # ReLU, falling: A = exp(-c D^alpha + b) + A0 (arXiv 2411.02335, section 4.1)
    "logspace": _Form(
        _logspace, _publish_logspace, amplitude=(0, 1), shape=((0.02, 4), (0, 20)), has_limit=True,
        starts=((0.05, 0.3, 0.7, 1.2, 2.0), (0.05, 0.2, 0.6, 2.0)),
    ),
    # SiLU, rising: A = -c / D^alpha + A0 with c >= 0, as published (same section)
    "power": _Form(
        _rising_power, lambda t, ref: {"alpha": t[0], "c": t[1] * ref ** t[0], "A0": t[2]}, amplitude=(0, 1),
        shape=((0.02, 4),), starts=((0.05, 0.2, 0.5, 0.9, 1.5),), has_limit=True,
    ),
    "constant": _Form(
        lambda u, _: (np.ones_like(u), []), lambda t, ref: {"A0": t[0]}, amplitude=(0, 1), offset=None, has_limit=True
    ),
    # A = a + b ln D
    "log": _Form(
        lambda u, _: (np.log(u), []), lambda t, ref: {"a": t[1] - t[0] * np.log(ref), "b": t[0]},
        amplitude=(-np.inf, np.inf), offset=(-np.inf, np.inf),
    ),
    # A = c exp(-D / tau) + A0, rising or falling
    "exponential": _Form(
        _exponential, lambda t, ref: {"c": t[1] * np.exp(t[0]), "tau": ref / t[0], "A0": t[2]},
        amplitude=(-1, 1), shape=((1e-3, 30),), starts=((0.1, 0.5, 1.5, 5.0),), has_limit=True,
    ),
    # A = c / D^alpha, rising or falling
    "plain-power": _Form(
        _falling_power, lambda t, ref: {"alpha": t[0], "c": t[1] * ref ** t[0]}, amplitude=(0, 1),
        shape=((-4, 4),), starts=((-0.2, 0.02, 0.2),), offset=None,
    ),
    # A = c / (1 + (D / tau)^k) + A0, logistic in ln D, rising or falling
    "sigmoid": _Form(
        _sigmoid, lambda t, ref: {"k": t[0], "tau": ref * np.exp(t[1]), "c": t[2], "A0": t[3]}, amplitude=(-1, 1),
        shape=((0.05, 20), (-5, 5)), starts=((0.5, 1.0, 2.0, 4.0), (-2.0, -0.7, 0.7, 2.0)), has_limit=True,
    ),
}  # fmt: skip
RIVAL_FORMS = ("constant", "log", "exponential", "plain-power", "sigmoid")  # what a published form is compared with


@dataclass(frozen=True)
class Interval:
    """Percentile interval of the limit, and the band of the resampled curves; NaN and empty if there was no limit.

    `params` holds the interval of every published parameter, each taken alone: their errors are correlated.
    """

    low: float
    high: float
    limits: Array = field(repr=False)  # (resamples,)
    tokens: Array = field(repr=False)  # (points,) where the band is drawn
    band_low: Array = field(repr=False)  # (points,)
    band_high: Array = field(repr=False)  # (points,)
    params: dict[str, tuple[float, float]] = field(repr=False)


@dataclass(frozen=True)
class Fit:
    """One form fitted to one curve. `reason` is empty for a sound fit, else says why its limit must not be used.

    `limit` is None where the form has none or the data say nothing about it; an extrapolated limit is kept, with
    its reason. AIC and AICc count the error variance as a parameter and take the points as independent: along one
    run they are not, so small differences mean less than they seem to.
    """

    form: str
    params: dict[str, float]
    limit: float | None
    rmse: float
    aic: float
    aicc: float
    n: int
    reason: str
    tokens: Array = field(repr=False)  # (n,)
    activation_ratio: Array = field(repr=False)  # (n,)
    groups: NDArray = field(repr=False)  # (n,) seed labels
    theta: Array = field(repr=False)  # internal parameters
    reference: float = field(repr=False)  # D_ref, tokens

    @property
    def sound(self) -> bool:
        return not self.reason

    @property
    def unseen(self) -> float:
        """Share of the change from first point to limit that lies beyond the last point; NaN without a limit.

        |A0 - A(last)| / |A0 - A(first)|
        """
        if self.limit is None:
            return float("nan")
        first, last = self.predict([self.tokens.min(), self.tokens.max()])
        return float(abs(self.limit - last) / max(abs(self.limit - first), 1e-12))

    @cached_property
    def interval(self) -> Interval:
        """`bootstrap_limit` with its defaults."""
        return bootstrap_limit(self, RESAMPLES)

    def predict(self, tokens: ArrayLike) -> Array:
        """Activation ratio after `tokens` training tokens; NaN if nothing could be fitted."""
        tokens = np.asarray(tokens, dtype=float)
        if np.isnan(self.theta).any():
            return np.full(tokens.shape, np.nan)
        return FORMS[self.form].curve(tokens / self.reference, self.theta)


def fit_data_law(tokens: ArrayLike, activation_ratio: ArrayLike, form: str, groups: ArrayLike | None = None) -> Fit:
    """Fit one form of the data law by bounded least squares from several starts.

    tokens: training tokens of each checkpoint, warm-up points already dropped. activation_ratio: between 0 and 1.
    groups: the seed of each point; one common curve is fitted to all of them, and resampling stays within a seed.
    form: "logspace" (ReLU, falling), "power" (SiLU, rising), or one to compare them with: "constant", "log",
    "exponential", "plain-power", "sigmoid". Source: arXiv 2411.02335, section 4.1.
    Raises InputError for an unknown form, NaN, non-positive tokens, or ratios outside 0 to 1. Too few points, no
    trend and a limit that the data do not determine are no errors: `Fit.reason` says so.
    """
    if form not in FORMS:
        raise InputError(f"form is {form!r}; choose one of {', '.join(FORMS)}.")
    d, a, g = _points(tokens, activation_ratio, groups)
    shape = FORMS[form]
    unfitted = Fit(form, {}, None, np.nan, np.nan, np.nan, d.size, "", d, a, g, np.full(shape.size, np.nan), np.nan)
    distinct = np.unique(d).size
    if distinct < shape.size + 2 or d.size < shape.size + 3:  # AICc needs n > parameters + 2
        reason = f"too few points: {d.size} at {distinct} token counts for {shape.size} parameters"
        return replace(unfitted, reason=reason)
    reference = float(np.exp(np.log(d).mean()))
    theta = _solve_from_starts(shape, d / reference, a)
    rss = float(np.sum((shape.curve(d / reference, theta) - a) ** 2))
    aic, aicc = information(rss, d.size, shape.size)
    unit = shape.publish(theta, reference / TOKEN_UNIT)
    fit = replace(
        unfitted, params={name: float(value) for name, value in unit.items()}, rmse=float(np.sqrt(rss / d.size)),
        aic=aic, aicc=aicc, theta=theta, reference=reference,
    )  # fmt: skip
    return replace(fit, limit=float(theta[-1]), reason="") if form == "constant" else _judge(fit)


def bootstrap_limit(fit: Fit, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Interval of the limit by a residual block bootstrap within each run.

    Errors of neighbouring checkpoints are correlated, so residuals are drawn in blocks of consecutive ones (as many as
    the cube root of the run's length, at least 2). They are scaled by sqrt(n / (n - parameters)) and added to
    the fitted curve; each sum is fitted again, starting at the fitted parameters. A run (`fit.groups`) keeps its own
    residuals in every resample, so the spread over seeds is not in this interval: see `limits.limits_table`. The same
    `seed` gives the same interval.

    The interval is a little narrow: in simulations with 20 checkpoints of 2 seeds, 90% intervals held the planted limit
    in about 85% of studies with independent errors, and in about 75% with errors of lag-one correlation 0.4.
    """
    if fit.limit is None:
        empty = np.empty(0)
        return Interval(np.nan, np.nan, empty, empty, empty, empty, {})
    shape, rng = FORMS[fit.form], np.random.default_rng(seed)
    u, fitted = fit.tokens / fit.reference, fit.predict(fit.tokens)
    residuals = (fit.activation_ratio - fitted) * np.sqrt(fit.n / (fit.n - shape.size))
    runs = [np.flatnonzero(fit.groups == group) for group in np.unique(fit.groups)]
    runs = [run[np.argsort(fit.tokens[run], kind="stable")] for run in runs]
    drawn = np.empty(fit.n)
    thetas = np.empty((resamples, shape.size))
    for row in range(resamples):
        for run in runs:
            drawn[run] = residuals[run[_block_order(run.size, max(2, round(run.size ** (1 / 3))), rng)]]
        thetas[row] = _solve(shape, u, fitted + drawn, fit.theta, tolerance=1e-5)
    grid = np.geomspace(fit.tokens.min(), fit.tokens.max(), 60)
    curves = np.array([shape.curve(grid / fit.reference, theta) for theta in thetas])  # (resamples, points)
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(thetas[:, -1], tails)
    published = pd.DataFrame([shape.publish(theta, fit.reference / TOKEN_UNIT) for theta in thetas])
    ends = {name: np.quantile(values, tails) for name, values in published.items()}
    params = {name: (float(first), float(last)) for name, (first, last) in ends.items()}
    below, above = np.quantile(curves, tails, axis=0)
    return Interval(float(low), float(high), thetas[:, -1], grid, below, above, params)


def compare_forms(tokens: ArrayLike, activation_ratio: ArrayLike, forms: Sequence[str] = tuple(FORMS)) -> pd.DataFrame:
    """AICc of several forms on one curve, best first.

    Columns: form, parameters (of the curve, without the error variance), rmse, aicc, delta_aicc (to the best), weight
    (Akaike weight, exp(-delta_aicc / 2) over its sum), limit (NaN where the form has none or the points determine
    none), reason (why the limit must not be used). A form with too few points has NaN and comes last.
    """
    fits = [fit_data_law(tokens, activation_ratio, form) for form in forms]
    table = pd.DataFrame(
        [{"form": f.form, "parameters": FORMS[f.form].size, "rmse": f.rmse, "aicc": f.aicc} for f in fits]
    )
    table["delta_aicc"] = table["aicc"] - table["aicc"].min()
    weight = np.exp(-table["delta_aicc"] / 2)
    table["weight"] = weight / weight.sum()
    table["limit"] = [np.nan if fit.limit is None else fit.limit for fit in fits]
    table["reason"] = [fit.reason for fit in fits]
    return table.sort_values("aicc", kind="stable", ignore_index=True)


def information(rss: float, n: int, parameters: int) -> tuple[float, float]:
    """AIC and AICc of a least-squares fit with normal errors; NaN for AICc with too few points.

    AIC = 2 k - 2 ln L and AICc = AIC + 2 k (k + 1) / (n - k - 1), with ln L = -n / 2 (ln(2 pi rss / n) + 1) and
    k = `parameters` + 1, since the error variance counts as one more.
    """
    variance = max(rss / n, 1e-16)  # an exact fit would have minus infinity
    log_likelihood = -n / 2 * (np.log(2 * np.pi * variance) + 1)
    aic = float(eval_measures.aic(log_likelihood, n, parameters + 1))
    if n <= parameters + 2:
        return aic, float("nan")
    return aic, float(eval_measures.aicc(log_likelihood, n, parameters + 1))


def _points(tokens: ArrayLike, ratio: ArrayLike, groups: ArrayLike | None) -> tuple[Array, Array, NDArray]:
    d, a = np.asarray(tokens, dtype=float), np.asarray(ratio, dtype=float)
    g = np.zeros(d.shape) if groups is None else np.asarray(groups)
    if d.ndim != 1 or d.shape != a.shape or d.shape != g.shape:
        shapes = f"{d.shape}, {a.shape}, {g.shape}"
        raise InputError(f"tokens, activation_ratio and groups have shapes {shapes}; give rows of equal length.")
    if not (np.isfinite(d).all() and np.isfinite(a).all()):
        raise InputError("tokens or activation_ratio hold NaN or infinity; drop or measure those checkpoints first.")
    if (d <= 0).any() or (a < 0).any() or (a > 1).any():
        raise InputError("tokens must be positive and activation ratios between 0 and 1 (shares, not percent).")
    return d, a, g


def _solve(shape: _Form, u: Array, a: Array, start: Array, tolerance: float) -> Array:
    """The local solution from `start`; remembered, since several findings fit the same runs of a study."""
    return _solved(shape, u.tobytes(), a.tobytes(), start.tobytes(), tolerance).copy()


@lru_cache(REMEMBERED)
def _solved(shape: _Form, u_bytes: bytes, a_bytes: bytes, start_bytes: bytes, tolerance: float) -> Array:
    u, a, start = map(np.frombuffer, (u_bytes, a_bytes, start_bytes))
    scale = max(float(a.std()), 1e-6)  # residuals of order one, so that the tolerances mean something
    solution = least_squares(
        lambda theta: (shape.curve(u, theta) - a) / scale,
        np.clip(start, *shape.bounds),
        jac=lambda theta: shape.jacobian(u, theta) / scale,
        bounds=shape.bounds,
        x_scale="jac",
        **dict.fromkeys(("ftol", "xtol", "gtol"), tolerance),
    )
    return solution.x


def _solve_from_starts(shape: _Form, u: Array, a: Array) -> Array:
    """Best of several local solutions; each start gets its amplitude and offset by linear least squares."""
    starts = []
    for values in product(*shape.starts):
        theta = np.array([*values, 1.0, *([0.0] if shape.offset is not None else [])])
        linear = shape.jacobian(u, theta)[:, len(values) :]
        theta[len(values) :] = np.linalg.lstsq(linear, a, rcond=None)[0]
        starts.append(np.clip(theta, *shape.bounds))

    def loss(theta: Array) -> float:
        return float(np.sum((shape.curve(u, theta) - a) ** 2))

    starts.sort(key=loss)
    return min((_solve(shape, u, a, start, tolerance=1e-9) for start in starts[:POLISHED_STARTS]), key=loss)


def _judge(fit: Fit) -> Fit:
    """Set the limit, and the reason not to use it: no trend, a limit at its bound, or a mostly unseen change."""
    if fit.aicc >= fit_data_law(fit.tokens, fit.activation_ratio, "constant").aicc:
        return replace(fit, reason=f"no trend: a constant describes the points as well as the {fit.form} form")
    if not FORMS[fit.form].has_limit:
        return fit
    limit = float(fit.theta[-1])
    if not AT_BOUND < limit < 1 - AT_BOUND:
        return replace(fit, reason=f"the limit is at its bound, {limit:.0f}: the points do not determine it")
    fit = replace(fit, limit=limit)
    if fit.unseen > LARGEST_UNSEEN:
        reason = f"extrapolates: {fit.unseen:.0%} of the change from first point to limit lies beyond the last point"
        return replace(fit, reason=reason)
    return fit


def _block_order(length: int, block: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices 0..length-1 in random circular blocks, so that every residual is drawn equally often. (length,)"""
    block = min(length, block)
    starts = rng.integers(0, length, size=-(-length // block))
    return ((starts[:, None] + np.arange(block)).ravel() % length)[:length]
