"""The certified gate: the bound holds for the worst inputs, and the result has the bits of the exact kernel."""

import dataclasses

import pytest
import torch
from ffn_cases import SHAPES, assert_close, ffn_case, neurons, reference

from kernels import SparseFFN, eight_bits, naive
from kernels.certified import certified_gate, inactive_region


def plain_and_certified(case):
    ffn = SparseFFN(**{key: value for key, value in case.items() if key != "x"})
    return ffn, ffn.certified()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 5, 16])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_the_same_bits_as_without_the_copy(shape, tokens, dtype):
    case = ffn_case(shape, 0.8, tokens=tokens, dtype=dtype, biases=True)
    exact, certified = plain_and_certified(case)
    y = certified(case["x"])
    assert torch.equal(y, exact(case["x"]))
    assert_close(y, reference(case))


def cancelling(size=300, rows=600):
    """Rows that 8 bits hold exactly, and for each an x that float32 sums to about its own rounding error."""
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(-126, 127, (rows, size), generator=random).double()
    bits[:, 0] = 127
    w = bits * 3 / 1024
    x = torch.randn(rows, size, generator=random, dtype=torch.float64)
    x = (x - (x * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w).float()
    return w.float(), x


def missed(w, x):
    """How many rows the certified kernel calls inactive that the exact one computes, each for its own x."""
    exact = SparseFFN(w, None, torch.eye(len(w)), 0.0)
    certified = exact.certified()
    return sum(bool((exact(one)[i] != 0) & (certified(one)[i] == 0)) for i, one in enumerate(x))


def test_the_rounding_of_sums_is_part_of_the_bound(monkeypatch):
    w, x = cancelling()
    assert missed(w, x) == 0
    monkeypatch.setattr(eight_bits, "UNIT", 0.0)  # a bound that forgets it
    assert missed(w, x) > 0


OVERFLOWING = {  # x, w, threshold: sums that leave float32 on one side alone
    "the estimate": ([-2.7e36, 2.6e36, 2.6e36], [1.0, 1.0, 1.0], 0.0),
    "the exact sum": ([1e30, 1e30, 1e30], [1e10, -1e10, -1e10], 0.0),
    "infinite threshold": ([float("inf"), 1.0, 0.0], [1.0, 0.0, 0.0], float("inf")),
}


@pytest.mark.parametrize("name", OVERFLOWING)
def test_overflow_is_never_certain(name):
    x, w, threshold = OVERFLOWING[name]
    exact = SparseFFN(torch.tensor([w]), None, torch.ones(1, 1), threshold)
    certified, given = exact.certified(), torch.tensor(x)
    assert torch.equal(certified(given).nan_to_num(7), exact(given).nan_to_num(7))
    assert not certified.certificate.certain(given[None]).any()


def test_far_tails_of_a_tiny_limit():
    exact = SparseFFN(torch.ones(1, 1), None, torch.full((1, 1), 1e18), 1e-20, act="silu")
    x = torch.tensor([-41.0])
    assert torch.equal(exact.certified()(x), exact(x)) and exact(x) != 0


def test_another_ffn_has_no_certificate():
    case = ffn_case("odd", 0.9)
    certified = plain_and_certified(case)[1]
    assert dataclasses.replace(certified, threshold=0.0).certificate is None


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("act", sorted(naive.ACTIVATIONS))
@pytest.mark.parametrize("rule", naive.RULES)
def test_the_same_bits_under_every_rule_and_activation(act, rule):
    case = ffn_case("tall", 0.8, tokens=2, act=act, rule=rule)
    if rule == "neuron" and act not in ("relu", "relu2"):
        with pytest.raises(ValueError, match="no neuron is certainly inactive"):
            plain_and_certified(case)
        return
    exact, certified = plain_and_certified(case)
    assert torch.equal(certified(case["x"]), exact(case["x"]))
    assert certified.certificate.certain(case["x"]).double().mean() > 0.3  # or nothing would be saved


@pytest.mark.parametrize("act", sorted(naive.ACTIVATIONS))
def test_no_active_neuron_is_ever_certain_even_for_the_worst_inputs(act):
    """x along the rounding errors of a row leads that row's estimate as far astray as any x of its size can."""
    case = ffn_case("tall", 0.9, act=act, biases=True)
    certificate = plain_and_certified(case)[1].certificate
    copy = certificate.copy
    error = case["w_gate"].double() - copy.scale[:, None] * copy.bits.double()  # (d_ff, d)
    directions = torch.cat([error, -error, case["w_gate"], -case["w_gate"]]).double()
    sizes = torch.logspace(-3, 3, 13, dtype=torch.float64)
    for size in sizes:
        x = (directions / directions.norm(dim=1, keepdim=True) * size).float()
        _, s, _ = neurons(case | {"x": x})
        active = s.abs() > case["threshold"]
        assert not (certificate.certain(x, case["b_gate"]) & active).any()


def test_the_bound_is_tight():
    """Along a row's error its g leaves the estimate by all of the radius but what is kept for float32."""
    case = ffn_case("tall", 0.5)
    certificate = plain_and_certified(case)[1].certificate
    copy = certificate.copy
    error = case["w_gate"].double() - copy.scale[:, None] * copy.bits.double()
    assert (error.norm(dim=1) <= copy.radius).all()
    assert (copy.radius <= error.norm(dim=1) + 5e-5 * case["w_gate"].double().norm(dim=1)).all()
    assert copy.bits.abs().amax(dim=1).eq(eight_bits.LEVELS).all()


@pytest.mark.parametrize("act", sorted(naive.ACTIVATIONS))
@pytest.mark.parametrize("limit", [0.0, 1e-6, 0.05, 0.16, 0.2, 0.3, 2.0])
def test_the_inactive_region_is_that_of_the_activation_function(act, limit):
    tail, low, high = (part.item() for part in inactive_region(act, torch.tensor([limit])))
    g = torch.linspace(-30, 5, 70_001, dtype=torch.float64)
    inside = (g <= tail) | ((g >= low) & (g <= high))
    inactive = naive.ACTIVATIONS[act](g).abs() <= limit
    assert not (inside & ~inactive).any()
    if limit > 1e-5:  # below, the margin for rounding is all there is
        assert (inactive & ~inside).sum() <= 3
    assert not (naive.ACTIVATIONS[act](g.float()).abs()[inside] > limit).any()  # as computed in float32


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_inputs_and_weights_are_never_certain(bad):
    case = ffn_case("odd", 0.9, tokens=3)
    case["x"][1, 7] = bad
    exact, certified = plain_and_certified(case)
    assert not certified.certificate.certain(case["x"])[1].any()
    assert torch.equal(certified(case["x"]).nan_to_num(7), exact(case["x"]).nan_to_num(7))
    case = ffn_case("odd", 0.9)
    case["w_gate"][3, 5] = bad
    exact, certified = plain_and_certified(case)
    assert not certified.certificate.certain(case["x"])[:, 3].any()
    assert torch.equal(certified(case["x"]).nan_to_num(7), exact(case["x"]).nan_to_num(7))


def test_a_row_of_zeros_and_tiny_numbers():
    case = ffn_case("odd", 0.9)
    case["w_gate"][0] = 0
    case["w_gate"][1] *= 1e-42
    exact, certified = plain_and_certified(case)
    assert torch.equal(certified(case["x"]), exact(case["x"]))


def test_other_devices_are_refused():
    weight = torch.empty(3, 2, device="meta")
    with pytest.raises(ValueError, match="on a CPU only"):
        certified_gate(weight, None, "relu", torch.zeros(3))
