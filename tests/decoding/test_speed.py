"""Decoding speeds: greedy tokens, parts of the time, bytes."""

import json
import time

import numpy as np
import pytest
import torch
from families import build, left_behind
from mixtures import build as build_mixture

from sparsity_utils.console import InputError
from sparsity_utils.decoding import layer_kernels, speed
from sparsity_utils.decoding.decode import sparse_kernels
from sparsity_utils.models.pretrained import load_weights
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.modes import forward_replaced
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.paths import RECORDED_MODELS

LAYERS = json.loads((RECORDED_MODELS / "relu" / "config.json").read_text())["num_hidden_layers"]
CETT = Thresholds("cett", (0.05,) * LAYERS)
IDS = torch.ones(1, 3, dtype=torch.long)


@pytest.fixture(scope="module")
def model():
    return load_weights(RECORDED_MODELS / "relu").eval()


@pytest.fixture
def prompts(model):
    return torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))


def test_greedy_tokens_are_those_of_generate(model, prompts):
    tokens, seconds = speed.greedy(model, prompts, 7)
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=7, do_sample=False)
    assert torch.equal(tokens, expected[:, prompts.shape[1] :]) and seconds > 0


def test_every_way_is_timed_and_gives_the_masked_model_s_tokens(model, prompts):
    table = speed.decode_speeds(model, prompts, CETT, new_tokens=6, rounds=2).set_index("way")
    assert list(table.index) == ["dense", "all rows", "sparse", "certified"] and table["same_tokens"].all()
    assert (table["tokens_per_second"] > 0).all() and table.loc["dense", "speedup"] == 1
    times = table[["ffn_time", "attention_time", "head_time"]]
    assert (times.loc["dense"] > 0).all() and (times["head_time"] > 0).all() and (times.sum(axis=1) < 1).all()
    assert times.drop(index="dense")[["ffn_time", "attention_time"]].isna().all(axis=None)  # layers in one call each
    config = model.config
    weights = config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size
    assert table.loc["dense", "ffn_megabytes"] == pytest.approx(4 * weights / 1e6)
    assert table.loc["all rows", "ffn_megabytes"] == table.loc["dense", "ffn_megabytes"]
    assert table.loc["sparse", "ffn_megabytes"] < table.loc["dense", "ffn_megabytes"]
    assert (table.loc[["dense", "all rows"], "strict_speedup"] == 1).any()  # the faster of the two is the measure
    whole = sum(p.nbytes for p in model.parameters()) / 1e6
    assert table.loc["dense", "megabytes"] == pytest.approx(whole)  # tied embeddings are the head
    assert table.loc["sparse", "up_share"] >= table.loc["sparse", "active_share"] > 0


def test_other_tokens_give_no_speed(model, prompts, monkeypatch):
    true = speed.greedy

    def wrong(model, prompts, new_tokens):
        tokens, seconds = true(model, prompts, new_tokens)
        return (tokens + 1 if "forward" in vars(find_ffns(model)[0].down) else tokens), seconds

    monkeypatch.setattr(speed, "greedy", wrong)
    table = speed.decode_speeds(model, prompts, CETT, new_tokens=3, rounds=1).set_index("way")
    assert not table.loc["sparse", "same_tokens"] and np.isnan(table.loc["sparse", "tokens_per_second"])
    assert table.loc["dense", "tokens_per_second"] > 0


def test_parts_count_the_time_after_the_prompt_alone(model, prompts):
    calls, own, ffn = [], model.lm_head.forward, find_ffns(model)[0]

    def slow_first(x):
        time.sleep(0 if calls else 0.3)
        calls.append(x)
        return own(x)

    slow = ffn.down.register_forward_pre_hook(lambda module, args: time.sleep(0.02))
    try:
        with forward_replaced(model.lm_head, slow_first):
            parts = parts_of(model, prompts[:, :1])  # of one token, as all others
    finally:
        slow.remove()
    assert parts["ffn"] >= 3 * 0.02 and parts["attention"] > 0  # three passes, slept in one of the FFNs
    assert 0 < parts["head"] < 0.3 and len(calls) == 4 and not left_behind(model)


def parts_of(model, prompts):
    """Seconds of the parts in the decoding of four tokens."""
    undivided = layer_kernels.run_as_one_call(model, len(prompts))
    with torch.no_grad(), speed.parts_timed(model, find_ffns(model), undivided) as parts:
        speed.greedy(model, prompts, 4)
    return parts


@pytest.mark.parametrize("sequences", [2, 4])
def test_parts_are_those_of_the_way_that_the_model_runs(model, prompts, sequences, monkeypatch):
    """Few sequences run layer by layer, whatever is timed; more of them module by module."""
    calls, own = [], layer_kernels._run
    monkeypatch.setattr(layer_kernels, "_run", lambda *given: calls.append(given) or own(*given))
    texts = prompts.repeat(2, 1)[:sequences]
    with sparse_kernels(model, CETT):
        calls.clear()
        with torch.no_grad():
            speed.greedy(model, texts, 4)
        untimed = len(calls)
        parts = parts_of(model, texts)
    assert len(calls) == 2 * untimed == (2 * 3 * LAYERS if sequences == 2 else 0)  # two runs of three passes
    assert np.isnan([parts["ffn"], parts["attention"]]).all() == (sequences == 2) and parts["head"] > 0


def test_parts_of_some_layers_alone_are_none(model, prompts):
    with sparse_kernels(model, CETT):
        hook = find_ffns(model)[0].gate.module.register_forward_hook(lambda module, args, y: None)
        try:
            parts = parts_of(model, prompts)
        finally:
            hook.remove()
    assert np.isnan(parts["ffn"]) and np.isnan(parts["attention"]) and parts["head"] > 0


def test_patterns_are_those_of_the_last_tokens(model):
    windows = torch.randint(0, model.config.vocab_size, (3, 5), generator=torch.Generator().manual_seed(1))
    pattern = speed.decode_pattern("trained relu", model, CETT, windows)
    neurons = model.config.num_hidden_layers * model.config.intermediate_size
    assert (pattern.act, pattern.rule) == ("relu", "neuron") and pattern.active.shape == (3, neurons)
    assert (pattern.nonzero | ~pattern.active).all() and 0 < pattern.active.mean() < pattern.nonzero.mean() < 1
    alone = speed.decode_pattern("trained relu", model, CETT, windows[1:2])
    assert (alone.active == pattern.active[1:2]).all()
    gate = speed.decode_pattern("fat", model, Thresholds("fat", (0.1,) * LAYERS), windows)
    assert gate.rule == "gate" and (gate.nonzero == gate.active).all()


def test_an_encoder_decoder_is_refused():
    with pytest.raises(InputError, match="does not decode"):
        speed.decode_speeds(build("t5", dtype=torch.float32), IDS, CETT, new_tokens=2, rounds=1)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(InputError, match=r"Prompts of 3 tokens and 30 new ones .* context of 32"):
        speed.decode_speeds(build("gpt2", dtype=torch.float32), IDS, CETT, new_tokens=30, rounds=1)


def test_one_new_token_has_no_speed(model, prompts):
    with pytest.raises(InputError, match="1 new token has no speed"):
        speed.decode_speeds(model, prompts, CETT, new_tokens=1, rounds=1)


def test_a_model_that_no_kernel_fits_is_refused_and_one_without_certificate_is_not(model, prompts):
    with pytest.raises(InputError, match="routed experts"):
        speed.decode_speeds(build_mixture("mixtral", dtype=torch.float32), IDS, CETT, new_tokens=2, rounds=1)
    silu = load_weights(RECORDED_MODELS / "silu").eval()
    table = speed.decode_speeds(silu, prompts, CETT, new_tokens=2, rounds=1)
    assert list(table["way"]) == ["dense", "all rows", "sparse"]
