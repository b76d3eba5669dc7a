"""Text sources: where documents come from, in a fixed order, each with a name and a domain label.

`open_source` returns what identifies the text (for the corpus's folder name) and an iterator of documents.
Nothing is read before it is asked for, so a size cap costs no more than the text it keeps.
"""

import base64
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackagePath
from pathlib import Path
from typing import Any

from sparsity_utils.console import InputError
from sparsity_utils.text.config import CorpusConfig
from sparsity_utils.text.documents import Document, Skipped, decoded, normalised
from sparsity_utils.text.files import file_hashes, hub_documents, path_documents, sha256, text_files
from sparsity_utils.text.prose import LICENCE, docstrings, prose_paragraphs

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

PROSE_SUFFIXES = (".rst", ".md", ".txt")
PARAGRAPHS_LEAST = 500  # characters of paragraphs worth a document of python-prose

# Written while a wheel is built or repaired, so they differ between platforms or between CPU and CUDA wheels.
BUILD_TIME_FILES = {
    "version.py", "_version.py", "__version__.py", "_generated_version.py", "_version_meson.py", "__config__.py",
    "_distributor_init.py",
}  # fmt: skip
DIGITS_AT_MOST = 0.25  # share of a file's bytes; above it, a file is a table of numbers rather than text

PackageFile = tuple[str, str, PackagePath]  # name, domain, file


@dataclass
class Source:
    """A text source, opened.

    `identity` is JSON: two sources with the same identity hold the same text. `skipped` counts, by reason,
    what was left out so far; it fills while `documents` is read.
    """

    identity: dict[str, Any]
    documents: Iterator[Document]
    skipped: Skipped = field(default_factory=Skipped)


def open_source(config: CorpusConfig) -> Source:
    """Open the text source a profile names.

    Raises:
        InputError: when the source is missing, empty or unreadable; rows may also raise it while they are read.
    """
    skipped = Skipped()
    identity, documents = _opened(config, skipped)
    return Source(identity, normalised(documents, skipped), skipped)


def _opened(config: CorpusConfig, skipped: Skipped) -> tuple[dict[str, Any], Iterator[Document]]:
    """The identity of a source, and its documents as they are stored."""
    if config.source == "python-source":
        files = _package_files(_is_source)
        return _packages_identity(files), _python_documents(files, skipped)
    if config.source == "python-prose":
        files = _package_files(_holds_prose)
        return _packages_identity(files), _prose_documents(files, skipped)
    root = Path(config.path or "")
    if config.source == "path":
        root = root.expanduser()
        texts = text_files(root)
        return {"files": file_hashes(root, texts)}, path_documents(root, texts, config.text_field, skipped)
    identity: dict[str, Any] = {"path": config.path, "revision": config.revision}
    if root.is_dir():  # a local data set has no revision of its own
        identity["files"] = file_hashes(root, sorted(file for file in root.rglob("*") if file.is_file()))
    return identity, hub_documents(config, skipped)


# Sources "python-source" and "python-prose"


def _packages() -> list[str]:
    return sorted(package for packages in FAMILIES.values() for package in packages)


def _packages_identity(files: list[PackageFile]) -> dict[str, Any]:
    listing = "\n".join(f"{name} {file.hash.value}" for name, _, file in files)
    return {
        "packages": {p: importlib.metadata.version(p).partition("+")[0] for p in _packages()},
        "files": len(files),
        "listing_sha256": sha256(listing.encode()),
    }


def _package_files(usable: Callable[[PackagePath], bool]) -> list[PackageFile]:
    """(name, domain, file) of every usable file, ordered by a hash of the name.

    In this order any prefix, so any size cap, is a proportional sample of all packages.
    """
    found = [
        (file.as_posix(), domain, file)
        for domain, packages in FAMILIES.items()
        for package in packages
        for file in _files_of(package, usable)
    ]
    return sorted(found, key=lambda item: sha256(item[0].encode()))


def _files_of(package: str, usable: Callable[[PackagePath], bool]) -> list[PackagePath]:
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
    came = [file for file in files if file.hash and file.hash.mode == "sha256" and ".." not in file.parts]
    return [file for file in came if usable(file)]


def _is_source(file: PackagePath) -> bool:
    """Python text that came with the wheel, the same on every platform."""
    if file.suffix != ".py":
        return False
    if file.name in BUILD_TIME_FILES or "generated" in file.parts:
        return False
    # Wheel repair on Windows writes into a package's top-level __init__.py.
    return not (file.name == "__init__.py" and len(file.parts) == 2)


def _gives_docstrings(name: str) -> bool:
    """A file gives its code or its docstrings, never both, so that no sentence stands twice in a corpus or in two
    (and none of a training file's docstrings is validation prose)."""
    return hashlib.sha256(f"prose {name}".encode()).digest()[0] % PROSE_ONE_IN == 0


def _holds_prose(file: PackagePath) -> bool:
    """A text file, a package's description, or a Python file that is no test and gives no code to python-source."""
    if LICENCE.search(file.as_posix()) or {"test", "tests"} & set(file.parts):
        return False
    if file.suffix == ".py":
        return _is_source(file) and _gives_docstrings(file.as_posix())
    return file.suffix in PROSE_SUFFIXES or file.name == "METADATA"


def package_documents(package: str) -> list[str]:
    """The source files of an installed package that is no part of the corpus, as texts, ordered by name.

    Text that a model trained on the corpus never saw, the same bytes for everybody with the same lock file.

    Raises InputError when the package is part of the corpus, not installed, or changed since.
    """
    if package in _packages():
        raise InputError(f"The package {package} is part of the training text; name one that is not in FAMILIES.")
    skipped = Skipped()
    files = sorted(_files_of(package, _is_source), key=PackagePath.as_posix)
    texts = [text for file in files if (text := _package_text(file, skipped))]
    if skipped["changed since it was installed"]:
        raise InputError(f"The package {package} was changed since it was installed; install it again.")
    return texts


def _package_text(file: PackagePath, skipped: Skipped) -> str | None:
    """The text of an installed file; None, counted by reason, when it is not what the wheel brought or no text."""
    try:
        data = Path(file.locate()).read_bytes()
    except OSError as error:
        name = file.as_posix()
        raise InputError(f"{name} cannot be read ({error.strerror}); install its package again.") from error
    if base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode() != file.hash.value:
        skipped.add("changed since it was installed", file.as_posix())
        return None
    if sum(map(data.count, b"0123456789")) > DIGITS_AT_MOST * len(data):
        skipped.add("table of numbers", file.as_posix())
        return None
    return decoded(data, file.as_posix(), skipped)


def _python_documents(files: list[PackageFile], skipped: Skipped) -> Iterator[Document]:
    for name, domain, file in files:
        text = _package_text(file, skipped)
        if text is None:
            continue
        if _gives_docstrings(name):
            prose = docstrings(text)
            if len(prose) >= PROSE_LEAST:
                text, domain = prose, PROSE
        yield Document(name, domain, text)


def _prose_documents(files: list[PackageFile], skipped: Skipped) -> Iterator[Document]:
    """The prose of each file: paragraphs of English that no file before it had."""
    seen: set[str] = set()
    for name, domain, file in files:
        text = _package_text(file, skipped)
        if text is None:
            continue
        text = docstrings(text) if file.suffix == ".py" else text.expandtabs()
        paragraphs = dict.fromkeys(paragraph for paragraph in prose_paragraphs(text) if paragraph not in seen)
        seen |= paragraphs.keys()
        prose = "\n\n".join(paragraphs)
        if len(prose) < PARAGRAPHS_LEAST:
            skipped.add("of little prose", name)
        else:
            yield Document(name, domain, prose)
