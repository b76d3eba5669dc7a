"""Sparse linear kernels in a model compute what the masked model computes; the head gives its likeliest words."""

import pytest
import torch
from families import build, left_behind
from linear_maps import DECODERS, grouped_query

from sparsity_utils.console import InputError
from sparsity_utils.decoding.decode import sparse_kernels
from sparsity_utils.decoding.speed import greedy
from sparsity_utils.neurons.input_rules import INPUT_RULES, TopInputs
from sparsity_utils.neurons.linears import find_linears, sparse_inputs
from sparsity_utils.neurons.rotations import rotated
from sparsity_utils.neurons.thresholds import Thresholds

GATED = [
    name for name in DECODERS if name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "granite", "olmo2")
]
IDS = torch.tensor([[3, 17, 9, 28, 5], [11, 2, 30, 8, 21]])


def thresholds(model, rule, share=0.5):
    """Those that skip about half of the inputs, amid the values that the model's maps see."""
    maps = find_linears(model)
    if isinstance(INPUT_RULES[rule], TopInputs):
        return Thresholds(rule, tuple(float(round(share * linear.inputs)) for linear in maps))
    seen: dict[int, float] = {}

    class Watched:
        values = (0.0,) * len(maps)

        def active_inputs(self, linear, x):
            scores = INPUT_RULES[rule].scores(linear, x.float().abs()).flatten().sort().values
            gaps = scores[1:] - scores[:-1]
            middle = slice(len(gaps) // 3, 2 * len(gaps) // 3 + 1)
            place = middle.start + int(gaps[middle].argmax())  # no rounding decides
            seen[linear.index] = float(scores[place] + scores[place + 1]) / 2
            return INPUT_RULES[rule].active(linear, x.float().abs(), seen[linear.index])

    with torch.no_grad(), sparse_inputs(model, Watched()):
        model(IDS)
    return Thresholds(rule, tuple(seen[linear.index] for linear in maps))


@pytest.mark.parametrize("family", GATED)
def test_a_model_computes_what_it_computes_masked(family):
    model = build(family, dtype=torch.float32)
    same(model, thresholds(model, "teal"))


@pytest.mark.parametrize("rule", sorted(INPUT_RULES))
def test_every_rule(rule):
    model = grouped_query(dtype=torch.float32)
    same(model, thresholds(model, rule))


@pytest.mark.parametrize("biased", ["q_proj", "v_proj"])
def test_maps_of_one_vector_of_which_some_have_a_bias(biased):
    model = grouped_query(dtype=torch.float32)
    for layer in model.model.layers:
        old = getattr(layer.self_attn, biased)
        new = torch.nn.Linear(old.in_features, old.out_features)
        new.weight = old.weight
        setattr(layer.self_attn, biased, new.eval())
    same(model, thresholds(model, "teal"))


def same(model, rule):
    with torch.no_grad():
        dense = model(IDS).logits
        with sparse_inputs(model, rule):
            expected = model(IDS).logits
        with sparse_kernels(model, rule):
            assert torch.allclose(model(IDS).logits, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(dense, expected, rtol=1e-2, atol=1e-2)  # the mask changes something
    assert not left_behind(model)


def test_greedy_tokens_are_those_of_the_masked_model_also_with_a_certified_head():
    model = grouped_query(layers=3, dtype=torch.float32)
    rule = thresholds(model, "wina")
    with torch.no_grad():
        with sparse_inputs(model, rule):
            expected, _ = greedy(model, IDS, 12)
        for likeliest in (None, 1, 3):
            with sparse_kernels(model, rule, likeliest=likeliest):
                assert torch.equal(greedy(model, IDS, 12)[0], expected)
    assert not left_behind(model)


def test_the_head_gives_the_likeliest_words_and_nothing_else():
    model = grouped_query(dtype=torch.float32)
    with torch.no_grad():
        expected = model(IDS).logits
        with sparse_kernels(model, None, likeliest=4):
            logits = model(IDS).logits
    assert torch.equal(logits.topk(4).indices.sort().values, expected.topk(4).indices.sort().values)
    assert (logits == -torch.inf).float().mean() > 0.3


def test_eight_bits_are_near():
    model = grouped_query(dtype=torch.float32)
    rule = Thresholds("teal", (0.0,) * len(find_linears(model)))
    with torch.no_grad():
        expected = model(IDS).logits
        with sparse_kernels(model, rule, eight_bits=True):
            logits = model(IDS).logits
    error = (logits - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.05


def test_an_optimistic_order_of_calls_changes_nothing():
    """A module that is called twice with one vector, or in another order, still gets its own outputs."""
    model = grouped_query(dtype=torch.float32)
    attention, rule = model.model.layers[0].self_attn, thresholds(model, "teal")
    x = torch.randn(1, 3, 24)
    with torch.no_grad():
        with sparse_inputs(model, rule):
            expected = [part(x) for part in (attention.v_proj, attention.q_proj, attention.q_proj, attention.k_proj)]
        with sparse_kernels(model, rule):
            found = [part(x) for part in (attention.v_proj, attention.q_proj, attention.q_proj, attention.k_proj)]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))


def refused(model, match, *given, **options):
    with pytest.raises(InputError, match=match), sparse_kernels(model, *given, **options):
        pass
    assert not left_behind(model)


def test_what_does_not_fit_is_refused():
    model = grouped_query(dtype=torch.float32)
    maps = len(find_linears(model))
    refused(model, f"the model has {maps}", Thresholds("teal", (0.0,) * (maps - 1)))
    refused(model, "eight_bits is for thresholds of a rule on the inputs", None, eight_bits=True)
    refused(model, "certified is for thresholds of a rule on neurons", thresholds(model, "teal"), certified=True)
    refused(model, "choose 1 to 41", None, likeliest=0)
    mixed = Thresholds("wina", tuple([0.0] + [3.0] * (maps - 1)))
    refused(model, "none of all its maps, or one at least", mixed)
    refused(build("gpt2", dtype=torch.float32), "plain FFN", thresholds(build("gpt2", dtype=torch.float32), "teal"))
    bfloat16 = grouped_query(dtype=torch.bfloat16)
    refused(bfloat16, "cannot be certified", None, likeliest=1)


def test_rotated_maps_are_refused():
    from sparsity_utils.decoding.input_kernels import linear_kernel

    model = grouped_query()
    with pytest.raises(InputError, match="is rotated"):
        linear_kernel(rotated(model)[:1], Thresholds("teal", (0.0,) * len(find_linears(model))))


def test_training_inside_the_block_is_refused():
    model = grouped_query(dtype=torch.float32)
    with sparse_kernels(model, thresholds(model, "teal")), pytest.raises(InputError, match="does not train"):
        model(IDS)
