"""Finished runs travel in small files: what they hold, what is refused, and that the recorded ones are found done."""

import json
import multiprocessing
import shutil
import zipfile
from dataclasses import replace

import pandas as pd
import pytest
from small import one_size, profile_content, write_profile, write_text

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.study import archive
from sparsity_utils.study.archive import HEADER, archived
from sparsity_utils.study.plan import QUESTIONS
from sparsity_utils.study.runs import find_run, train_run
from sparsity_utils.study.schedule import run_session
from sparsity_utils.study.study import Study

FOREVER = 10.0  # minutes
FIRST = {"sizes": [one_size("8x1", seeds=(0, 1))], "activations": ["relu"]}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A profile of two runs, the folder that its study left, and one of its tables."""
    folder = tmp_path_factory.mktemp("archive")
    profile = write_profile(folder, profile_content(write_text(folder / "text")) | {"study": FIRST})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSITY_BUILD", str(folder / "build"))
        study = Study.from_profile(profile)
        assert run_session(study, FOREVER, [folder / "runs"]) == ""
        yield profile, folder / "runs", study.table("relu_vs_silu")


@pytest.fixture
def elsewhere(kept, tmp_path, monkeypatch):
    """Another machine: an empty store, and a copy of the folder."""
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    shutil.copytree(kept[1], tmp_path / "runs")
    return Study.from_profile(kept[0]), tmp_path / "runs"


def bring(study, folder):
    with archived(study, [folder]):
        pass


def test_tables_travel_and_the_first_seed_of_the_largest_size_with_its_weights(kept, elsewhere):
    study, folder = elsewhere
    files = sorted(folder.glob("*.zip"))
    assert [bool("model.safetensors" in zipfile.ZipFile(file).namelist()) for file in files].count(True) == 1
    written = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    assert run_session(study, 0, [folder]) == ""  # nothing is left to do
    pd.testing.assert_frame_equal(study.table("relu_vs_silu"), kept[2])
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()} == written
    first, second = (find_run(config) for config in study.configs("relu_vs_silu"))
    measured = {file.name for file in first.folder.glob("*.csv")}
    assert any(name.startswith("curve-") for name in measured)
    assert first.last_weights.exists() and not second.last_weights.exists()
    model, _ = study.trained_model("relu")  # without training
    assert model.config.hidden_size == 8 and not first.has_weights
    manifest = json.loads((first.folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["checkpoints"][0]["validation_loss"] += 0.01  # as of another kind of machine
    (first.folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    trained = train_run(study.configs("relu_vs_silu")[0], study.corpus)
    assert trained.has_weights  # all checkpoints in hand take training again
    assert trained.manifest["checkpoints"] == manifest["checkpoints"]
    assert {file.name for file in first.folder.glob("*.csv")} >= measured  # what findings rest on stays
    assert all((trained.load(trained.checkpoints["step"].max()).state_dict()[n] == w).all() for n, w in
               model.state_dict().items())  # fmt: skip


def test_a_run_is_archived_with_the_same_bytes_wherever_it_is_done(kept, elsewhere):
    study, folder = elsewhere
    before = {file.name: file.read_bytes() for file in folder.glob("*.zip")}
    bring(study, folder)
    for file in folder.glob("*.zip"):
        file.unlink()
    bring(study, folder)  # packed again from the store
    assert {file.name: file.read_bytes() for file in folder.glob("*.zip")} == before


def test_a_brought_run_that_was_altered_is_found_and_brought_again(elsewhere):
    study, folder = elsewhere
    bring(study, folder)
    config = study.configs("relu_vs_silu")[0]
    run = find_run(config)
    before = run.last_weights.read_bytes()
    run.last_weights.write_bytes(before[:-1] + b"x")
    with pytest.warns(UserWarning, match=r"model\.safetensors is not what was written"):
        assert find_run(config) is None
    (run.folder / "manifest.json").write_text("")
    bring(study, folder)
    assert find_run(config).last_weights.read_bytes() == before


def test_an_unfinished_or_damaged_run_is_not_archived(elsewhere, tmp_path):
    study, folder = elsewhere
    bring(study, folder)
    first, second = study.configs("relu_vs_silu")
    next((paths.runs() / first.key).glob("dead-*.csv")).unlink()
    (paths.runs() / second.key / "manifest.json").write_text("")
    with pytest.warns(UserWarning, match=r"manifest\.json is not what was written"):
        bring(study, tmp_path / "empty")
    assert [file.name for file in (tmp_path / "empty").iterdir()] == [HEADER]


def test_what_is_measured_later_joins_and_nothing_that_was_archived_is_lost(elsewhere, tmp_path):
    study, folder = elsewhere
    bring(study, folder)
    config = study.configs("relu_vs_silu")[0]
    measured = {file.name: file.read_bytes() for file in (paths.runs() / config.key).glob("*.csv")}
    curve = next(name for name in measured if name.startswith("curve"))
    for name in set(measured) - {curve}:
        (paths.runs() / config.key / name).unlink()
    with archived(study, [tmp_path / "grows"], ["relu_vs_silu"]) as keep:
        archive = tmp_path / "grows" / f"{config.key}.zip"
        assert tables(archive) == {curve}
        for name, content in measured.items():  # the others are measured, the curve is gone from the store
            (paths.runs() / config.key / name).write_bytes(content)
        keep()
    assert tables(archive) == set(measured)
    (paths.runs() / config.key / curve).unlink()
    with archived(study, [tmp_path / "grows"]):
        assert (paths.runs() / config.key / curve).read_bytes() == measured[curve]


def tables(file):
    return {name for name in zipfile.ZipFile(file).namelist() if name.endswith(".csv")}


def test_a_damaged_archive_is_named_wherever_the_damage_is(elsewhere):
    _, folder = elsewhere
    file = min(folder.glob("*.zip"), key=lambda file: file.stat().st_size)
    content, refused = file.read_bytes(), 0
    header = json.loads((folder / HEADER).read_text())
    for place in range(0, len(content), max(1, len(content) // 200)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        try:
            archive.unpack_run(file, header)
        except InputError as error:
            assert file.name in str(error)
            refused += 1
    assert refused > 150  # the rest are dates and attributes, which nobody reads


@pytest.mark.parametrize("key", archive.SAME)
def test_runs_of_another_study_are_refused_and_nothing_is_lost(elsewhere, key):
    study, folder = elsewhere
    header = json.loads((folder / HEADER).read_text())
    (folder / HEADER).write_text(json.dumps(header | {key: "other"}))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match=rf"The runs in .* differ from this study in {archive.SAME[key]}; go on from"):
        bring(study, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not paths.runs().exists()


def test_a_stray_run_of_another_text_is_named(elsewhere):
    study, folder = elsewhere
    config = replace(study.configs("relu_vs_silu")[0], corpus="other")
    write(folder / f"{config.key}.zip", {"manifest.json": json.dumps({"config": config.identity()})})
    with pytest.raises(InputError, match=rf"The run in .*{config.key}\.zip differs from this study in the text"):
        bring(study, folder)


def write(file, members):
    with zipfile.ZipFile(file, "w") as found:
        for name, content in members.items():
            found.writestr(name, content)


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"../escape.csv": ""}, r"holds '\.\./escape\.csv', which no archive of a run has"),
        ({"manifest.json": json.dumps({"config": {}})}, "does not fit its name"),
        ({"manifest.json": "{"}, "does not fit its name"),
        ({"curve-0123456789abcdef.csv": "step\n"}, "does not fit its name"),
    ],
)
def test_a_file_that_is_no_archive_of_a_run_is_refused(elsewhere, members, sentence):
    study, folder = elsewhere
    write(folder / "0123456789abcdef.zip", members)
    with pytest.raises(InputError, match=sentence):
        bring(study, folder)
    (folder / "0123456789abcdef.zip").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"0123456789abcdef\.zip is no archive of a run"):
        bring(study, folder)


def test_a_file_in_place_of_the_folder_and_a_damaged_header_are_refused(elsewhere, tmp_path):
    study, folder = elsewhere
    (folder / HEADER).write_text("{")
    with pytest.raises(InputError, match=r"study\.json cannot be read; bring the folder back"):
        bring(study, folder)
    (tmp_path / "tables.zip").write_bytes(b"")
    with pytest.raises(InputError, match=r"tables\.zip is a file; name a folder"):
        bring(study, tmp_path / "tables.zip")


def hold(folder, ready, end):
    with paths.locked(folder):
        ready.set()
        end.wait(60)


def test_two_processes_do_not_write_one_folder(elsewhere):
    study, folder = elsewhere
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=hold, args=(folder, ready, end))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(InputError, match=r"Another process writes .*runs; wait until it ends, or name another"):
            bring(study, folder)
    finally:
        end.set()
        other.join()
    bring(study, folder)  # the system has freed it


RECORDED = paths.RESULTS / "runs"


class RecordedText:
    """What run keys need of the text of the second study, without its hundred million tokens."""

    def __init__(self):
        header = json.loads((RECORDED / HEADER).read_text())
        self.hash, self.tokenizer_hash, self.folder = header["corpus"], header["tokenizer"], paths.corpora()
        self.manifest = {"source": {"packages": header["packages"]}, "versions": header["versions"]}


@pytest.mark.skipif(not (RECORDED / HEADER).exists(), reason="no runs are archived")
def test_every_archived_run_of_the_second_study_is_found_done(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    shutil.copytree(RECORDED, tmp_path / "runs")
    study = Study.from_profile("long")
    study._corpus = RecordedText()
    bring(study, tmp_path / "runs")
    jobs = {job.config.key: job for job in study.jobs(*QUESTIONS)}
    finished = {file.stem for file in RECORDED.glob("*.zip")}
    assert finished and finished <= set(jobs), "a run has another key now"
    assert all(jobs[key].done() for key in finished), "a measurement has another name now"
    assert sum(file.stat().st_size for file in RECORDED.iterdir()) < 12_000_000
