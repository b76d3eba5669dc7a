"""The one call: what it refuses, in which words, and where it falls back to the dense mask."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from ffn_cases import assert_close, ffn_case, reference

from kernels import MAX_TOKENS, SparseFFN, ffn, naive, sparse_ffn
from sparsity_utils.paths import ROOT


def case(**changes):
    return {**ffn_case("odd", 0.5, tokens=2, biases=True), **changes}


BAD = {
    "w_up (157, 62) float32 on cpu": {"w_up": torch.zeros(157, 62)},
    "w_down_t is (63, 157).*transposed": {"w_down_t": torch.zeros(63, 157)},
    "w_gate is (63,) .*two dimensions": {"w_gate": torch.zeros(63)},
    "w_gate is (0, 63).*two dimensions": {"w_gate": torch.zeros(0, 63)},
    "b_gate is (63,).*must be (157,)": {"b_gate": torch.zeros(63)},
    "w_up is .*float16.*one dtype": {"w_up": torch.zeros(157, 63, dtype=torch.float16)},
    "b_down is .*on meta.*one device": {"b_down": torch.zeros(63, device="meta")},
    "w_gate is .*float64.*float32, float16 or bfloat16": {"w_gate": torch.zeros(157, 63, dtype=torch.float64)},
    "threshold is (156,).*one per neuron, (157,)": {"threshold": torch.zeros(156)},
    "threshold is .*on meta": {"threshold": torch.zeros(157, device="meta")},
    "threshold is NaN; it must be a number": {"threshold": float("nan")},
    "A threshold is NaN": {"threshold": torch.full((157,), float("nan"))},
    "threshold is '0.1'; it must be a number": {"threshold": "0.1"},
    "w_gate is of type list; it must be a torch tensor": {"w_gate": [1.0]},
    "act is 'tanh'; choose one of relu, relu2": {"act": "tanh"},
    "rule is 'top-k'; choose one of gate, neuron": {"rule": "top-k"},
    "b_up was given without w_up": {"w_up": None},
    "x is (2, 62).*must be (..., 63)": {"x": torch.zeros(2, 62)},
    "x is (2, 63) bfloat16": {"x": torch.zeros(2, 63, dtype=torch.bfloat16)},
    "x is (2, 63) float32 on meta": {"x": torch.zeros(2, 63, device="meta")},
    "x is () float32": {"x": torch.tensor(1.0)},
}


@pytest.mark.parametrize(("words", "changes"), BAD.items(), ids=list(BAD))
def test_bad_input_is_one_clear_sentence(words, changes):
    pattern = ".*".join(words.replace("(", r"\(").replace(")", r"\)").split(".*")).replace("w_up \\(", "w_up is \\(")
    with pytest.raises(ValueError, match=pattern):
        sparse_ffn(**case(**changes))


@pytest.mark.parametrize("tokens", [0, 1, MAX_TOKENS, MAX_TOKENS + 1, 40])
def test_any_number_of_tokens(tokens):
    given = ffn_case("odd", 0.5, tokens=max(tokens, 1))
    given["x"] = given["x"][:tokens]
    y = sparse_ffn(**given)
    assert y.shape == (tokens, 63)
    assert torch.allclose(y.double(), reference(given), atol=1e-5)
    if tokens > MAX_TOKENS:
        assert torch.equal(y, naive.sparse_ffn(**given))  # the dense mask itself


@pytest.mark.parametrize("shape", [(63,), (1, 1, 63), (2, 3, 63), (0, 4, 63)])
def test_leading_dimensions_are_kept(shape):
    given = ffn_case("odd", 0.5, tokens=6)
    x = given["x"].flatten()[: torch.Size(shape).numel()].view(shape)
    y = sparse_ffn(**given | {"x": x})
    assert y.shape == (*shape[:-1], 63)
    assert torch.equal(y.reshape(-1, 63), sparse_ffn(**given | {"x": x.reshape(-1, 63)}))


def test_thresholds_may_be_a_number_a_tensor_or_one_per_neuron():
    given = ffn_case("odd", 0.5)
    value = given["threshold"]
    expected = sparse_ffn(**given)
    for threshold in (torch.tensor(value), torch.full((157,), value), torch.full((157,), value, dtype=torch.float32)):
        assert torch.equal(sparse_ffn(**given | {"threshold": threshold}), expected)


def test_extreme_thresholds_leave_all_or_none():
    given = ffn_case("odd", 0.5, act="silu")
    for threshold, sparsity in ((-1, 0), (1e39, 1), (float("inf"), 1)):
        y = sparse_ffn(**given | {"threshold": threshold})
        expected = reference(given | {"threshold": -1.0 if sparsity == 0 else 1e30})
        assert torch.allclose(y.double(), expected, atol=1e-5) and (y == 0).all() == bool(sparsity)


def test_no_gradient_flows_and_none_is_asked_for():
    given = ffn_case("odd", 0.5)
    given["w_gate"].requires_grad_()
    y = sparse_ffn(**given | {"x": given["x"].requires_grad_()})
    assert not y.requires_grad


def test_weights_are_shared_not_copied():
    given = ffn_case("odd", 0.5)
    x = given.pop("x")
    kept = SparseFFN(**given)
    before = kept(x)
    given["w_down_t"].mul_(2)
    assert torch.allclose(kept(x), 2 * before)


@pytest.fixture
def fresh_backends():
    ffn.kernels_of.cache_clear()
    yield
    ffn.kernels_of.cache_clear()


def test_a_missing_backend_falls_back_and_says_so_once(fresh_backends, monkeypatch):
    def missing(name):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(ffn, "import_module", missing)
    given = case()
    with pytest.warns(UserWarning, match=r"on cpu run densely, with a mask: .*No module named 'triton'"):
        y = sparse_ffn(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sparse_ffn(**given), y)
    assert torch.allclose(y.double(), reference(given), atol=1e-5)


def test_a_device_without_a_kernel_falls_back(fresh_backends):
    with pytest.warns(UserWarning, match="no kernel for 'mps'"):
        assert ffn.backend("mps") is ffn.run_dense


def test_a_call_leaves_the_number_of_threads_of_torch_alone():
    code = """
import torch
from kernels import SparseFFN
before = torch.get_num_threads()
SparseFFN(torch.ones(3, 2), None, torch.ones(3, 2), 0.0)(torch.ones(1, 2))
assert torch.get_num_threads() == before == 1, torch.get_num_threads()
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_numbers_of_threads_change_the_order_of_sums_alone(two_threads):
    given = ffn_case("tall", 0.5, tokens=3)
    expected, x = reference(given), given.pop("x")
    kept, results = SparseFFN(**given), []
    for count in (2, 1):
        torch.set_num_threads(count)
        results.append(kept(x))
        assert torch.equal(kept(x), results[-1])
        assert_close(results[-1], expected)
    assert not torch.equal(*results)  # or the call was not shared
