"""Speeds of decoding with skipped inputs: every way judged by the masked model's text, bytes counted, pieces kept."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from small import write_text

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.decoding.masked_text import MaskedText
from sparsity_utils.models.pretrained import load_weights
from sparsity_utils.study.makers import input_settings, input_speeds
from sparsity_utils.study.opened_models import InputSpeedConfig, PretrainedConfig

SETTINGS = InputSpeedConfig(
    models=("silu",), rules=("teal", "wina", "cats", "cett"), sparsities=(0.4,), prices=(5.0,), window=32,
    calibration_tokens=128, evaluation_tokens=64, prompt=20, new_tokens=4, rounds=2,
)  # fmt: skip
WHOLE = input_speeds.WHOLE


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Documents, and the folder of the pieces."""
    folder = tmp_path_factory.mktemp("input_speeds")
    write_text(folder / "english")
    return folder


def measured(here, **changes):
    pretrained = PretrainedConfig(english=str(here / "english"))
    return input_speeds.input_speeds(replace(SETTINGS, **changes), pretrained, here / "pieces")


@pytest.fixture(scope="module")
def table(here):
    return measured(here)


def test_one_row_for_each_way(table):
    kernels = table[table["engine"] == "kernels"]
    found = kernels.groupby(["rule", "setting"]).size().to_dict()
    assert len(table) == 2 + 4 + 4 * 4 + 3 * 2 and list(table["weights"][:2]) == ["float32", "bfloat16"]
    assert found["teal", "40%"] == found["wina", "5% of perplexity"] == 4  # float32 and 8 bits, both heads
    assert found["cats", "40%"] == found["cett", "5% of perplexity"] == 2
    assert (table["wrong"] == 0).all() and (table["tokens_per_second"] > 0).all()
    assert not table.duplicated(["engine", "rule", "setting", "weights", "head"]).any()


def test_bytes_are_those_of_the_weights_that_are_read(table):
    model = load_weights(paths.RECORDED_MODELS / "silu")
    every = sum(parameter.numel() for parameter in model.parameters())
    word, tied = model.config.hidden_size, model.lm_head.weight is model.model.embed_tokens.weight
    assert tied
    rows = table.set_index(["engine", "rule", "setting", "weights", "head"])
    assert rows.loc[("transformers", WHOLE, "", "float32", "full"), "megabytes"] == pytest.approx(
        4 * (every + word) / 1e6
    )
    half = rows.loc[("transformers", WHOLE, "", "bfloat16", "full"), "megabytes"]
    assert half == pytest.approx(2 * (every + word) / 1e6, rel=1e-3)
    wina = rows.sort_index().loc["kernels", "wina", "40%"]
    assert set(wina["read_share"]) == {19 / 32}  # the nearest that all widths can meet
    certified, full = wina.loc[("float32", "certified"), "megabytes"], wina.loc[("float32", "full"), "megabytes"]
    assert certified < full < rows.loc[("kernels", WHOLE, "", "float32", "full"), "megabytes"]


def test_no_speed_where_a_wrong_word_is_chosen(here, table, monkeypatch):
    monkeypatch.setattr(MaskedText, "differing", lambda text, words: (3, 2) if min(text.read) < 0.9 else (0, 0))
    again = measured(here)
    wrong = again["read_share"] < 0.8
    assert wrong.any() and again.loc[wrong, ["tokens_per_second", "prompt_tokens_per_second", "speedup"]].isna().all(
        axis=None
    )
    assert again.loc[~again["rule"].isin(["teal", "wina", "cats", "cett"]), "tokens_per_second"].notna().all()


def test_thresholds_and_texts_are_kept_and_rounds_go_on(here, table, monkeypatch):
    monkeypatch.setattr(input_settings, "TrainingFree", lambda *given: None)  # nothing is solved again
    times, way_timed = [], input_speeds.Way.timed

    def killed(way, prompt, words=None):
        times.append(way)
        if len(times) == 28 + 28 + 5:  # warmed, the first round, and a part of the second
            raise KeyboardInterrupt
        return way_timed(way, prompt, words)

    monkeypatch.setattr(input_speeds.Way, "timed", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(here)
    times.clear()
    again = measured(here)
    assert len(times) == 28 + 28  # warmed, and the second round
    same = ["engine", "rule", "setting", "weights", "head", "sparsity", "read_share", "megabytes", "rounding"]
    assert again[same].equals(table[same])
    assert not list((here / "pieces").glob("*/rounds*/*"))


def test_a_model_that_was_not_fetched_is_named(here, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path))
    with pytest.raises(InputError, match="python -m sparsity_utils fetch smollm2"):
        measured(here, models=("smollm2",))


def test_impossible_settings_are_refused():
    for changes, match in (
        ({"rules": ("teel",)}, "input_speeds.rules has 'teel'"),
        ({"sparsities": (1.5,)}, "input_speeds.sparsities"),
        ({"prices": (0.0,)}, "input_speeds.prices"),
        ({"new_tokens": 1}, "input_speeds.new_tokens is 1; at least 2"),
    ):
        with pytest.raises(InputError, match=match):
            replace(SETTINGS, **changes)


def test_the_model_of_an_activation_function_that_a_study_trains_is_its_own(here, monkeypatch):
    asked = SimpleNamespace(
        profile=SimpleNamespace(
            study=SimpleNamespace(activations=("relu",)),
            input_speeds=replace(SETTINGS, models=("relu", "silu")),
            pretrained=PretrainedConfig(),
        ),
        output=here,
        trained_model=lambda activation: f"our own {activation}",
    )
    monkeypatch.setattr(input_speeds, "opened_here", lambda name: f"{name} of the record")
    monkeypatch.setattr(input_speeds, "input_speeds", lambda settings, *others: [*map(others[-1], settings.models)])
    (maker,) = input_speeds.MAKERS
    assert maker.make(asked) == {"input_speeds": ["our own relu", "silu of the record"]}
    assert maker.missing(asked.profile) == ""
