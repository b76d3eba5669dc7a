"""A call in another process or thread: right after a fork, and from several threads at once."""

import os
import subprocess
import sys

import pytest

from sparsity_utils.paths import ROOT

CODE = """
import os, sys, torch
from concurrent.futures import ThreadPoolExecutor
torch.set_num_threads(2)
sys.path.insert(0, "tests/helpers")
from ffn_cases import ffn_case, reference
from kernels import SparseFFN, cpu_threads

given = ffn_case("tall", 0.5, tokens=3)
expected = reference(given)
x = given.pop("x")
ffn = SparseFFN(**given)
cpu_threads.BYTES_PER_THREAD = 1
torch.ones(1000, 1000).exp()  # starts torch's threads

def right(*_):
    return torch.allclose(ffn(x).double(), expected, atol=1e-5) and torch.get_num_threads() == 2

def forked():
    child = os.fork()
    if not child:
        os._exit(0 if right() and right() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert forked() == 0, "before the first call of the parent"
with cpu_threads.on_threads(2) as count:
    assert count == 2
with ThreadPoolExecutor(4) as pool:
    assert all(pool.map(right, range(200)))
assert forked() == 0, "after calls of the parent"
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue"])  # of numba; tbb has to be installed
def test_forked_children_and_threads_compute_the_same(layer: str) -> None:
    environment = os.environ | {"NUMBA_THREADING_LAYER": layer, "OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Sparse kernels run densely in a forked process") == 2  # once in each child
