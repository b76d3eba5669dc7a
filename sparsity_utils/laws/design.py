"""Predict before you train: activation ratio and loss of a run from its size, its data and its shape.

Each outcome is one least-squares fit over the runs of a study. With N parameters, D tokens and the width-depth ratio r,
each of N, D / N and r over its REFERENCE,

    link(outcome) = a + b log10 N + c log10(D / N) + s log10 r    (the loss: + q (log10 r)^2 + decay).

A law must earn its place. Where it predicts the runs of an activation function, shapes left out in turn, with a larger
mean error than the mean of that function's other runs does, it is dropped for that function: its mean is predicted, and
`Design.extrapolates` says so.

The link of a share is its log odds, that of the loss its logarithm. a, b and c belong to an activation function. s is
shared, since often only ReLU is trained at several ratios: on the scale of log odds that is an assumption, and
`Design.extrapolates` names the predictions that rest on it.

Checkpoints along a run are correlated, so no interval comes from them. On the scale of the link, a 90% interval reaches

    sqrt(unseen^2 + (1.645 se)^2)

to either side. `unseen` is a quantile of the errors on runs whose shape was left out of the fit. `se` is the standard
error of the grouped jackknife: how much the prediction moves when a shape is left out, which grows with the distance
from the runs. A shape is left out with all its seeds and activation functions. In simulations of straight laws with 34
runs, 90% intervals held 90 to 97% of new runs inside the fit, 88% one decade of parameters beyond it, and 89 to 94%
four decades beyond. That the law stays straight there is an assumption that no interval can test. The interval of a
mean comes from the errors of that mean, and does not grow with the distance.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logit

from sparsity_utils.console import InputError, short_number
from sparsity_utils.laws.data_law import LEVEL
from sparsity_utils.laws.limits import COLUMNS, fit_points, last_means, require
from sparsity_utils.laws.trends import Estimate, no_estimate
from sparsity_utils.models.config import ACTIVATIONS

# The questions whose tables hold the runs of a design, as far as a study has them
CURVES = ("relu_vs_silu", "width_depth_ratio", "second_line", "data_limited")
EXACT_ZEROS = ("relu", "relu2")  # of the others every gate is non-zero
PART = 0.25  # a run enters the fits from this part of its stable tokens on: earlier the loss falls faster
REFERENCE = {"parameters": 1e5, "tokens per parameter": 100.0, "width-depth ratio": 10.0}  # where intercepts are read
NEAR = 1.1  # up to this factor beyond the fitted range nothing is extrapolated: integer shapes miss a size by as much
FEWEST_RUNS = round(LEVEL / (1 - LEVEL))  # with so many runs their largest error is the quantile at LEVEL
FEWEST_SIZES = 3  # of an activation function: two are left for a slope when one is left out
SIZE_STEP = 1.5  # neighbouring sizes within this factor count as one
ONE_SIDED = NormalDist().inv_cdf((1 + LEVEL) / 2)  # standard errors to either end of an interval
SHARE_BOUND = 1e-4  # shares are clipped this far from 0 and 1, whose log odds are infinite

Array = NDArray[np.float64]


class Outcome(NamedTuple):
    """What is predicted of a run: a column of its checkpoints, on the scale of the fit."""

    column: str
    link: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    bent: bool = False  # where the ratios allow, a parabola in log ratio: the loss has a lowest point (Fig. 6)
    decayed: bool = False  # measured after the decay, else as the mean of the last five stable checkpoints


def _log_odds(share: Array) -> Array:
    return logit(np.clip(share, SHARE_BOUND, 1 - SHARE_BOUND))


RATIO = Outcome("activation_ratio", _log_odds, expit)
NONZERO = Outcome("nonzero_share", _log_odds, expit)
LOSS = Outcome("validation_loss", np.log, np.exp, bent=True, decayed=True)


class Level(NamedTuple):
    """The mean of an activation function's runs, on the scale of the link: what is predicted in place of a law."""

    mean: float
    without: Array  # (shapes,) the mean without that shape
    errors: Array  # (its runs,) |link error| on each run of the mean without its shape


@dataclass(frozen=True)
class Law:
    """One outcome, fitted to all runs and once without each shape. `reason` says why it predicts nothing."""

    outcome: Outcome
    fitted: tuple[str, ...]  # activation functions, in the order of the coefficients
    reason: str
    coefficients: Array = field(repr=False)  # (terms,)
    without: Array = field(repr=False)  # (shapes, terms), fitted without that shape
    errors: Array = field(repr=False)  # (runs,) |link error| on each run by the fit without its shape
    predicted: Array = field(default_factory=lambda: np.empty(0), repr=False)  # (runs,) the outcome by that same fit
    levels: dict[str, Level] = field(default_factory=dict)  # by activation function: where the law was dropped

    @property
    def activations(self) -> tuple[str, ...]:
        return tuple(sorted({*self.fitted, *self.levels}))

    def predict(self, parameters: float, tokens: float, width_depth_ratio: float, activation: str) -> Estimate:
        """The outcome of a run with its 90% interval; NaN with a reason where there is none."""
        if level := self.levels.get(activation):
            return _with_interval(self.outcome, level.mean, level.without, level.errors)
        if self.reason or activation not in self.fitted:
            return no_estimate(self.reason or f"{ACTIVATIONS[activation]} was not fitted", self.errors.size)
        numbers = {"parameters": parameters, "tokens": tokens, "width_depth_ratio": width_depth_ratio}
        point = pd.DataFrame([numbers]).assign(activation=activation, role="final")
        x = _terms(point, self.outcome, self.fitted)[0]
        return _with_interval(self.outcome, float(self.coefficients @ x), self.without @ x, self.errors)

    @property
    def table(self) -> pd.DataFrame:
        """Columns term, activation, coefficient: one row per term and activation, "all" where they share the term.

        Where the law was dropped, the one row of an activation function is the mean of its runs.
        """
        names = ["at the reference", "decade of parameters", "decade of tokens per parameter"]
        rows = [(name, ACTIVATIONS[activation]) for activation in self.fitted for name in names]
        rows += [("decade of width-depth ratio", "all")]
        rows += [("decade of width-depth ratio, squared", "all")] * self.outcome.bent
        rows += [("decay", "all")] * self.outcome.decayed
        known = math.nan if self.reason else self.coefficients
        table = pd.DataFrame(rows, columns=["term", "activation"]).assign(coefficient=known)
        means = [("mean of its runs", ACTIVATIONS[name], level.mean) for name, level in self.levels.items()]
        dropped = table["activation"].isin([ACTIVATIONS[name] for name in self.levels])
        dropped |= set(self.fitted) <= set(self.levels)
        return pd.DataFrame([*table[~dropped].itertuples(index=False), *means], columns=table.columns)


class Prediction(NamedTuple):
    """What a run is expected to end with, and in which directions that lies beyond the runs of the fit."""

    activation_ratio: Estimate  # stable stage, at the increase of perplexity that the study measured at (1%)
    nonzero_share: Estimate  # of the gates; exactly 1 of smooth activation functions
    loss: Estimate  # validation loss after the decay, nats per token
    extrapolates: tuple[str, ...]  # empty: within what was fitted


@dataclass(frozen=True)
class Design:
    """The laws of a study. `runs`: one row per fitted run, with its size, shape, tokens and measured outcomes."""

    runs: pd.DataFrame = field(repr=False)
    activation_ratio: Law
    nonzero: Law
    loss: Law

    @property
    def activations(self) -> tuple[str, ...]:
        return self.activation_ratio.activations

    @property
    def reason(self) -> str:
        """Why there are no predictions; empty where there are."""
        return self.activation_ratio.reason or self.loss.reason

    def predict(self, parameters: float, tokens: float, width_depth_ratio: float, activation: str) -> Prediction:
        """What to expect of a run before it is trained.

        Args:
            parameters: non-embedding.
            tokens: of the whole training, decay included.
            width_depth_ratio: d_model / n_layers.

        Raises InputError for an activation function that was not trained and for numbers that are not positive.
        """
        if activation not in self.activations:
            known = f"choose one of {', '.join(self.activations)}" if self.activations else self.reason
            raise InputError(f"Activation {activation!r} was not fitted; {known}.")
        for name, value in {"parameters": parameters, "tokens": tokens, "width_depth_ratio": width_depth_ratio}.items():
            if not 0 < value < math.inf:
                raise InputError(f"{name} is {value}; a prediction needs a positive number.")
        about = (parameters, tokens, width_depth_ratio, activation)
        all_gates = Estimate(1.0, 1.0, 1.0, len(self.runs))
        nonzero = self.nonzero.predict(*about) if activation in EXACT_ZEROS else all_gates
        return Prediction(
            self.activation_ratio.predict(*about), nonzero, self.loss.predict(*about), self.extrapolates(*about)
        )

    def extrapolates(
        self, parameters: float, tokens: float, width_depth_ratio: float, activation: str
    ) -> tuple[str, ...]:
        """In words, each direction in which a run lies beyond the fitted ones, and by how much.

        Words too where a mean is predicted in place of a law.
        """
        own = self._ranges[activation]
        size, data, shape = REFERENCE
        words = [_beyond(size, parameters, *own[size]), _beyond(data, tokens / parameters, *own[data])]
        words += [_beyond(shape, width_depth_ratio, *self._ranges["all"][shape])]
        low, high = own[shape]
        if _beyond(shape, width_depth_ratio, low, high) and (low, high) != self._ranges["all"][shape]:
            trained = f"{low:.3g}" if high < NEAR * low else f"{low:.3g} to {high:.3g}"
            words += [f"effect of shape taken from others, {ACTIVATIONS[activation]} was trained at ratio {trained}"]
        if activation in self.activation_ratio.levels:
            words += [f"activation ratio is the mean of all {ACTIVATIONS[activation]} runs: no law was nearer"]
        return tuple(word for word in words if word)

    @cached_property
    def _ranges(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Lowest and highest fitted value of each quantity of REFERENCE, per activation function and for "all"."""
        size, data, shape = REFERENCE
        chosen = {name: self.runs[self.runs["activation"] == name] for name in self.activations} | {"all": self.runs}
        ranges = {}
        for key, runs in chosen.items():
            per_parameter = runs["tokens"] / runs["parameters"]
            values = {size: runs["parameters"], data: per_parameter, shape: runs["width_depth_ratio"]}
            ranges[key] = {name: (float(column.min()), float(column.max())) for name, column in values.items()}
            ranges[key][data] = (PART * float(per_parameter.min()), float(per_parameter.max()))
        return ranges


def joined(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """The checkpoints of several questions in one table, each run once: questions may share runs."""
    return pd.concat(tables, ignore_index=True).drop_duplicates(["run", "step"], ignore_index=True)


def fit_design(checkpoints: pd.DataFrame) -> Design:
    """The laws of activation ratio, share of non-zero gates and loss over the runs of a study.

    checkpoints: the tables of the questions CURVES, put together by `joined`; results/columns.csv describes them under
    relu_vs_silu. Too few runs or shapes are no error: `Design.reason` says what is missing. Raises InputError for
    missing columns, duplicates and NaN, and for a run without a checkpoint after its decay.
    """
    columns = [*COLUMNS, "nonzero_share"]
    numbers = ["tokens", "parameters", "width_depth_ratio", *(outcome.column for outcome in (RATIO, NONZERO, LOSS))]
    require(checkpoints, columns, ["run", "step"], numbers, "checkpoints")
    runs = _measured_runs(checkpoints)
    sizes = runs.groupby("activation")["parameters"].transform(_count_sizes)
    runs = runs[sizes >= FEWEST_SIZES].reset_index(drop=True)
    sharp = runs["activation"].isin(EXACT_ZEROS)
    return Design(
        runs,
        activation_ratio=_fit(checkpoints, runs, RATIO),
        nonzero=_fit(checkpoints, runs[sharp], NONZERO),
        loss=_fit(checkpoints, runs, LOSS),
    )


def _measured_runs(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """One row per run: its identity, the tokens of its whole training, and each outcome as it is predicted."""
    runs = checkpoints[checkpoints["role"] == "final"].drop(columns=[RATIO.column, NONZERO.column])
    unfinished = set(checkpoints["run"]) - set(runs["run"])
    if unfinished:
        raise InputError(f"Run {min(unfinished)} has no checkpoint after its decay; finish it or leave it out.")
    for column in (RATIO.column, NONZERO.column):
        means = last_means(checkpoints, column).set_index("run")["last_five_mean"]
        runs = runs.assign(**{column: runs["run"].map(means)})
    return runs.sort_values(["activation", "parameters", "width_depth_ratio", "seed"], ignore_index=True)


def _count_sizes(parameters: pd.Series) -> int:
    """How many sizes there are, shapes of nearly one size counted once."""
    return 1 + int((np.diff(np.sort(parameters)) > (SIZE_STEP - 1) * np.sort(parameters)[:-1]).sum())


def _fit(checkpoints: pd.DataFrame, runs: pd.DataFrame, outcome: Outcome) -> Law:
    """The law of an outcome. Functions for which it is dropped leave one by one, the worst first.

    All share a slope, so that one without order may make the law err on another.
    """
    law, levels = _law(checkpoints, runs, outcome), dict[str, Level]()
    while not law.reason and (worst := _worst(law, runs)):
        levels[worst] = _level(outcome, runs[runs["activation"] == worst])
        runs = runs[runs["activation"] != worst]
        alone = _law(checkpoints, runs, outcome)
        if alone.reason:  # too few alone: what was fitted to all of them stays
            break
        law = alone
    return replace(law, levels=levels)


def _worst(law: Law, runs: pd.DataFrame) -> str:
    """The function on whose runs the law errs more than their mean does, by most; empty where there is none.

    Both predict runs of a shape without that shape. runs: those that the law was fitted to.
    """
    excess = {"": 0.0}
    for activation in law.fitted:
        own = (runs["activation"] == activation).to_numpy()
        measured = runs.loc[own, law.outcome.column].to_numpy(dtype=float)
        off_law, off_mean = law.predicted[own] - measured, _means_of_others(law.outcome, runs[own]) - measured
        if own.sum() >= FEWEST_RUNS:
            excess[activation] = float(np.abs(off_law).mean() - np.abs(off_mean).mean())
    return max(excess, key=excess.__getitem__)


def _level(outcome: Outcome, runs: pd.DataFrame) -> Level:
    """The mean of the runs of one function."""
    others, measured = _means_of_others(outcome, runs), runs[outcome.column].to_numpy(dtype=float)
    first = ~runs.duplicated(["d_model", "n_layers"]).to_numpy()
    links = outcome.link(others)  # (runs,), one number for each shape
    return Level(
        float(outcome.link(measured.mean(keepdims=True))[0]), links[first], np.abs(links - outcome.link(measured))
    )


def _means_of_others(outcome: Outcome, runs: pd.DataFrame) -> Array:
    """Of each run of one function, the mean outcome of those of other shapes. (runs,)"""
    shapes = runs.groupby(["d_model", "n_layers"])[outcome.column]
    values = runs[outcome.column]
    others = (values.sum() - shapes.transform("sum")) / (len(runs) - shapes.transform("size"))
    return others.to_numpy(dtype=float)


def _law(checkpoints: pd.DataFrame, runs: pd.DataFrame, outcome: Outcome) -> Law:
    """Fit all runs, and again without each shape. Runs count equally: a checkpoint weighs 1 / (those of its run)."""
    activations = tuple(sorted(set(runs["activation"])))
    law = Law(outcome, activations, "", np.empty(0), np.empty(0), np.empty(len(runs)))
    if len(runs) < FEWEST_RUNS:
        enough = f"an interval at {LEVEL:.0%} needs {FEWEST_RUNS}"
        return replace(law, reason=f"only {len(runs)} runs, {FEWEST_SIZES} sizes each activation function; {enough}")
    points = _points(checkpoints[checkpoints["run"].isin(runs["run"])], outcome)
    x, y = _terms(points, outcome, activations), outcome.link(points[outcome.column].to_numpy(dtype=float))
    weights = 1 / points.groupby("run")["run"].transform("size").to_numpy()
    shapes, own = (table[["d_model", "n_layers"]].apply(tuple, axis=1) for table in (points, runs))
    fits: dict[tuple[int, int], Array | None] = {}
    for shape in dict.fromkeys(own):
        kept = (shapes != shape).to_numpy()
        fits[shape] = _weighted(x[kept], y[kept], weights[kept])
        if fits[shape] is None and outcome.bent:  # too few width-depth ratios for a parabola
            return _law(checkpoints, runs, outcome._replace(bent=False))
        if fits[shape] is None:
            reason = f"without {shape[0]}x{shape[1]} the other shapes do not determine the {x.shape[1]} coefficients"
            return replace(law, reason=reason)
    unseen = np.sum(_terms(runs, outcome, activations) * np.array([fits[shape] for shape in own]), axis=1)  # (runs,)
    errors = np.abs(outcome.link(runs[outcome.column].to_numpy(dtype=float)) - unseen)
    without = np.array(list(fits.values()))  # (shapes, terms)
    law = replace(law, errors=errors, predicted=outcome.inverse(unseen))
    return replace(law, coefficients=_weighted(x, y, weights), without=without)


def _with_interval(outcome: Outcome, middle: float, moves: Array, errors: Array) -> Estimate:
    """A prediction on the scale of the link, and what it is without each shape, as the outcome with interval."""
    rank = math.ceil(LEVEL * (errors.size + 1))  # at most their number, from FEWEST_RUNS on
    jackknife = math.sqrt((moves.size - 1) * moves.var())  # standard error of the prediction (Efron 1982, ch. 3)
    reach = math.hypot(np.sort(errors)[rank - 1], ONE_SIDED * jackknife)
    value, low, high = outcome.inverse(np.array([middle, middle - reach, middle + reach]))
    return Estimate(float(value), float(low), float(high), errors.size)


def _points(checkpoints: pd.DataFrame, outcome: Outcome) -> pd.DataFrame:
    """The checkpoints that an outcome is fitted to: the later ones of the stable stage, and the end of the decay."""
    stable = fit_points(checkpoints)
    late = stable["tokens"] >= PART * stable.groupby("run")["tokens"].transform("max")
    finals = checkpoints[(checkpoints["role"] == "final") & outcome.decayed]
    return pd.concat([stable[late], finals])


def _terms(points: pd.DataFrame, outcome: Outcome, activations: tuple[str, ...]) -> Array:
    """The regressors, in the order of `Law.table`. (points, terms)"""
    values = (points["parameters"], points["tokens"] / points["parameters"], points["width_depth_ratio"])
    references = REFERENCE.values()
    n, t, r = (np.log10(v.to_numpy(dtype=float) / at) for v, at in zip(values, references, strict=True))
    columns = []
    for activation in activations:
        own = (points["activation"] == activation).to_numpy(dtype=float)
        columns += [own, own * n, own * t]
    columns += [r, r**2] if outcome.bent else [r]
    columns += [(points["role"] == "final").to_numpy(dtype=float)] if outcome.decayed else []
    return np.column_stack(columns)


def _weighted(x: Array, y: Array, weights: Array) -> Array | None:
    """The b that minimises sum(weights (y - x b)^2); None where the points do not determine it."""
    roots = np.sqrt(weights)
    solution, _, rank, _ = np.linalg.lstsq(x * roots[:, None], y * roots, rcond=None)
    return np.asarray(solution, float) if rank == x.shape[1] else None


def _beyond(name: str, value: float, low: float, high: float) -> str:
    """How far `value` lies outside a fitted range, in decades; empty where it does not."""
    if value > NEAR * high:
        return f"{name} {math.log10(value / high):.2g} decades above {short_number(high)}"
    return f"{name} {math.log10(low / value):.2g} decades below {short_number(low)}" if value < low / NEAR else ""
