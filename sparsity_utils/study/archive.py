"""Finished runs as files that travel: one small archive per run, in a folder that git can keep.

    study.json       what every run in the folder rests on: text, tokenizer, recipe, version of measurements; and the
                     commit that began it (each run's manifest names its own)
    <key>.zip        manifest.json and the measured tables of one run; of a few runs also the weights after the decay
    ../.<name>.lock  held by the process that writes the folder

A file is written when its run has been trained and measured, always with the same bytes, and again only when more has
been measured on the run: the folder grows by what is new and by nothing else.
"""

import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.study.jobs import Job
from sparsity_utils.study.measurements import VERSION, decided_by
from sparsity_utils.study.plan import QUESTIONS
from sparsity_utils.study.runs import CONFIG, RECIPE, WEIGHTS, commit, digest, find_run
from sparsity_utils.study.study import Study

HEADER = "study.json"
MANIFEST = "manifest.json"
MEMBER = re.compile(r"manifest\.json|config\.json|model\.safetensors|[a-z]+-[0-9a-f]{16}\.csv")
SAME = {  # what runs of one folder share, and how it is called in a message
    "recipe": "the recipe of training",
    "measurements": "the version of measurements",
    "corpus": "the text",
    "tokenizer": "the tokenizer",
}
ALWAYS = (1980, 1, 1, 0, 0, 0)  # the date of every member: the same content gives the same bytes
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError)


@contextmanager
def archived(
    study: Study, folders: Sequence[Path], questions: Iterable[str] = QUESTIONS
) -> Iterator[Callable[[], None]]:
    """Bring the runs of `folders` into the run store, then yield a function that writes the finished ones to the first.

    A run is finished when all that `questions` ask of it is measured. The first folder is locked meanwhile; the others
    are only read. Raises InputError when another process has the first, when runs rest on another text, tokenizer,
    recipe or version of measurements than this study, for a folder that is not there, and for a file that is no archive
    of a run.
    """
    folder, *others = folders
    for place in folders:
        if place.exists() and not place.is_dir():
            raise InputError(f"{place} is a file; name a folder, which holds one file per finished run.")
    for place in others:
        if not (place / HEADER).exists():
            raise InputError(f"{place} holds no {HEADER}; name folders that `study --tables` wrote.")
    with paths.locked(folder, wait=False):
        header = _header(study)
        for place in reversed(folders):  # of a run that several hold, the first folder has the last word
            _check_header(place, header)
            for file in sorted(place.glob("*.zip")):
                unpack_run(file, header)
        weights = {study.largest_config(activation).key for activation in study.profile.study.activations}
        everything = {job.config.key: job for job in study.jobs(*QUESTIONS)}
        asked = study.jobs(*questions)

        def keep() -> None:
            for job in asked:
                pack_run(job, everything[job.config.key], folder, job.config.key in weights)

        keep()  # what is in the store already
        yield keep


def _header(study: Study) -> dict:
    corpus = study.corpus
    return {
        "commit": commit(),
        "recipe": RECIPE,
        "measurements": VERSION,
        "corpus": corpus.hash,
        "tokenizer": corpus.tokenizer_hash,
        "packages": corpus.manifest["source"].get("packages", {}),  # whose source is the text
        "versions": corpus.manifest["versions"],
    }


def _check_header(folder: Path, header: dict) -> None:
    """Compare the header of `folder` with this study's; write it where there is none."""
    file = folder / HEADER
    if not file.exists():
        with paths.written_aside(file) as aside:
            aside.write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        other = [words for key, words in SAME.items() if found[key] != header[key]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} cannot be read; bring the folder back as it was written.") from error
    if other:
        raise InputError(
            f"The runs in {folder} differ from this study in {' and '.join(other)}; go on from commit "
            f"{found.get('commit', 'unknown')} with its lock file, or name another folder."
        )


def pack_run(asked: Job, everything: Job, folder: Path, with_weights: bool) -> None:
    """Write a run to `folder` once all that is `asked` of it is done.

    Nothing is written if the run's file holds all of it already. What the file holds and the store lacks stays in it.

    everything: the job with all measurements that the study may make of the run; those that were made go along.
    """
    key, store = asked.config.key, paths.runs() / asked.config.key
    tables = [f"{what}-{digest(decided_by(everything.measure))}.csv" for what in everything.what]
    members = {name: store / name for name in (MANIFEST, *tables) if (store / name).exists()}
    target = folder / f"{key}.zip"
    before = _members(target) if target.exists() else {}
    weights = {CONFIG, WEIGHTS} if with_weights else set()
    if MANIFEST not in members or (before and set(before) >= {*members, *weights}) or not asked.done():
        return
    run = find_run(asked.config)
    if with_weights and run.last_weights.exists():
        last, _ = run.checkpoint(run.last_step)
        members |= {CONFIG: last / CONFIG, WEIGHTS: run.last_weights}
    contents = before | {name: file.read_bytes() for name, file in members.items()}
    if contents == before:
        return
    with paths.written_aside(target) as aside, zipfile.ZipFile(aside, "w") as archive:
        for name, content in sorted(contents.items()):
            archive.writestr(zipfile.ZipInfo(name, ALWAYS), content, zipfile.ZIP_DEFLATED, compresslevel=9)


def unpack_run(file: Path, header: dict) -> None:
    """Put an archived run into the store; a run that was trained here is left as it is.

    Raises InputError for a file that is no archive of a run, or a run that does not fit its name or the header.
    """
    contents = _members(file)
    for name in contents:
        if not MEMBER.fullmatch(name):
            raise InputError(f"{file} holds {name!r}, which no archive of a run has; take the file away.")
    try:
        config = json.loads(contents.get(MANIFEST, b""))["config"]
        whole = digest(config) == file.stem
        other = [words for key, words in SAME.items() if key in config and config[key] != header[key]]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(f"The run in {file} does not fit its name; bring the file back again.")
    if other:
        raise InputError(f"The run in {file} differs from this study in {' and '.join(other)}; take the file away.")
    store = paths.runs() / file.stem
    for name, content in contents.items() if not (store / "checkpoints").exists() else ():
        target = store / name
        if not target.exists() or target.read_bytes() != content:
            with paths.written_aside(target) as aside:
                aside.write_bytes(content)


def _members(file: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(file) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except BROKEN as error:
        raise InputError(f"{file} is no archive of a run ({error}); take it away, or bring it back again.") from error
