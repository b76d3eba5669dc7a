"""Decoding speeds: greedy tokens, parts of the time, bytes; and the summaries and verdicts drawn from speed tables."""

import time

import numpy as np
import pandas as pd
import pytest
import torch
from families import build
from mixtures import build as build_mixture

from sparsity_utils.console import InputError
from sparsity_utils.decoding import speed
from sparsity_utils.findings import speed_summary, speed_verdicts
from sparsity_utils.laws.cost import decoding_limit
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED
from sparsity_utils.models.pretrained import load_weights
from sparsity_utils.neurons.hooks import find_ffns
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.paths import RECORDED_MODELS

CETT = Thresholds("cett", (0.05,) * 4)


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
    assert (times > 0).all(axis=None) and (times.sum(axis=1) < 1).all()
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


def test_parts_count_the_time_of_single_tokens_alone(model, prompts, monkeypatch):
    ffn = find_ffns(model)[0]
    slow = ffn.down.register_forward_pre_hook(lambda module, args: time.sleep(0.02))
    parts = speed.Parts()
    try:
        with parts.timed(model, find_ffns(model)):
            speed.greedy(model, prompts, 4)
    finally:
        slow.remove()
    assert parts.seconds["ffn"] >= 3 * 0.02 > parts.seconds["head"]  # three single tokens, slept in one of four FFNs


def test_patterns_are_those_of_the_last_tokens(model):
    windows = torch.randint(0, model.config.vocab_size, (3, 5), generator=torch.Generator().manual_seed(1))
    pattern = speed.decode_pattern("trained relu", model, CETT, windows)
    neurons = model.config.num_hidden_layers * model.config.intermediate_size
    assert (pattern.act, pattern.rule) == ("relu", "neuron") and pattern.active.shape == (3, neurons)
    assert (pattern.nonzero | ~pattern.active).all() and 0 < pattern.active.mean() < pattern.nonzero.mean() < 1
    alone = speed.decode_pattern("trained relu", model, CETT, windows[1:2])
    assert (alone.active == pattern.active[1:2]).all()
    gate = speed.decode_pattern("fat", model, Thresholds("fat", (0.1,) * 4), windows)
    assert gate.rule == "gate" and (gate.nonzero == gate.active).all()


def test_an_encoder_decoder_is_refused():
    with pytest.raises(InputError, match="does not decode"):
        speed.decode_speeds(build("t5", dtype=torch.float32), torch.ones(1, 3, dtype=torch.long), CETT)


# Summaries and verdicts


def ffns(strict=0.95, at_zero=1.3, certified=4.4, shape="2.4B"):
    rows = []
    for sparsity in (0.0, 0.5, 0.9, 0.935, 0.97):
        for way in ("dense", "sparse", "certified"):
            ideal = {"dense": 1.0, "sparse": 3 / (1 + 2 * (1 - sparsity)), "certified": 3 / (0.4 + 3 * (1 - sparsity))}
            gain = {"dense": 0.7, "sparse": strict * ideal["sparse"], "certified": certified}[way]
            torch_gain = at_zero if sparsity == 0 and way == "sparse" else gain * 1.4
            rows.append(
                {"shape": shape, "d_model": 2304, "dtype": "float32", "tokens": 1, "pattern": "random",
                 "activation": "relu", "rule": "gate", "sparsity": sparsity, "way": way, "ideal_speedup": ideal[way],
                 "speedup": torch_gain, "low_speedup": torch_gain * 0.99, "high_speedup": torch_gain * 1.01,
                 "strict_speedup": gain, "low_strict_speedup": gain * 0.99, "high_strict_speedup": gain * 1.01}
            )  # fmt: skip
    return pd.DataFrame(rows)


def decoding(trained=0.8, shape=1.4, same=True):
    rows = []
    for model, activation, gain in (
        ("trained", "relu", trained),
        ("trained", "silu", 1.2),
        ("random weights", "relu", shape),
    ):
        for way, sparsity in (("dense", 0.0), ("sparse", 0.9)):
            value = 1.0 if way == "dense" else gain if same else np.nan
            rows.append(
                {"model": model, "activation": activation, "shape": "48x4", "sequences": 1, "rule": "cett",
                 "setting": 90, "way": way,
                 "sparsity": sparsity, "speedup": value, "low_speedup": value * 0.99, "high_speedup": value * 1.01,
                 "strict_speedup": value, "low_strict_speedup": value * 0.99, "high_strict_speedup": value * 1.01,
                 "same_tokens": same}
            )  # fmt: skip
    return pd.DataFrame(rows)


def verdicts(**changes):
    tables = {"ffns": ffns(), "decoding": decoding(), **changes}
    return speed_verdicts.sparse_decoding(tables["ffns"], tables["decoding"])


def test_verdicts_follow_the_stated_thresholds():
    near, slower, wall, published, gains, trained = verdicts()
    assert [row.verdict for row in (near, slower, wall)] == [SUPPORTED] * 3
    assert near.here == pytest.approx(0.95) and slower.here == 1.3 and wall.here == 4.4
    assert published.verdict == NOT_SUPPORTED and published.here == pytest.approx(2.875)
    assert gains.verdict == SUPPORTED and trained.verdict == NOT_SUPPORTED and "ReLU" in trained.reason


@pytest.mark.parametrize(("strict", "expected"), [(0.88, NOT_SUPPORTED), (0.9, INCONCLUSIVE), (0.92, SUPPORTED)])
def test_near_the_ideal_is_judged_by_the_interval(strict, expected):
    assert verdicts(ffns=ffns(strict=strict))[0].verdict == expected


def test_a_wall_just_passed_or_a_kernel_just_slower_is_no_support():
    assert verdicts(ffns=ffns(certified=3.4))[2].verdict == NOT_SUPPORTED
    assert verdicts(ffns=ffns(at_zero=0.97))[1].verdict == NOT_SUPPORTED


def test_what_was_not_measured_is_inconclusive():
    rows = verdicts(ffns=ffns(shape="0.1B"), decoding=decoding().query("model == 'trained'"))
    assert [row.verdict for row in rows] == [INCONCLUSIVE] * 3 + [NOT_SUPPORTED, INCONCLUSIVE, NOT_SUPPORTED]
    assert rows[0].reason == "it was not measured"


def test_other_tokens_are_inconclusive():
    rows = verdicts(decoding=decoding(same=False))
    assert [row.verdict for row in rows[-2:]] == [INCONCLUSIVE] * 2 and "other tokens" in rows[-1].reason


def test_too_few_rounds_are_inconclusive():
    rows = verdicts(ffns=ffns().assign(low_strict_speedup=np.nan, high_strict_speedup=np.nan))
    assert rows[0].verdict == INCONCLUSIVE and rows[0].reason == "too few rounds for an interval"


def test_a_model_that_no_kernel_fits_is_refused_and_one_without_certificate_is_not(model, prompts):
    with pytest.raises(InputError, match="routed experts"):
        speed.decode_speeds(build_mixture("mixtral", dtype=torch.float32), torch.ones(1, 3, dtype=torch.long), CETT)
    silu = load_weights(RECORDED_MODELS / "silu").eval()
    table = speed.decode_speeds(silu, prompts, CETT, new_tokens=2, rounds=1)
    assert list(table["way"]) == ["dense", "all rows", "sparse"]


def test_tables_that_cannot_be_used_are_refused():
    with pytest.raises(InputError, match="strict_speedup"):
        verdicts(ffns=ffns().drop(columns="strict_speedup"))
    with pytest.raises(InputError):
        verdicts(ffns=pd.concat([ffns(), ffns()]))


def test_break_even_lies_where_the_log_speed_up_crosses_zero():
    table = ffns().query("way == 'sparse'").assign(speedup=[0.5, 2.0, 3.0, 3.0, 3.0])
    assert speed_summary.break_even(table)["sparse"].tolist() == pytest.approx([25.0])
    assert speed_summary.break_even(table.assign(speedup=2.0))["sparse"].tolist() == [0.0]
    assert np.isnan(speed_summary.break_even(table.assign(speedup=0.5))["sparse"]).all()


def test_shares_of_the_ideal_stand_side_by_side():
    table = speed_summary.shares_of_ideal(ffns(), "2.4B")
    assert list(table.index) == [0.0, 50.0, 90.0, 93.5, 97.0]
    assert table["of_ideal", "sparse"].tolist() == pytest.approx([0.95] * 5)


def test_decoding_limits_are_bytes_over_bytes():
    d = 100
    attention, ffn = 4 * d * d, 3 * 2.5 * d * d
    assert decoding_limit(0.25) == pytest.approx((attention + ffn) / (attention + 0.25 * ffn))
    table = speed_summary.decoding_limits(0.9352)
    assert table.loc["nothing", "whole model, no head"] == pytest.approx(2.875)
    assert table.loc["gate in full, then active rows", "FFN alone"] == pytest.approx(3 / (1 + 2 * 0.0648))
