"""Verdicts of notebook 07 on planted curves and tables whose answer is known, and its figure with points."""

import numpy as np
import pytest
from planted_curves import few_resamples, planted, tables

from sparsity_utils.console import InputError
from sparsity_utils.findings import published_curves
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED


@pytest.fixture(scope="module", autouse=True)
def quick():
    with few_resamples():
        yield


@pytest.fixture(scope="module")
def true(quick):
    """The tables of curves that are as printed."""
    return tables(planted())


def verdicts_of(found):
    return {row.claim: row for row in published_curves.verdicts(*found.values())}


def test_verdicts_on_curves_that_are_as_printed(true):
    rows = verdicts_of(true)
    assert list(rows) == list(published_curves.CLAIMS.values())
    assert published_curves.claims()["question"].tolist() == [claim.claim for claim in rows]
    words = [row.verdict for row in rows.values()]
    assert words[0] == SUPPORTED and words[6] == SUPPORTED
    assert rows[published_curves.SPARSITY_KNOWN].here == pytest.approx(93.52, abs=0.3)


def found_limits(true, **changes):
    """The refit table with three curves of each activation whose limits are known to 0.2 points, then changed."""
    limit = true["published_refit"]["published_limit"]
    known = {"limit": limit, "limit_low": limit - 0.001, "limit_high": limit + 0.001}
    table = true["published_refit"].assign(**known | {"published_rmse": 0.001})
    for column, value in changes.items():
        table.loc[table["model"] == "2.4B", column] = value
    return true | {"published_refit": table}


@pytest.mark.parametrize(
    ("changes", "relu"),
    [
        ({}, SUPPORTED),
        ({"limit_low": 0.05}, INCONCLUSIVE),  # inside an interval of more than a point
        ({"limit_low": 0.07, "limit_high": 0.075, "limit": 0.072}, NOT_SUPPORTED),
        ({"limit_low": np.nan, "limit_high": np.nan, "limit": np.nan}, INCONCLUSIVE),
    ],
)
def test_limits_are_reproduced_by_narrow_intervals_around_all_of_them(true, changes, relu):
    rows = verdicts_of(found_limits(true, **changes))
    assert rows[published_curves.refit_claim("relu")].verdict == relu
    assert rows[published_curves.refit_claim("silu")].verdict == SUPPORTED


@pytest.mark.parametrize(
    ("early", "changes", "verdict"),
    [
        (0.0650, {}, SUPPORTED),
        (0.0700, {}, NOT_SUPPORTED),
        (np.nan, {}, NOT_SUPPORTED),
        (0.0650, {"limit_low": 0.05}, NOT_SUPPORTED),
        (0.0650, {"reason": "extrapolates: 60%"}, NOT_SUPPORTED),
        (0.0650, {"limit": np.nan}, INCONCLUSIVE),
    ],
)
def test_a_limit_is_determined_when_sound_narrow_and_seen_early(true, early, changes, verdict):
    found = found_limits(true, **changes)
    stability = found["published_stability"].copy()
    chosen = (stability["model"] == "2.4B") & (stability["source"] == published_curves.FIRST_PART)
    assert chosen.sum() == 1
    stability.loc[chosen, "limit"] = early
    row = verdicts_of(found | {"published_stability": stability})[published_curves.SPARSITY_KNOWN]
    assert row.verdict == verdict


def test_a_printed_law_off_its_points_is_not_supported(true):
    row = verdicts_of(found_limits(true, published_rmse=0.006))[published_curves.PRINTED_LAWS]
    assert (row.verdict, row.here) == (NOT_SUPPORTED, pytest.approx(0.6)) and "worst: ReLU 2.4B" in row.reason


def test_forecasts_worse_than_the_last_value_are_not_supported(true):
    forecasts = true["published_forecasts"].copy()
    forecasts["rmse"] = np.where(forecasts["form"] == "last value", 0.001, 0.002)
    row = verdicts_of(true | {"published_forecasts": forecasts})[published_curves.LAW_FORECASTS]
    assert row.verdict == NOT_SUPPORTED and row.here == pytest.approx(-np.log(2))


def test_unusable_tables_are_input_errors(true):
    for name, table in true.items():
        with pytest.raises(InputError, match="lacks the columns model"):
            verdicts_of(true | {name: table.drop(columns="model")})


def test_the_points_are_drawn_where_they_are_given(true):
    counts = [len(published_curves.laws_figure(true["published_refit"], c).axes[0].lines) for c in (None, planted())]
    assert counts == [2 * 3, 3 * 3]
