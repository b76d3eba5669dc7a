"""Each backend against the same rule run densely in float64. Triton runs compiled on a GPU, interpreted without one."""

from importlib import import_module

import pytest
import torch
from ffn_cases import SHAPES, assert_close, computed, ffn_case, neurons, poisoned, reference  # noqa: F401

from kernels import naive, sparse_ffn

GPU = torch.cuda.is_available()
BACKENDS = {"cpu": "kernels.cpu_ffn", "two threads": "kernels.cpu_ffn", "triton": "kernels.triton_ffn"}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # numpy in the interpreter, on NaN
]


@pytest.fixture(params=sorted(BACKENDS))
def backend(request):
    if request.param == "two threads":
        request.getfixturevalue("two_threads")
    return request.param


def run(backend, case):
    return computed(import_module(BACKENDS[backend]).run, case)


def make(backend, *args, **options):
    return ffn_case(*args, device="cuda" if backend == "triton" and GPU else "cpu", **options)


def check(backend, *args, **options):
    case = make(backend, *args, **options)
    y = run(backend, case)
    assert y.dtype == case["x"].dtype
    assert_close(y, reference(case))


@pytest.mark.parametrize("rule", naive.RULES)
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 1])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_odd_shapes_at_every_sparsity(backend, shape, sparsity, rule):
    check(backend, shape, sparsity, rule=rule)


@pytest.mark.parametrize("rule", naive.RULES)
@pytest.mark.parametrize("act", sorted(naive.ACTIVATIONS))
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("biases", [False, True], ids=["no bias", "biases"])
def test_every_activation_with_and_without_up_and_biases(backend, act, rule, gated, biases):
    check(backend, "odd", 0.6, act=act, rule=rule, gated=gated, biases=biases, tokens=3)


@pytest.mark.parametrize("rule", naive.RULES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 16])
def test_batches_use_the_union_of_active_sets_and_a_mask_per_row(backend, tokens, rule):
    case = make(backend, "odd", 0.8, tokens=tokens, rule=rule)
    y = run(backend, case)
    assert_close(y, reference(case))
    for row in range(tokens):  # a row must not see the neurons that only others keep active
        assert_close(y[row : row + 1], reference(case | {"x": case["x"][row : row + 1]}))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_dtypes(backend, dtype, tokens):
    check(backend, "odd", 0.7, tokens=tokens, dtype=dtype, biases=True)


def test_the_bounds_would_catch_one_dropped_row(backend):
    case = make(backend, "tall", 0, dtype=torch.bfloat16, act="silu")
    y = run(backend, case)
    assert_close(y, reference(case))
    kept = {key: case[key][1:] for key in ("w_gate", "w_up", "w_down_t")}
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close(y, reference(case | kept))


def test_the_same_bits_on_every_call(backend):
    case = make(backend, "tall", 0.5, tokens=4)
    assert all(torch.equal(run(backend, case), run(backend, case)) for _ in range(5))


@pytest.mark.parametrize("rule", naive.RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_broken_inputs_reach_the_output_of_their_own_row_alone(backend, bad, act, rule):
    case = make(backend, "odd", 0.9, tokens=3, act=act, rule=rule)
    case["x"][1, 7] = bad
    y, expected = run(backend, case), reference(case)
    assert torch.equal(y.isfinite(), expected.isfinite()) and not y[1].isfinite().any()
    assert_close(y[::2], expected[::2])


def test_an_infinite_weight_of_an_inactive_neuron_is_not_read(backend):
    case = make(backend, "odd", 0.5)
    _g, s, _ = neurons(case)
    idle = int((s[0] == 0).nonzero()[0])
    case["w_up"][idle], case["w_down_t"][idle] = float("inf"), float("nan")
    y = run(backend, case)
    case["w_up"][idle], case["w_down_t"][idle] = 0, 0
    assert_close(y, reference(case))


@pytest.mark.parametrize("rule", naive.RULES)
def test_a_broken_weight_of_a_needed_row_reaches_the_output(backend, rule):
    case = make(backend, "odd", 0.5, rule=rule)
    _, s, _ = neurons(case)
    case["w_up"][int(s[0].argmax())] = float("nan")
    assert not run(backend, case).isfinite().any() and not reference(case).isfinite().any()


@pytest.mark.parametrize("name", ["x", "w_gate", "w_up", "w_down_t"])
def test_tensors_that_are_not_contiguous(backend, name):
    case = make(backend, "odd", 0.5, tokens=2)
    spaced = case[name].repeat_interleave(2, dim=1)[:, ::2].T.contiguous().T
    assert not spaced.is_contiguous()
    assert torch.equal(sparse_ffn(**case | {name: spaced}), sparse_ffn(**case))
