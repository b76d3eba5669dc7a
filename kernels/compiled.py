"""Machine code that numba keeps beside the kernels for CPUs, forgotten when any of them changed.

Numba compiles a function anew when its own file changed, not when a function that it calls did, in another file: after
an update a kernel could go on with old parts.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

STAMP = "cpu_kernels.sha256"


def forget_old_code(folder: Path) -> None:
    """Delete what numba kept in `__pycache__` of `folder` of other sources `cpu_*.py` than those there now.

    Where nothing can be written numba keeps nothing there either.
    """
    sources = b"".join(file.read_bytes() for file in sorted(folder.glob("cpu_*.py")))
    digest, kept = hashlib.sha256(sources).hexdigest(), folder / "__pycache__"
    with suppress(OSError):
        kept.mkdir(exist_ok=True)
        stamp = kept / STAMP
        if stamp.exists() and stamp.read_text() == digest:
            return
        for index in kept.glob("cpu_*.nbi"):
            index.unlink(missing_ok=True)
        aside = kept / f"{STAMP}.{os.getpid()}"
        aside.write_text(digest)
        aside.replace(stamp)
