"""Means and slopes over sizes: each size of a line counts once, however many seeds it has.

The unit of these tests is a size, not a run. A size sits above or below the mean or the line for reasons of its own,
and all of its seeds share them, so runs are averaged over the seeds of a size first. What is left around the mean or
the line of a line of sizes then holds both what a size has of its own and what seeds leave in its mean. Few sizes tell
little about that spread, so it is taken to be equal on every line and estimated from all of them together:

    means:   value of a size = intercept of its line + residual                 degrees of freedom: sizes - lines
    slopes:  value of a size = intercept of its line + slope of its line * x + residual             sizes - 2 lines

The residuals of all lines share one variance; ordinary least squares then gives t intervals. They are exact where every
size has as many seeds, and nearly so elsewhere, where the mean of fewer seeds scatters a little more (simulated in
tests/laws/test_pooled.py).
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from numpy.typing import ArrayLike, NDArray

from sparsity_utils.console import InputError
from sparsity_utils.laws.data_law import LEVEL
from sparsity_utils.laws.trends import SMALLEST_DOF, Estimate, finite, no_estimate

Array = NDArray[np.float64]


def size_means(runs: pd.DataFrame, keys: Sequence[str] = ("line", "d_model", "n_layers")) -> pd.DataFrame:
    """One row per size: the mean over its runs (seeds) of every other column of numbers, and `runs`, their count."""
    groups = runs.drop(columns="seed").groupby(list(keys), sort=True)
    return groups.mean(numeric_only=True).assign(runs=groups.size()).reset_index()


def pooled_means(values: ArrayLike, lines: ArrayLike, level: float = LEVEL) -> dict[Any, Estimate]:
    """{line: mean over its sizes}, with t intervals from the residual variance that all lines share.

    values: one per size; lines: the line of each. `n` of an estimate counts the sizes of its line.
    """
    values = finite(values, "values")
    labels = _labels(lines, values)
    names = list(dict.fromkeys(labels))
    design = np.column_stack([labels == name for name in names]).astype(float) if names else np.empty((0, 0))
    return _estimates(design, values, dict(enumerate(names)), labels, level)


def pooled_slopes(x: ArrayLike, values: ArrayLike, lines: ArrayLike, level: float = LEVEL) -> dict[Any, Estimate]:
    """{line: slope of `values` on `x` over its sizes}, each line with its own intercept; intervals as `pooled_means`.

    A line whose sizes share one `x` has no slope and tells nothing about the spread around one: it gets a reason.
    """
    x, values = finite(x, "x"), finite(values, "values")
    if x.size != values.size:
        raise InputError(f"x has {x.size} numbers and values {values.size}; give as many of one as of the other.")
    labels = _labels(lines, values)
    names = list(dict.fromkeys(labels))
    spread = [name for name in names if np.unique(x[labels == name]).size > 1]
    kept = np.isin(labels, spread)
    own = [labels[kept] == name for name in spread]
    columns = [np.where(at, x[kept] - x[kept][at].mean(), 0) for at in own] + [at.astype(float) for at in own]
    design = np.column_stack(columns) if columns else np.empty((0, 0))
    found = _estimates(design, values[kept], dict(enumerate(spread)), labels[kept], level)
    reason = "sizes at one position have no slope"
    nothing = {name: no_estimate(reason, int(np.sum(labels == name)), level) for name in names}
    return nothing | found


def line_at(x: Array, values: Array, slope: float, at: ArrayLike) -> Array:
    """Height at `at` of the least-squares line of that slope: it passes through the mean of the points."""
    return np.mean(values) + slope * (np.asarray(at, dtype=float) - np.mean(x))


def coefficients(design: Array, values: Array, level: float = LEVEL) -> tuple[Array, Array]:
    """Ordinary least squares: coefficients (columns,) and the ends of their t intervals (columns, 2)."""
    fit = sm.OLS(values, design).fit()
    return np.asarray(fit.params), np.asarray(fit.conf_int(1 - level))


def _estimates(
    design: Array, values: Array, named: dict[int, Hashable], labels: NDArray, level: float
) -> dict[Any, Estimate]:
    """The coefficients of the named columns, or why there are none."""
    sizes = {name: int(np.sum(labels == name)) for name in named.values()}
    dof = values.size - design.shape[1]
    if dof < SMALLEST_DOF:
        reason = f"too few sizes: {values.size} on {len(sizes)} line{'s' * (len(sizes) != 1)} leave {max(dof, 0)} "
        reason += "degrees of freedom"
        return {name: no_estimate(reason, count, level) for name, count in sizes.items()}
    found, ends = coefficients(design, values, level)
    return {
        name: Estimate(float(found[column]), float(ends[column, 0]), float(ends[column, 1]), level, sizes[name])
        for column, name in named.items()
    }


def _labels(lines: ArrayLike, values: Array) -> NDArray:
    labels = np.asarray(lines)
    if labels.shape != values.shape:
        raise InputError(f"lines has shape {labels.shape} for {values.size} sizes; give one label per size.")
    return labels
