"""A kernel never goes on with old machine code of a function that it calls in another file."""

import os
import subprocess
import sys

from kernels.compiled import STAMP, forget_old_code
from sparsity_utils.paths import ROOT

CALLED = "from numba import njit\n@njit(cache=True)\ndef added(x):\n    return x + {}\n"
CALLER = """
from pathlib import Path
from kernels.compiled import forget_old_code
forget_old_code(Path(__file__).parent)
from numba import njit
from cpu_called import added
@njit(cache=True)
def both(x):
    return added(x)
print(both(1), sum(both.stats.cache_hits.values()))
"""


def test_a_changed_function_in_another_file_is_compiled_anew(tmp_path):
    (tmp_path / "cpu_caller.py").write_text(CALLER)

    def run(number):
        (tmp_path / "cpu_called.py").write_text(CALLED.format(number))
        environment = {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))}
        command = [sys.executable, "-c", "import cpu_caller"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    assert run(1) == ["2", "0"]
    assert run(1) == ["2", "1"]  # kept code is used
    assert run(1000) == ["1001", "0"]


def test_only_code_of_other_sources_is_forgotten(tmp_path):
    kept = tmp_path / "__pycache__"
    (tmp_path / "cpu_a.py").write_text("a = 1")
    forget_old_code(tmp_path)
    for name in ("cpu_a.f-1.nbi", "other.nbi"):
        (kept / name).touch()
    forget_old_code(tmp_path)
    assert (kept / "cpu_a.f-1.nbi").exists()
    (tmp_path / "cpu_a.py").write_text("a = 2")
    forget_old_code(tmp_path)
    assert {file.name for file in kept.iterdir()} == {"other.nbi", STAMP}
