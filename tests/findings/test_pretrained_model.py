"""Verdicts on a pretrained model, on tables whose answers are planted; its notebook, with a stand-in and without."""

import pandas as pd
import pytest
from notebook_runs import run_notebook
from planted import check_stated
from planted_pretrained import positions_table, pretrained_table, prices_table
from small import profile_content, write_text
from tiny_llama import write_llama

from sparsity_utils.console import InputError
from sparsity_utils.findings import pretrained_figures, pretrained_model
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED
from sparsity_utils.study.tables import Tables, write_table


def analysed(tmp_path, prices=None, positions=None, table=None):
    """What follows from planted tables, stored and read as a study's."""
    stored = {"pretrained": table, "pretrained_prices": prices, "pretrained_positions": positions}
    defaults = {
        "pretrained": pretrained_table,
        "pretrained_prices": prices_table,
        "pretrained_positions": positions_table,
    }
    for name, given in stored.items():
        write_table(defaults[name]() if given is None else given, Tables("planted", tmp_path).file(name))
    return pretrained_model.analyse(Tables("planted", tmp_path))


def words(found):
    return {row.claim.key: row.verdict for row in pretrained_model.verdicts(found)}


def test_every_claim_holds_where_it_was_planted(tmp_path):
    expected = dict.fromkeys((claim.key for claim in pretrained_model.CLAIMS), SUPPORTED)
    found = words(analysed(tmp_path))
    assert found == expected | {"first_delimiter": NOT_SUPPORTED}  # planted for the first token alone


@pytest.mark.parametrize(
    ("changes", "refuted"),
    [
        ({"prices": prices_table(gap=-0.02)}, {"cett_lowest", "score", "allocation"}),
        ({"prices": prices_table(crossed=0.05)}, {"transfer"}),
        ({"prices": prices_table(dtype_shift=-0.03)}, {"bfloat16"}),
        ({"positions": positions_table(quotient=0.9)}, {"first_token"}),
        ({"positions": positions_table(ends=-0.1)}, {"layer_ends"}),
    ],
)
def test_what_is_planted_against_a_claim_refutes_it_alone(tmp_path, changes, refuted):
    found = words(analysed(tmp_path, **changes))
    assert {key for key, word in found.items() if word == NOT_SUPPORTED} == refuted | {"first_delimiter"}


def test_few_tokens_decide_nothing_on_losses_and_few_documents_nothing_on_layers(tmp_path):
    few = words(analysed(tmp_path, prices=prices_table(tokens=600)))
    on_losses = {"cett_lowest", "score", "allocation", "agreement", "accuracy", "price_paid", "transfer"}
    assert {key for key, word in few.items() if word == INCONCLUSIVE} == on_losses
    positions = positions_table(documents=16)
    halves = words(analysed(tmp_path, positions=positions))
    assert {key for key, word in halves.items() if word == INCONCLUSIVE} == {"first_token", "first_delimiter"}
    details = pretrained_model.verdicts(analysed(tmp_path, positions=positions)).details().set_index("question")
    assert "fewer than 12 documents" in details.loc[pretrained_model.FIRST_TOKEN.claim, "reason"]


def test_without_tables_every_claim_is_inconclusive(tmp_path, capsys):
    found = pretrained_model.analyse(Tables("empty", tmp_path))
    assert found is None and "has no table for pretrained" in capsys.readouterr().out
    assert set(words(found).values()) == {INCONCLUSIVE}
    assert list(pretrained_model.figures(Tables("empty", tmp_path))) == []


def test_claims_are_stated_before_their_verdicts(tmp_path):
    check_stated(pretrained_model, pretrained_model.verdicts(analysed(tmp_path)))


def test_tables_and_figures_show_what_was_found(tmp_path):
    found = analysed(tmp_path)
    line = Tables.recorded().table("relu_vs_silu")
    beside = pretrained_figures.beside(found.table, line)
    assert beside["parameters"].is_monotonic_increasing
    assert (beside["model"] == "published limit").sum() == 5 and (beside["model"] == "planted").sum() == 2
    prices = pretrained_figures.price_table(found)
    assert prices.index.tolist() == [(text, p) for text in ("english", "python") for p in (1.0, 10.0)]
    assert prices.loc[("english", 1.0), "accuracy lost, points"] == "0.20 (0.20 to 0.20)"
    rivals = pretrained_figures.rivals_table(found)["rise"]
    assert set(rivals) == {"CETT-PPL", "Top-k", "FAT-ε", "Top-k of ‖n‖"} and (rivals["FAT-ε"] > rivals["Top-k"]).all()
    bands = pretrained_figures.band_table(found).set_index(["position", "text"])
    assert bands.loc[("first", "python"), "band of layers"] == "3 to 6"
    assert bands.loc[("first delimiter", "english"), "band of layers"] == "none"
    drawn = dict(pretrained_model.figures(Tables("planted", tmp_path)))
    assert [len(figure.axes) for figure in drawn.values()] == [1, 2, 3, 4]
    assert all(len(figure._repr_png_()[0]) > 5_000 for figure in drawn.values())


def test_an_unusable_table_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="pretrained_prices table has two rows for text english"):
        analysed(tmp_path, prices=pd.concat([prices_table(), prices_table()]))
    with pytest.raises(InputError, match="pretrained_positions table lacks the columns tokens"):
        analysed(tmp_path, positions=positions_table().drop(columns="tokens"))


def run(tmp_path, monkeypatch, **parameters):
    content = profile_content(tmp_path) | {
        "pretrained": {"window": 32, "calibration_tokens": 256, "evaluation_tokens": 512, "prices": [1]}
    }
    return run_notebook("09_pretrained_model", tmp_path, monkeypatch, content, **parameters)


def test_the_notebook_measures_a_stand_in(tmp_path, monkeypatch):
    model, english = write_llama(tmp_path / "tiny_llama"), write_text(tmp_path / "english")
    found = run(tmp_path, monkeypatch, model=str(model), english=str(english))
    assert "Measuring tiny_llama" in found.text and "not measured" not in found.text
    assert len(found.verdicts) == len(pretrained_model.CLAIMS)
    assert found.figures == {"09_activation_ratio", "09_layers", "09_positions", "09_metrics"}
    judged = found.verdicts.set_index("question")["verdict"]
    assert judged[pretrained_model.TRANSFER.claim] == INCONCLUSIVE and judged[pretrained_model.LAYER_ENDS.claim]


def test_the_notebook_without_the_model_says_how_to_get_it(tmp_path, monkeypatch):
    found = run(tmp_path, monkeypatch)
    assert "smollm2 is not here, so nothing is measured: python -m sparsity_utils fetch smollm2 gets it" in found.text
    assert set(found.verdicts["verdict"]) == {INCONCLUSIVE} and not found.figures
