"""Half-way points of planted curves in closed form, the common window, and runs that have none."""

import numpy as np
import pandas as pd
import pytest
from planted import study

from sparsity_utils.console import InputError
from sparsity_utils.laws.convergence import convergence_table
from sparsity_utils.laws.limits import fit_curves

SHAPES = ((40, 2), (60, 3))


def checkpoints(ratio, windows=((10, 100), (10, 100)), activation="relu"):
    """One run per shape with `ratio(tokens per parameter)` on 20 log-spaced checkpoints over its window."""
    table = study(SHAPES, (activation,), (0,))
    table = table[table["role"] == "stable"].assign(fit=True)
    for (d_model, _), window in zip(SHAPES, windows, strict=True):
        rows = table["d_model"] == d_model
        x = np.geomspace(*window, rows.sum())
        table.loc[rows, "tokens"] = x * table.loc[rows, "parameters"]
        table.loc[rows, "activation_ratio"] = ratio(x)
    return table


def fitted(*args, **options):
    return fit_curves(checkpoints(*args, **options))


def test_an_exponential_has_its_half_way_point_in_closed_form():
    """exp(-x / 20) between 10 and 100: half of the change is done where it is the mean of both ends."""
    table = convergence_table(fitted(lambda x: 0.2 + 0.1 * np.exp(-x / 20)))
    for share, column in ((0.5, "halfway_per_parameter"), (0.9, "ninety_per_parameter")):
        expected = -20 * np.log((1 - share) * np.exp(-0.5) + share * np.exp(-5))
        np.testing.assert_allclose(table[column], expected, rtol=5e-3)
    np.testing.assert_allclose(table["halfway"], table["halfway_per_parameter"] * table["parameters"])
    assert (table["reason"] == "").all() and table["first"].iloc[0] == pytest.approx(10)


def test_a_rising_power_law_has_it_too():
    table = convergence_table(fitted(lambda x: 0.5 - 0.2 / x, activation="silu"))
    np.testing.assert_allclose(table["halfway_per_parameter"], 2 / (1 / 10 + 1 / 100), rtol=5e-3)


def test_runs_are_compared_over_the_window_that_all_share():
    """The same curve, seen over different windows: the half-way points agree over the common one."""
    table = convergence_table(fitted(lambda x: 0.2 + 0.1 * np.exp(-x / 20), ((5, 100), (10, 200))))
    np.testing.assert_allclose(table[["first", "last"]], [[10, 100]] * 2)
    assert table["halfway_per_parameter"].max() == pytest.approx(table["halfway_per_parameter"].min(), rel=0.01)


def test_runs_without_a_half_way_point_say_why():
    noise = 1e-3 * np.random.default_rng(0).normal(size=20)
    flat = convergence_table(fitted(lambda x: 0.3 + noise))
    rising = convergence_table(fitted(lambda x: 0.3 + 1e-3 * x))  # a ReLU run that moves the wrong way
    apart = convergence_table(fitted(lambda x: 0.3 - 1e-3 * x, ((1, 9), (10, 90))))
    unfitted = convergence_table(fit_curves(checkpoints(lambda x: 0.3 - 1e-3 * x).assign(fit=False)))
    for table, reason in ((flat, "no trend"), (rising, "no trend"), (apart, "no window"), (unfitted, "no window")):
        assert table["reason"].str.startswith(reason).all()
        assert table[["halfway", "ninety", "halfway_per_parameter"]].isna().all(axis=None)


def test_a_limit_that_the_points_do_not_determine_is_no_hindrance():
    table = convergence_table(fitted(lambda x: 0.3 - 0.03 * np.log(x)))
    np.testing.assert_allclose(table["halfway_per_parameter"], np.sqrt(10 * 100), rtol=0.02)


def test_unusable_tables_are_input_errors():
    with pytest.raises(InputError, match="two rows for run"):
        fit_curves(pd.concat([checkpoints(np.log10)] * 2))
