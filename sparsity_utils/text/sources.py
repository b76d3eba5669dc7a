"""Text sources: where documents come from, in a fixed order, each with a name and a domain label.

`open_source` returns what identifies the text (for the corpus's folder name) and an iterator of documents.
Nothing is read before it is asked for, so a size cap costs no more than the text it keeps.
"""

import ast
import base64
import hashlib
import importlib.metadata
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsity_utils.console import InputError, explained
from sparsity_utils.text.config import CorpusConfig

# Only packages whose pin in the lock file is the same for every Python version and platform, and whose wheels
# hold the same Python files on every platform.
FAMILIES = {
    "deep learning": ("accelerate", "huggingface-hub", "torch", "transformers"),
    "mathematics": ("mpmath", "networkx", "sympy"),
    "data and statistics": ("datasets", "formulaic", "fsspec", "narwhals", "pandas", "patsy", "pyarrow", "statsmodels"),
    "numerical computing": ("llvmlite", "numba", "numpy", "scipy"),
    "graphics": ("fonttools", "matplotlib", "pillow", "seaborn"),
    "interactive tools": (
        "ipykernel", "ipython", "jedi", "jinja2", "jupyter-client", "jupyter-server", "jupyterlab", "nbconvert",
        "papermill", "prompt-toolkit", "pydantic", "pygments", "pytest", "rich", "setuptools", "tornado", "traitlets",
    ),
}  # fmt: skip
PROSE = "prose"
PROSE_ONE_IN = 5  # one file in so many gives its docstrings, the others their code
PROSE_LEAST = 400  # characters of docstring worth a document of their own

# Written while a wheel is built or repaired, so they differ between platforms or between CPU and CUDA wheels.
BUILD_TIME_FILES = {
    "version.py", "_version.py", "__version__.py", "_generated_version.py", "_version_meson.py", "__config__.py",
    "_distributor_init.py",
}  # fmt: skip
DIGITS_AT_MOST = 0.25  # share of a file's bytes; above it, a file is a table of numbers rather than text

PackageFile = tuple[str, str, importlib.metadata.PackagePath]  # name, domain, file

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text and its labels."""

    name: str
    domain: str
    text: str


@dataclass
class Source:
    """A text source, opened.

    `identity` is JSON: two sources with the same identity hold the same text. `skipped` counts, by reason,
    what was left out so far; it fills while `documents` is read.
    """

    identity: dict[str, Any]
    documents: Iterator[Document]
    skipped: Counter = field(default_factory=Counter)


def open_source(config: CorpusConfig) -> Source:
    """Open the text source a profile names.

    Raises:
        InputError: when the source is missing, empty or unreadable; rows may also raise it while they are read.
    """
    skipped: Counter = Counter()
    if config.source == "python-source":
        files = _package_files()
        listing = "\n".join(f"{name} {file.hash.value}" for name, _, file in files)
        identity = {
            "packages": {p: importlib.metadata.version(p).partition("+")[0] for p in _packages()},
            "files": len(files),
            "listing_sha256": sha256(listing.encode()),
        }
        return Source(identity, _python_documents(files, skipped), skipped)
    if config.source == "path":
        root = Path(config.path).expanduser()
        texts = _text_files(root)
        documents = _path_documents(root, texts, config.text_field, skipped)
        return Source({"files": _file_hashes(root, texts)}, documents, skipped)
    root = Path(config.path)
    identity = {"path": config.path, "revision": config.revision}
    if root.is_dir():  # a local data set has no revision of its own
        identity["files"] = _file_hashes(root, sorted(file for file in root.rglob("*") if file.is_file()))
    documents = _row_documents(_hub_rows(config), config.path, "hub", config.text_field, skipped)
    return Source(identity, documents, skipped)


def sha256(data: bytes) -> str:
    """SHA-256 of `data`, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _decoded(data: bytes, skipped: Counter) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
        return None


# Source "python-source"


def _packages() -> list[str]:
    return sorted(package for packages in FAMILIES.values() for package in packages)


def _package_files() -> list[PackageFile]:
    """(name, domain, file) of every usable file, ordered by a hash of the name.

    In this order any prefix, so any size cap, is a proportional sample of all packages.
    """
    found = [
        (file.as_posix(), domain, file)
        for domain, packages in FAMILIES.items()
        for package in packages
        for file in _sources_of(package)
    ]
    return sorted(found, key=lambda item: sha256(item[0].encode()))


def _sources_of(package: str) -> list[importlib.metadata.PackagePath]:
    """The usable files of an installed package."""
    try:
        files = importlib.metadata.distribution(package).files
    except importlib.metadata.PackageNotFoundError:
        files = None
    if not files:
        raise InputError(
            f"The package {package}, whose source is read as text, is not installed with a list of its files; "
            "install the packages of requirements.lock, or name a text of your own."
        )
    return [file for file in files if _is_source(file)]


def _is_source(file: importlib.metadata.PackagePath) -> bool:
    """Python text that came with the wheel, the same on every platform."""
    if file.suffix != ".py" or ".." in file.parts or file.hash is None or file.hash.mode != "sha256":
        return False
    if file.name in BUILD_TIME_FILES or "generated" in file.parts:
        return False
    # Wheel repair on Windows writes into a package's top-level __init__.py.
    return not (file.name == "__init__.py" and len(file.parts) == 2)


def package_documents(package: str) -> list[str]:
    """The source files of an installed package that is no part of the corpus, as texts, ordered by name.

    Text that a model trained on the corpus never saw, the same bytes for everybody with the same lock file.

    Raises InputError when the package is part of the corpus, not installed, or changed since.
    """
    if package in _packages():
        raise InputError(f"The package {package} is part of the training text; name one that is not in FAMILIES.")
    skipped: Counter = Counter()
    files = sorted(_sources_of(package), key=lambda file: file.as_posix())
    texts = [text for file in files if (text := _package_text(file, skipped))]
    if skipped["changed since it was installed"]:
        raise InputError(f"The package {package} was changed since it was installed; install it again.")
    return texts


def _package_text(file: importlib.metadata.PackagePath, skipped: Counter) -> str | None:
    """The text of an installed file; None, counted by reason, when it is not what the wheel brought or no text."""
    try:
        data = Path(file.locate()).read_bytes()
    except OSError as error:
        name = file.as_posix()
        raise InputError(f"{name} cannot be read ({error.strerror}); install its package again.") from error
    if base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode() != file.hash.value:
        skipped["changed since it was installed"] += 1
        return None
    if sum(map(data.count, b"0123456789")) > DIGITS_AT_MOST * len(data):
        skipped["table of numbers"] += 1
        return None
    return _decoded(data, skipped)


def _python_documents(files: list[PackageFile], skipped: Counter) -> Iterator[Document]:
    for name, domain, file in files:
        text = _package_text(file, skipped)
        if text is None:
            continue
        # A file gives its code or its docstrings, never both, so that no sentence stands twice in the corpus
        # (and none of a training file's docstrings is validation prose).
        if hashlib.sha256(f"prose {name}".encode()).digest()[0] % PROSE_ONE_IN == 0:
            prose = docstrings(text)
            if len(prose) >= PROSE_LEAST:
                text, domain = prose, PROSE
        yield Document(name, domain, text)


def docstrings(source: str) -> str:
    """The docstrings of a Python file, in the order of the file, dedented, joined by empty lines.

    Empty when there are none or the file does not parse.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the text being read are none of the reader's business
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    owners = [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node, clean=False)]
    owners.sort(key=lambda node: node.body[0].lineno)
    return "\n\n".join(filter(None, (_dedented(ast.get_docstring(node, clean=False)) for node in owners)))


def _dedented(text: str) -> str:
    """Like `inspect.cleandoc`, which does not give the same text in every Python version."""
    first, *rest = text.expandtabs().split("\n")
    margin = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip()), default=0)
    return "\n".join([first.strip(), *(line[margin:].rstrip() for line in rest)]).strip()


# Source "path"


def _text_files(root: Path) -> list[Path]:
    if not root.exists():
        raise InputError(f"{root} does not exist; give a file or folder of {', '.join(SUFFIXES)}.")
    candidates = sorted(root.rglob("*")) if root.is_dir() else [root]
    files = [file for file in candidates if file.suffix.lower() in SUFFIXES and not file.is_dir()]
    if not files:
        raise InputError(f"{root} holds no text; give a file or folder of {', '.join(SUFFIXES)}.")
    return sorted(files, key=lambda file: sha256(_relative(root, file).encode()))  # a cap keeps a sample of all


def _relative(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix() if file != root else file.name


def _file_hashes(root: Path, files: Iterable[Path]) -> dict[str, str]:
    hashes = {}
    for file in files:
        try:
            with file.open("rb") as stream:
                hashes[_relative(root, file)] = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror}); correct it or take it away.") from error
    return hashes


def _path_documents(root: Path, files: list[Path], text_field: str, skipped: Counter) -> Iterator[Document]:
    """Read text files and tables. Domain: the first sub-folder or, without one, a table's name or a text's suffix."""
    for file in files:
        name = _relative(root, file)
        suffix = file.suffix.lower()
        is_table = suffix in (".jsonl", ".parquet")
        folder, slash, _ = name.partition("/")
        domain = folder if slash else file.stem if is_table else suffix[1:]
        if is_table:
            rows = _jsonl_rows(file) if suffix == ".jsonl" else _parquet_rows(file, text_field)
            yield from _row_documents(rows, name, domain, text_field, skipped)
        elif (text := _decoded(file.read_bytes(), skipped)) is not None:
            yield Document(name, domain, text)


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


# Source "hub"


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
    rows: Iterable[Any], name: str, domain: str, text_field: str, skipped: Counter
) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or text_field not in row:
            raise _no_field(f"{name}, row {number},", text_field, row if isinstance(row, dict) else ())
        if isinstance(row[text_field], str):
            yield Document(f"{name}:{number}", domain, row[text_field])
        else:
            skipped["not a text"] += 1
