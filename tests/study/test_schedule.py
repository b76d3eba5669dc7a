"""A study in several sessions: what it costs, in which order, that it stops in time; text travels compressed."""

import json
import lzma
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from blocked import block
from small import one_size, profile_content, write_profile, write_text

from sparsity_utils import paths
from sparsity_utils.__main__ import TIME_OVER, main
from sparsity_utils.console import InputError
from sparsity_utils.study.plan import QUESTIONS
from sparsity_utils.study.schedule import costs, in_order, run_session, shared
from sparsity_utils.study.study import Study
from sparsity_utils.text.packed_text import pack_text, unpack_text

FOREVER = 10.0  # minutes


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))


def one_run(tmp_path, text, **study) -> str:
    """A profile of a single run."""
    content = profile_content(text)
    only = {"sizes": [one_size("8x1")], "activations": ["relu"]}
    content["study"] = {**only, **study}
    return write_profile(tmp_path, content)


def test_a_session_ends_in_time_and_the_next_one_goes_on(tmp_path, text, capsys):
    profile, folder = one_run(tmp_path, text), tmp_path / "runs"
    command = ["study", "--profile", profile, "--tables", str(folder), "--minutes"]
    assert main([*command, "0"]) == TIME_OVER
    assert "0 of 1 runs done; the same command continues" in capsys.readouterr().out
    study = Study.from_profile(profile)
    assert run_session(study, FOREVER, [folder]) == "" and run_session(study, 0, [folder]) == ""


def test_settings_are_chosen_first_then_short_runs_then_those_of_primary_claims(tmp_path, text, monkeypatch):
    lines = {
        "sizes": [one_size("8x1"), one_size("8x2", 80_000)],
        "second_sizes": [one_size("16x1", 6000)],
        "one_dimension": [one_size("8x1"), one_size("8x1", 9000, d_ff=40), one_size("8x2", 50_000, d_ff=40)],
    }
    study = Study.from_profile(one_run(tmp_path, text, **lines))
    jobs = in_order(study, QUESTIONS)
    seconds = [job.config.cost() for job in jobs]
    assert seconds == sorted(seconds) and len(jobs) == 5  # the centre is one run
    monkeypatch.setattr("sparsity_utils.study.schedule.SHORT", (seconds[2] + seconds[3]) / 2)
    assert in_order(study, QUESTIONS) == [*jobs[:3], jobs[4], jobs[3]]  # 8x2 of the main line before the wide one
    (only,) = in_order(study, ["second_line"])
    assert only.config.model.d_model == 16
    tried = {"tuning_sizes": [one_size("16x2", 50_000)], "tuning_rates": [0.01], "tuning_batches": [256]}
    assert (
        in_order(Study.from_profile(one_run(tmp_path, text, **lines, **tried)), QUESTIONS)[0].config.model.d_model == 16
    )


@pytest.mark.slow
def test_shares_divide_the_jobs_and_their_folders_merge(tmp_path, text, monkeypatch, capsys):
    content = profile_content(text)
    content["study"] = {"sizes": [one_size("8x1", seeds=(0, 1, 2))], "activations": ["relu", "silu"]}
    profile = write_profile(tmp_path, content)
    command = ["study", "--profile", profile]
    jobs = in_order(Study.from_profile(profile), QUESTIONS)
    parts = [shared(jobs, (number, 4)) for number in (1, 2, 3, 4)]
    assert sorted(map(len, parts)) == [1, 1, 2, 2] and {job.config for part in parts for job in part} == {
        job.config for job in jobs
    }
    folders = [str(tmp_path / f"share_{number}") for number in (1, 2)]
    for number, folder in enumerate(folders, start=1):
        monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / f"machine_{number}"))  # each with a store of its own
        assert main([*command, "--share", f"{number}/2", "--tables", folder]) == 0
        assert not list(paths.profile_output("tiny").glob("results/*"))
        assert len(list(paths.runs().glob("[!.]*"))) == 3
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "merged"))
    monkeypatch.setattr(
        "sparsity_utils.study.engines.ProcessPoolExecutor", lambda *args: pytest.fail("started workers")
    )
    merge = [*command, "--questions", "relu_vs_silu", "--tables", str(tmp_path / "all"), *folders]
    capsys.readouterr()
    assert main(merge) == 0
    assert "relu_vs_silu:" in capsys.readouterr().out and len(Study.from_profile(profile).table("relu_vs_silu")) > 0
    packed = {file.name: file.read_bytes() for folder in folders for file in (tmp_path / folder).glob("*.zip")}
    assert {file.name: file.read_bytes() for file in (tmp_path / "all").glob("*.zip")} == packed and len(packed) == 6


@pytest.mark.parametrize("share", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2"])
def test_a_share_that_is_none_is_refused(share, capsys):
    assert main(["study", "--profile", "smoke", f"--share={share}"]) == 2
    assert f"--share is '{share}'; write i/n with i from 1 to n" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_not_merged(tmp_path, text):
    study = Study.from_profile(one_run(tmp_path, text))
    with pytest.raises(InputError, match=r"nowhere holds no study\.json; name folders that"):
        run_session(study, 0, [tmp_path / "all", tmp_path / "nowhere"])


def test_costs_are_told_by_line_before_anything_is_trained(tmp_path, text, capsys):
    lines = {"second_sizes": [one_size("16x1", 6000), one_size("8x1")]}
    profile = one_run(tmp_path, text, **lines)
    assert main(["study", "--profile", profile, "--cost"]) == 0
    assert "second_line" in capsys.readouterr().out and not list(paths.runs().glob("*"))
    study = Study.from_profile(profile)
    run_session(study, FOREVER, questions=[question for question in QUESTIONS if question != "second_line"])
    table = costs(study).set_index("question")
    capsys.readouterr()
    assert list(table.index) == ["relu_vs_silu", "second_line", "all"]  # a run of both lines counts in the first
    assert table["runs"].tolist() == [1, 1, 2] and table["finished"].tolist() == [1, 0, 1]
    run_session(study, 0, [tmp_path / "runs"], questions=["relu_vs_silu"])
    shutil.rmtree(paths.runs())
    assert main(["study", "--profile", profile, "--cost", "--tables", str(tmp_path / "runs")]) == 0
    *_, total, about = capsys.readouterr().out.splitlines()
    assert total.split()[1:3] == ["2", "1"] and "CPU cores" in about  # runs that were brought are finished
    assert main(["study", "--profile", profile, "--questions", "speed"]) == 2
    assert "There is no question 'speed'; choose from metrics" in capsys.readouterr().err


def test_packed_text_gives_the_same_corpus(tmp_path, text):
    profile, packed = one_run(tmp_path, text), tmp_path / "text.jsonl.xz"
    assert main(["corpus", "--profile", profile, "--pack", str(packed)]) == 0
    built = Study.from_profile(profile).corpus
    manifest = built.manifest
    shutil.rmtree(paths.corpora())
    unpacked = Study.from_profile(profile, packed).corpus
    assert (unpacked.folder, unpacked.manifest) == (built.folder, manifest)


def test_packed_text_that_is_cut_or_of_another_profile_is_refused(tmp_path, text):
    config = Study.from_profile(one_run(tmp_path, text)).profile.corpus
    packed = tmp_path / "text.jsonl.xz"
    pack_text(config, packed)
    other = Study.from_profile(write_profile(tmp_path, {**profile_content(text), "about": "x"}, "other")).profile.corpus
    assert unpack_text(other, packed).manifest["splits"]  # the corpus section is what counts
    shutil.rmtree(paths.corpora())
    whole = packed.read_bytes()
    packed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="no whole packed text"):
        unpack_text(config, packed)
    with lzma.open(packed, "wt") as stream:
        stream.write(json.dumps({"request": {"config": {}}}) + "\n")
    with pytest.raises(InputError, match="packed for another corpus section"):
        unpack_text(config, packed)


@pytest.mark.slow
def test_a_session_needs_only_what_a_bare_gpu_image_has(tmp_path, text):
    profile, packed, archive = one_run(tmp_path, text), tmp_path / "text.jsonl.xz", tmp_path / "runs"
    assert main(["corpus", "--profile", profile, "--pack", str(packed)]) == 0
    blocked = ("scipy", "statsmodels", "matplotlib", "seaborn", "datasketch", "datasets", "papermill", "nbformat")
    blocked += ("pooch", "numba")
    block(tmp_path, blocked)
    (tmp_path / "session.py").write_text(f"""
if __name__ == "__main__":
    from pathlib import Path
    from sparsity_utils import measure_sparsity
    from sparsity_utils.__main__ import main
    from sparsity_utils.study.schedule import run_session
    from sparsity_utils.study.study import Study
    assert run_session(Study.from_profile({profile!r}, Path({str(packed)!r})), 10.0, [Path({str(archive)!r})]) == ""
""")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(paths.ROOT)])}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "session.py")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    (run,) = archive.glob("*.zip")
    names = {name.partition("-")[0] for name in zipfile.ZipFile(run).namelist()}
    measured = {"metrics", "curve", "neurons", "vocabulary", "dead", "transfer"}
    assert names == {"manifest.json", "config.json", "model.safetensors", *measured}
