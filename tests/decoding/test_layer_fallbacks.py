"""What a single call would leave out of a decoder layer is computed, by its modules, or refused."""

import copy

import pytest
import torch
from layer_calls import calls, one_by_one
from linear_maps import grouped_query
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP

from sparsity_utils.console import InputError
from sparsity_utils.decoding.decode import sparse_kernels
from sparsity_utils.neurons.hooks import sparse_neurons
from sparsity_utils.neurons.linears import find_linears, observe_inputs, sparse_inputs
from sparsity_utils.neurons.thresholds import Thresholds

pytestmark = pytest.mark.filterwarnings("error:.*run module by module")  # no fault of ours is taken for a model's
IDS = torch.tensor([[3, 17, 9, 28, 5], [11, 2, 30, 8, 21]])
LAYERS = 3


@pytest.fixture
def model():
    return grouped_query(layers=LAYERS, dtype=torch.float32)


def teal(model):
    return Thresholds("teal", (0.0,) * len(find_linears(model)))


def one_token(model, cache=None, **asked):
    """The model's output for a token after a prompt."""
    cache = model(input_ids=IDS, use_cache=True).past_key_values if cache is None else cache
    return model(input_ids=IDS[:, :1], past_key_values=cache, use_cache=True, **asked)


def near(one, other):
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("asked", [("hidden_states",), ("attentions",), ("hidden_states", "attentions")])
def test_hidden_states_and_attentions_are_given_where_they_are_asked_for_and_only_there(model, asked, monkeypatch):
    made, asked = calls(monkeypatch), {f"output_{name}": True for name in asked}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for _ in range(2):  # the second time, hooks that transformers installed are in the model
            with sparse_kernels(model, None):
                made.clear()
                found = one_token(model, **asked)
                assert not made
                plain = one_token(model)
                assert len(made) == LAYERS
        expected = one_token(model, **asked)
    assert near(plain.logits, expected.logits)
    for name in (name.removeprefix("output_") for name in asked):
        assert len(found[name]) == len(expected[name])
        assert all(near(one, other) for one, other in zip(found[name], expected[name], strict=True))


def test_a_hook_inside_a_layer_sees_its_module(model, monkeypatch):
    made, seen = calls(monkeypatch), []
    with torch.no_grad(), sparse_kernels(model, None):
        made.clear()
        handle = model.model.layers[1].mlp.register_forward_hook(lambda module, args, y: seen.append(y.shape))
        try:
            one_by_one(model, IDS, 3)
        finally:
            handle.remove()
    assert len(seen) == 4 and len(made) == 2 * 3


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_a_hook_of_all_modules_sees_them(model, register, monkeypatch):
    made, seen = calls(monkeypatch), []
    with torch.no_grad(), sparse_kernels(model, None):
        made.clear()
        handle = register(lambda module, *given: seen.append(type(module)))
        try:
            one_by_one(model, IDS, 3)
        finally:
            handle.remove()
        assert seen.count(LlamaMLP) == LAYERS * 4 and not made
        one_by_one(model, IDS, 3)
        assert len(made) == LAYERS * 3


class Doubled(nn.Module):
    """Attention whose output counts twice."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, **given):
        y, weights = self.own(**given)
        return 2 * y, weights


def doubled_attention(module, *given, **options):
    y, weights = sdpa_attention_forward(module, *given, **options)
    return 2 * y, weights


def change(model, kind, monkeypatch):
    """Makes one layer, or all, compute something else; returns how many stay as they are."""
    layer = model.model.layers[1]
    if kind == "forward":
        own = layer.mlp.forward
        layer.mlp.forward = lambda x: 2 * own(x)
    if kind == "forward of an inner module":
        own_down = layer.mlp.down_proj.forward
        layer.mlp.down_proj.forward = lambda h: 2 * own_down(h)
    if kind == "module":
        layer.self_attn = Doubled(layer.self_attn)
    if kind == "class":
        own_class = LlamaMLP.forward
        monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 2 * own_class(self, x))
        return 0
    if kind == "attention":
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "doubled", doubled_attention)
        model.set_attn_implementation("doubled")
        return 0
    return LAYERS - 1


@pytest.mark.parametrize("kind", ["forward", "forward of an inner module", "module", "class", "attention"])
def test_what_is_replaced_inside_a_layer_runs_for_single_tokens_too(model, kind, monkeypatch):
    made, other = calls(monkeypatch), copy.deepcopy(model)
    with torch.no_grad():
        before = one_token(model).logits
        with sparse_kernels(model, None), monkeypatch.context() as changes:
            made.clear()
            assert near(one_token(model).logits, before) and len(made) == LAYERS
            made.clear()
            left = change(model, kind, changes)
            found = one_token(model).logits
            assert len(made) == left
        with monkeypatch.context() as changes:
            change(other, kind, changes)
            expected = one_token(other).logits
    assert near(found, expected) and not near(found, before)


def test_a_part_of_a_model_on_kernels_is_not_masked_or_observed(model):
    rule, maps = teal(model), find_linears(model.model)  # which are then known
    whole = nn.ModuleDict({"inner": model})
    for inside, outside in ((model, model.model), (model.model, model), (model, whole)):
        with sparse_kernels(inside, None):
            for block in (
                sparse_inputs(outside, rule, maps),
                observe_inputs(outside, print, maps),
                sparse_neurons(outside, Thresholds("relu", (0.0,) * LAYERS)),
            ):
                with pytest.raises(InputError, match="run on sparse kernels"), block:
                    pass
    with sparse_inputs(model.model, rule):
        pass


@pytest.mark.parametrize("kind", ["bfloat16", "gradient"])
def test_a_cache_that_one_call_does_not_take_is_read_by_the_modules(model, kind, monkeypatch):
    made = calls(monkeypatch)

    def filled():
        if kind == "bfloat16":
            return copy.deepcopy(model).bfloat16()(input_ids=IDS, use_cache=True).past_key_values
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        cache.layers[1].values.requires_grad_()
        return cache

    def decoded(cache):
        assert type(cache) is DynamicCache
        return torch.stack([one_token(model, cache).logits for _ in range(2)])

    with torch.no_grad():
        cache, same = filled(), filled()
        expected = decoded(same)
        with sparse_kernels(model, None):
            made.clear()
            found = decoded(cache)
    # The modules make a cache of bfloat16 one of float32, and one that needs a gradient one that does not.
    assert len(made) == {"bfloat16": LAYERS, "gradient": 2 * LAYERS - 1}[kind]
    assert near(found, expected)


def test_a_cache_that_needs_gradients_gets_none_in_silence(model):
    model.requires_grad_(False)
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    cache.layers[1].values.requires_grad_()
    with sparse_kernels(model, None), pytest.raises(InputError, match="does not train"):
        one_token(model, cache)


def test_a_mask_that_is_no_tensor_is_read_by_the_modules(model, monkeypatch):
    """As that of flex attention, which takes ten seconds to compile."""
    made, masks = calls(monkeypatch), []

    def attention(module, query, key, value, mask, **options):
        masks.append(mask)
        return sdpa_attention_forward(module, query, key, value, None, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "own", attention)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "own", lambda *given, **options: object())
    model.set_attn_implementation("own")
    with torch.no_grad():
        expected = one_token(model).logits
        with sparse_kernels(model, None):
            assert near(one_token(model).logits, expected)
    assert masks and not any(isinstance(mask, torch.Tensor) for mask in masks) and not made


TRAINED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj", "input_layernorm"]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("rule", [None, teal])
def test_no_gradient_is_lost_in_silence(model, name, rule, monkeypatch):
    made, thresholds = calls(monkeypatch), rule and rule(model)
    model.requires_grad_(False)
    with sparse_kernels(model, thresholds):
        with torch.no_grad():
            cache = model(input_ids=IDS, use_cache=True).past_key_values
        made.clear()
        one_token(model, copy.deepcopy(cache))
        assert len(made) == LAYERS  # with gradients on, and nothing to train
        made.clear()
        model.model.layers[2].get_submodule(name).weight.requires_grad_()
        with pytest.raises(InputError, match="does not train"):
            one_token(model, cache)
        assert len(made) == 2


def test_generate_runs_on_whole_layers_where_all_parameters_could_be_trained(model, monkeypatch):
    made, options = calls(monkeypatch), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), pad_token_id=0, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with sparse_kernels(model, None):
        made.clear()
        found = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), pad_token_id=0, **options)
    assert torch.equal(found, expected) and len(made) == LAYERS * 5
