"""One law of a design: an outcome of runs as a function of their size, data and shape, with intervals.

With N parameters, D tokens and the width-depth ratio r, each of N, D / N and r over its REFERENCE,

    link(outcome) = a + b log10 N + c log10(D / N) + s log10 r    (the loss: + q (log10 r)^2 + decay),

one least-squares fit over the runs of a study. The link of a share is its log odds, that of the loss its logarithm.
a, b and c belong to an activation function; s, q and the effect of the decay are shared.

A law must earn its place. It is fitted to as many activation functions as possible such that on none of them it errs
more, shapes left out in turn, than the mean of that function's other runs does. Of the other functions the mean is
predicted.

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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logit

from sparsity_utils.laws.data_law import LEVEL
from sparsity_utils.laws.limits import fit_points
from sparsity_utils.laws.trends import Estimate, no_estimate
from sparsity_utils.models.config import ACTIVATIONS

PART = 0.25  # a run enters the fits from this part of its stable tokens on: earlier the loss falls faster
REFERENCE = {"parameters": 1e5, "tokens per parameter": 100.0, "width-depth ratio": 10.0}  # where intercepts are read
FEWEST_RUNS = round(LEVEL / (1 - LEVEL))  # with so many runs their largest error is the quantile at LEVEL
ONE_SIDED = NormalDist().inv_cdf((1 + LEVEL) / 2)  # standard errors to either end of an interval
SHARE_BOUND = 1e-4  # shares are clipped this far from 0 and 1, whose log odds are infinite
FEWEST_SIZES = 3  # of an activation function: two are left for a slope when one is left out

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


class Errors(NamedTuple):
    """Mean size of the errors on the runs of an activation function, each predicted without its shape."""

    law: float
    mean: float  # of the function's other runs


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
    levels: dict[str, Level] = field(default_factory=dict)  # by activation function: where the mean is predicted
    off: dict[str, Errors] = field(default_factory=dict)  # by activation function

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

        Where a mean is predicted, the one row of an activation function is that of its runs.
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


def fit_law(checkpoints: pd.DataFrame, runs: pd.DataFrame, outcome: Outcome) -> Law:
    """The law of an outcome for as many functions as possible on none of which it errs more than their mean does.

    checkpoints: of these runs and perhaps others. runs: one row each, as `Design.runs`. Too few runs or shapes are no
    error: `Law.reason` says what is missing.
    """
    joint = _law(checkpoints, runs, outcome)
    if joint.reason:
        return joint
    off = _errors(joint, runs)
    for size in range(len(joint.fitted), -1, -1):
        choices = [_law_of(kept, joint, checkpoints, runs, outcome) for kept in combinations(joint.fitted, size)]
        sound = [law for law in choices if law is not None]
        if sound:  # of equally many functions those on which the laws err least
            best = min(sound, key=lambda law: sum(errors.law for errors in law.off.values()))
            return replace(best, off=off | best.off)
    return replace(joint, off=off)


def _law_of(
    kept: tuple[str, ...], joint: Law, checkpoints: pd.DataFrame, runs: pd.DataFrame, outcome: Outcome
) -> Law | None:
    """The law of some functions and the means of the others; None where one of either is the worse choice.

    Where the runs of `kept` determine no law alone, they have the joint one. A mean of fewer than FEWEST_RUNS runs has
    no interval and is no choice.
    """
    counts = runs["activation"].value_counts()
    own = runs[runs["activation"].isin(kept)]
    alone = joint if len(own) == len(runs) else _law(checkpoints, own, outcome)
    law, fitted = (joint, runs) if alone.reason else (alone, own)
    errors = {name: found for name, found in _errors(law, fitted).items() if name in kept}
    others = [name for name in joint.fitted if name not in kept]
    if any(counts[name] < FEWEST_RUNS for name in others):
        return None
    if any(found.law > found.mean and counts[name] >= FEWEST_RUNS for name, found in errors.items()):
        return None
    levels = {name: _level(outcome, runs[runs["activation"] == name]) for name in others}
    return replace(law, levels=levels, off=errors)


def _errors(law: Law, runs: pd.DataFrame) -> dict[str, Errors]:
    """By activation function. runs: those that the law was fitted to."""
    found = {}
    for activation in law.fitted:
        own = (runs["activation"] == activation).to_numpy()
        measured = runs.loc[own, law.outcome.column].to_numpy(dtype=float)
        guesses = (law.predicted[own], _means_of_others(law.outcome, runs[own]))
        found[activation] = Errors(*(float(np.abs(guess - measured).mean()) for guess in guesses))
    return found


def _level(outcome: Outcome, runs: pd.DataFrame) -> Level:
    """The mean of the runs of one function."""
    others, measured = (outcome.link(x) for x in (_means_of_others(outcome, runs), runs[outcome.column].to_numpy()))
    first = ~runs.duplicated(["d_model", "n_layers"]).to_numpy()  # one number for each shape
    mean = float(outcome.link(np.array([runs[outcome.column].mean()]))[0])
    return Level(mean, others[first], np.abs(others - measured))


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
