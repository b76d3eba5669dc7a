"""FFN discovery, observation and masking on the FFNs of many families of transformers models."""

from copy import deepcopy

import pytest
import torch
from families import (
    FAMILIES,
    SQUARE,
    Keep,
    build,
    down,
    first_maps,
    inputs,
    keep_all,
    keep_even,
    keep_none,
    left_behind,
    names,
    neurons,
    output,
)
from torch import nn
from torch.nn import functional

from sparsity_utils.neurons.activations import activation_name
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.hooks import observe_neurons, sparse_neurons

EVERY = sorted(FAMILIES)


def ffn_inputs(family, model, batch):
    """What each FFN is given, (rows, d), seen at its first linear map."""
    gate, seen = FAMILIES[family][1].gate, {}

    def keep(name):
        return lambda module, args: seen.update({name: args[0].flatten(0, -2)})

    first = {name: model.get_submodule(f"{name}.{gate}") for name in names(family)}
    handles = [module.register_forward_pre_hook(keep(name)) for name, module in first.items()]
    output(model, batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", EVERY)
def test_ffns_are_found_and_s_and_h_are_those_of_the_definition(family):
    model, batch, seen = build(family), inputs(family), {}
    ffns = find_ffns(model)
    assert [ffn.name for ffn in ffns] == names(family)
    assert [ffn.layer for ffn in ffns] == list(range(len(ffns)))
    assert [ffn.in_encoder for ffn in ffns] == [ffn.name.startswith("encoder.block") for ffn in ffns]
    assert all((ffn.expert, ffn.experts) == (0, 1) for ffn in ffns)
    for ffn in ffns:
        weight = down(family, model, ffn.name).weight
        expected = weight.T if FAMILIES[family][1].conv1d else weight
        assert torch.equal(ffn.down_weight, expected) and ffn.down_weight.data_ptr() == weight.data_ptr()
        assert ffn.d_ff == expected.shape[1] and not ffn.down_weight.requires_grad

    with observe_neurons(model, lambda ffn, s, h, tokens: seen.setdefault(ffn.name, []).append((s, h, tokens))):
        output(model, batch)
    given = ffn_inputs(family, model, batch)
    assert list(seen) == names(family)
    for name, calls in seen.items():
        ((s, h, tokens),) = calls
        expected_s, expected_h = neurons(family, model, name, given[name])
        torch.testing.assert_close(s, expected_s, rtol=1e-8, atol=1e-9)  # bloom rounds its constants
        torch.testing.assert_close(h, expected_h, rtol=1e-8, atol=1e-9)
        assert tokens.tolist() == list(range(len(given[name])))


def is_view_of(found, expected):
    """Whether both are the same part of the same storage, or both None."""
    if found is None or expected is None:
        return found is expected
    same = (found.data_ptr(), found.shape, found.stride()) == (expected.data_ptr(), expected.shape, expected.stride())
    return same and torch.equal(found, expected) and not found.requires_grad


def linear(x, weight, bias):
    """W x + b by its definition."""
    y = (x[:, None, :] * weight[None]).sum(-1)
    return y if bias is None else y + bias


def check_first_maps(ffn, expected):
    for found, by_hand in zip((ffn.gate, ffn.up), expected, strict=True):
        assert (found is None) == (by_hand is None)
        if found is not None:
            module, weight, bias = by_hand
            assert found.module is module and is_view_of(found.weight, weight) and is_view_of(found.bias, bias)


@pytest.mark.parametrize("d_ff", [24, 16])
@pytest.mark.parametrize("family", EVERY)
def test_the_first_maps_are_found_and_make_s_and_h(family, d_ff):
    model, batch, seen = build(family, d_ff=d_ff), inputs(family), {}
    ffns = find_ffns(model)
    with observe_neurons(model, lambda ffn, s, h, tokens: seen.setdefault(ffn.name, (s, h))):
        output(model, batch)
    given, act = ffn_inputs(family, model, batch), FAMILIES[family][1].act
    for ffn in ffns:
        check_first_maps(ffn, first_maps(family, model, ffn.name))
        x = given[ffn.name]
        s = act(linear(x, ffn.gate.weight, ffn.gate.bias))
        h = s if ffn.up is None else s * linear(x, ffn.up.weight, ffn.up.bias)
        torch.testing.assert_close((s, h), seen[ffn.name], rtol=1e-8, atol=1e-9)  # bloom rounds its constants
        for found in (ffn.gate, ffn.up):
            if found is not None:
                returned = found.module(x)[..., found.outputs]
                torch.testing.assert_close(returned, linear(x, found.weight, found.bias), rtol=1e-10, atol=1e-10)
        whole = down(family, model, ffn.name)
        assert (ffn.down is None) == (ffn.activation is None) == (family == "lfm2")  # whose activation is a function
        if ffn.down is not None:
            assert ffn.down is whole and is_view_of(ffn.down_bias, whole.bias)
            assert activation_name(ffn.activation) == act.__name__


class Fused(nn.Module):
    """Gate and up interleaved in one map, with a bias, whose outputs `compute` may take elsewhere than from it."""

    def __init__(self, compute):
        super().__init__()
        self.both, self.act, self.out = nn.Linear(6, 18), nn.SiLU(), nn.Linear(9, 6, bias=False)
        self.compute = compute

    def forward(self, x):
        both = self.compute(self.both, x)
        return self.out(both[..., 1::2] * self.act(both[..., ::2]))


def directly(both, x):
    return both(x)


def transposed(both, x):
    """Torch then multiplies by a weight expanded to a stack, and adds the bias by itself."""
    return both.requires_grad_(False)(x.mT.contiguous().mT)


@pytest.mark.parametrize("compute", [directly, transposed])
def test_interleaved_maps_are_found_by_their_rows_also_inside_another_module(compute):
    model, x = Fused(compute).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    both, weight, bias = model.both, model.both.weight.detach(), model.both.bias.detach()
    model.both = nn.Sequential(both)
    (ffn,) = find_ffns(model, x)
    check_first_maps(ffn, [(both, weight[i::2], bias[i::2]) for i in (0, 1)])
    assert ffn.down is model.out and ffn.down_bias is None
    model.float()
    check_first_maps(ffn, [(both, both.weight.detach()[i::2], both.bias.detach()[i::2]) for i in (0, 1)])


def run_by_no_module(both, x):
    return functional.linear(x, both.weight, both.bias)


def without_a_positional_argument(both, x):
    return both(input=x)


def of_another_vector_inside(both, x):
    handle = both.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    result = both(x)
    handle.remove()
    return result


@pytest.mark.parametrize("compute", [run_by_no_module, without_a_positional_argument, of_another_vector_inside])
def test_maps_that_no_module_makes_of_x_are_not_given(compute):
    model, x = Fused(compute).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    (ffn,) = find_ffns(model, x)
    assert ffn.gate is None and ffn.up is None and ffn.down is model.out


@pytest.mark.parametrize("family", SQUARE)
def test_shapes_do_not_mislead(family):
    """Attention outputs, and every first linear map, have here the shape of a down projection."""
    model = build(family, d=16, d_ff=16)
    ffns = find_ffns(model)
    assert [ffn.name for ffn in ffns] == names(family)
    assert all(ffn.parameter is down(family, model, ffn.name).weight for ffn in ffns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", EVERY)
def test_observing_and_masking_nothing_change_no_bit(family, dtype):
    model, batch = build(family, dtype=dtype), inputs(family, dtype)
    before = output(model, batch)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ffns = find_ffns(model)
    with observe_neurons(model, lambda ffn, s, h, tokens: torch.zeros_like(h)):
        assert torch.equal(output(model, batch), before)
        with torch.inference_mode():
            assert torch.equal(model(**batch)[0], before)
    with sparse_neurons(model, Keep(ffns, keep_all)):
        assert torch.equal(output(model, batch), before)
    assert torch.equal(output(model, batch), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert left_behind(model) == []


@pytest.mark.parametrize("keep", [keep_none, keep_even])
@pytest.mark.parametrize("family", EVERY)
def test_a_mask_is_a_model_without_those_columns(family, keep):
    """Masking everything leaves the bias of the down projection: its weight is zero in the model compared with."""
    model, batch = build(family), inputs(family)
    with sparse_neurons(model, Keep(find_ffns(model), keep)):
        masked = output(model, batch)
    without = deepcopy(model)
    for name in names(family):
        weight = down(family, without, name).weight.data
        columns = weight if FAMILIES[family][1].conv1d else weight.T  # (d_ff, d)
        columns[~keep(torch.arange(len(columns)))] = 0
    assert not torch.allclose(masked, output(model, batch))
    if keep is keep_none:
        assert torch.equal(masked, output(without, batch))
    torch.testing.assert_close(masked, output(without, batch), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "t5-gated", "lfm2"])
def test_nothing_is_left_when_the_forward_raises(family):
    model, batch = build(family), inputs(family)
    ffns, before = find_ffns(model), output(model, batch)

    def fails(module, args):
        raise RuntimeError("in the second FFN")

    handle = down(family, model, ffns[1].name).register_forward_pre_hook(fails)
    for block in (observe_neurons(model, lambda *seen: None), sparse_neurons(model, Keep(ffns, keep_none))):
        with pytest.raises(RuntimeError, match="in the second FFN"), block:
            assert len(left_behind(model)) > 1
            output(model, batch)
        assert len(left_behind(model)) == 1
    handle.remove()
    assert left_behind(model) == [] and torch.equal(output(model, batch), before)


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_autocast_is_followed_also_after_it_cast_the_weights(family):
    model, batch, seen = build(family, dtype=torch.float32), inputs(family), []
    ffns = find_ffns(model)
    with torch.autocast("cpu", torch.bfloat16):
        before = output(model, batch)
        with observe_neurons(model, lambda ffn, s, h, tokens: seen.append((ffn, s.dtype, h.dtype))):
            assert torch.equal(output(model, batch), before)
        with sparse_neurons(model, Keep(ffns, keep_none)):
            assert not torch.equal(output(model, batch), before)
    assert seen == [(ffn, torch.bfloat16, torch.bfloat16) for ffn in ffns]


def test_compiled_attention_is_no_obstacle():
    model = build("llama", dtype=torch.float32)
    model.set_attn_implementation("flex_attention")
    assert len(find_ffns(model)) == 2 and model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_ffns_follow_the_model_to_another_dtype(family):
    model, batch = build(family), inputs(family)
    ffns = find_ffns(model)
    model.to(torch.bfloat16)
    assert find_ffns(model) == ffns
    seen = []
    with observe_neurons(model, lambda ffn, s, h, tokens: seen.append((ffn, h))):
        output(model, batch)
    assert [ffn for ffn, _ in seen] == ffns
    assert all(h.dtype == ffn.down_weight.dtype == torch.bfloat16 for ffn, h in seen)
