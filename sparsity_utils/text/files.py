"""Documents of files and tables: a folder of the user's own, and data sets of the hub."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sparsity_utils.console import InputError, explained
from sparsity_utils.text.config import CorpusConfig
from sparsity_utils.text.documents import Document, Skipped, decoded

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


def sha256(data: bytes) -> str:
    """SHA-256 of `data`, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


# A path


def text_files(root: Path) -> list[Path]:
    """The files below `root`, or `root` itself, whose suffix is one of SUFFIXES, ordered by a hash of the name.

    In this order any prefix, so any size cap, is a sample of all folders. Raises InputError where there are none, and
    where a folder cannot be listed.
    """
    if not root.exists():
        raise InputError(f"{root} does not exist; give a file or folder of {', '.join(SUFFIXES)}.")
    candidates = _files_below(root) if root.is_dir() else [root]
    files = [file for file in candidates if file.suffix.lower() in SUFFIXES and not file.is_dir()]
    if not files:
        raise InputError(f"{root} holds no text; give a file or folder of {', '.join(SUFFIXES)}.")
    return sorted(files, key=lambda file: sha256(_relative(root, file).encode()))


def _files_below(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename, error) from error

    for folder, _, names in os.walk(root, onerror=refuse):
        yield from (Path(folder) / name for name in names)


def _unreadable(file: Path | str, error: OSError) -> InputError:
    return InputError(f"{file} cannot be read ({error.strerror}); correct it or take it away.")


def _relative(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix() if file != root else file.name


def file_hashes(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of each file by its name below `root`; InputError when one cannot be read."""
    hashes = {}
    for file in files:
        try:
            with file.open("rb") as stream:
                hashes[_relative(root, file)] = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise _unreadable(file, error) from error
    return hashes


def path_documents(
    root: Path, files: list[Path], text_field: str, skipped: Skipped, largest: float = math.inf
) -> Iterator[Document]:
    """Read text files and tables. Domain: the first sub-folder or, without one, a table's name or a text's suffix.

    Files that cannot be read are skipped, and text files of more than `largest` bytes.
    """
    for file in files:
        name = _relative(root, file)
        suffix = file.suffix.lower()
        is_table = suffix in (".jsonl", ".parquet")
        folder, slash, _ = name.partition("/")
        domain = folder if slash else file.stem if is_table else suffix[1:]
        try:
            with file.open("rb") as stream:
                text = None if is_table else _read_text(stream, name, skipped, largest)
        except OSError as error:
            skipped.add(f"unreadable ({error.strerror})", name)
            continue
        if is_table:
            rows = _jsonl_rows(file) if suffix == ".jsonl" else _parquet_rows(file, text_field)
            yield from _row_documents(rows, name, domain, text_field, skipped)
        elif text is not None:
            yield Document(name, domain, text)


def _read_text(stream: BinaryIO, name: str, skipped: Skipped, largest: float) -> str | None:
    """The text of an open file, or None, counted."""
    if os.fstat(stream.fileno()).st_size > largest:
        skipped.add(f"larger than {largest / 1e6:g} MB", name)
        return None
    data = stream.read()
    if b"\0" in data:  # also of UTF-16, which without a mark would be valid UTF-8
        skipped.add("binary", name)
        return None
    return decoded(data, name, skipped)


def _jsonl_rows(file: Path) -> Iterator[Any]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise InputError(
                        f"{file}, line {number}, is not JSON; correct it or take the file away."
                    ) from error


def _parquet_rows(file: Path, text_field: str) -> Iterator[dict]:
    """The column of texts, by pyarrow: a row group of 400 MB takes 0.3 s and 220 MB, through `datasets` 3 s and 800."""
    from pyarrow import parquet

    with explained(f"{file} is not readable as Parquet", "correct it or take it away"):
        table = parquet.ParquetFile(file)
        if text_field not in table.schema_arrow.names:
            raise _no_field(str(file), text_field, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            yield from batch.to_pylist()


# The hub


def hub_documents(config: CorpusConfig, skipped: Skipped) -> Iterator[Document]:
    """The rows of the data set `config.path` of the hub, or in a local folder."""
    return _row_documents(_hub_rows(config), config.path or "", "hub", config.text_field, skipped)


def _hub_rows(config: CorpusConfig) -> Iterator[dict]:
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it says of a file is also raised
    what = f"The data set {config.path} at revision {config.revision} cannot be read"
    with (
        explained(what, "check corpus.path, corpus.revision, that it has a train split, and the network"),
        tempfile.TemporaryDirectory() as cache,  # it holds a lock file while the data set is opened
    ):
        options = {"revision": config.revision, "split": "train", "streaming": True, "cache_dir": cache}
        yield from datasets.load_dataset(config.path, **options)


# Rows of a table


def _no_field(where: str, text_field: str, names: Iterable[str]) -> InputError:
    found = ", ".join(sorted(names)) or "no field at all"
    return InputError(
        f"{where} has no field {text_field!r}; rename the one that holds the text, or name it as a profile's "
        f"corpus.text_field ({found})."
    )


def _row_documents(
    rows: Iterable[Any], name: str, domain: str, text_field: str, skipped: Skipped
) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or text_field not in row:
            raise _no_field(f"{name}, row {number},", text_field, row if isinstance(row, dict) else ())
        if isinstance(row[text_field], str):
            yield Document(f"{name}:{number}", domain, row[text_field])
        else:
            skipped.add("not a text", f"{name}:{number}")
