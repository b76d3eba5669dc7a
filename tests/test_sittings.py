"""A study in several sittings: it stops in time, tables travel without weights, text travels compressed."""

import json
import lzma
import os
import shutil
import subprocess
import sys
import zipfile

import pandas as pd
import pytest
from small import profile_content, write_profile, write_text

from sparsity_utils import paths
from sparsity_utils.__main__ import TIME_OVER, main
from sparsity_utils.errors import InputError
from sparsity_utils.packed_text import pack_text, unpack_text
from sparsity_utils.runs import find_run, train_run
from sparsity_utils.sittings import sit, unpack_runs
from sparsity_utils.study import Study

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
    only = {"sizes": [{"shape": "8x1", "tokens": 5000}], "activations": ["relu"], "seeds": [0]}
    content["study"] = {**only, **study}
    return write_profile(tmp_path, content)


def test_tables_travel_without_weights_and_answer_what_was_measured(tmp_path, text):
    profile, archive = one_run(tmp_path, text), tmp_path / "tables.zip"
    study = Study.from_profile(profile)
    assert sit(study, FOREVER, archive) == ""
    table = study.table("relu_vs_silu")
    assert not [name for name in zipfile.ZipFile(archive).namelist() if "safetensors" in name]
    shutil.rmtree(paths.runs())
    brought = Study.from_profile(profile)
    assert sit(brought, FOREVER, archive) == ""
    pd.testing.assert_frame_equal(brought.table("relu_vs_silu"), table)
    (config,) = brought.configs("relu_vs_silu")
    assert not find_run(config).has_weights
    assert train_run(config, brought.corpus).has_weights  # a model in hand is trained again


def test_a_sitting_ends_in_time_and_the_next_one_goes_on(tmp_path, text, capsys):
    profile, archive = one_run(tmp_path, text), tmp_path / "tables.zip"
    command = ["study", "--profile", profile, "--tables", str(archive), "--minutes"]
    assert main([*command, "0"]) == TIME_OVER
    assert "0 of 1 runs done; the same command continues" in capsys.readouterr().out
    study = Study.from_profile(profile)
    assert sit(study, FOREVER, archive) == "" and sit(study, 0, archive) == ""


def test_an_archive_that_is_not_ours_is_refused(tmp_path, text):
    bad = tmp_path / "bad.zip"
    bad.write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"bad\.zip is no archive of runs"):
        unpack_runs(bad)
    for name, content, sentence in (
        ("../escape.csv", "", "which no archive of runs has"),
        ("0123456789abcdef/manifest.json", json.dumps({"config": {}}), "does not fit its name"),
        ("0123456789abcdef/manifest.json", "{", "does not fit its name"),
        ("0123456789abcdef/curve-0123456789abcdef.csv", "step\n", "does not fit its name"),
    ):
        with zipfile.ZipFile(bad, "w") as archive:
            archive.writestr(name, content)
        with pytest.raises(InputError, match=sentence):
            unpack_runs(bad)
    assert not paths.runs().exists()


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


def test_a_sitting_needs_only_what_a_bare_gpu_image_has(tmp_path, text):
    profile, packed, archive = one_run(tmp_path, text), tmp_path / "text.jsonl.xz", tmp_path / "tables.zip"
    assert main(["corpus", "--profile", profile, "--pack", str(packed)]) == 0
    blocked = ("scipy", "statsmodels", "matplotlib", "seaborn", "datasketch", "datasets", "papermill", "nbformat")
    blocked += ("pooch", "numba")
    (tmp_path / "sitecustomize.py").write_text(f"""
import importlib.util, sys
class Blocker:  # in the worker processes too
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(name)
find = importlib.util.find_spec  # libraries ask it what is installed
importlib.util.find_spec = lambda name, *args: None if name.split(".")[0] in {blocked} else find(name, *args)
sys.meta_path.insert(0, Blocker())
""")
    (tmp_path / "sit.py").write_text(f"""
if __name__ == "__main__":
    from pathlib import Path
    from sparsity_utils import measure_sparsity
    from sparsity_utils.__main__ import main
    from sparsity_utils.sittings import sit
    from sparsity_utils.study import Study
    assert sit(Study.from_profile({profile!r}, Path({str(packed)!r})), 10.0, Path({str(archive)!r})) == ""
""")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(paths.ROOT)])}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "sit.py")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    names = {name.partition("/")[2].partition("-")[0] for name in zipfile.ZipFile(archive).namelist()}
    assert names == {"manifest.json", "metrics", "curve", "neurons", "vocabulary", "dead", "transfer"}
