"""Finished runs as files that travel: one small archive per run, in a folder that git can keep.

    study.json       what every run in the folder rests on: commit, recipe, version of measurements, text, tokenizer
    <key>.zip        manifest.json and the measured tables of one run; of a few runs also the weights after the decay
    ../.<name>.lock  held by the process that writes the folder

A file is written once, when its run has finished, and always with the same bytes, so the folder grows by the runs that
are new and by nothing else.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsity_utils import paths
from sparsity_utils.curves import VERSION
from sparsity_utils.errors import InputError
from sparsity_utils.plan import QUESTIONS, largest
from sparsity_utils.runs import BROUGHT_WEIGHTS, RECIPE, Run, commit, digest
from sparsity_utils.study import Study

HEADER = "study.json"
MEMBER = re.compile(rf"manifest\.json|config\.json|{re.escape(BROUGHT_WEIGHTS)}|[a-z]+-[0-9a-f]{{16}}\.csv")
SAME = {  # what runs of one folder share, and how it is called in a message
    "recipe": "the recipe of training",
    "measurements": "the version of measurements",
    "corpus": "the text",
    "tokenizer": "the tokenizer",
}
ALWAYS = (1980, 1, 1, 0, 0, 0)  # the date of every member: the same content gives the same bytes


@contextmanager
def archived(study: Study, folder: Path) -> Iterator[Callable[[], None]]:
    """Bring the runs of `folder` into the run store, then yield a function that writes the finished ones back.

    The folder is locked meanwhile. Raises InputError when another process has it, when its runs rest on another text,
    tokenizer, recipe or version of measurements than this study, and for a file that is no archive of a run.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder, which holds one file per finished run.")
    with paths.locked(folder, wait=False):
        header = _header(study)
        _check_header(folder, header)
        for file in sorted(folder.glob("*.zip")):
            unpack_run(file, header)
        keys = sorted({config.key for question in QUESTIONS for config in study.configs(question)})
        weights = {config.key for config in study.configs_of(largest(study.profile))}

        def keep() -> None:
            for key in keys:
                pack_run(key, folder, key in weights)

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


def pack_run(key: str, folder: Path, with_weights: bool) -> None:
    """Write the finished run `key` of the store to `folder`, unless it is there with all that was measured."""
    run = paths.runs() / key
    if not (run / "manifest.json").exists():
        return
    members = {file.name: file for file in sorted(run.glob("*.*")) if MEMBER.fullmatch(file.name)}
    members.pop("config.json", None)
    last = Run(run, json.loads((run / "manifest.json").read_text(encoding="utf-8"))).last_weights
    if with_weights and last.exists():
        members |= {"config.json": run / "config.json", BROUGHT_WEIGHTS: last}
    target = folder / f"{key}.zip"
    if target.exists() and set(_members(target)) >= set(members):
        return
    with paths.written_aside(target) as aside, zipfile.ZipFile(aside, "w") as archive:
        for name, file in sorted(members.items()):
            archive.writestr(zipfile.ZipInfo(name, ALWAYS), file.read_bytes(), zipfile.ZIP_DEFLATED, compresslevel=9)


def unpack_run(file: Path, header: dict) -> None:
    """Put an archived run into the store; a run that is there keeps what it has and gains what it lacks.

    Raises InputError for a file that is no archive of a run, or a run that does not fit its name or the header.
    """
    contents = _members(file)
    for name in contents:
        if not MEMBER.fullmatch(name):
            raise InputError(f"{file} holds {name!r}, which no archive of a run has; take the file away.")
    try:
        config = json.loads(contents.get("manifest.json", b""))["config"]
        whole = digest(config) == file.stem
        other = [words for key, words in SAME.items() if key in config and config[key] != header[key]]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(f"The run in {file} does not fit its name; bring the file back again.")
    if other:
        raise InputError(f"The run in {file} differs from this study in {' and '.join(other)}; take the file away.")
    for name, content in contents.items():
        target = paths.runs() / file.stem / name
        if not target.exists():
            with paths.written_aside(target) as aside:
                aside.write_bytes(content)


def _members(file: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(file) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise InputError(f"{file} is no archive of a run ({error}); take it away, or bring it back again.") from error
