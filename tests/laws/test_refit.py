"""The refit of published curves: planted laws come back, and each table and verdict says what was planted."""

import numpy as np
import pandas as pd
import pytest

from sparsity_utils import paths
from sparsity_utils.__main__ import main
from sparsity_utils.console import InputError
from sparsity_utils.findings import claims, published_plots, published_verdicts
from sparsity_utils.laws import data_law as laws
from sparsity_utils.laws import published_curves, refit
from sparsity_utils.laws.published_laws import PUBLISHED_LAWS
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED

CHOSEN = [law for law in PUBLISHED_LAWS if law.model in ("0.2B", "0.8B")] + [PUBLISHED_LAWS[5]]
END = {"0.2B": 85e9, "0.8B": 270e9, "2.4B": 300e9}


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """Intervals are tested with the laws; here they only need to be there."""
    usual = laws.bootstrap_limit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laws, "bootstrap_limit", lambda fit: usual(fit, resamples=12))
        patch.setattr(refit, "MOST_DROPPED", 3)
        patch.setattr(refit, "PARTS", {name: refit.PARTS[name] for name in list(refit.PARTS)[:5]})
        yield


def planted(models=CHOSEN, noise=1e-5, early=0.0, points=26):
    """Curves of printed laws; `early` lifts the first two points off them."""
    rng, curves = np.random.default_rng(0), []
    for law in models:
        tokens = np.linspace(END[law.model] / points, END[law.model], points)
        ratio = law.predict(tokens) + noise * rng.normal(size=points) + early * (np.arange(points) < 2)
        about = {"activation": law.activation, "model": law.model}
        curves.append(pd.DataFrame({"tokens": tokens, "activation_ratio": ratio}).assign(**about))
    return pd.concat(curves, ignore_index=True)


def tables(curves):
    return {name: make(curves) for name, make in refit.TABLES.items()}


def verdicts_of(found):
    return {row.claim: row for row in published_verdicts.published_curves(*found.values())}


@pytest.fixture(scope="module")
def true(few_resamples):
    """The tables of curves that are as printed."""
    return tables(planted())


def test_planted_laws_come_back_with_intervals_around_them(true):
    table = true["published_refit"]
    assert len(table) == len(CHOSEN) and (table["reason"] == "").all() and (table["dropped"] == 0).all()
    np.testing.assert_allclose(table["limit"], table["published_limit"], atol=5e-4)
    np.testing.assert_allclose(table["alpha"], table["published_alpha"], rtol=0.02)
    for name in ("alpha", "c", "limit"):
        assert (table[f"{name}_low"] <= table[name]).all() and (table[name] <= table[f"{name}_high"]).all()
    assert table.loc[table["activation"] == "silu", ["b", "b_low", "published_b"]].isna().all(axis=None)
    assert (table[["rmse", "published_rmse", "published_late_rmse"]] < 1e-4).all(axis=None)


def test_dropped_is_the_number_of_first_points_that_do_not_belong():
    table = refit.refit_laws(planted(CHOSEN[:1], noise=0.0, early=0.01))
    assert table["dropped"].tolist() == [2]
    assert table["published_rmse"][0] == pytest.approx(0.01 * np.sqrt(2 / 26), rel=1e-2)
    assert table["published_late_rmse"][0] < 1e-4
    other = planted(CHOSEN[:1]).assign(model="7B")  # nothing was printed for it
    assert refit.refit_laws(other)[["dropped", "published_limit", "published_rmse"]].isna().all(axis=None)


@pytest.mark.parametrize("law", PUBLISHED_LAWS, ids=lambda law: f"{law.activation} {law.model}")
def test_tokens_to_the_limit_are_where_the_law_says(law):
    form = "logspace" if law.activation == "relu" else "power"
    tokens = refit.tokens_to_limit(form, law._asdict(), within=0.002)
    assert abs(law.predict(tokens) - law.limit) == pytest.approx(0.002, rel=1e-6)


def test_a_law_that_starts_at_its_limit_has_arrived():
    assert refit.tokens_to_limit("logspace", {"alpha": 1.0, "b": -9.0, "c": 0.1}) == 0


def test_forms_and_forecasts_have_a_row_per_curve_and_form(true):
    forms, forecasts = true["published_forms"], true["published_forecasts"]
    assert len(forms) == len(CHOSEN) * 6 and len(forecasts) == len(CHOSEN) * 7
    best = forms[forms["delta_aicc"] == 0].set_index(["activation", "model"])["form"]
    assert {form for (activation, _), form in best.items() if activation == "silu"} == {"power"}
    assert forms.loc[forms["form"].isin(["log", "plain-power"]), "limit"].isna().all()
    assert (forecasts["fitted"] + forecasts["predicted"] == 26).all()


def test_stability_has_the_printed_limits_and_the_parts(true):
    rows = true["published_stability"].query("activation == 'relu' and model == '2.4B'").set_index("source")
    assert list(rows.index) == [refit.PRINTED, refit.SCRIPTS, *refit.PARTS]
    assert rows.loc[refit.PRINTED, "limit"] == 0.0648 and rows.loc[refit.SCRIPTS, "limit"] == 0.0712
    assert rows["points"].tolist()[2:] == [26, 13, 19, 23, 25]  # 0.5, 0.75 and 0.9 of 26, all but the first
    other = true["published_stability"].query("model == '0.2B'")["source"]
    assert refit.SCRIPTS not in set(other)


def test_verdicts_on_curves_that_are_as_printed(true):
    rows = verdicts_of(true)
    assert [row.claim for row in rows.values()] == claims.claims_table("published_curves")["question"].tolist()
    words = [row.verdict for row in rows.values()]
    assert words[0] == SUPPORTED and words[6] == SUPPORTED
    assert rows[claims.SPARSITY_KNOWN.claim].here == pytest.approx(93.52, abs=0.3)


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
    assert rows[claims.refit_claim("relu").claim].verdict == relu
    assert rows[claims.refit_claim("silu").claim].verdict == SUPPORTED


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
    chosen = (stability["model"] == "2.4B") & (stability["source"] == published_verdicts.FIRST_PART)
    assert chosen.sum() == 1
    stability.loc[chosen, "limit"] = early
    row = verdicts_of(found | {"published_stability": stability})[claims.SPARSITY_KNOWN.claim]
    assert row.verdict == verdict


def test_a_printed_law_off_its_points_is_not_supported(true):
    row = verdicts_of(found_limits(true, published_rmse=0.006))[claims.PRINTED_LAWS.claim]
    assert (row.verdict, row.here) == (NOT_SUPPORTED, pytest.approx(0.6)) and "worst: ReLU 2.4B" in row.reason


def test_forecasts_worse_than_the_last_value_are_not_supported(true):
    forecasts = true["published_forecasts"].copy()
    forecasts["rmse"] = np.where(forecasts["form"] == "last value", 0.001, 0.002)
    row = verdicts_of(true | {"published_forecasts": forecasts})[claims.LAW_FORECASTS.claim]
    assert row.verdict == NOT_SUPPORTED and row.here == pytest.approx(-np.log(2))


def test_unusable_tables_are_input_errors(true):
    for name, table in true.items():
        with pytest.raises(InputError, match="lacks the columns model"):
            verdicts_of(true | {name: table.drop(columns="model")})


def test_the_command_writes_every_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published_curves, "read_curves", lambda folder: planted([CHOSEN[0], CHOSEN[2]]))
    monkeypatch.setattr(published_curves, "download_curves", lambda: pytest.fail("a folder was named"))
    monkeypatch.setattr(paths, "PUBLISHED", tmp_path)
    assert main(["refit", "--curves", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"{name}.csv") for name in refit.TABLES]
    stored = pd.read_csv(tmp_path / "published_refit.csv")
    assert list(stored["activation"]) == ["relu", "silu"] and stored["reason"].isna().all()


def test_the_points_are_drawn_where_they_are_given(true):
    counts = [len(published_plots.laws(true["published_refit"], c).axes[0].lines) for c in (None, planted())]
    assert counts == [2 * 3, 3 * 3]
