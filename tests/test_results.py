"""The recorded study: complete, described, drawn; and the commands that write it."""

import json
import re
import shutil
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from small import profile_content, write_profile, write_text

from sparsity_utils import measure_sparsity, paths
from sparsity_utils.commands import record
from sparsity_utils.commands.figures import draw, draw_all, draw_verdicts
from sparsity_utils.commands.measure import window_length
from sparsity_utils.console import InputError
from sparsity_utils.findings import (
    activation_patterns,
    dead_neurons,
    design_a_sparse_model,
    digits,
    initial_gradient,
    lazy_neuron,
    metrics,
    one_dimension,
    power,
    pretrained_model,
    published_curves,
    q_sparse,
    quickstart,
    relu_vs_silu,
    scale_insensitivity,
    sirius,
    sparse_decoding,
    training_free,
    width_depth_ratio,
)
from sparsity_utils.findings.claims import Verdicts
from sparsity_utils.laws import refit
from sparsity_utils.laws.design import CURVES, joined
from sparsity_utils.laws.holdout import held_out
from sparsity_utils.laws.published import PUBLISHED_LAWS
from sparsity_utils.models.pretrained import load_weights
from sparsity_utils.paths import collection
from sparsity_utils.study.plan import COVERING, OF_MODELS, PRETRAINED, PUBLISHED_TABLES, QUESTIONS, SCHEMA, planned
from sparsity_utils.study.profiles import read_profile
from sparsity_utils.study.schedule import run_session
from sparsity_utils.study.study import MAKERS, Study
from sparsity_utils.text.sources import package_documents
from sparsity_utils.text.windows import split_documents, text_batches

RECORDED = paths.RESULTS
COLUMNS = pd.read_csv(paths.RESULTS / "columns.csv")
NOTEBOOKS = paths.NOTEBOOKS
OF_12 = ("q_sparse", "q_sparse_sizes", "equal_active", "gradient_flow")  # tables that the claims of notebook 12 rest on
NUMBER = re.compile(r"-?\d+\.\d+")  # in an SVG
TABLES = {file.name.partition(".")[0]: file for file in sorted(paths.RESULTS.glob("*.csv*"))}
TABLES.pop("columns")


@pytest.mark.parametrize("name", TABLES)
def test_every_column_is_described(name):
    file, described = TABLES[name], COLUMNS[COLUMNS["table"] == name]
    assert list(described["column"]) == list(pd.read_csv(file, nrows=1).columns)
    assert described["meaning"].str.len().min() > 10


def test_the_dictionary_describes_nothing_that_is_not_there():
    answers = {question.file.partition(".")[0] for question in QUESTIONS.values()}  # no profile need have them all
    simulated = {"deciding", "power_reached"}  # of a study whose runs tell what they vary by
    assert set(COLUMNS["table"]) == set(TABLES) | answers | simulated


def test_the_recorded_study_stays_small():
    files = [file for file in paths.RESULTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12_000_000


def test_the_manifest_fits_the_tables():
    manifest = json.loads((paths.RESULTS / "manifest.json").read_text())
    table = Study.recorded().table("relu_vs_silu")
    study = manifest["profile"]["study"]
    assert manifest["schema"] == SCHEMA and manifest["device"]
    assert {f"{row.d_model}x{row.n_layers}" for row in table.itertuples()} == {size["shape"] for size in study["sizes"]}
    seeds = {seed for size in study["sizes"] for seed in size["seeds"]}
    assert set(table["activation"]) == set(study["activations"]) and set(table["seed"]) == seeds


def test_the_power_of_the_second_study_is_that_of_its_design():
    """The effects, runs and sizes that the recorded table names; its shares come from many more draws."""
    profile, stored = read_profile("long"), pd.read_csv(paths.RESULTS / "power.csv")
    designs = {name: planned(profile, name) for name in (*power.LINES, "width_depth_ratio", "one_dimension")}
    few = power.simulated(designs, pd.read_csv(paths.RESULTS / "power_inputs.csv"), draws=2)
    about = ["question", "claim", "rank", "effect", "value", "unit", "runs", "sizes"]
    pd.testing.assert_frame_equal(few[about], stored[about], rtol=1e-4)
    shares = stored[["supported", "not_supported", "inconclusive"]]
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
    assert (stored.query("effect == 'zero' or effect == 'margin'")["not_supported"] < 0.11).mean() > 0.9


def test_the_recorded_runs_are_those_of_the_archive():
    study, manifest = Study.recorded(), json.loads((paths.RESULTS / "manifest.json").read_text())
    named = {run for question in COVERING if study.answers(question) for run in study.table(question)["run"]}
    archived = {file.stem for file in (paths.RESULTS / "runs").glob("*.zip")}
    training = manifest["training"]
    assert named <= archived and len(archived) == training["runs"]
    assert len(named) == training["runs"] - training["diverged"]


def test_the_recorded_verdicts_follow_from_the_tables():
    study = Study.recorded()
    table, second = study.table, study.table("second_line")
    neurons, tokens = table("activation_patterns"), table("token_patterns")
    held = held_out(joined(map(table, filter(study.answers, CURVES))))
    found = Verdicts(
        [
            *metrics.verdicts(table("metrics")),
            *relu_vs_silu.verdicts(relu_vs_silu.analyse(table("relu_vs_silu"), second)),
            *width_depth_ratio.verdicts(width_depth_ratio.analyse(table("width_depth_ratio"))),
            *scale_insensitivity.verdicts(scale_insensitivity.analyse(table("scale_insensitivity"), second)),
            *activation_patterns.verdicts(
                activation_patterns.likeness(neurons, tokens),
                dead_neurons.curves_of(table("dead_neurons")),
                table("transfer"),
            ),
            *sparse_decoding.verdicts(table("sparse_ffn"), table("sparse_decoding")),
            *published_curves.verdicts(*map(table, PUBLISHED_TABLES)),
            *design_a_sparse_model.verdicts(held),
            *pretrained_model.verdicts(pretrained_model.analyse(study)),
            *training_free.verdicts(training_free.analyse(study, table("training_free"))),
            *lazy_neuron.verdicts(lazy_neuron.analyse(table("lazy_neuron"), study.table_or_none("one_dimension"))),
            *initial_gradient.verdicts(initial_gradient.analyse()),
            *one_dimension.of_study(study),
            *digits.verdicts(table("digits")),
            *q_sparse.verdicts(q_sparse.analyse(*map(table, OF_12))),
            *sirius.verdicts(sirius.analyse(study, table("correction"))),
        ]
    )
    stored = pd.read_csv(paths.RESULTS / "verdicts.csv", keep_default_na=False).drop(columns=["minutes", "notebook"])
    judged = found.table()
    from_tables = stored[stored["question"].isin(judged["question"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(judged, from_tables)
    assert set(stored["question"]) - set(judged["question"]) == set(quickstart.claims()["question"])


def test_the_recorded_verdict_on_the_price_follows_from_the_model():
    model, tokenizer = Study.recorded().trained_model("relu")
    batches = text_batches(tokenizer, package_documents("mistune"), window_length(model))
    calibration, evaluation = split_documents(batches)
    (row,) = quickstart.verdicts(measure_sparsity(model, evaluation, calibration=calibration))
    stored = pd.read_csv(paths.RESULTS / "verdicts.csv").set_index("question").loc[row.claim.claim]
    assert stored["verdict"] == row.verdict
    assert float(stored["here"].split()[0]) == pytest.approx(row.here, abs=0.03)  # it may move a little by machine


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_the_recorded_models_are_those_of_the_table(activation):
    from tokenizers import Tokenizer

    folder = paths.RECORDED_MODELS / activation
    assert (folder / "model.safetensors").stat().st_size < 2_000_000
    model = load_weights(folder)
    assert model.config.hidden_act == activation
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == model.config.vocab_size
    ids = torch.tensor(
        [tokenizer.encode("def add(a, b):\n    return a + b\n\n\ndef main():\n    print(add(1, 2))\n").ids]
    )
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 5.0  # untrained: ln 1024 = 6.9
    table = Study.recorded().table("relu_vs_silu").query("activation == @activation")
    assert (table["d_model"].max(), table["n_layers"].max()) == (
        model.config.hidden_size,
        model.config.num_hidden_layers,
    )


def test_the_tables_of_the_published_curves_are_those_of_the_refit():
    assert tuple(refit.TABLES) == PUBLISHED_TABLES
    curves = [
        set(zip(table["activation"], table["model"], strict=True))
        for table in map(Study.recorded().table, PUBLISHED_TABLES)
    ]
    assert all(found == {(law.activation, law.model) for law in PUBLISHED_LAWS} for found in curves)


class ReadOnce(Study):
    """A recorded study that hands out the same tables every time, so that a figure which changes one is caught."""

    def table(self, question):
        if question not in self.tables:
            self.tables[question] = super().table(question)
        return self.tables[question]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """All figures of the recorded study, drawn twice from the same tables."""
    study = ReadOnce("recorded", paths.RESULTS, None)
    study.tables = {}
    folders = [tmp_path_factory.mktemp(f"figures{turn}") for turn in (1, 2)]
    for folder, notebook in product(folders, collection()):
        draw(notebook.stem.partition("_")[2], study, folder)
    for folder in folders:
        draw_verdicts(paths.RESULTS / "verdicts.csv", folder)
    return folders


def test_a_figure_is_a_pure_function_of_its_tables(drawn):
    first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in drawn)
    assert first == second and min(map(len, first.values())) > 5_000
    assert not plt.get_fignums()


def test_the_committed_figures_are_those_of_the_tables(drawn):
    names = {file.name for file in drawn[0].iterdir()}
    assert names == {file.name for file in paths.FIGURES.iterdir()}
    for name in sorted(names):
        committed, fresh = (folder / name for folder in (paths.FIGURES, drawn[0]))
        if name.endswith(".png"):  # the same picture, in a table's and a processor's last digits
            was, now = map(plt.imread, (committed, fresh))
            assert was.shape == now.shape and abs(was - now).mean() < 0.002, name
        else:
            (was, at), (now, to) = (NUMBER.subn("#", file.read_text()) for file in (committed, fresh))
            assert (was, at) == (now, to), name


def check_kept(profile, study, shelf):
    """A notebook on a pretrained model stays as it is recorded, with its tables; nothing else does."""
    (shelf / "02_relu_vs_silu.ipynb").touch()
    with pytest.raises(InputError, match=r"02_relu_vs_silu rests on runs of the study and cannot be kept"):
        list(record.record(profile, ["02"]))
    (shelf / "02_relu_vs_silu.ipynb").unlink()
    notebooks = [shelf / "09_pretrained_model.ipynb", shelf / "10_training_free.ipynb"]
    notebooks[0].touch()
    with pytest.raises(InputError, match=r"no recorded verdicts of 09_pretrained_model to keep"):
        list(record.record(profile, ["09"]))
    for file in (*map(study.file, OF_MODELS), study.folder / "verdicts.csv"):
        shutil.copy(RECORDED / file.name, paths.RESULTS)
    tables = [study.file(question).name for question in PRETRAINED]
    study.file(PRETRAINED[0]).write_text("measured before, and not what the verdicts rest on")
    assert not set(record.record(profile, ["9"])) & {paths.RESULTS / name for name in tables}
    there = {file.name for file in paths.RESULTS.glob("*.csv*")} & {study.file(name).name for name in OF_MODELS}
    assert there == set(tables)
    assert all((paths.RESULTS / name).read_bytes() == (RECORDED / name).read_bytes() for name in tables)
    stored = pd.read_csv(RECORDED / "verdicts.csv", dtype=str, keep_default_na=False)
    kept = pd.read_csv(paths.RESULTS / "verdicts.csv", dtype=str, keep_default_na=False)
    expected = stored[stored["notebook"] == "09_pretrained_model"].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, expected)
    assert json.loads((paths.RESULTS / "manifest.json").read_text())["kept"] == ["09_pretrained_model"]
    notebooks[1].touch()
    shutil.copy(RECORDED / "training_free.csv", paths.RESULTS)
    with pytest.raises(InputError, match=r"training_free\.csv holds 32x4 silu seed 10, which is no run of this study"):
        list(record.record(profile, ["09", "10"]))


def test_a_tiny_study_is_drawn_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    for name in ("RESULTS", "RECORDED_MODELS"):
        monkeypatch.setattr(paths, name, tmp_path / "results" / ("" if name == "RESULTS" else "models"))
    shelf = tmp_path / "notebooks"
    shelf.mkdir()
    monkeypatch.setattr(paths, "NOTEBOOKS", shelf)
    profile = write_profile(tmp_path, profile_content(write_text(tmp_path / "text")))
    with pytest.raises(InputError, match=r"no verdicts\.csv of profile tiny; run make reproduce"):
        list(record.record(profile))
    study = Study.from_profile(profile)
    (study.folder.parent).mkdir(parents=True)
    (study.folder.parent / "verdicts.csv").write_text("question,published,here,interval,verdict,minutes,notebook\n")
    (shelf / "02_left_out.ipynb").touch()
    with pytest.raises(InputError, match=r"verdicts\.csv of profile tiny lacks 02_left_out; reproduce all notebooks"):
        list(record.record(profile))
    (shelf / "02_left_out.ipynb").unlink()
    with pytest.raises(InputError, match=r"6 runs of profile tiny are not done, such as 8x1 relu seed 0; run make"):
        list(record.record(profile))
    assert run_session(study, minutes=10) == ""
    fewer = study.table("relu_vs_silu").query("d_model != 16")  # as if a size had been added
    fewer.to_csv(study.file("relu_vs_silu"), index=False)
    with pytest.raises(InputError, match=r"relu_vs_silu\.csv is not of the runs that profile tiny asks for"):
        list(record.record(profile))
    study.file("relu_vs_silu").unlink()
    with pytest.raises(InputError, match=r"sparse_ffn\.csv of profile tiny is not measured; run make reproduce"):
        list(record.record(profile))
    for question in filter(study.answers, set(MAKERS) - set(OF_MODELS)):
        study.table(question)
    left_out = [QUESTIONS[question].file for question in ("equal_active", "pretrained")]
    (tmp_path / "results").mkdir()
    for file in (*left_out, "power.csv"):
        (tmp_path / "results" / file).write_text("of the study before")
    written = {str(file.relative_to(tmp_path / "results")) for file in record.record(profile)}
    models = {
        f"models/{a}/{f}" for a in ("relu", "silu") for f in ("config.json", "model.safetensors", "tokenizer.json")
    }
    own = [question for question in QUESTIONS if study.answers(question) and question not in OF_MODELS]
    tables = {QUESTIONS[question].file for question in own}  # of models: what a notebook left, and none ran here
    assert written == {*tables, "verdicts.csv", "manifest.json"} | models
    there = {str(file.relative_to(tmp_path / "results")) for file in (tmp_path / "results").rglob("*.*")}
    assert there == written | {"power.csv"} and not written & set(left_out)  # power.csv is of no study's tables
    assert load_weights(paths.RECORDED_MODELS / "silu").config.hidden_size == 16  # the largest
    training = json.loads((paths.RESULTS / "manifest.json").read_text())["training"]
    assert (training["runs"], training["diverged"], training["parameters"]) == (6, 0, [736, 5888])
    assert training["tokens"] > 6 * 5000 and training["run_hours"] >= 0
    assert str(tmp_path) not in (paths.RESULTS / "manifest.json").read_text()  # no path of this machine travels
    monkeypatch.setattr(paths, "NOTEBOOKS", NOTEBOOKS)
    with pytest.raises(InputError, match=r"figures holds no tables; name the folder that has results/"):
        list(draw_all(tmp_path / "figures", tmp_path / "figures"))
    figures = {file.stem for file in draw_all(tmp_path / "results", tmp_path / "figures")}
    assert {"02_relu_vs_silu", "verdicts"} <= figures and figures == {
        file.stem for file in (tmp_path / "figures").iterdir()
    }
    monkeypatch.setattr(paths, "NOTEBOOKS", shelf)
    check_kept(profile, study, shelf)
