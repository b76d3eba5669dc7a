"""Activation frequencies of neurons and tokens against the slow reference; padding, experts, dead neurons."""

from contextlib import contextmanager
from dataclasses import replace

import literal_metrics as literal
import numpy as np
import pandas as pd
import pytest
import torch
from metric_cases import padded_batches
from mixtures import IDS, build
from tiny_granite import granite, hooks_of

from sparsity_utils.console import InputError
from sparsity_utils.models.shapes import representative_layers
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity import patterns
from sparsity_utils.sparsity.metrics import measure_sparsity
from sparsity_utils.sparsity.patterns import activation_patterns, dead_neurons, over_domains

VOCABULARY = 23
RULES = [("relu", (0.0,) * 3), ("cett", (0.3, 0.5, 0.2)), ("top-k", (5, 5, 5)), ("fat", (0.2,) * 3)]


def model_of(layers=3):
    return granite("relu", d=12, d_ff=31, layers=layers, vocabulary=VOCABULARY)


def literal_active(model, rule, values, batches):
    """(token ids (tokens,), per layer: active (tokens, d_ff)) over the real tokens of all batches."""
    per_layer = literal.all_neurons(model, "relu", batches)
    active = [~literal.inactive(rule, v, s, h, n) for v, (s, h, n) in zip(values, per_layer, strict=True)]
    ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    return ids, active


@pytest.mark.parametrize(("rule", "values"), RULES, ids=[rule for rule, _ in RULES])
def test_frequencies_and_ratios_are_those_of_the_literal_version(rule, values):
    model = model_of()
    domains = {"code": padded_batches(1), "prose": padded_batches(2, rows=(2, 4))}
    found = activation_patterns(model, domains, Thresholds(rule, values))
    for domain, batches in domains.items():
        ids, active = literal_active(model, rule, values, batches)
        rows = found.frequencies[found.frequencies["domain"] == domain]
        expected = torch.cat([layer.double().mean(0) for layer in active]).numpy()
        np.testing.assert_allclose(rows["frequency"], expected, rtol=0, atol=1e-12)
        assert list(rows["layer"]) == [layer for layer in range(3) for _ in range(31)]
        assert list(rows["neuron"]) == 3 * list(range(31)) and set(rows["expert"]) == {0}
        assert set(rows["tokens"]) == {len(ids)}
    ids, active = literal_active(model, rule, values, [*domains["code"], *domains["prose"]])
    shares = torch.stack([layer.double().mean(1) for layer in active])  # (layers, tokens)
    for row in found.vocabulary.itertuples():
        occurs = ids == row.token_id
        first, middle, last = shares[:, occurs].mean(1).tolist()
        assert row.count == int(occurs.sum())
        assert (row.activation_ratio, row.first, row.middle, row.last) == pytest.approx(
            ((first + middle + last) / 3, first, middle, last), abs=1e-12
        )
    assert list(found.vocabulary["token_id"]) == sorted(set(ids.tolist()))
    assert hooks_of(model) == []


def test_the_mean_frequency_is_the_activation_ratio_of_the_report():
    model, batches = model_of(), padded_batches(3)
    report = measure_sparsity(model, batches, "cett", cett=0.3)
    found = activation_patterns(model, {"all": batches}, report.thresholds)
    means = found.frequencies.groupby("layer")["frequency"].mean()
    np.testing.assert_allclose(means, report.layers["activation_ratio"], atol=1e-12)
    words = found.vocabulary
    assert np.average(words["activation_ratio"], weights=words["count"]) == pytest.approx(
        report.activation_ratio, abs=1e-12
    )


def test_other_batches_of_the_same_tokens_count_the_same():
    model, batches = model_of(), padded_batches(4)
    thresholds = Thresholds("cett", (0.3, 0.5, 0.2))
    whole = activation_patterns(model, {"all": batches}, thresholds)
    rows = [
        {key: x[i : i + 1] for key, x in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))
    ]
    by_row = activation_patterns(model, {"all": rows}, thresholds)
    pd.testing.assert_frame_equal(whole.frequencies, by_row.frequencies)
    pd.testing.assert_frame_equal(whole.vocabulary, by_row.vocabulary)


def test_what_is_kept_does_not_grow_with_the_text(monkeypatch):
    """The counts have the size of the model, after one batch as after forty."""
    sizes, table = [], patterns._TokenCounts.table

    def sized(self):
        sizes.append([x.numel() for x in vars(self).values()])
        return table(self)

    monkeypatch.setattr(patterns._TokenCounts, "table", sized)
    for repeats in (1, 40):
        activation_patterns(model_of(), {"all": padded_batches(5) * repeats}, Thresholds("relu", (0.0,) * 3))
    assert sizes == 2 * [[VOCABULARY, 3 * VOCABULARY, 3 * VOCABULARY]]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, {"first": 0, "last": 0}),
        (2, {"first": 0, "last": 1}),
        (3, {"first": 0, "middle": 1, "last": 2}),
        (4, {"first": 0, "middle": 2, "last": 3}),
        (40, {"first": 0, "middle": 20, "last": 39}),
    ],
)
def test_representative_layers(layers, expected):
    assert representative_layers(layers) == expected


@pytest.mark.parametrize("layers", [1, 2])
def test_a_shallow_model_has_no_middle(layers):
    model = model_of(layers)
    words = activation_patterns(model, {"a": padded_batches(1)}, Thresholds("relu", (0.0,) * layers)).vocabulary
    assert words["middle"].isna().all() and words[["activation_ratio", "first", "last"]].notna().all(axis=None)
    if layers == 1:
        assert words["first"].equals(words["last"]) and words["first"].equals(words["activation_ratio"])


def test_experts_count_over_the_tokens_routed_to_them(monkeypatch):
    """Two experts of one layer: each sees some of six tokens, the last one is padding; a third expert sees none."""
    model = model_of(1)
    ffns = [replace(find_ffns(model)[0], expert=expert, experts=3) for expert in range(3)]
    active = torch.zeros(6, 31, dtype=torch.float64)
    active[torch.arange(6), :] = (torch.arange(31) < torch.tensor([[1], [2], [3], [4], [5], [31]])).double()
    routed = {0: torch.tensor([0, 1, 4, 5]), 1: torch.tensor([1, 2, 3])}

    @contextmanager
    def observe(model, callback):
        for expert, tokens in routed.items():
            callback(ffns[expert], active[tokens], active[tokens], tokens)
        callback(ffns[2], active[:0], active[:0], torch.arange(0))
        yield ffns

    monkeypatch.setattr(patterns, "find_ffns", lambda model: ffns)
    monkeypatch.setattr(patterns, "observe_neurons", observe)
    batch = {"input_ids": torch.tensor([[7, 8, 8], [9, 7, 8]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    found = activation_patterns(model, {"a": [batch]}, Thresholds("relu", (0.0,)))
    table = found.frequencies.set_index(["expert", "neuron"])["frequency"]
    assert table[0][:6].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 1 / 3, 1 / 3, 0])  # tokens 0, 1, 4
    assert table[1][:6].tolist() == pytest.approx([1, 1, 2 / 3, 1 / 3, 0, 0])  # tokens 1, 2, 3
    assert table[2].isna().all()
    assert found.frequencies.groupby("expert")["tokens"].first().tolist() == [3, 3, 0]
    words = found.vocabulary.set_index("token_id")
    assert words["count"].to_dict() == {7: 2, 8: 2, 9: 1}
    shares = {7: (1 + 5) / 2, 8: (2 + 2 + 3) / 3, 9: 4}  # token 1 went to two experts
    assert (31 * words["activation_ratio"]).to_dict() == pytest.approx(shares)
    assert dead_neurons(found.frequencies)["neurons"].tolist() == [62]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_routed_neurons_weigh_to_the_ratio_of_the_report(family):
    model, batches = build(family), [{"input_ids": IDS}]
    report = measure_sparsity(model, batches, "cett", cett=0.4)
    found = activation_patterns(model, {"all": batches}, report.thresholds)
    table = found.frequencies.assign(active=found.frequencies["frequency"].fillna(0) * found.frequencies["tokens"])
    sums = table.groupby("layer")[["active", "tokens"]].sum()
    np.testing.assert_allclose(sums["active"] / sums["tokens"], report.layers["activation_ratio"], atol=1e-12)
    assert not table.duplicated(["layer", "expert", "neuron"]).any()
    assert len(table) == sum(ffn.d_ff for ffn in find_ffns(model))
    words = found.vocabulary
    assert np.average(words["activation_ratio"], weights=words["count"]) == pytest.approx(
        report.activation_ratio, abs=1e-12
    )


def frequencies(values, tokens, domain="a"):
    return pd.DataFrame(
        {"domain": domain, "layer": 0, "expert": 0, "neuron": range(len(values)), "frequency": values, "tokens": tokens}
    )


def test_domains_weigh_by_their_tokens():
    both = pd.concat([frequencies([0.1, 0.0], 100), frequencies([0.4, 0.5], 300, "b")])
    whole = over_domains(both)
    assert whole["frequency"].tolist() == pytest.approx([0.325, 0.375]) and whole["tokens"].tolist() == [400, 400]


def test_dead_is_below_one_in_a_thousand_of_all_tokens():
    """Active on 0, 1, 2 and 3 of 2,000 tokens; the third is exactly at the limit, so it lives."""
    table = dead_neurons(frequencies(np.array([0, 1, 2, 3]) / 2000, 2000))
    assert table.to_dict("list") == {"layer": [0], "neurons": [4], "dead": [2], "dead_share": [0.5]}
    elsewhere = frequencies([1.0, 0.0, 0.0, 0.0], 2000, "b")  # the first lives on other text
    assert dead_neurons(pd.concat([frequencies([0.0] * 4, 2000), elsewhere]))["dead"].tolist() == [3]


def test_a_model_of_two_texts_or_none_is_refused():
    model = model_of()
    model.main_input_name = "pixel_values"
    with pytest.raises(InputError, match="GraniteForCausalLM does not read one text per row"):
        activation_patterns(model, {"a": padded_batches(1)}, Thresholds("relu", (0.0,) * 3))


@pytest.mark.parametrize(
    ("domains", "values", "message"),
    [
        ({}, (0.0,) * 3, "No domain was given"),
        ({"code": padded_batches(1)}, (0.0,) * 2, "for 2 layers and the model has 3"),
        ({"code": []}, (0.0,) * 3, "The code batches hold no token"),
        ({"code": [{"input_ids": torch.full((1, 4), 99)}]}, (0.0,) * 3, "code batch 0 has token ids outside"),
    ],
)
def test_unusable_input_is_named(domains, values, message):
    model = model_of()
    with pytest.raises(InputError, match=message):
        activation_patterns(model, domains, Thresholds("relu", values))
    assert hooks_of(model) == []
