"""Forecasts: a planted law forecasts itself, the last value is a floor to beat, short curves say why there is none."""

import numpy as np
import pandas as pd
import pytest
from planted import study

from sparsity_utils.console import InputError
from sparsity_utils.laws.data_law import FORMS, RIVAL_FORMS
from sparsity_utils.laws.holdout import LAST_VALUE, forecast_errors, forecast_table

TOKENS = np.linspace(1e9, 40e9, 40)
FALLING = 0.07 + np.exp(-0.06 * (TOKENS / 1e9) ** 1.2 - 2.5)


def by_form(table):
    return table.set_index("form")


def test_a_planted_law_forecasts_itself_and_the_last_value_is_off_by_the_change():
    rows = by_form(forecast_errors(TOKENS, FALLING, ("logspace", "constant")))
    assert list(rows.index) == [LAST_VALUE, "logspace", "constant"]
    assert set(rows["fitted"]) == {20} and set(rows["predicted"]) == {20}
    assert rows.loc["logspace", "rmse"] < 1e-5
    expected = FALLING[19] - FALLING[20:]  # written out: the 20th point is the last up to half of the tokens
    assert rows.loc[LAST_VALUE, "bias"] == pytest.approx(expected.mean())
    assert rows.loc[LAST_VALUE, "rmse"] == pytest.approx(np.sqrt((expected**2).mean()))
    assert rows.loc["constant", "bias"] == pytest.approx(FALLING[:20].mean() - FALLING[20:].mean())


def test_later_points_do_not_enter_the_fit():
    spoilt = np.where(np.arange(40) < 20, FALLING, 0.9)
    clean, rows = (by_form(forecast_errors(TOKENS, a)) for a in (FALLING, spoilt))
    change = (0.9 - FALLING[20:]).mean()
    np.testing.assert_allclose(rows["bias"], clean["bias"] - change, rtol=1e-9)


def test_every_form_is_tried_and_a_form_without_a_trend_still_forecasts():
    rows = by_form(forecast_errors(TOKENS, FALLING))
    assert set(rows.index) == {LAST_VALUE, *FORMS}
    assert np.isfinite(rows["rmse"]).all() and (rows["reason"] == "").all()
    flat = by_form(forecast_errors(TOKENS, np.full(40, 0.3)))
    np.testing.assert_allclose(flat["rmse"], 0, atol=1e-6)


def test_log_spaced_checkpoints_leave_few_points_and_short_curves_say_why():
    tokens = 1e6 * 1.4 ** np.arange(13)  # three points lie beyond the half: 1.4^-2 = 0.51 of the last
    rows = by_form(forecast_errors(tokens, 0.3 - 0.01 * np.log(tokens / 1e6)))
    assert set(rows["predicted"]) == {3} and set(rows["fitted"]) == {10}
    short = by_form(forecast_errors([1e9, 2e9, 3e9, 9e9, 10e9], [0.3, 0.25, 0.22, 0.2, 0.2]))
    assert short.loc["logspace", "reason"].startswith("too few points: 3") and np.isnan(short.loc["logspace", "rmse"])
    assert short.loc[LAST_VALUE, "bias"] == pytest.approx(0.02)
    empty = by_form(forecast_errors([], []))
    assert set(empty["reason"]) == {"no point lies beyond half of the last tokens"} and set(empty["predicted"]) == {0}
    single = by_form(forecast_errors([5e9], [0.3]))
    assert single.loc[LAST_VALUE, "reason"] == "no fitted point"


def test_points_may_come_in_any_order():
    order = np.random.default_rng(0).permutation(40)
    rows, sorted_rows = (by_form(forecast_errors(TOKENS[at], FALLING[at])) for at in (order, np.arange(40)))
    pd.testing.assert_frame_equal(rows, sorted_rows, rtol=1e-6)


def test_a_study_gets_one_row_per_run_and_form():
    checkpoints = study(seeds=(0, 1)).query("n_layers == n_layers.min()")
    table = forecast_table(checkpoints)
    assert len(table) == checkpoints["run"].nunique() * (2 + len(RIVAL_FORMS))
    assert not table.duplicated(["run", "form"]).any()
    relu, silu = (set(table.loc[table["activation"] == name, "form"]) for name in ("relu", "silu"))
    assert relu - silu == {"logspace"} and silu - relu == {"power"}
    run = checkpoints[checkpoints["run"] == table["run"][0]]
    fitted = run[(run["role"] == "stable") & run["fit"]]
    assert table["fitted"][0] + table["predicted"][0] == len(fitted)  # no warm-up, no decay


def test_unusable_tables_are_input_errors():
    with pytest.raises(InputError, match="hold NaN"):
        forecast_errors([1e9, 2e9], [0.1, np.nan])
    with pytest.raises(InputError, match="lacks the columns"):
        forecast_table(pd.DataFrame({"run": []}))
