"""A study in several sittings: it stops when its time is over, and finished runs travel as small tables.

A sitting on a borrowed machine begins with what earlier ones brought back, and an archive of tables is written after
every finished run, so that nothing but the runs under way is lost with the machine.
"""

import json
import re
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

from sparsity_utils import paths
from sparsity_utils.errors import InputError
from sparsity_utils.jobs import OutOfTime, do_jobs
from sparsity_utils.plan import QUESTIONS
from sparsity_utils.runs import digest
from sparsity_utils.study import Study

TABLE = re.compile(r"([0-9a-f]{16})/(manifest\.json|[a-z]+-[0-9a-f]{16}\.csv)")  # all that an archive may hold


def sit(study: Study, minutes: float, tables: Path | None = None) -> str:
    """Train and measure for at most `minutes` what the study lacks; return what was left to do, or an empty string.

    `tables`: an archive of finished runs, read first if it is there and written after every finished run.
    Raises InputError for an archive that is not one of ours.
    """
    deadline, jobs = time.monotonic() + 60 * minutes, study.jobs(*QUESTIONS)
    if tables is not None and tables.exists():
        unpack_runs(tables)
    keys = sorted(job.config.key for job in jobs)
    keep = (lambda: pack_runs(keys, tables)) if tables is not None else (lambda: None)
    try:
        do_jobs(jobs, study.profile, deadline, keep)
    except OutOfTime as left:
        return str(left)
    return ""


def pack_runs(keys: Iterable[str], file: Path) -> None:
    """Write manifests and measurements of the finished runs among `keys`, without weights, into the archive `file`."""
    with paths.written_aside(file) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in keys:
            for table in sorted((paths.runs() / key).glob("*.*")):
                if TABLE.fullmatch(f"{key}/{table.name}"):
                    archive.write(table, f"{key}/{table.name}")


def unpack_runs(file: Path) -> None:
    """Put the runs of an archive into the run store; a run that is there keeps what it has and gains what it lacks.

    Raises InputError for a file that is no such archive, or a run whose manifest does not belong to its name.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{file} is no archive of runs ({error}); name one written by `study --tables`.") from error
    for name, content in contents.items():
        match = TABLE.fullmatch(name)
        if not match:
            raise InputError(f"{file} holds {name!r}, which no archive of runs has; name one of `study --tables`.")
        if _key(contents.get(f"{match[1]}/manifest.json", b"")) != match[1]:
            raise InputError(f"The run {match[1]} in {file} does not fit its name; bring the archive back again.")
        target = paths.runs() / match[1] / match[2]
        if not target.exists():
            with paths.written_aside(target) as aside:
                aside.write_bytes(content)


def _key(manifest: bytes) -> str:
    """The name of the run that a manifest belongs to; nothing for a damaged one."""
    try:
        return digest(json.loads(manifest)["config"])
    except (ValueError, KeyError, TypeError):
        return ""
