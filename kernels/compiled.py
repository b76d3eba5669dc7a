"""Machine code that numba keeps of the kernels for CPUs, forgotten when any source of the kernels changed.

Numba compiles a function anew when its own file changed, not when a function that it calls, or a constant, did in
another file: after an update a kernel could go on with old parts.
"""

import hashlib
import os
from pathlib import Path

STAMP = "cpu_kernels.sha256"


def forget_old_code(folder: Path, kept: Path) -> None:
    """Delete what numba kept of `cpu_*.py` of `folder` unless all sources `*.py` there are those that it was kept of.

    kept: where numba keeps it, `stats.cache_path` of a kernel: below NUMBA_CACHE_DIR if that is set, in `__pycache__`,
    or, if nothing can be written there, in a folder of the user. Numba looks there at the first call of a kernel.
    """
    sources = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    digest, stamp = hashlib.sha256(sources).hexdigest(), kept / STAMP
    if stamp.exists() and stamp.read_text() == digest:
        return
    for index in kept.glob("cpu_*.nbi"):
        index.unlink(missing_ok=True)
    aside = kept / f"{STAMP}.{os.getpid()}"
    aside.write_text(digest)
    aside.replace(stamp)
