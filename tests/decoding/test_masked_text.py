"""The text by which kernels are judged: the masked model's own, with its own doubts, and what it reads counted."""

import pytest
import torch
from families import left_behind
from linear_maps import grouped_query

from sparsity_utils.console import InputError
from sparsity_utils.decoding.decode import head_kernel, ready_kernels, running
from sparsity_utils.decoding.input_kernels import Stored
from sparsity_utils.decoding.masked_text import CountedMask, MaskedText, masked_text, with_rounded_weights
from sparsity_utils.decoding.speed import decoded, greedy
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.hooks import sparse_neurons
from sparsity_utils.neurons.linears import find_linears, observe_inputs, sparse_inputs
from sparsity_utils.neurons.thresholds import Thresholds

PROMPT = torch.tensor([[3, 17, 9, 28, 5]])
WORDS = 6


@pytest.fixture(scope="module")
def model():
    return grouped_query(layers=2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def teal(model):
    return Thresholds("teal", (0.15,) * len(find_linears(model)))


def test_it_is_the_greedy_text_of_the_masked_model(model, teal):
    text = masked_text(model, CountedMask(model, teal), PROMPT, WORDS, head_kernel(model, 1))
    with torch.no_grad(), sparse_inputs(model, teal):
        words, _ = greedy(model, PROMPT, WORDS)
        logits = model(torch.cat([PROMPT, words[:, :-1]], dim=1)).logits[0, -WORDS:]
    best = logits.topk(2).values
    assert torch.equal(text.words, words[0]) and text.second.tolist() == logits.topk(2).indices[:, 1].tolist()
    assert torch.allclose(text.gaps, best[:, 0] - best[:, 1], atol=1e-4) and 0 <= text.rounding < 1e-4
    assert 0 < text.undecided < 1 and not left_behind(model)


def test_what_a_token_reads_is_counted(model, teal):
    text = masked_text(model, CountedMask(model, teal), PROMPT, WORDS)
    counts = {linear.index: [] for linear in find_linears(model)}

    def keep(readers, x):
        for linear in readers:
            counts[linear.index].append((x.abs() > 0.15).float().mean())

    with torch.no_grad(), sparse_inputs(model, teal), observe_inputs(model, keep):
        decoded(model, PROMPT, WORDS)
    assert text.read == pytest.approx([float(torch.stack(found[1:]).mean()) for found in counts.values()])
    assert 0.1 < sum(text.read) / len(text.read) < 0.9


def test_what_a_rule_on_neurons_reads_is_counted(model):
    fat, shares = Thresholds("fat", (0.05,) * 2), []
    text = masked_text(model, CountedMask(model, fat), PROMPT, WORDS)
    with torch.no_grad(), sparse_neurons(model, fat):
        words, _ = greedy(model, PROMPT, WORDS)
        for ffn in find_ffns(model):
            handle = ffn.activation.register_forward_hook(
                lambda module, args, s: shares.append((s.abs() >= 0.05).float().mean())
            )
            decoded(model, PROMPT, WORDS)
            handle.remove()
    layers = [float(torch.stack(part[1:]).mean()) for part in (shares[:WORDS], shares[WORDS:])]
    expected = [layers[one.layer] if one.role in ("up", "down") else 1.0 for one in find_linears(model)]
    assert torch.equal(text.words, words[0]) and text.read == pytest.approx(expected)


@pytest.mark.parametrize("words", [0, 1])
def test_too_few_words_to_measure_are_refused(model, teal, words):
    with pytest.raises(InputError, match=f"A masked text of {words} words .* at least 2"):
        masked_text(model, CountedMask(model, teal), PROMPT, words)


def test_two_words_are_enough(model, teal):
    text = masked_text(model, CountedMask(model, teal), PROMPT, 2, head_kernel(model, 1))
    assert len(text.words) == 2 and all(0 <= share <= 1 for share in text.read) and 0 < text.undecided < 1


def test_another_word_is_admitted_only_where_the_masked_model_was_in_doubt():
    text = MaskedText(
        torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8]), torch.tensor([1.0, 0.1, 0.1, 1.0]), 0.2, []
    )
    assert text.differing(torch.tensor([1, 2, 3, 4])) == (0, 0)
    assert text.differing(torch.tensor([1, 6, 3, 4])) == (1, 0)  # the second, nearly as likely
    assert text.differing(torch.tensor([1, 2, 9, 4])) == (1, 1)  # neither of the two
    assert text.differing(torch.tensor([1, 6, 3, 8])) == (2, 1)  # the second, but far behind
    assert text.differing(torch.tensor([1, 6])) == (1, 0)  # the first places alone


def test_kernels_in_8_bits_compute_what_a_copy_with_rounded_weights_computes(model, teal):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernels = ready_kernels(model, teal, Stored(), eight_bits=True)
    rounded = with_rounded_weights(model, kernels)
    with torch.no_grad():
        with running(model, kernels):
            found = model(PROMPT).logits
        with sparse_inputs(rounded, CountedMask(model, teal)):
            expected = rounded(PROMPT).logits
        with sparse_inputs(model, teal):
            unrounded = model(PROMPT).logits
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(unrounded, expected, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_kernels_of_several_thresholds_share_the_weights(model, teal):
    stored, maps = Stored(), len(find_linears(model))
    rules = [teal, Thresholds("teal", (0.1,) * maps), Thresholds("wina", (3.0,) * maps)]
    made = [ready_kernels(model, rule, stored, likeliest=1) for rule in rules]
    assert len({one.attention[0][1].weight_t.data_ptr() for one in made}) == len({id(one.head) for one in made}) == 1
    with torch.no_grad():
        for rule, kernels in zip(rules, made, strict=True):
            with sparse_inputs(model, rule):
                expected, _ = greedy(model, PROMPT, WORDS)
            with running(model, kernels):
                assert torch.equal(greedy(model, PROMPT, WORDS)[0], expected)
