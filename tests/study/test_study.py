"""The study: the runs of each question, interruption, divergence, recorded tables, the command line."""

import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small import one_size, profile_content, write_profile, write_text

from sparsity_utils import paths
from sparsity_utils.__main__ import main
from sparsity_utils.console import InputError
from sparsity_utils.study.plan import OF_MODELS, QUESTIONS, SPEEDS
from sparsity_utils.study.schedule import run_session
from sparsity_utils.study.study import MAKERS, Study
from sparsity_utils.study.tables import read_table, write_table


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def built(tmp_path_factory, text):
    """A store with the tiny study in it, computed once for this file."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSITY_BUILD", str(folder / "build"))
        study = Study.from_profile(write_profile(folder, profile_content(text)))
        assert run_session(study, minutes=10) == ""  # all runs in one go
        tables = {
            question: study.table(question)
            for question in set(QUESTIONS) - {*SPEEDS, *OF_MODELS}
            if study.configs(question)
        }
        yield study, tables


def test_each_question_gets_the_runs_it_needs(built):
    _study, tables = built
    assert {(row.d_model, row.activation) for row in tables["relu_vs_silu"].itertuples()} == {
        (8, "relu"),
        (8, "silu"),
        (16, "relu"),
        (16, "silu"),
    }
    assert {(row.d_model, row.n_layers) for row in tables["width_depth_ratio"].itertuples()} == {(16, 1), (8, 4)}
    pd.testing.assert_frame_equal(tables["scale_insensitivity"], tables["relu_vs_silu"])
    assert set(tables["metrics"]["metric"]) == {"relu", "top-k", "fat", "cett", "cett-ppl"}
    assert set(tables["metrics"]["role"]) == {"stable"}


def test_a_curve_has_one_stabilised_cett_per_run(built):
    _, tables = built
    table = tables["relu_vs_silu"]
    assert (table.groupby("run")["cett"].nunique() == 1).all()
    assert table["activation_ratio"].between(0, 1).all() and table["nonzero_share"].between(0, 1).all()
    assert (table[table["activation"] == "silu"]["nonzero_share"] > 0.999).all()
    assert table.duplicated(["run", "step"]).sum() == 0 and table.notna().all().all()


def test_the_model_that_stands_for_an_activation_is_the_largest_after_its_decay(built):
    study, tables = built
    model, tokenizer = study.trained_model("silu")
    assert (model.config.hidden_size, model.config.hidden_act, model.training) == (16, "silu", False)
    rows = tables["relu_vs_silu"].query("activation == 'silu' and d_model == 16 and seed == 0")
    folder = paths.runs() / rows["run"].iloc[0] / "checkpoints" / f"step-{rows['step'].max():06d}"
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    text = "abba cafe\n<|endoftext|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(InputError, match=r"Profile tiny has no gelu run; name one of its study\.activations"):
        study.trained_model("gelu")


def test_a_recorded_study_has_its_models_at_hand():
    model, tokenizer = Study.recorded().trained_model("relu")
    assert model.config.hidden_act == "relu" and len(tokenizer) == model.config.vocab_size
    with pytest.raises(InputError, match="gelu"):
        Study.recorded().trained_model("gelu")


def test_a_second_call_computes_nothing(built, monkeypatch):
    study, tables = built
    monkeypatch.setattr(
        "sparsity_utils.study.engines.ProcessPoolExecutor", lambda *args: pytest.fail("started workers")
    )
    pd.testing.assert_frame_equal(study.table("metrics"), tables["metrics"])


def test_another_price_reuses_the_runs(built, tmp_path, text):
    _study, tables = built
    content = copy.deepcopy(profile_content(text)) | {
        "measure": {"p": 10.0, "calibration_tokens": 256, "evaluation_tokens": 512}
    }
    before = {file: file.stat().st_mtime_ns for file in paths.runs().glob("*/manifest.json")}
    cheap = Study.from_profile(write_profile(tmp_path, content, "cheap")).table("relu_vs_silu")
    assert {file: file.stat().st_mtime_ns for file in paths.runs().glob("*/manifest.json")} == before
    assert cheap["activation_ratio"].mean() < tables["relu_vs_silu"]["activation_ratio"].mean()


def test_recorded_tables_are_those_that_were_computed(built):
    study, tables = built
    recorded = Study.recorded(study.folder)
    pd.testing.assert_frame_equal(recorded.table("relu_vs_silu"), tables["relu_vs_silu"])
    recorded.keep_verdicts("01_metrics", pd.DataFrame({"question": []}))  # keeps nothing
    assert not (study.folder.parent / "verdicts").exists()


def test_a_missing_table_question_or_source_is_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no metrics\.csv in .*; name a folder that holds a study"):
        Study.recorded(tmp_path).table("metrics")
    with pytest.raises(InputError, match="no question 'speed'; choose one of metrics"):
        Study.recorded(tmp_path).table("speed")
    with pytest.raises(InputError, match="source is 'web'; choose recorded"):
        Study.open("web", "laptop")


def test_a_profile_that_leaves_a_question_out_says_so(built):
    study, tables = built
    assert study.answers("metrics") and study.answers("sparse_ffn") and not study.answers("second_line")
    with pytest.raises(InputError, match=r"Profile tiny trains no runs for second_line"):
        study.table("second_line")
    recorded = Study.recorded(study.folder)
    assert recorded.answers("relu_vs_silu") and not recorded.answers("second_line")
    assert "second_line" not in tables


def test_speeds_of_runs_that_a_profile_leaves_out_are_not_measured(text, tmp_path):
    content = profile_content(text)
    content["study"]["ratios"] = []
    study = Study.from_profile(write_profile(tmp_path, content))
    assert study.answers("sparse_ffn") and not study.answers("depth_cost")
    with pytest.raises(InputError, match="Profile tiny has no runs of width_depth_ratio, for which depth_cost is"):
        study.table("depth_cost")
    assert study.lacking("depth_cost").startswith("Profile tiny has no runs of width_depth_ratio")


def test_a_makers_tables_are_made_by_one_process_at_a_time(tmp_path, text, monkeypatch):
    study, table = Study.from_profile(write_profile(tmp_path, profile_content(text))), pd.DataFrame({"seed": [0]})

    def make(asked):
        with pytest.raises(InputError, match="Another process"), paths.locked(study.file("digits"), wait=False):
            pass
        return {"digits": table}

    monkeypatch.setitem(MAKERS, "digits", replace(MAKERS["digits"], make=make))
    monkeypatch.setattr(study, "folder", tmp_path)
    pd.testing.assert_frame_equal(study.table("digits"), table)
    with paths.locked(study.file("digits"), wait=False):  # free again
        pass


def test_a_table_is_stored_with_the_same_bytes_whenever_it_is_written(tmp_path, monkeypatch):
    table, files = pd.DataFrame({"token": ["None", "a"], "share": [1 / 3, np.nan]}), []
    for name, suffix in product(("one", "other"), (".csv", ".csv.gz")):
        monkeypatch.setattr(time, "time", lambda name=name: 1e9 * len(name))
        write_table(table, file := tmp_path / name / f"table{suffix}")
        pd.testing.assert_frame_equal(read_table(file), table, rtol=1e-7)
        files.append(file.read_bytes())
    assert files[:2] == files[2:] and files[1][:2] == b"\x1f\x8b"  # as gzip begins


def test_tables_of_an_unknown_schema_are_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"schema": 99}')
    with pytest.raises(InputError, match=r"have schema 99, this version reads 2; use the version of the project"):
        Study.recorded(tmp_path)


def test_a_diverged_run_does_not_stop_the_study(tmp_path, monkeypatch, text):
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    content = profile_content(text)
    content["study"] |= {"tuning_sizes": [one_size("8x1")], "tuning_rates": [0.01, 1e6], "tuning_batches": [256]}
    study = Study.from_profile(write_profile(tmp_path, content))
    with pytest.warns(
        UserWarning,
        match=r"8x1 relu seed 0: Training stopped at step \d+.*learning rate 1e\+06.*The study goes on without it",
    ):
        table = study.table("tuning")
    assert set(table["learning_rate"]) == {0.01}
    content["study"]["tuning_rates"] = [1e6]
    with pytest.warns(UserWarning, match="goes on"), pytest.raises(InputError, match="Every run of tuning diverged"):
        Study.from_profile(write_profile(tmp_path, content)).table("tuning")


@pytest.mark.slow
def test_a_killed_study_redoes_no_finished_run_also_when_two_resume_it(tmp_path, text):
    content = profile_content(text) | {"workers": 1}  # the processes share the work, their workers need not
    content["study"]["sizes"] = [one_size(f"{8 * n}x1", 20_000) for n in (1, 2, 3)]
    command = [sys.executable, "-m", "sparsity_utils", "study", "--profile", write_profile(tmp_path, content)]
    environment = os.environ | {"SPARSITY_BUILD": str(tmp_path / "build"), "PYTHONPATH": str(paths.ROOT)}
    store = tmp_path / "build" / "runs"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 90
        while len(list(store.glob("[!.]*/manifest.json"))) < 2 and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    finished = {file: file.stat().st_mtime_ns for file in store.glob("[!.]*/manifest.json")}
    pair = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in pair:  # two at once share the work and the store
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    assert 2 <= len(finished) < len(list(store.glob("[!.]*/manifest.json")))
    assert all(file.stat().st_mtime_ns == written for file, written in finished.items())


def test_an_impossible_ratio_is_refused_before_anything_is_trained(tmp_path, text):
    content = profile_content(text)
    content["study"]["ratios"] = [16, 4]
    with pytest.raises(InputError, match="No integer shape has 3,000 parameters at width-depth ratio 4 within 10%"):
        Study.from_profile(write_profile(tmp_path, content))


def test_the_command_line_says_what_is_wrong_in_one_sentence(capsys):
    assert main(["study", "--profile", "labtop"]) == 2
    assert capsys.readouterr().err.startswith("Error: There is no profile 'labtop'; choose one of")


@pytest.mark.slow
def test_a_killed_worker_is_said_and_finished_runs_are_kept(tmp_path, monkeypatch, text):
    import multiprocessing

    from sparsity_utils.study import engines as module

    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    original = module.wait

    def kill_one(pending, timeout):
        if list(paths.runs().glob("[!.]*/manifest.json")):
            multiprocessing.active_children()[0].kill()
        return original(pending, timeout=0.2)

    study = Study.from_profile(write_profile(tmp_path, profile_content(text)))
    with (
        monkeypatch.context() as patched,
        pytest.raises(InputError, match=r"A worker process ended: killed for want of memory.*others resume"),
    ):
        patched.setattr(module, "wait", kill_one)
        study.table("relu_vs_silu")
    kept = {file: file.stat().st_mtime_ns for file in paths.runs().glob("[!.]*/manifest.json")}
    assert kept and len(study.table("relu_vs_silu")) > 0
    assert all(file.stat().st_mtime_ns == written for file, written in kept.items())
