"""Predict before you train: activation ratio and loss of a run from its size, its data and its shape.

A design is three laws (`outcome_law`): of the activation ratio, of the share of non-zero gates, which decides how much
of the up projection is read, and of the loss. The effect of shape is shared by all activation functions, since often
only ReLU is trained at several ratios: on the scale of log odds that is an assumption, and `Design.extrapolates` names
the predictions that rest on it. Where no law is nearer to held-out runs of a function than their mean, the mean is
predicted: `Prediction.by_mean` says so, and `laws_and_means` shows both errors.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd

from sparsity_utils.console import InputError, short_number
from sparsity_utils.laws.limits import COLUMNS, last_means, require
from sparsity_utils.laws.outcome_law import FEWEST_SIZES, LOSS, NONZERO, PART, RATIO, REFERENCE, Law, fit_law
from sparsity_utils.laws.trends import Estimate
from sparsity_utils.models.config import ACTIVATIONS

# The questions whose tables hold the runs of a design, as far as a study has them
CURVES = ("relu_vs_silu", "width_depth_ratio", "second_line", "data_limited")
QUANTITIES = ("activation ratio", "share of non-zero gates", "loss")  # that a design predicts
EXACT_ZEROS = ("relu", "relu2")  # of the others every gate is non-zero
NEAR = 1.1  # up to this factor beyond the fitted range nothing is extrapolated: integer shapes miss a size by as much
SIZE_STEP = 1.5  # neighbouring sizes within this factor count as one


class Prediction(NamedTuple):
    """What a run is expected to end with, and in which directions that lies beyond the runs of the fit."""

    activation_ratio: Estimate  # stable stage, at the increase of perplexity that the study measured at (1%)
    nonzero_share: Estimate  # of the gates; exactly 1 of smooth activation functions
    loss: Estimate  # validation loss after the decay, nats per token
    extrapolates: tuple[str, ...]  # empty: within what was fitted
    by_mean: tuple[str, ...]  # the quantities, of QUANTITIES, for which the mean of the function's runs stands


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
    def laws(self) -> dict[str, Law]:
        """By their names in QUANTITIES."""
        return dict(zip(QUANTITIES, (self.activation_ratio, self.nonzero, self.loss), strict=True))

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
        ratio, loss = self.activation_ratio.predict(*about), self.loss.predict(*about)
        by_mean = tuple(name for name, law in self.laws.items() if activation in law.levels)
        return Prediction(ratio, nonzero, loss, self.extrapolates(*about), by_mean)

    def extrapolates(
        self, parameters: float, tokens: float, width_depth_ratio: float, activation: str
    ) -> tuple[str, ...]:
        """In words, each direction in which a run lies beyond the fitted ones, and by how much."""
        own = self._ranges[activation]
        size, data, shape = REFERENCE
        words = [_beyond(size, parameters, *own[size]), _beyond(data, tokens / parameters, *own[data])]
        words += [_beyond(shape, width_depth_ratio, *self._ranges["all"][shape])]
        low, high = own[shape]
        if _beyond(shape, width_depth_ratio, low, high) and (low, high) != self._ranges["all"][shape]:
            trained = f"{low:.3g}" if high < NEAR * low else f"{low:.3g} to {high:.3g}"
            words += [f"effect of shape taken from others, {ACTIVATIONS[activation]} was trained at ratio {trained}"]
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
        activation_ratio=fit_law(checkpoints, runs, RATIO),
        nonzero=fit_law(checkpoints, runs[sharp], NONZERO),
        loss=fit_law(checkpoints, runs, LOSS),
    )


def laws_and_means(design: Design) -> pd.DataFrame:
    """How far laws and means are off on runs of shapes that were left out, and which of them is predicted.

    Columns: quantity, activation, error_of_law, error_of_mean (mean sizes; points of a share, nats of the loss) and
    predicted ("law" or "mean"). The error of a law that is not predicted is that of the fit to all functions.
    """
    rows = []
    for quantity, law in design.laws.items():
        unit = 1.0 if quantity == "loss" else 100.0
        for activation, errors in law.off.items():
            by = "mean" if activation in law.levels else "law"
            rows.append((quantity, ACTIVATIONS[activation], unit * errors.law, unit * errors.mean, by))
    return pd.DataFrame(rows, columns=["quantity", "activation", "error_of_law", "error_of_mean", "predicted"])


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


def _beyond(name: str, value: float, low: float, high: float) -> str:
    """How far `value` lies outside a fitted range, in decades; empty where it does not."""
    if value > NEAR * high:
        return f"{name} {math.log10(value / high):.2g} decades above {short_number(high)}"
    return f"{name} {math.log10(low / value):.2g} decades below {short_number(low)}" if value < low / NEAR else ""
