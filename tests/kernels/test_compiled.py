"""A kernel never goes on with old machine code of what it takes from another file, wherever numba keeps that code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import cpu_ffn, cpu_head, cpu_layer, cpu_linear
from kernels.compiled import STAMP, forget_old_code
from sparsity_utils.paths import ROOT

CALLED = "from numba import njit\n@njit(cache=True)\ndef added(x):\n    return x + {}\n"
CALLER = """
from pathlib import Path
from kernels.compiled import forget_old_code
from numba import njit
from cpu_called import added
from constants import FACTOR
@njit(cache=True)
def both(x):
    return FACTOR * added(x)
kept = Path(both.stats.cache_path)
forget_old_code(Path(__file__).parent, kept)
print(both(1), sum(both.stats.cache_hits.values()), kept)
"""
PLACES = ("NUMBA_CACHE_DIR", "tree", "user")


@pytest.mark.parametrize("place", PLACES)
def test_what_changed_in_another_file_is_compiled_anew(tmp_path, place):
    tree, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    tree.mkdir()
    (tree / "cpu_caller.py").write_text(CALLER)
    environment = {"PYTHONPATH": os.pathsep.join(map(str, (tree, ROOT))), "HOME": str(elsewhere)}
    if place == "NUMBA_CACHE_DIR":
        environment[place] = str(elsewhere)
    if place == "user":  # as root no folder is read-only; a file in the place of the folder cannot be written into
        (tree / "__pycache__").touch()

    def run(number, factor):
        (tree / "cpu_called.py").write_text(CALLED.format(number))
        (tree / "constants.py").write_text(f"FACTOR = {factor}")
        command = [sys.executable, "-B", "-c", "import cpu_caller"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        value, hits, kept = done.stdout.split()
        assert Path(kept).is_relative_to(tree if place == "tree" else elsewhere)
        return value, hits

    assert run(1, 1) == ("2", "0")
    assert run(1, 1) == ("2", "1")  # kept code is used
    assert run(1000, 1) == ("1001", "0")
    assert run(1000, 5) == ("5005", "0")


def test_only_code_of_other_sources_is_forgotten(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "cpu_a.py").write_text("a = 1")
    forget_old_code(tmp_path, kept)
    for name in ("cpu_a.f-1.nbi", "other.nbi"):
        (kept / name).touch()
    forget_old_code(tmp_path, kept)
    assert (kept / "cpu_a.f-1.nbi").exists()
    (tmp_path / "naive.py").write_text("a = 2")
    forget_old_code(tmp_path, kept)
    assert {file.name for file in kept.iterdir()} == {"other.nbi", STAMP}


def test_the_code_of_all_kernels_is_kept_in_one_place():
    kernels = cpu_ffn.computed, cpu_linear.mapped, cpu_head.computed, cpu_layer.layered
    (kept,) = {Path(kernel.stats.cache_path) for kernel in kernels}
    assert (kept / STAMP).exists()
