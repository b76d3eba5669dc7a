"""Notebook 13: verdicts follow what was planted, in every direction; tables and figures show it."""

import numpy as np
import pandas as pd
import pytest
from notebook_runs import run_notebook
from planted_correction import DENSITY, TOKENS, correction_table, prefixes_table, speeds_table, text_table
from small import profile_content, write_text
from tiny_llama import write_llama

from sparsity_utils.console import InputError
from sparsity_utils.findings import sirius, sirius_figures
from sparsity_utils.laws.corrections import near_ties, summed_ways
from sparsity_utils.study.tables import Tables


def found_in(folder, table=None, prefixes=None):
    """`analyse` of planted tables that are stored as a study's are."""
    tables = {
        "correction": correction_table() if table is None else table,
        "correction_prefixes": prefixes_table() if prefixes is None else prefixes,
        "correction_speeds": speeds_table(),
        "correction_text": text_table(),
    }
    for name, frame in tables.items():
        frame.to_csv(folder / f"{name}.csv", index=False)
    study = Tables("planted", folder)
    return sirius.analyse(study, study.table("correction"))


def words(found):
    return {verdict.claim.key: verdict.verdict for verdict in sirius.verdicts(found)}


def test_what_is_planted_is_supported(tmp_path):
    found = found_in(tmp_path)
    assert set(words(found).values()) == {"supported"}
    rows = {verdict.claim.key: verdict for verdict in sirius.verdicts(found)}
    assert rows["few_corrections"].here == pytest.approx(11, abs=1)
    assert rows["advance"].here == pytest.approx((15 * 0.8 + 1) / 15, abs=0.01)  # FSparse decides
    assert rows["recovery"].here == pytest.approx(80, abs=1)
    assert rows["parts"].here == pytest.approx(0.05, abs=0.005)
    assert rows["fresh"].here == pytest.approx(30 - 2 * 5, abs=2)
    assert min(abs(rows["trade"].here - 0.01), abs(rows["trade"].here - 1)) < 0.2


@pytest.mark.parametrize(
    ("key", "table", "prefixes", "verdict"),
    [
        ("few_corrections", {}, {"disagreed": 0.4}, "not supported"),
        ("few_corrections", {}, {"disagreed": 0.25}, "inconclusive"),
        ("few_corrections", {}, {"disagreed": 0.01}, "inconclusive"),
        ("advance", {"advance": 11.0}, {}, "not supported"),
        ("recovery", {"recovered": 0.1}, {}, "not supported"),
        ("recovery", {"recovered": 0.45}, {}, "inconclusive"),
        ("recovery", {"lost": 0.0}, {}, "inconclusive"),  # nothing to give back
        ("recovery", {"lost": -0.1}, {}, "inconclusive"),
        ("trade", {"step": -1.0}, {}, "not supported"),
        ("trade", {"step": 0.0}, {}, "inconclusive"),
        ("parts", {"part": -0.05}, {}, "not supported"),
        ("parts", {"part": 0.0}, {}, "inconclusive"),
        ("fresh", {}, {"repeated": 0.3}, "not supported"),
        ("fresh", {}, {"fresh": 0.1}, "inconclusive"),
    ],
)
def test_what_is_not_is_not(tmp_path, key, table, prefixes, verdict):
    assert words(found_in(tmp_path, correction_table(**table), prefixes_table(**prefixes)))[key] == verdict


def test_few_documents_decide_nothing(tmp_path):
    found = found_in(tmp_path, correction_table(documents=11), prefixes_table(documents=11))
    assert set(words(found).values()) == {"inconclusive"}
    assert all("fewer than 12 documents" in verdict.reason for verdict in sirius.verdicts(found))
    single = found_in(tmp_path, correction_table(documents=1), prefixes_table(documents=1))
    assert set(words(single).values()) == {"inconclusive"}


def test_texts_that_are_all_alike_have_no_quotient(tmp_path):
    alike = sirius.verdicts(found_in(tmp_path, correction_table().assign(log_likelihood=-1.0)))
    recovery = next(verdict for verdict in alike if verdict.claim.key == "recovery")
    assert recovery.verdict == "inconclusive" and "not clearly less likely" in recovery.reason


def test_the_claims_are_not_on_our_own_model_nor_on_sums_nor_on_other_rules(tmp_path):
    own = correction_table(advance=5.0, recovered=0.0).assign(model="relu")
    both = found_in(tmp_path, pd.concat([correction_table(), own]))
    assert words(both)["advance"] == words(both)["recovery"] == "supported"
    other = correction_table(advance=5.0, recovered=0.0).query("rule == 'csparse'").assign(rule="teal")
    more = prefixes_table(disagreed=0.9).query("rule == 'csparse'").assign(rule="teal")
    shown = found_in(tmp_path, pd.concat([correction_table(), other]), pd.concat([prefixes_table(), more]))
    assert set(words(shown).values()) == {"supported"}  # rules that are not published are shown beside
    sums = correction_table()
    sums.loc[sums["text"] == "arithmetic", "advance"] = 1.0
    assert words(found_in(tmp_path, sums))["advance"] == "supported"
    alone = sirius.verdicts(found_in(tmp_path, own, prefixes_table().assign(model="relu")))
    assert {verdict.verdict for verdict in alone} == {"inconclusive"}
    assert {verdict.verdict for verdict in sirius.verdicts(None)} == {"inconclusive"}
    assert [row.claim for row in alone] == list(sirius.CLAIMS) and len(sirius.claims()) == 6


def test_a_study_without_tables_says_so(tmp_path, capsys):
    study = Tables("planted", tmp_path)
    assert sirius.analyse(study, study.table_or_none("correction")) is None
    assert "no table for correction" in capsys.readouterr().out
    assert list(sirius.figures(Tables("planted", tmp_path))) == []


def test_tables_with_gaps_are_refused(tmp_path):
    table = correction_table(documents=2)
    with pytest.raises(InputError, match="lacks the columns agreed"):
        found_in(tmp_path, table.drop(columns="agreed"))
    with pytest.raises(InputError, match="two rows for model planted"):
        found_in(tmp_path, pd.concat([table, table]))
    table.loc[3, "log_likelihood"] = np.nan
    with pytest.raises(InputError, match="no log_likelihood"):
        found_in(tmp_path, table)


def test_means_of_every_way():
    table = correction_table(documents=3)
    found = summed_ways(table, 16).set_index(["text", "rule", "way", "threshold"]).sort_index()
    rows = table.query("text == 'english' and rule == 'csparse' and way == 'corrected' and threshold == 0.5")
    row = found.loc[("english", "csparse", "corrected", 0.5)]
    advance = rows["advance"].sum() / rows["rounds"].sum()
    assert row["advance"] == pytest.approx(advance) and row["documents"] == 3
    assert row["effective_density"] == pytest.approx((15 * DENSITY["csparse"] + 1) / advance)
    assert row["corrected"] == pytest.approx(rows["rejected"].sum() / rows["advance"].sum())
    assert row["log_likelihood"] == pytest.approx(rows["log_likelihood"].sum() / (3 * TOKENS))
    alone = found.loc[("english", "fsparse", "alone")].iloc[0]
    assert alone["effective_density"] == DENSITY["fsparse"] and np.isnan(alone["advance"])
    assert found.loc[("arithmetic", "full", "full")].iloc[0]["right"] == pytest.approx(2 / 3)


def test_near_ties_are_counted():
    table = correction_table(documents=4).query("text == 'python' and rule == 'fsparse' and way == 'lossless'").copy()
    table["place"] = [-1, 5, 6, 7]
    table["gap"] = [0.0, 1e-6, 3e-6, 0.5]
    table["rounding"] = [0.0, 1e-6, 1e-6, 1e-6]
    row = near_ties(table).iloc[0]
    assert (row["documents"], row["differ"], row["near_ties"], row["largest_rounding"]) == (4, 3, 1, 1e-6)


def test_tables_and_figures_show_what_was_found(tmp_path):
    found = found_in(tmp_path)
    english, sums = (sirius_figures.ways_table(found.ways, "planted", text) for text in ("english", "arithmetic"))
    assert len(english) == 1 + 2 * 5 + 3 and "right answers %" not in english and set(sums["right answers %"]) == {"50"}
    assert english.loc[1, "rule"] == "FSparse" and english.loc[1, "AAL"] == ""
    assert sirius_figures.prefixes_table(found.prefixes)["another word %"].between(10, 12).all()
    assert (sirius_figures.lossless_table(found.table)["differ"] == 0).all()
    assert len(sirius_figures.speeds_table(found.speeds)) == 3
    names = {}
    for name, figure in sirius.figures(Tables("planted", tmp_path)):
        names[name] = figure
        assert len(figure._repr_png_()[0]) > 5000
    assert set(names) == {"13_trade", "13_text"}
    letters = [text.get_text() for axes in names["13_text"].axes for text in axes.texts]
    assert letters.count("$") == 4 and len(names["13_text"].axes) == 2  # both signs in both texts
    marked = [len(axes.patches) for axes in names["13_text"].axes]
    assert marked == [2, 2]


@pytest.mark.slow  # 40 s: it reads the text of the pinned packages and trains our own model
def test_the_notebook_measures_a_stand_in_and_our_own_model(tmp_path, monkeypatch):
    settings = {"documents": 2, "prompt": 8, "new_tokens": 6, "thresholds": [0.02, 0.1], "rounds": 1, "timed_tokens": 6}
    content = profile_content(write_text(tmp_path / "text")) | {"correction": settings}
    model = write_llama(tmp_path / "tiny_llama", layers=2)
    found = run_notebook("13_sirius", tmp_path, monkeypatch, content, model=str(model))
    assert "Measuring tiny_llama" in found.text and "Measuring relu" in found.text
    assert set(found.verdicts["verdict"]) == {"inconclusive"} and len(found.verdicts) == len(sirius.CLAIMS)
    assert {"13_trade", "13_text"} <= found.figures
