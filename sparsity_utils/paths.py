"""Where things live. Nothing else in the project builds a path of its own."""

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparsity_utils.console import InputError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
RESULTS = ROOT / "results"
RECORDED_MODELS = RESULTS / "models"
PUBLISHED = RESULTS  # tables on the published curves: of no profile, so the same for every study
FIGURES = ROOT / "figures"
LOCK = ROOT / "requirements.lock"
FULL = (errno.ENOSPC, errno.EDQUOT)
# Newer versions of filelock replace a lock that a file system lacks by one that outlives a killed process.
HARD: dict[str, Any] = {"fallback_to_soft": False} if hasattr(FileLock, "fallback_to_soft") else {}
PATIENCE = 3  # seconds that another process is waited for without a word
LOCKLESS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def build() -> Path:
    """The folder of everything generated and large; `SPARSITY_BUILD` moves it to another disk.

    It lies in the checkout, or in the current folder where the package is installed without one.
    """
    home = ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()
    return home / os.environ.get("SPARSITY_BUILD", "build")  # an absolute value stands for itself


def corpora() -> Path:
    """One folder per built corpus."""
    return build() / "corpus"


def runs() -> Path:
    """The run store: one folder per training run, named by its hash."""
    return build() / "runs"


def cluster_tasks(profile: str) -> Path:
    """What a cluster was given to do for a profile, and what its tasks said."""
    return build() / "slurm" / profile


def profile_output(profile: str) -> Path:
    """Executed notebooks, figures and tables of `make reproduce PROFILE=profile`."""
    return build() / profile


def measurement(model: str) -> Path:
    """Results of `python -m sparsity_utils measure` for a model, named as its folder or as on the hub."""
    return build() / "measure" / Path(model).resolve().name


def models() -> Path:
    """Models that `python -m sparsity_utils fetch` brought, one folder each."""
    return build() / "models"


def published_curves() -> Path:
    """The downloaded curves of the paper."""
    return build() / "published_curves"


@contextmanager
def locked(target: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock file beside `target`; the system frees it when the process ends, however it ends.

    Where another process holds it: say so after a few seconds and wait for it or, if not `wait`, raise InputError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent / f".{target.name}.lock", **HARD)
    try:
        _acquire(lock, target, wait)
    except Timeout as error:
        raise InputError(f"Another process writes {target}; wait until it ends, or name another folder.") from error
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", None) not in (None, *LOCKLESS):
            raise
        raise InputError(
            f"The file system of {target.parent} has no locks ({error}); have it mounted with them (Lustre: flock), or "
            "point SPARSITY_BUILD at another one."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, target: Path, wait: bool) -> None:
    """Raises Timeout where another process has the lock and nobody waits."""
    try:
        lock.acquire(timeout=PATIENCE if wait else 0)
    except Timeout:
        if not wait:
            raise
        print(f"Another process is at work on {target}; this one goes on when it ends.", file=sys.stderr, flush=True)
        lock.acquire(timeout=-1)


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` when the block ends well.

    The temporary path is a file name or, if the block makes it one, a folder. When the block raises,
    what was written is removed and `target` stays as it was. A full disk becomes an `InputError`.
    """
    folder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        aside = folder / target.name
        yield aside
        if target.is_dir() and aside.is_dir():
            shutil.rmtree(target)
        os.replace(aside, target)
    except Exception as error:
        # safetensors reports a full disk as an error of its own, with the system's words in its text
        if getattr(error, "errno", None) in FULL or os.strerror(errno.ENOSPC) in str(error):
            raise InputError(
                f"The disk is full: {target} could not be written and was left as it was; free some space "
                f"or point SPARSITY_BUILD at another disk, then run the same command again."
            ) from error
        raise
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def collection() -> list[Path]:
    """The notebooks of the collection, `notebooks/NN_name.ipynb`, in reading order."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
