"""Training-free rules measured in pieces: against single measurements, continued, and without a pretrained model."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from small import one_size, profile_content, write_profile, write_text
from tiny_llama import write_llama

from sparsity_utils.console import InputError
from sparsity_utils.models.pretrained import open_checkpoint
from sparsity_utils.neurons.linears import sparse_inputs
from sparsity_utils.sparsity.training_free import TrainingFree
from sparsity_utils.study.makers import training_free
from sparsity_utils.study.opened_models import TrainingFreeConfig
from sparsity_utils.study.plan import TRAINING_FREE_TABLES, planned
from sparsity_utils.study.profiles import read_profile
from sparsity_utils.study.study import Study

SETTINGS = TrainingFreeConfig(
    window=32, calibration_tokens=256, allocation_tokens=64, evaluation_tokens=512, decoder_tokens=64,
    sparsities=(0.5, 0.625), decoder_sparsities=(0.5,), prices=(0.5,), greedy_step=0.25,
)  # fmt: skip
ABOUT = {"model": "tiny", "seed": 0}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A stand-in for SmolLM2, English documents, and the folder of the pieces."""
    folder = tmp_path_factory.mktemp("training_free")
    write_llama(folder / "tiny_llama", layers=2)
    write_text(folder / "english")
    return folder


def opened(here):
    return open_checkpoint(here / "tiny_llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def texts(here):
    return training_free.read_text(opened(here)[1], str(here / "english"), SETTINGS)


def measured(here, texts, model=None, **options):
    model = model or opened(here)[0]
    return training_free.measured(
        ABOUT, model, texts, SETTINGS.sparsities, SETTINGS.prices, SETTINGS, here / "pieces", **options
    )


@pytest.fixture(scope="module")
def tables(here, texts):
    return measured(here, texts)


def test_documents_of_each_text_are_others(here, texts):
    sizes = [len(part["input_ids"]) for (part,) in texts]
    assert sizes == [8, 2, 16] and all(part["input_ids"].shape[1] == 32 for (part,) in texts)
    numbers = [set(part["documents"].tolist()) for (part,) in texts]
    assert set.union(*numbers) == set(range(26)) and sum(map(len, numbers)) == 26
    windows = list(training_free.middle_windows(opened(here)[1], training_free.read_documents(here / "english"), 32))
    for (part,) in texts:
        for number, ids in zip(part["documents"].tolist(), part["input_ids"].tolist(), strict=True):
            assert ids == windows[number]


@pytest.mark.parametrize(
    ("method", "allocation", "by", "level", "rotated"),
    [
        ("teal", "uniform", "sparsity", 0.5, False), ("wina", "uniform", "sparsity", 0.625, False),
        ("teal", "greedy", "sparsity", 0.5, False), ("cats", "uniform", "sparsity", 0.5, False),
        ("wina", "uniform", "weights", 0.5, True), ("n", "cett", "sparsity", 0.5, False),
    ],
)  # fmt: skip
def test_a_row_is_what_its_setting_measures_alone(here, texts, tables, method, allocation, by, level, rotated):
    calibration, allocating, evaluation = texts
    judge = TrainingFree(opened(here)[0], calibration, evaluation, allocating, greedy_step=SETTINGS.greedy_step)
    if method == "n":
        scores = training_free.DownScores(judge.model, judge.texts["calibration"])
        report = judge.at_realised(lambda asked: scores.mask("n", "cett", asked), level)
    elif by == "weights":
        report = judge.at_weights_read(method, level, rotate=rotated)
    elif method == "wina":
        report = judge.at(method, level)
    else:
        greedy = allocation == "greedy"
        report = judge.at_realised(lambda asked: judge.thresholds(method, asked, greedy=greedy), level)
    chosen = "method == @method and allocation == @allocation and by == @by and level == @level and rotated == @rotated"
    (row,) = tables["training_free"].query(chosen).to_dict("records")
    expected = {
        "loss": report.loss_sparse, "loss_dense": report.loss_dense, "excess": report.excess,
        "sparsity": report.sparsity, "weights_read": report.weights_read, "model_read": report.model_read,
        "agreement": report.agreement, "accuracy": report.accuracy_sparse,
    }  # fmt: skip
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-5), name
    by_role = report.maps.groupby("role")["share_read"].mean()
    assert row["skipped"] == pytest.approx(1 - by_role["down"] if method in ("n", "cats") else report.sparsity)
    documents = tables["training_free_documents"].query(chosen)
    assert len(documents) == 16 and documents["tokens"].sum() == 16 * 31
    assert documents["loss"].sum() / 496 == pytest.approx(row["loss"])
    assert documents["agreed"].sum() / 496 == pytest.approx(row["agreement"])


def test_what_is_predicted_and_agreed_on_is_counted_token_by_token(here, texts, tables):
    model, (batch,) = opened(here)[0], texts[2]
    judge = TrainingFree(model, texts[0], texts[2])
    chosen = "method == 'teal' and allocation == 'uniform' and level == 0.5 and by == 'sparsity'"
    asked = tables["training_free"].query(chosen)["calibrated_sparsity"].iloc[0]
    thresholds = judge.thresholds("teal", asked)
    rows = tables["training_free_documents"].query(chosen).set_index("document")
    for number, ids in zip(batch["documents"].tolist(), batch["input_ids"], strict=True):
        with torch.no_grad():
            dense = model(input_ids=ids[None]).logits[0, :-1].argmax(-1)
            with sparse_inputs(model, thresholds):
                sparse = model(input_ids=ids[None]).logits[0, :-1].argmax(-1)
        row = rows.loc[number]
        assert row["right_dense"] == sum(int(a) == int(b) for a, b in zip(dense, ids[1:], strict=True))
        assert row["right"] == sum(int(a) == int(b) for a, b in zip(sparse, ids[1:], strict=True))
        assert row["agreed"] == sum(int(a) == int(b) for a, b in zip(sparse, dense, strict=True))


def test_every_setting_has_a_row_and_equal_sparsities_are_equal(tables):
    table = tables["training_free"]
    assert len(table) == 1 + 2 * (7 + 2 + 9) + 4 + 2 and set(table["model"]) == {"tiny"}
    assert not table.duplicated(["method", "allocation", "rotated", "by", "level"]).any()
    at = table[(table["by"] == "sparsity") & table["note"].isna()]
    top = at[at["method"].isin(["wina", "wina-released", "teal-top-k"])]
    np.testing.assert_allclose(top["sparsity"], top["level"])
    thresholds = at[~at["method"].isin(top["method"]) & (at["allocation"] != "greedy")]
    np.testing.assert_allclose(thresholds["skipped"], thresholds["level"], atol=0.02)  # on so few tokens
    assert (table["rotation_weights"] > 0).sum() == table["rotated"].sum()
    solved = table[table["by"] == "perplexity"]
    assert solved["excess"].notna().any()
    refused = solved[solved["excess"].isna()]
    assert refused["note"].str.contains("does not raise perplexity").all()


def test_blocks_and_theory_have_a_row_each(here, texts, tables, tmp_path):
    blocks = tables["training_free_blocks"].sort_values("layer")
    assert blocks["layer"].tolist() == [0, 1] and (blocks[["uniform", "greedy"]] > 0).all(axis=None)
    sizes = {"q": 24 * 24, "k": 24 * 8, "v": 24 * 8, "o": 24 * 24, "gate": 24 * 64, "up": 24 * 64, "down": 24 * 64}
    mean = sum(blocks[role] * size for role, size in sizes.items()) / sum(sizes.values())
    np.testing.assert_allclose(mean, 0.5, rtol=1e-9)
    theory = tables["training_free_theory"]
    assert theory["check"].value_counts().to_dict() == {"lemma k": 2, "lemma gate": 2}
    assert (theory["identity"] < 1e-12).all() and (theory["violations"] == 0).all()
    decoder = training_free._Work(ABOUT, opened(here)[0], texts, SETTINGS, tmp_path, decoder=True, greedy_to=0.5)
    with torch.no_grad():
        checks = decoder.theory()["check"].value_counts().to_dict()
    assert checks == {"lemma k": 2, "lemma gate": 2, "stack": 2}


def test_a_stopped_measurement_goes_on_where_it_was(here, texts, tables, tmp_path):
    again = measured(here, texts)
    for name in TRAINING_FREE_TABLES:
        pd.testing.assert_frame_equal(again[name], tables[name])
    (folder,) = (here / "pieces").iterdir()
    gone = folder / "teal-greedy-sparsity-0.5"
    gone.rename(tmp_path / gone.name)
    model = opened(here)[0]
    continued = measured(here, texts, model)
    pd.testing.assert_frame_equal(continued["training_free"], tables["training_free"])


def test_other_text_other_weights_and_another_step_are_other_measurements(here, texts):
    model, _ = opened(here)
    keys = {training_free._key(model, texts, SETTINGS), training_free._key(model, texts[::-1], SETTINGS)}
    keys.add(training_free._key(model, texts, replace(SETTINGS, greedy_step=0.125)))
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    keys.add(training_free._key(model, texts, SETTINGS))
    assert len(keys) == 4


def test_too_few_documents_are_an_input_error(here):
    many = replace(SETTINGS, evaluation_tokens=32 * 100)
    with pytest.raises(InputError, match=r"The English text has 40 documents of 32 tokens, and 110 are asked for"):
        training_free.read_text(opened(here)[1], str(here / "english"), many)


def test_too_few_documents_of_the_study_itself_are_one_too(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    study = Study.from_profile(profile_with(tmp_path))
    with pytest.raises(InputError, match=r"The validation text has 8 documents .* lower training_free\.decoder_tokens"):
        training_free.corpus_text(study.corpus, 32, study.profile.training_free)


def profile_with(tmp_path, **changes):
    content = profile_content(write_text(tmp_path / "text"))
    section = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(SETTINGS).items()}
    content["training_free"] = section | changes
    content["study"]["sizes"] = [one_size("8x1", seeds=(0, 1)), one_size("16x2", seeds=(0, 1)), one_size("24x1")]
    return write_profile(tmp_path, content)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"window": 48}, r"training_free\.calibration_tokens is 256 and training_free\.window 48"),
        ({"sparsities": [0.25]}, r"training_free\.sparsities is \[0\.25\]; choose shares .* 0\.5 among them"),
        ({"decoder_sparsities": [0.5, 0.8]}, r"training_free\.decoder_sparsities is \[0\.5, 0\.8\]"),
        ({"prices": [0]}, r"training_free\.prices is \[0\.0\]; choose percentages up to 100"),
        ({"greedy_step": 0}, r"training_free\.greedy_step is 0\.0"),
        ({"decoder_tokens": 0}, r"training_free\.decoder_tokens is 0"),
    ],
)
def test_a_section_that_cannot_be_used_says_so(tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        read_profile(profile_with(tmp_path, **changes))


def test_decoders_are_the_silu_runs_of_the_largest_size_with_most_seeds(tmp_path):
    runs = planned(read_profile(profile_with(tmp_path)), "training_free")
    assert [(model.d_model, model.n_layers, model.activation, train.seed) for model, train in runs] == [
        (16, 2, "silu", 0),
        (16, 2, "silu", 1),
    ]


def test_a_study_measures_its_decoders_and_says_how_to_get_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    study = Study.open("run", profile_with(tmp_path, calibration_tokens=32, allocation_tokens=32), model="", english="")
    assert study.answers("training_free")
    table, theory = study.table("training_free"), study.table("training_free_theory")
    assert "python -m sparsity_utils fetch smollm2 gets it" in capsys.readouterr().out
    assert set(table["model"]) == {"16x2 silu"} and set(table["seed"]) == {0, 1} and len(table) == 2 * 19
    assert set(theory["check"]) == {"stack", "lemma k", "lemma gate"} and "example" in set(theory["model"])
    assert study.table("training_free_documents").empty and len(study.table("training_free_blocks")) == 4
    assert set(study.folder.glob("training_free*.csv*")) == set(map(study.file, TRAINING_FREE_TABLES))
