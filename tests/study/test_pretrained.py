"""A pretrained model measured in pieces: against measurements of single settings, continued, and refused."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from small import profile_content, write_profile, write_text
from tiny_llama import write_llama

from sparsity_utils.console import InputError
from sparsity_utils.models.pretrained import open_checkpoint
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.metrics import apply_thresholds
from sparsity_utils.study.makers import pretrained
from sparsity_utils.study.opened_models import PretrainedConfig
from sparsity_utils.study.plan import PRETRAINED
from sparsity_utils.study.study import Study

SETTINGS = PretrainedConfig(window=32, calibration_tokens=256, evaluation_tokens=512, prices=(1.0, 10.0))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A stand-in for SmolLM2, English documents, and the folder of the pieces."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_llama(folder / "tiny_llama")
    write_text(folder / "english")
    return folder


@pytest.fixture(scope="module")
def settings(here):
    return replace(SETTINGS, model=str(here / "tiny_llama"), english=str(here / "english"))


def opened(settings):
    return open_checkpoint(settings.model, dtype=torch.float32)


@pytest.fixture(scope="module")
def texts(settings):
    return pretrained.read_texts(opened(settings)[1], settings)


@pytest.fixture(scope="module")
def tables(here, settings):
    return pretrained.measured(*opened(settings), settings, here / "pieces")


def solved(here, text, price):
    """The thresholds that were kept for a price."""
    (folder,) = (here / "pieces").iterdir()
    piece = "report-{}/thresholds.csv" if price == 1 else "thresholds-{}-float32/thresholds.csv"
    table = pd.read_csv(folder / piece.format(text)).query("price == @price")
    return table


def test_a_row_of_prices_is_what_its_setting_measures_alone(here, settings, texts, tables):
    (model, _), (english, python) = opened(settings), texts
    prices = tables["pretrained_prices"].query("dtype == 'float32'")
    for text, solved_on, price in ((english, "english", 1), (english, "english", 10), (python, "english", 1)):
        rule = Thresholds("cett", tuple(solved(here, solved_on, price)["threshold"]))
        check_setting(model, text, rule, prices.query("metric == 'cett-ppl' and price == @price"), solved_on)
    for metric in ("top-k", "top-k-norm", "fat"):
        rows = prices.query("metric == @metric and price == 1")
        value = rows.query("text == 'english'")["value"].iloc[0]
        check_setting(model, english, Thresholds(metric, (value,) * 4), rows, "english")


def check_setting(model, text, rule, rows, solved_on):
    """The report of one measurement agrees with the rows of its documents."""
    rows = rows[(rows["text"] == text.name) & (rows["solved_on"] == solved_on)]
    report = apply_thresholds(model, text.evaluation, rule)
    assert len(rows) == report.documents == 16 and rows["tokens"].sum() == 16 * 31
    assert rows["loss_dense"].sum() / rows["tokens"].sum() == pytest.approx(report.loss_dense, rel=1e-6)
    assert rows["loss"].sum() / rows["tokens"].sum() == pytest.approx(report.loss_sparse, rel=1e-6)
    assert rows["activation_ratio"].mean() == pytest.approx(report.activation_ratio, abs=1e-4)


def test_rivals_have_the_activation_ratio_of_cett(tables):
    own = tables["pretrained_prices"].query("dtype == 'float32' and text == solved_on")
    ratios = own.groupby(["text", "price", "metric"])["activation_ratio"].mean().unstack()
    assert len(ratios) == 4 and not ratios.isna().any(axis=None)
    for metric in ("top-k", "top-k-norm"):
        assert ((ratios[metric] - ratios["cett-ppl"]).abs() <= 1 / 64).all()  # whole neurons of 64
    assert ((ratios["fat"] - ratios["cett-ppl"]).abs() < 0.002).all()


def test_what_the_dense_model_predicts_is_counted_token_by_token(settings, texts, tables):
    (model, _), (english, _) = opened(settings), texts
    right = {}
    for batch in english.evaluation:
        for ids, document in zip(batch["input_ids"], batch["documents"].tolist(), strict=True):
            with torch.no_grad():
                likeliest = model(input_ids=ids[None]).logits[0].argmax(-1)
            right[document] = sum(int(likeliest[place]) == int(ids[place + 1]) for place in range(31))
    rows = tables["pretrained_prices"].query(
        "text == 'english' and dtype == 'float32' and metric == 'fat' and price == 1"
    )
    assert dict(zip(rows["document"], rows["right_dense"], strict=True)) == right
    assert (rows["agreed"] <= rows["tokens"]).all() and rows["agreed"].sum() > 0


def test_the_report_has_the_model_and_its_interval(settings, tables):
    table = tables["pretrained"].set_index("text")
    assert set(table["model"]) == {"tiny_llama"} and set(table["documents"]) == {16} and set(table["tokens"]) == {512}
    assert table["source"].to_dict() == {"english": "english", "python": "source of pinned packages"}
    assert table["opened"].str.startswith("LlamaForCausalLM, ").all() and set(table["dtype"]) == {"float32"}
    assert (table["low"] <= table["activation_ratio"]).all() and (table["activation_ratio"] <= table["high"]).all()
    hidden, layers, d_ff = 24, 4, 64
    assert set(table["parameters"]) == {
        layers * (2 * hidden**2 + 2 * hidden * 8 + 3 * hidden * d_ff + 2 * hidden) + hidden
    }
    positions = tables["pretrained_positions"]
    sums = positions.assign(active=positions["tokens"] * positions["activation_ratio"]).groupby("text")
    ratios = sums["active"].sum() / sums["tokens"].sum()
    np.testing.assert_allclose(ratios, table["activation_ratio"].sort_index(), rtol=1e-6)


def test_a_stopped_measurement_goes_on_where_it_was(here, settings, tables, tmp_path, monkeypatch):
    pieces = here / "pieces"
    again = pretrained.measured(*opened(settings), settings, pieces)
    for name in PRETRAINED:
        pd.testing.assert_frame_equal(again[name], tables[name])
    (folder,) = pieces.iterdir()
    gone = folder / "sparse-python-float32-fat-10-python"
    gone.rename(tmp_path / gone.name)
    model, tokenizer = opened(settings)
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    continued = pretrained.measured(model, tokenizer, settings, pieces)
    assert len(passes) <= math.ceil(16 * 32 / pretrained.BATCH_TOKENS) + 1  # the one piece, and a look at the FFNs
    pd.testing.assert_frame_equal(continued["pretrained_prices"], tables["pretrained_prices"])


def test_other_settings_and_other_text_are_other_measurements(settings, texts):
    model, _ = opened(settings)
    keys = {pretrained._key(model, texts, settings), pretrained._key(model, texts, replace(settings, prices=(1.0,)))}
    keys.add(pretrained._key(model, texts[::-1], settings))
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    keys.add(pretrained._key(model, texts, settings))
    assert len(keys) == 4


def test_one_window_of_each_document_from_its_middle(settings):
    _, tokenizer = opened(settings)
    documents = [" ".join(str(number) for number in range(start, start + 200)) for start in (0, 1000)]
    windows = list(pretrained.middle_windows(tokenizer, [documents[0], "short", documents[1]], 32))
    ids = tokenizer(documents[0])["input_ids"]
    assert len(windows) == 2 and windows[0] in [
        ids[start : start + 32] for start in range(len(ids) // 3, len(ids) // 2)
    ]


def test_too_few_documents_are_an_input_error(settings):
    _, tokenizer = opened(settings)
    many = replace(settings, evaluation_tokens=32 * 100)
    with pytest.raises(InputError, match=r"The english text has 40 documents of 32 tokens, and 108 are asked for"):
        pretrained.read_texts(tokenizer, many)


@pytest.mark.parametrize(
    ("token", "known"),
    [
        *((".", True), (" .", True), ("\n", True), ("\n\n    ", True), (" \n", True)),
        *(("..", False), ("   ", False), (",", False), ("a.\n", False), ("", False)),
    ],
)
def test_delimiters_are_full_stops_and_line_breaks(token, known):
    assert pretrained.is_delimiter(token) == known


def test_classes_of_positions():
    ids = [5, 7, 5, 5, 9, 7, 5, 7]  # 7 is a delimiter; the first token never counts as one
    ratios = np.arange(8) / 10
    table = pd.DataFrame({"document": 3, "position": range(8), "token_id": ids, "layer_0": ratios, "layer_1": 1.0})
    found = pretrained.positions(table, np.array([number == 7 for number in range(10)]))
    assert set(found["layer"]) == {0, 1} and (found.query("layer == 1")["activation_ratio"] == 1).all()
    first = found.query("layer == 0").set_index("position")
    assert first["tokens"].to_dict() == {"first": 1, "first delimiter": 1, "delimiter": 2, "early": 2, "other": 2}
    expected = {"first": 0.0, "first delimiter": 0.1, "delimiter": 0.6, "early": 0.25, "other": 0.5}
    assert first["activation_ratio"].to_dict() == pytest.approx(expected)


def test_a_study_without_the_model_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    study = Study.open("run", write_profile(tmp_path, profile_content(tmp_path)), model="", english="")
    assert not study.answers("pretrained") and study.table_or_none("pretrained") is None
    assert "python -m sparsity_utils fetch smollm2 gets it" in capsys.readouterr().out
    assert study.kept("pretrained") is None  # and it is not asked for
    with pytest.raises(InputError, match="smollm2 is not here"):
        study.table("pretrained")
    assert study.jobs(*PRETRAINED) == []


def test_a_study_keeps_the_tables_of_the_model_that_was_named(here, settings, tables, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    content = profile_content(tmp_path) | {
        "pretrained": {"window": 32, "calibration_tokens": 256, "evaluation_tokens": 512, "prices": [1, 10]}
    }
    profile = write_profile(tmp_path, content)
    study = Study.open("run", profile, model=settings.model, english=settings.english)
    table = study.table("pretrained_positions")
    assert (study.folder / "pretrained_positions.csv.gz").exists()
    pd.testing.assert_frame_equal(table, tables["pretrained_positions"], rtol=1e-6)
