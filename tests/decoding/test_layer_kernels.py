"""Decoder layers that run as one call give the tokens and the cache of the module they stand for, or do not run."""

import copy

import pytest
import torch
from families import build, left_behind
from linear_maps import grouped_query

from sparsity_utils.decoding.decode import kernel_of, ready_kernels, running, sparse_kernels
from sparsity_utils.decoding.input_kernels import Stored
from sparsity_utils.decoding.layer_kernels import ROOM, whole_layers
from sparsity_utils.decoding.speed import decoded
from sparsity_utils.models.config import ModelConfig
from sparsity_utils.models.decoder import build_model
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.hooks import sparse_neurons
from sparsity_utils.neurons.linears import find_linears, sparse_inputs
from sparsity_utils.neurons.thresholds import Thresholds

IDS = torch.tensor([[3, 17, 9, 28, 5], [11, 2, 30, 8, 21]])
WHOLE = ["llama", "qwen2", "phi3", "granite"]


@pytest.fixture(scope="module")
def model():
    return grouped_query(layers=3, dtype=torch.float32)


@pytest.fixture
def ours():
    """A decoder as this study trains them."""
    config = ModelConfig(d_model=24, n_layers=2, activation="relu", vocabulary=41, context=96)
    return build_model(config, seed=3).eval()


def teal(model, limit=0.05):
    return Thresholds("teal", (limit,) * len(find_linears(model)))


def compared(model, kernels, masked, words=12):
    """The logits of kernels at each place of the masked model's text are the masked model's; returns the cache."""
    expected, found = [], []
    with torch.no_grad(), masked:
        text, _, _ = decoded(model, IDS, words, keep=lambda logits: expected.append(logits.clone()))
    with torch.no_grad(), running(model, kernels):
        decoded(model, IDS, words, text=text, keep=lambda logits: found.append(logits.clone()))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)
    assert not left_behind(model)


def calls(monkeypatch):
    """Counts the calls of whole layers."""
    from kernels import cpu_layer

    made, own = [], cpu_layer.run
    monkeypatch.setattr(cpu_layer, "run", lambda *given: made.append(1) or own(*given))
    return made


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masked_inputs(family, attention, monkeypatch):
    model, made = build(family, dtype=torch.float32), calls(monkeypatch)
    model.set_attn_implementation(attention)
    kernels = ready_kernels(model, teal(model), Stored())
    made.clear()
    compared(model, kernels, sparse_inputs(model, teal(model)))
    assert len(made) == 2 * 11


@pytest.mark.parametrize("certified", [False, True])
def test_masked_neurons_of_our_decoders(ours, certified, monkeypatch):
    made, fat = calls(monkeypatch), Thresholds("fat", (0.01, 0.02))
    kernels = ready_kernels(ours, fat, Stored(), certified=certified)
    made.clear()
    compared(ours, kernels, sparse_neurons(ours, fat))
    assert len(made) == 2 * 11


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "olmo2", "mistral", "gpt2", "starcoder2", "vit", "t5"])
def test_layers_of_another_form_run_module_by_module(family):
    model = build(family, dtype=torch.float32)
    assert whole_layers(model, find_ffns(model), kernel_of) == []


def test_a_layer_that_makes_more_of_its_modules_runs_module_by_module(model):
    model = copy.deepcopy(model)
    assert len(whole_layers(model, find_ffns(model), kernel_of)) == 3
    own = model.model.layers[1].forward
    model.model.layers[1].forward = lambda x, **given: x + 1.01 * (own(x, **given) - x)
    assert whole_layers(model, find_ffns(model), kernel_of) == []


def test_queries_that_are_scaled_far_from_the_first_position_run_module_by_module(model, monkeypatch):
    model = copy.deepcopy(model)
    attention = model.model.layers[1].self_attn
    own = attention.q_proj.forward
    far = {}
    model.model.rotary_emb.register_forward_hook(
        lambda module, args, kwargs, y: far.update(now=int(kwargs["position_ids"].max()) > 20), with_kwargs=True
    )
    attention.q_proj.forward = lambda x: own(x) * (1.3 if far["now"] else 1.0)
    assert whole_layers(model, find_ffns(model), kernel_of) == []


def test_without_numba_layers_run_module_by_module(model, monkeypatch):
    from sparsity_utils.decoding import layer_kernels

    monkeypatch.setattr(layer_kernels, "kernels_of", lambda what, device, name: None)
    assert whole_layers(model, find_ffns(model), kernel_of) == []


def test_half_precision_runs_module_by_module():
    model = grouped_query(dtype=torch.bfloat16)
    assert whole_layers(model, find_ffns(model), kernel_of) == []


def cached(model, ids, words):
    out = model(input_ids=ids, use_cache=True)
    for place in range(words):
        out = model(input_ids=IDS[:, place % 5, None], past_key_values=out.past_key_values, use_cache=True)
    return out


def assert_same_cache(one, other):
    assert one.get_seq_length() == other.get_seq_length()
    for mine, own in zip(one.layers, other.layers, strict=True):
        assert torch.allclose(mine.keys, own.keys, atol=1e-4) and torch.allclose(mine.values, own.values, atol=1e-4)


def test_the_cache_is_that_of_the_modules_also_beyond_its_first_room(ours):
    words = ROOM + 5
    with torch.no_grad():
        expected = cached(ours, IDS, words)
        with sparse_kernels(ours, None):
            found = cached(ours, IDS, words)
        assert_same_cache(found.past_key_values, expected.past_key_values)
        again = ours(input_ids=IDS[:, :1], past_key_values=found.past_key_values, use_cache=True)
        own = ours(input_ids=IDS[:, :1], past_key_values=expected.past_key_values, use_cache=True)
    assert torch.allclose(again.logits, own.logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", ["crop", "reorder", "copy"])
def test_a_cache_that_was_changed_is_read_anew(model, change):
    def after(model):
        cache = cached(model, IDS, 4).past_key_values
        kept = copy.deepcopy(cache)
        if change == "crop":
            cache.crop(-3)
        if change == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        for other in (cache, kept) if change == "copy" else (cache,):
            out = model(input_ids=IDS[:, 2:3], past_key_values=other, use_cache=True)
        return out, cache, kept

    with torch.no_grad():
        expected, own, before = after(model)
        with sparse_kernels(model, None):
            found, cache, kept = after(model)
    assert torch.allclose(found.logits, expected.logits, rtol=1e-3, atol=1e-4)
    assert_same_cache(cache, own)
    assert_same_cache(kept, before)


def test_padded_texts_and_many_side_by_side(model, monkeypatch):
    made = calls(monkeypatch)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for ids, given in ((IDS, {"attention_mask": mask}), (IDS.repeat(2, 1), {})):
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(input_ids=ids, **given, **options)
        with sparse_kernels(model, None):
            made.clear()
            assert torch.equal(model.generate(input_ids=ids, **given, **options), expected)
        assert not made


def test_generate_uses_whole_layers(model, monkeypatch):
    made, options = calls(monkeypatch), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), pad_token_id=0, **options)
    with sparse_kernels(model, None):
        made.clear()
        found = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), pad_token_id=0, **options)
    assert torch.equal(found, expected) and len(made) == 3 * 5


def test_a_hook_inside_a_layer_sees_its_module(model, monkeypatch):
    made, seen = calls(monkeypatch), []
    with torch.no_grad(), sparse_kernels(model, None):
        made.clear()
        handle = model.model.layers[1].mlp.register_forward_hook(lambda module, args, y: seen.append(y.shape))
        try:
            cached(model, IDS, 3)
        finally:
            handle.remove()
    assert len(seen) == 4 and len(made) == 2 * 3


def test_hidden_states_and_attentions_are_given_where_they_are_asked_for(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")

    def out():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        asked = {"output_hidden_states": True, "output_attentions": True}
        return model(input_ids=IDS[:, :1], past_key_values=cache, use_cache=True, **asked)

    with torch.no_grad():
        expected = out()
        with sparse_kernels(model, None):
            found = out()
    for name in ("hidden_states", "attentions"):
        assert len(found[name]) == len(expected[name])
        for one, other in zip(found[name], expected[name], strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)
