"""What is special to the Triton kernels: shared work, memory that calls reuse, machine code, CUDA graphs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from ffn_cases import assert_close, computed, ffn_case, neurons, poisoned, reference  # noqa: F401

from kernels import SparseFFN, naive
from kernels import ffn as sparse_ffns

triton = pytest.importorskip("triton")
triton_ffn = import_module("kernels.triton_ffn")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ROOT = Path(__file__).parents[2]


def make(*args, **options):
    return ffn_case(*args, device=DEVICE, **options)


def ffn_of(case):
    return SparseFFN(**{key: value for key, value in case.items() if key != "x"})


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("split", [1, 2, 3, 7])
@pytest.mark.usefixtures("poisoned")
def test_any_number_of_programs_may_share_a_column(split, tokens):
    case = make("tall", 0.6, tokens=tokens, biases=True)
    ffn = ffn_of(case)
    sizes = replace(triton_ffn.sizes_for(ffn, tokens), split=split)
    y = triton_ffn.launch(ffn, case["x"], sizes)
    assert_close(y, reference(case))
    assert torch.equal(triton_ffn.launch(ffn, case["x"], sizes), y)


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_call_may_be_given_the_memory_of_the_one_before(monkeypatch, tokens):
    case, memory, empty = make("tall", 0.6, tokens=tokens), {}, torch.empty

    def reused(shape, **options):
        return memory.setdefault((shape, *options.values()), empty(shape, **options))

    monkeypatch.setattr(torch, "empty", reused)
    for x in (case["x"], -case["x"], case["x"].flip(1)):  # each with other active neurons
        y = computed(triton_ffn.run, case | {"x": x}).clone()
        assert_close(y, reference(case | {"x": x}))
    assert len(memory) == 6


@pytest.mark.parametrize("rule", naive.RULES)
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_rows_of_neurons_that_no_token_needs_are_not_read(rule, tokens):
    case = make("tall", 0.9, tokens=tokens, rule=rule)
    expected = reference(case)
    g, s, h = neurons(case)
    idle = ~naive.active_neurons(g, s, h, case["threshold"], rule).any(0)
    assert idle.any()
    case["w_down_t"][idle] = float("nan")
    case["w_up"][idle if rule == "gate" else (s == 0).all(0)] = float("nan")
    assert_close(computed(triton_ffn.run, case), expected)


def has_tool(name):
    try:
        return bool(getattr(triton.knobs.nvidia, name).path)
    except RuntimeError:  # it was not found
        return False


def test_compiles_for_a_gpu():
    """Weights are read 128 bits at a time, nothing is spilled, and no float is added atomically."""
    if not (has_tool("ptxas") and has_tool("cuobjdump")):
        pytest.skip("this Triton has no CUDA assembler")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "tests/helpers/triton_compile.py"]
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 16 + 5
    for kernel in kernels:
        _dtype, tokens, *_, (d, *_) = kernel["case"]
        assert kernel["spilled"] == 0 and kernel["float_atomics"] == 0, kernel
        if d % 16 == 0:
            linear = kernel["kernel"] == "linear_kernel"  # it is not pipelined
            assert kernel["wide_loads" if tokens == 1 or linear else "wide_copies"] >= 4, kernel
            assert (kernel["tensor_cores"] > 0) == (tokens > 1), kernel


def test_a_triton_that_is_too_old_is_an_import_error(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    monkeypatch.delitem(sys.modules, "kernels.triton_ffn")
    with pytest.raises(ImportError, match=r"Triton 3\.3\.1 is installed; the kernels need 3\.4 or later"):
        import_module("kernels.triton_ffn")
    sparse_ffns.kernels_of.cache_clear()
    with pytest.warns(UserWarning, match=r"on cuda run densely, with a mask: .*3\.4 or later"):
        assert sparse_ffns.backend("cuda") is sparse_ffns.run_dense
    sparse_ffns.kernels_of.cache_clear()


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    case = ffn_case("tiny", 0.5)
    monkeypatch.setattr(triton, "JITFunction", object)  # what the kernels are without the interpreter
    with pytest.raises(ValueError, match="x is on cpu; the Triton kernels need a GPU"):
        computed(triton_ffn.run, case)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_cuda_graph_replays_a_call_on_new_inputs(tokens):
    case = make("tall", 0.6, tokens=tokens, dtype=torch.bfloat16)
    ffn, x = ffn_of(case), case["x"].clone()
    ffn(x)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ffn(x)
    for new in (case["x"], -case["x"], case["x"].flip(1)):
        x.copy_(new)
        graph.replay()
        assert_close(y, reference(case | {"x": new}))
        assert torch.equal(y, ffn(new))
