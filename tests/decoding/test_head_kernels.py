"""With a certified head a model writes what it writes without, or refuses settings that look at other words."""

import pytest
import torch
from families import build, left_behind
from linear_maps import grouped_query
from transformers import LogitsProcessorList, TopHLogitsWarper, TopPLogitsWarper

from sparsity_utils.console import InputError
from sparsity_utils.decoding.decode import sparse_kernels

IDS = torch.tensor([[3, 17, 9, 28, 5], [11, 2, 30, 8, 21]])


@pytest.fixture
def model():
    model = grouped_query(dtype=torch.float32)
    model.generation_config.update(eos_token_id=7, pad_token_id=0)
    return model


def generated(model, **settings):
    torch.manual_seed(0)
    return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, **settings)


@pytest.mark.parametrize(
    ("likeliest", "settings"),
    [
        (1, {}),
        (1, {"num_return_sequences": 1, "temperature": 0.5}),
        (3, {}),
        (3, {"do_sample": True, "top_k": 3}),
        (5, {"do_sample": True, "top_k": 3, "temperature": 0.7, "top_p": 0.8, "typical_p": 0.9}),
        (5, {"do_sample": True, "top_k": 5, "renormalize_logits": True}),
    ],
)
def test_plain_decoding_and_sampling_of_the_likeliest_are_those_without_it(model, likeliest, settings):
    expected = generated(model, **settings)
    with sparse_kernels(model, None, likeliest=likeliest):
        assert torch.equal(generated(model, **settings), expected)
    assert not left_behind(model) and "_get_logits_processor" not in vars(model)


@pytest.mark.parametrize(
    ("likeliest", "settings"),
    [
        (1, {"num_beams": 2}),
        (9, {"num_beams": 2, "do_sample": True, "top_k": 3}),
        (1, {"min_new_tokens": 3}),
        (1, {"min_length": 8}),
        (1, {"repetition_penalty": 1.3}),
        (1, {"no_repeat_ngram_size": 2}),
        (1, {"bad_words_ids": [[3]]}),
        (1, {"suppress_tokens": [3]}),
        (1, {"do_sample": True, "top_k": 2}),
        (9, {"do_sample": True, "top_k": 0}),
        (9, {"do_sample": True, "top_k": 3, "repetition_penalty": 1.3}),
        (9, {"do_sample": True, "top_k": 3, "logits_processor": LogitsProcessorList([TopHLogitsWarper(0.5)])}),
        (9, {"do_sample": True, "top_k": 0, "logits_processor": LogitsProcessorList([TopPLogitsWarper(0.5)])}),
    ],
)
def test_settings_that_look_at_other_words_are_refused(model, likeliest, settings):
    with sparse_kernels(model, None, likeliest=likeliest), pytest.raises(InputError, match=f"likeliest={likeliest}"):
        generated(model, **settings)
    assert generated(model, **settings).shape[0] == 2
    assert "_get_logits_processor" not in vars(model)


def test_settings_of_the_model_itself_are_refused_too(model):
    model.generation_config.repetition_penalty = 1.3
    with (
        sparse_kernels(model, None, likeliest=1),
        pytest.raises(InputError, match="here: RepetitionPenaltyLogitsProcessor"),
    ):
        generated(model)


def test_logits_that_are_capped_after_the_head_are_refused():
    model = build("gemma2", dtype=torch.float32)
    assert model.config.final_logit_softcapping
    with pytest.raises(InputError, match="caps its logits"), sparse_kernels(model, None, likeliest=1):
        pass
    model.config.final_logit_softcapping = None
    with torch.no_grad(), sparse_kernels(model, None, likeliest=1):
        assert (model(IDS).logits == -torch.inf).any()


def test_a_head_that_is_trained_is_refused():
    model = build("llama", dtype=torch.float32).requires_grad_(False)
    ids = IDS % 29
    with sparse_kernels(model, None, likeliest=1):
        model(ids)
        model.lm_head.weight.requires_grad_()
        with pytest.raises(InputError, match="output head runs on a sparse kernel, which does not train"):
            model(ids)
