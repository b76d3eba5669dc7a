"""The refit of published curves: planted laws come back, and each table says what was planted."""

import numpy as np
import pandas as pd
import pytest
from planted_curves import CHOSEN, few_resamples, planted, tables

from sparsity_utils import paths
from sparsity_utils.__main__ import main
from sparsity_utils.laws import published, refit
from sparsity_utils.laws.published import PUBLISHED_LAWS


@pytest.fixture(scope="module", autouse=True)
def quick():
    with few_resamples():
        yield


@pytest.fixture(scope="module")
def true(quick):
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


def test_the_command_writes_every_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published, "read_curves", lambda folder: planted([CHOSEN[0], CHOSEN[2]]))
    monkeypatch.setattr(published, "download_curves", lambda: pytest.fail("a folder was named"))
    monkeypatch.setattr(paths, "PUBLISHED", tmp_path)
    assert main(["refit", "--curves", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"{name}.csv") for name in refit.TABLES]
    stored = pd.read_csv(tmp_path / "published_refit.csv")
    assert list(stored["activation"]) == ["relu", "silu"] and stored["reason"].isna().all()
