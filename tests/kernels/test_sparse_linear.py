"""Sparse linear maps: each backend against the rule in float64; Triton is interpreted where there is no GPU."""

from importlib import import_module

import pytest
import torch
from ffn_cases import assert_close, poisoned  # noqa: F401

from kernels import linear as module
from kernels.ffn import kernels_of
from kernels.linear import SparseInputFFN, SparseLinear, dense, dense_ffn, side_by_side
from kernels.naive import ACTIVATIONS

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = {"cpu": "kernels.cpu_linear", "two threads": "kernels.cpu_linear", "triton": "kernels.triton_linear"}
WIDTHS = {"one": (1,), "odd": (70, 33, 129), "wide": (300,)}
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=sorted(BACKENDS))
def run(request, monkeypatch):
    """A backend. The maps of its test lie on its device."""
    if request.param == "two threads":
        request.getfixturevalue("two_threads")
    monkeypatch.setattr(f"{__name__}.DEVICE", "cuda" if request.param == "triton" and GPU else "cpu")
    return import_module(BACKENDS[request.param]).run


def maps(widths="odd", d=63, dtype=torch.float32, rule="limits", bias=True, seed=0):
    """Maps of d inputs of which about half are active, each map by limits or numbers of its own."""
    random, count = torch.Generator().manual_seed(seed), len(WIDTHS[widths])
    weights = [torch.randn(width, d, generator=random).to(dtype) for width in WIDTHS[widths]]
    weight_t, sizes = side_by_side(weights)
    how = {"limits": {"limits": 1.4 * torch.rand(count, d, generator=random)}}
    keep = tuple(max(d * (number + 1) // (count + 1), 1) for number in range(count))
    how |= {"keep": {"keep": keep}, "norms": {"keep": keep, "norms": torch.rand(count, d, generator=random)}}
    shift = torch.randn(sum(sizes), generator=random).to(dtype) if bias else None
    parts = {"weight_t": weight_t, "bias": shift} | how[rule]
    parts = {name: part.to(DEVICE) if isinstance(part, torch.Tensor) else part for name, part in parts.items()}
    return SparseLinear(**parts, widths=sizes)


def inputs(linear, tokens, seed=1):
    x = torch.randn(tokens, linear.d, generator=torch.Generator().manual_seed(seed)).to(linear.dtype)
    return x.to(linear.weight_t.device)


def reference(linear, x):
    """y in float64, one output of one token at a time over its active inputs, from the numbers the kernel is given."""
    weights, starts = linear.wide_weights().double(), [0]
    for width in linear.widths:
        starts.append(starts[-1] + width)
    y = torch.zeros(len(x), starts[-1], dtype=torch.float64, device=x.device)
    for number in range(len(linear.widths)):
        for t, token in enumerate(x.double()):
            kept = literal_active(linear, number, token)
            mine = slice(starts[number], starts[number + 1])
            y[t, mine] = sum((token[j] * weights[j, mine] for j in kept), torch.zeros_like(y[t, mine]))
    return y if linear.bias is None else y + linear.bias.double()


def literal_active(linear, number, token):
    sizes = token.abs().tolist()
    if linear.limits is not None:
        return [j for j, size in enumerate(sizes) if size > linear.limits[number, j]]
    norms = [1.0] * len(sizes) if linear.norms is None else linear.norms[number].tolist()
    ranked = sorted(range(len(sizes)), key=lambda j: -sizes[j] * norms[j])
    return [j for j in ranked[: linear.keep[number]] if sizes[j] != 0]


@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("rule", ["limits", "keep", "norms"])
def test_maps_equal_the_reference(run, rule, tokens):
    linear = maps(rule=rule)
    x = inputs(linear, tokens)
    assert_close(run(linear, x), reference(linear, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("widths", "d"), [("one", 1), ("odd", 6), ("wide", 157)])
def test_shapes_and_dtypes(run, widths, d, dtype):
    linear = maps(widths, d, dtype, bias=False)
    for tokens in (1, 3):
        x = inputs(linear, tokens) * 3  # some input is active
        assert_close(run(linear, x), reference(linear, x))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("rule", ["limits", "norms"])
def test_eight_bits_are_what_they_stand_for(run, rule, tokens):
    linear = maps(rule=rule).quantised()
    x = inputs(linear, tokens)
    assert linear.weight_t.dtype == torch.int8
    assert_close(run(linear, x), reference(linear, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_eight_bits_keep_the_dtype_of_the_maps(run, dtype, bias):
    linear = maps(dtype=dtype, bias=bias).quantised()
    for tokens in (1, 3, 9):
        x = inputs(linear, tokens)
        assert x.dtype == dtype and linear(x).dtype == dtype
        assert_close(run(linear, x), reference(linear, x))


def test_eight_bits_are_off_by_half_a_step_at_most():
    linear = maps()
    off = (linear.quantised().wide_weights() - linear.weight_t).abs().split(linear.widths, dim=1)
    steps = linear.quantised().scale  # (maps, d)
    for part, step in zip(off, steps, strict=True):
        assert (part <= step[:, None] * 0.5001).all()


def test_nothing_active_and_all_active(run):
    linear = maps(bias=False)
    x = inputs(linear, 2)
    none = SparseLinear(linear.weight_t, linear.widths, limits=torch.full_like(linear.limits, 99.0))
    everything = SparseLinear(linear.weight_t, linear.widths, limits=torch.full_like(linear.limits, -1.0))
    assert not run(none, x).any()
    assert_close(run(everything, x), x.double() @ linear.weight_t.double())


def test_the_same_bits_on_every_call_and_through_the_call(run):
    linear = maps()
    x = inputs(linear, 3)
    first = run(linear, x)
    assert all(torch.equal(first, run(linear, x)) for _ in range(3))
    backend = module.backend(x.device.type)
    assert torch.equal(linear(x[None, :, None]), backend(linear, x)[None, :, None])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", ["limits", "norms"])
def test_a_broken_input_reaches_the_output(run, rule, broken):
    linear = maps(rule=rule)
    x = inputs(linear, 2)
    x[1, 7] = broken
    y = run(linear, x)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


def test_ties_are_all_kept(run):
    linear = maps(rule="keep", bias=False)
    x = torch.ones_like(inputs(linear, 1))
    assert_close(run(linear, x), x.double() @ linear.weight_t.double())


def test_without_a_kernel_maps_run_densely_after_one_warning(monkeypatch):
    def missing(name):
        raise ImportError("No module named 'numba'")

    monkeypatch.setattr("kernels.ffn.import_module", missing)
    linear = maps()
    ffn = SparseInputFFN(SparseLinear(linear.weight_t[:, :232], (116, 116), limits=linear.limits[:2]), down(116))
    x = inputs(linear, 2)
    kernels_of.cache_clear()
    with pytest.warns(UserWarning, match=r"linear maps on \w+ run densely, with a mask: .*No module named 'numba'"):
        assert torch.equal(linear(x), dense(linear, x))
    assert torch.equal(ffn(x), dense_ffn(ffn, x))
    kernels_of.cache_clear()


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("rule", ["limits", "keep", "norms"])
def test_many_tokens_are_masked_and_multiplied(run, rule, eight_bits):
    linear = maps(rule=rule).quantised() if eight_bits else maps(rule=rule)
    x = inputs(linear, module.MAX_TOKENS + 1)
    x[3, 7] = float("inf")
    whole = [t for t in range(len(x)) if t != 3]
    expected = reference(linear, x[whole])
    for y in (run(linear, x), linear(x)):
        assert not y[3].isfinite().any()
        assert_close(y[whole], expected)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("tokens", [1, 3, 6])
@pytest.mark.parametrize("act", ["silu", "relu2"])
def test_an_ffn_in_one_call(act, tokens):
    gate_up = maps("wide")
    half = SparseLinear(gate_up.weight_t, (150, 150), limits=gate_up.limits.repeat(2, 1), bias=gate_up.bias)
    ffn = SparseInputFFN(half, down(150), act)
    x = inputs(half, tokens)
    both = reference(half, x)
    h = ACTIVATIONS[act](both[:, :150]) * both[:, 150:]
    assert_close(ffn(x), reference(ffn.down, h), bound=1e-5)


def down(d):
    linear = maps("wide", d, seed=3)
    return SparseLinear(linear.weight_t, linear.widths, keep=(d // 2,))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"limits": None}, "either limits or keep"),
        ({"widths": (3, 4)}, r"must be \(d, 7\)"),
        ({"limits": torch.zeros(2, 3)}, r"must be \(3, 63\)"),
        ({"limits": None, "keep": (0, 1, 1)}, "numbers from 1 to 63"),
        ({"bias": torch.zeros(5)}, r"bias is \(5,\)"),
        ({"scale": torch.ones(3, 63)}, "int8 with a scale"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    linear = maps()
    given = {"weight_t": linear.weight_t, "widths": linear.widths, "limits": linear.limits, "bias": linear.bias}
    with pytest.raises(ValueError, match=says):
        SparseLinear(**given | change)


def test_an_input_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 63\), float32"):
        maps()(torch.zeros(2, 62))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("rule", ["limits", "norms"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_cuda_graph_replays_a_call_on_new_inputs(rule, tokens):
    linear = maps(dtype=torch.bfloat16, rule=rule)
    x, other = inputs(linear, tokens), inputs(linear, tokens, seed=2)
    linear(x)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x)
    for new in (x.clone(), other):
        x.copy_(new)
        graph.replay()
        assert_close(y, reference(linear, new))
        assert torch.equal(y, linear(new))
