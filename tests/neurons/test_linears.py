"""The linear maps of decoders: found by what they compute, their inputs observed and masked."""

from copy import deepcopy

import mixtures
import pytest
import torch
from families import build, inputs, left_behind, output
from linear_maps import DECODERS, Keep, every_other, everything, expected_maps, grouped_query, nothing
from tiny_granite import granite
from torch import nn
from torch.nn import functional

from sparsity_utils.console import InputError
from sparsity_utils.neurons.hooks import sparse_neurons
from sparsity_utils.neurons.linears import VECTORS, find_linears, observe_inputs, sparse_inputs
from sparsity_utils.neurons.thresholds import Thresholds

IDS = {"input_ids": torch.randint(3, 29, (3, 7), generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", DECODERS)
def test_maps_are_those_of_the_model(family, dtype):
    model = build(family, dtype=dtype)
    maps, expected = find_linears(model), expected_maps(family, model)
    assert {(one.layer, one.role) for one in maps} == expected.keys()
    assert [one.index for one in maps] == list(range(len(maps)))
    assert [(one.layer, list(VECTORS).index(one.role)) for one in maps] == sorted(
        (layer, list(VECTORS).index(role)) for layer, role in expected
    )
    for one in maps:
        module, columns, weight = expected[one.layer, one.role]
        assert one.module is module and one.outputs.tolist() == columns and torch.equal(one.weight, weight)
        assert model.get_submodule(one.name) is module and one.name.startswith(f"{one.block}.")
        assert one.inputs == weight.shape[1] and one.size == weight.numel()
    assert left_behind(model) == [] and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_keys_and_values_shared_by_queries_are_told_apart(dtype, attention):
    model = grouped_query(dtype=dtype)
    model.set_attn_implementation(attention)
    maps = find_linears(model)
    assert [one.role for one in maps] == ["q", "k", "v", "o", "gate", "up", "down"] * 2
    assert [len(one.outputs) for one in maps[:4]] == [24, 8, 8, 24]
    assert [one.name.rpartition(".")[2] for one in maps[:4]] == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("texts", [1, 3])
def test_texts_and_positions_that_a_model_flattens_are_told_apart(texts):
    model = grouped_query()
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn.q_proj
    for module in (mlp, attention):
        module.forward = lambda x, own=module.forward: own(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    given = {"input_ids": IDS["input_ids"][:texts, :5]}
    assert [one.role for one in find_linears(model, given)] == ["q", "k", "v", "o", "gate", "up", "down"] * 2


def test_a_large_scale_of_the_queries_misleads_nobody():
    """Softmax then rounds to one-hot vectors, and derivatives nearly vanish."""
    model = grouped_query(dtype=torch.bfloat16)
    for block in model.model.layers:
        block.self_attn.q_proj.weight.data *= 10
    assert [one.name.rpartition(".")[2][0] for one in find_linears(model)[:3]] == ["q", "k", "v"]


@pytest.mark.parametrize("family", DECODERS)
def test_the_vectors_observed_are_those_the_modules_read(family):
    model, batch, seen, given = build(family), inputs(family), [], {}
    maps = find_linears(model)
    handles = [
        one.module.register_forward_pre_hook(lambda module, args: given.update({module: args[0].flatten(0, -2)}))
        for one in maps
    ]
    before = output(model, batch)
    for handle in handles:
        handle.remove()
    with observe_inputs(model, lambda readers, x: seen.append((readers, x))):
        assert torch.equal(output(model, batch), before)
    assert len(seen) == 8  # two blocks, four vectors
    assert sorted(one.index for readers, _ in seen for one in readers) == list(range(len(maps)))
    for readers, x in seen:
        assert len({one.vector for one in readers}) == 1
        for one in readers:
            assert torch.equal(x, given[one.module])
            y = functional.linear(x, one.weight)
            bias = getattr(one.module, "bias", None)
            expected = one.module(x)[..., one.outputs] - (0 if bias is None else bias[one.outputs])
            torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert left_behind(model) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", DECODERS)
def test_masking_nothing_changes_no_bit(family, dtype):
    model, batch = build(family, dtype=dtype), inputs(family)
    before, maps = output(model, batch), find_linears(model)
    with sparse_inputs(model, Keep(maps, everything)):
        assert torch.equal(output(model, batch), before)
    assert torch.equal(output(model, batch), before) and left_behind(model) == []


@pytest.mark.parametrize("keep", [every_other, nothing])
@pytest.mark.parametrize("family", DECODERS)
def test_a_mask_is_a_model_without_those_columns(family, keep):
    model, batch = build(family), inputs(family)
    maps = find_linears(model)
    with sparse_inputs(model, Keep(maps, keep)):
        masked = output(model, batch)
    without = deepcopy(model)
    for (layer, role), (_, columns, weight) in expected_maps(family, model).items():
        one = next(one for one in maps if (one.layer, one.role) == (layer, role))
        parameter = without.get_submodule(one.name).weight.data
        whole = parameter.T if one.transposed else parameter  # (out, in), a view
        whole[columns] = weight * keep(one, torch.arange(one.inputs))
    assert not torch.allclose(masked, output(model, batch))
    torch.testing.assert_close(masked, output(without, batch), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_nothing_is_left_when_the_forward_raises(family):
    model, batch = build(family), inputs(family)
    maps, before = find_linears(model), output(model, batch)

    def fails(module, args):
        raise RuntimeError("in the second block")

    handle = maps[-1].module.register_forward_pre_hook(fails)
    for block in (observe_inputs(model, lambda *seen: None), sparse_inputs(model, Keep(maps, nothing))):
        with pytest.raises(RuntimeError, match="in the second block"), block:
            assert len(left_behind(model)) > 1
            output(model, batch)
        assert len(left_behind(model)) == 1
    handle.remove()
    assert left_behind(model) == [] and torch.equal(output(model, batch), before)


def test_maps_are_looked_for_again_when_a_module_is_replaced():
    model, runs = granite(), []
    model.register_forward_pre_hook(lambda module, args: runs.append(1))
    maps = find_linears(model)
    assert find_linears(model) == maps and len(runs) == 2  # one of them for the FFNs
    model.model.layers[1].self_attn.k_proj = nn.Linear(12, 12, bias=False, dtype=torch.float64)
    assert find_linears(model)[8].module is model.model.layers[1].self_attn.k_proj


def test_finding_leaves_modes_random_numbers_and_gradients_as_they_were():
    model = granite().train()
    model.model.layers[1].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    find_linears(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert left_behind(model) == [] and all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("t5", "T5ForConditionalGeneration is an encoder-decoder"),
        ("bert", r"What bert\.encoder\.layer\.0\.attention\.output\.dense is given is not causal attention"),
        ("vit", r"What layers\.0\.attention\.o_proj is given is not causal attention"),
        ("lfm2", r"What model\.layers\.0\.conv\.out_proj is given is not causal attention"),
    ],
)
def test_other_blocks_are_refused_in_one_sentence(family, message):
    with pytest.raises(InputError, match=message):
        find_linears(build(family))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_mixtures_are_refused(family):
    with pytest.raises(InputError, match="has routed experts, and rules on the inputs of linear maps need dense FFNs"):
        find_linears(mixtures.build(family))


class Quantised(nn.Module):
    """A linear map that keeps its weight in 8 bits."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return functional.linear(x, self.weight * self.scale)


@pytest.mark.parametrize("name", ["k_proj", "o_proj"])
def test_quantised_maps_are_refused_by_name(name):
    model = granite()
    attention = model.model.layers[1].self_attn
    setattr(attention, name, Quantised(getattr(attention, name)))
    with pytest.raises(InputError, match=rf"model\.layers\.1\.self_attn\.{name} keeps quantised weights"):
        find_linears(model)


class LowRank(nn.Module):
    """A linear map as the product of two."""

    def __init__(self, size):
        super().__init__()
        self.first, self.second = (nn.Linear(size, size, bias=False, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        return self.second(self.first(x))


def test_keys_of_another_vector_than_queries_are_refused():
    model = granite()
    model.model.layers[0].self_attn.k_proj = LowRank(12)
    with pytest.raises(InputError, match=r"What model\.layers\.0\.self_attn\.o_proj is given is not causal attention"):
        find_linears(model)


class Doubled(nn.Linear):
    """A module that uses its weight for something else than W x."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj"])
def test_a_module_that_computes_something_else_is_no_linear_map(name):
    model = granite(layers=1)
    setattr(model.model.layers[0].self_attn, name, Doubled(12, 12, bias=False, dtype=torch.float64))
    with pytest.raises(InputError, match="is given is not causal attention over q, k and v"):
        find_linears(model)


class ReadsItsWeight(nn.Module):
    """A down projection that the FFN computes itself, with the weight of a module that never runs."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        return functional.linear(functional.silu(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)


def test_a_module_that_never_runs_is_not_masked_in_silence():
    model = granite(layers=1)
    model.model.layers[0].mlp = ReadsItsWeight(model.model.layers[0].mlp)
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj is not run once as an unquantised linear"):
        find_linears(model)


class NoAttention(nn.Module):
    """What mixes no tokens."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


def test_a_block_without_attention_is_refused():
    model = granite()
    model.model.layers[1].self_attn = NoAttention()
    with pytest.raises(InputError, match="has 3 FFNs and 2 attention layers made of unquantised linear maps"):
        find_linears(model)


def test_thresholds_of_another_kind_or_number_are_refused():
    model = granite()
    with (
        pytest.raises(InputError, match="for 3 linear maps and the model has 21"),
        sparse_inputs(model, Thresholds("teal", (0.0,) * 3)),
    ):
        pass
    with (
        pytest.raises(InputError, match="'cett' is on neurons; use sparse_neurons"),
        sparse_inputs(model, Thresholds("cett", (0.0,) * 21)),
    ):
        output(model, IDS)
    with (
        pytest.raises(InputError, match="'wina' is on inputs of linear maps, not on neurons"),
        sparse_neurons(model, Thresholds("wina", (3.0,) * 3)),
    ):
        pass
    assert left_behind(model) == []
