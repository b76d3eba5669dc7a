"""Decoder layers that run as one call give the tokens and the cache of the module they stand for, or do not run."""

import copy
import gc
from weakref import WeakSet

import pytest
import torch
from families import build, left_behind, randomised
from layer_calls import calls, one_by_one
from linear_maps import grouped_query
from transformers import BertConfig, BertModel, Ministral3Config, Ministral3ForCausalLM

from sparsity_utils.decoding import layer_kernels
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

pytestmark = pytest.mark.filterwarnings("error:.*run module by module")  # no fault of ours is taken for a model's
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


@pytest.mark.parametrize(("beyond", "context"), [(20, 32), (40, 32), (40, None)])
def test_queries_that_are_scaled_far_from_the_first_position_run_module_by_module(model, beyond, context, monkeypatch):
    model = copy.deepcopy(model)
    monkeypatch.setattr(layer_kernels, "context_length", lambda model: context)
    attention = model.model.layers[1].self_attn
    own = attention.q_proj.forward
    far = {}
    model.model.rotary_emb.register_forward_hook(
        lambda module, args, kwargs, y: far.update(now=int(kwargs["position_ids"].max()) > beyond), with_kwargs=True
    )
    attention.q_proj.forward = lambda x: own(x) * (1.3 if far["now"] else 1.0)
    assert whole_layers(model, find_ffns(model), kernel_of) == []


def test_queries_that_a_family_scales_beyond_its_context_run_module_by_module():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Ministral3Config(
        vocab_size=29, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, sliding_window=None, **sizes
    )
    config.rope_parameters |= {"original_max_position_embeddings": 64, "factor": 1.0}
    model = randomised(Ministral3ForCausalLM(config), torch.float32)
    assert whole_layers(model, find_ffns(model), kernel_of) == []


def test_what_a_far_position_changes_is_restored(model):
    model = copy.deepcopy(model)
    rotary = model.model.rotary_emb
    rotary.rope_type, rotary.original_inv_freq = "dynamic", rotary.inv_freq.clone()
    rotary.config.rope_parameters |= {"rope_type": "dynamic", "factor": 2.0}
    before = rotary.inv_freq.clone()
    assert len(whole_layers(model, find_ffns(model), kernel_of)) == 3
    assert torch.equal(rotary.inv_freq, before)


def test_a_model_that_fails_far_away_runs_module_by_module(model):
    model = copy.deepcopy(model)
    own = model.model.rotary_emb.forward

    def limited(x, position_ids):
        if position_ids.max() >= 32:
            raise IndexError("there are 32 positions")
        return own(x, position_ids)

    model.model.rotary_emb.forward = limited
    with torch.no_grad():
        expected = one_by_one(model, IDS, 2).logits
        with pytest.warns(UserWarning, match="module by module.*32 positions"), sparse_kernels(model, None):
            assert torch.allclose(one_by_one(model, IDS, 2).logits, expected, rtol=1e-3, atol=1e-4)
    assert model.model.rotary_emb.forward is limited


def test_a_model_whose_pooler_is_given_one_vector_runs_module_by_module():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = randomised(BertModel(BertConfig(vocab_size=29, **sizes)), torch.float32)
    with torch.no_grad():
        expected = bert(IDS[:1, :4])
        with sparse_kernels(bert, None, inputs={"input_ids": IDS[:1, :4]}):
            found = bert(IDS[:1, :4])
    assert torch.allclose(found.pooler_output, expected.pooler_output, atol=1e-5)


def test_without_numba_layers_run_module_by_module(model, monkeypatch):
    monkeypatch.setattr(layer_kernels, "kernels_of", lambda what, device, name: None)
    assert whole_layers(model, find_ffns(model), kernel_of) == []


def test_half_precision_runs_module_by_module():
    model = grouped_query(dtype=torch.bfloat16)
    assert whole_layers(model, find_ffns(model), kernel_of) == []


def assert_same_cache(one, other):
    assert one.get_seq_length() == other.get_seq_length()
    for mine, own in zip(one.layers, other.layers, strict=True):
        assert torch.allclose(mine.keys, own.keys, atol=1e-4) and torch.allclose(mine.values, own.values, atol=1e-4)


def test_the_cache_is_that_of_the_modules_also_beyond_its_first_room(ours, monkeypatch):
    made, words = calls(monkeypatch), ROOM + 5
    with torch.no_grad():
        expected = one_by_one(ours, IDS, words)
        with sparse_kernels(ours, None):
            made.clear()
            found = one_by_one(ours, IDS, words)
        assert len(made) == 2 * words
        assert_same_cache(found.past_key_values, expected.past_key_values)
        again = ours(input_ids=IDS[:, :1], past_key_values=found.past_key_values, use_cache=True)
        own = ours(input_ids=IDS[:, :1], past_key_values=expected.past_key_values, use_cache=True)
    assert torch.allclose(again.logits, own.logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", ["crop", "reorder", "copy", "reset"])
def test_a_cache_that_was_changed_is_read_anew(model, change, monkeypatch):
    made = calls(monkeypatch)

    def after(model):
        cache = one_by_one(model, IDS, 4).past_key_values
        kept = copy.deepcopy(cache)
        if change == "crop":
            cache.crop(-3)
        if change == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        if change == "reset":
            cache.reset()
            model(input_ids=IDS[:, :3], past_key_values=cache, use_cache=True)
        for other in (cache, kept) if change == "copy" else (cache,):
            out = model(input_ids=IDS[:, 2:3], past_key_values=other, use_cache=True)
        return out, cache, kept

    with torch.no_grad():
        expected, own, before = after(model)
        with sparse_kernels(model, None):
            made.clear()
            found, cache, kept = after(model)
    assert len(made) == 3 * (6 if change == "copy" else 5)
    assert torch.allclose(found.logits, expected.logits, rtol=1e-3, atol=1e-4)
    assert_same_cache(cache, own)
    assert_same_cache(kept, before)


def test_a_room_is_kept_only_while_it_is_the_cache(model, monkeypatch):
    rooms, own = WeakSet(), layer_kernels.Room
    monkeypatch.setattr(layer_kernels, "Room", lambda cached: rooms.add(made := own(cached)) or made)
    with torch.no_grad(), sparse_kernels(model, None):
        cache = one_by_one(model, IDS, 2).past_key_values
        assert len(rooms) == 3
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
        gc.collect()
        assert not rooms


def test_a_layer_takes_its_input_by_name(model, monkeypatch):
    made, x = calls(monkeypatch), torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cache, layer = one_by_one(model, IDS, 0).past_key_values, model.model.layers[0]
        turn = model.model.rotary_emb(x, torch.tensor([[5]]))
        given = {"hidden_states": x, "position_embeddings": turn}
        expected = layer(past_key_values=copy.deepcopy(cache), **given)
        with sparse_kernels(model, None):
            made.clear()
            assert torch.allclose(layer(past_key_values=cache, **given), expected, rtol=1e-3, atol=1e-4)
    assert len(made) == 1


def test_texts_at_positions_of_their_own(model, monkeypatch):
    made = calls(monkeypatch)

    def logits():
        cache = one_by_one(model, IDS, 2).past_key_values
        given = {"position_ids": torch.tensor([[9], [20]]), "past_key_values": cache}
        return model(input_ids=IDS[:, :1], use_cache=True, **given).logits

    with torch.no_grad():
        expected = logits()
        with sparse_kernels(model, None):
            made.clear()
            found = logits()
    assert len(made) == 3 * 3
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


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
