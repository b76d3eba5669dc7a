"""The Makefile seen from a test: its targets and what they would run."""

import os
import re
import subprocess

from sparsity_utils import paths


def targets() -> set[str]:
    """The names that the Makefile declares as targets for people."""
    phony = re.search(r"^\.PHONY:(.*)$", (paths.ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(phony[1].split())


def variables() -> set[str]:
    """The variables that a reader may set, as the head of the Makefile lists them."""
    return set(re.findall(r"^#   ([A-Z]+)=", (paths.ROOT / "Makefile").read_text(), re.MULTILINE))


def make(*arguments: str, cwd=paths.ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run make without what an outer make or an active conda environment has set."""
    dropped = ("MAKE", "MFLAGS", "CONDA", *variables())
    clean = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return subprocess.run(["make", *arguments], cwd=cwd, env=clean | environment, capture_output=True, text=True)


def dry(*arguments: str, **options) -> str:
    """What `make` with these arguments would run; fails when make does."""
    done = make("--dry-run", *arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout
