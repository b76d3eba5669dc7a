"""Limits of made-up studies whose laws are known, and when they are not sound."""

import numpy as np
import pandas as pd
import pytest
from planted import SHAPES, study

from sparsity_utils.laws import data_law, limits


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals are tested with the laws; here they only need to be there."""
    monkeypatch.setattr(data_law, "RESAMPLES", 20)


def limits_of(checkpoints, **options):
    return limits.limits_table(limits.fit_curves(checkpoints), **options)


def test_limits_table_has_planted_limits_per_seed_and_for_all():
    table = limits_of(study(limit=lambda activation, ratio, size: {"relu": 0.15, "silu": 0.5}[activation]))
    assert list(table.columns) == limits.LIMITS
    assert len(table) == 2 * len(SHAPES) * 3
    common = table[table["seed"] == "all"]
    assert table["sound"].all() and set(table["seed"]) == {"all", "0", "1"}
    np.testing.assert_allclose(common.loc[common["activation"] == "relu", "limit"], 0.15, atol=3e-3)
    np.testing.assert_allclose(common.loc[common["activation"] == "silu", "limit"], 0.50, atol=3e-3)
    assert (common["low"] < common["limit"]).all() and (common["limit"] < common["high"]).all()
    by_seed = table[table["seed"] != "all"]
    assert (common[["spread", "last_five_spread"]] > 0).all(axis=None)
    assert by_seed[["low", "high", "spread", "last_five_spread"]].isna().all(axis=None)


def test_seeds_have_intervals_of_their_own_where_asked_for():
    checkpoints = study(SHAPES[:1], ("relu",))
    plain, table = limits_of(checkpoints), limits_of(checkpoints, seed_intervals=True)
    assert (table["low"] < table["limit"]).all() and (table["limit"] < table["high"]).all()
    pd.testing.assert_frame_equal(table.drop(columns=["low", "high"]), plain.drop(columns=["low", "high"]))
    pd.testing.assert_series_equal(table.iloc[0], plain.iloc[0])  # the common curve


def test_spread_is_the_range_over_seeds():
    checkpoints = study(SHAPES[:1], ("relu",), seeds=(0, 1, 2))
    table = limits_of(checkpoints).set_index("seed")
    for values, spread in (("limit", "spread"), ("last_five_mean", "last_five_spread")):
        seeds = table.loc[["0", "1", "2"], values]
        assert table.loc["all", spread] == pytest.approx(seeds.max() - seeds.min())
    assert np.isnan(limits_of(study(SHAPES[:1], ("relu",), seeds=(0,)))["last_five_spread"]).all()


def test_last_five_mean_is_the_mean_of_the_last_five_stable_checkpoints():
    checkpoints = study(SHAPES[:1], ("relu",), (0,)).sample(frac=1, random_state=0)
    stable = checkpoints[checkpoints["role"] == "stable"]
    expected = stable.nlargest(5, "tokens")["activation_ratio"].mean()
    table = limits_of(checkpoints)
    np.testing.assert_allclose(table["last_five_mean"], expected)


def test_warm_up_points_are_not_fitted():
    checkpoints = study(noise=0.0)
    early = checkpoints["tokens"] <= 0.7e6
    spoilt = checkpoints.assign(activation_ratio=checkpoints["activation_ratio"].where(~early, 0.9))
    pd.testing.assert_series_equal(limits_of(checkpoints)["limit"], limits_of(spoilt)["limit"])


def test_runs_without_a_limit_are_unsound_and_say_why():
    checkpoints = study(SHAPES[:1], ("relu",)).assign(activation_ratio=0.3)
    table = limits_of(checkpoints)
    assert not table["sound"].any() and table["reason"].str.startswith("no trend").all() and table["limit"].isna().all()
    table = limits_of(checkpoints.assign(fit=False))
    assert table["reason"].str.startswith("too few points: 0").all()
    np.testing.assert_allclose(table["last_five_mean"], 0.3)


def test_a_limit_with_a_wide_interval_is_unsound(monkeypatch):
    checkpoints = study(SHAPES[:1], ("relu",))
    monkeypatch.setattr(limits, "WIDEST_INTERVAL", 1e-5)
    table = limits_of(checkpoints)
    common = table[table["seed"] == "all"].iloc[0]
    assert not common["sound"] and "interval of the limit spans" in common["reason"]
