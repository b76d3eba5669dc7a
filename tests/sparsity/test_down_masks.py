"""Masks on the down projection, against scores and errors computed one token at a time."""

import numpy as np
import pytest
import torch
from linear_maps import grouped_query
from tiny_granite import granite

from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.hooks import observe_neurons, sparse_neurons
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity import down_masks, input_thresholds
from sparsity_utils.sparsity.down_masks import ALLOCATIONS, SCORES, DownScores
from sparsity_utils.sparsity.passes import checked
from sparsity_utils.sparsity.training_free import TrainingFree

IDS = torch.randint(0, 41, (6, 12), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS[:4]}, {"input_ids": IDS[4:]}]


def seen_by(model):
    """h and s of every layer, (tokens, d_ff) each, and the down weights."""
    found = {}

    def keep(ffn, s, h, tokens):
        found.setdefault(ffn.layer, []).append((s.clone(), h.clone()))

    with evaluating(model), observe_neurons(model, keep):
        model(input_ids=IDS)
    parts = {layer: tuple(torch.cat(x) for x in zip(*rows, strict=True)) for layer, rows in found.items()}
    return [(*parts[ffn.layer], ffn.down_weight.detach().double()) for ffn in find_ffns(model)]


def literal_size(score, s, h, weight, i):
    return {"gate": abs(s[i]), "h": abs(h[i]), "n": abs(h[i]) * float(weight[:, i].norm())}[score]


def sizes_of(score, s, h, weight):
    return [
        [literal_size(score, a, b, weight, i) for i in range(len(a))]
        for a, b in zip(s.tolist(), h.tolist(), strict=True)
    ]


def scores_of(model):
    return DownScores(model, list(checked(model, BATCHES, "calibration")))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_mask_keeps_the_largest_scores_and_leaves_out_what_was_asked(score, allocation):
    model = grouped_query()
    mask, layers = scores_of(model).mask(score, allocation, 0.6), seen_by(model)
    left_out = 0
    for ffn, value, (s, h, weight) in zip(find_ffns(model), mask.values, layers, strict=True):
        sizes, kept = sizes_of(score, s, h, weight), mask.active(ffn, s, h).tolist()
        for size, row in zip(sizes, kept, strict=True):
            smallest = sorted(size)[-16] if allocation == "top-k" else value
            assert row == [x >= smallest for x in size]
        left_out += sum(row.count(False) for row in kept)
    if allocation == "top-k":
        assert mask.values == (16, 16)
    if allocation == "shared":
        assert len(set(mask.values)) == 1
    assert left_out == pytest.approx(0.6 * 2 * 72 * 40, abs=2)


def test_no_neuron_stays_where_all_are_left_out():
    model = grouped_query()
    for allocation in ALLOCATIONS:
        mask = scores_of(model).mask("n", allocation, 1.0)
        for ffn, (s, h, _) in zip(find_ffns(model), seen_by(model), strict=True):
            assert not mask.active(ffn, s, h).any()


@pytest.mark.parametrize("score", SCORES)
def test_cett_gives_every_layer_one_relative_error(score, monkeypatch):
    monkeypatch.setattr(down_masks, "GRID", 200)
    model = granite("silu", vocabulary=41)
    model.model.layers[1].mlp.up_proj.weight.data[:4] *= 9  # else layers are alike, whatever the allocation
    mask, errors, shares = scores_of(model).mask(score, "cett", 0.5), [], []
    for value, (s, h, weight) in zip(mask.values, seen_by(model), strict=True):
        dropped = torch.tensor(sizes_of(score, s, h, weight)) < value
        tails = [
            float((weight @ row).norm() / (weight @ whole).norm()) for row, whole in zip(h * dropped, h, strict=True)
        ]
        errors.append(np.mean(tails))
        shares.append(float(dropped.double().mean()))
    assert max(errors) - min(errors) < 0.01 and np.mean(shares) == pytest.approx(0.5, abs=0.003)
    assert max(shares) - min(shares) > 0.02  # the layers need different sparsities for that


def test_two_of_the_masks_are_rules_that_the_package_has():
    model = grouped_query()
    for score, rule in (("gate", "top-k"), ("n", "top-k-norm")):
        mask, thresholds = scores_of(model).mask(score, "top-k", 0.5), Thresholds(rule, (20, 20))
        outputs = []
        for one in (mask, thresholds):
            with torch.no_grad(), sparse_neurons(model, one):
                outputs.append(model(input_ids=IDS).logits)
        assert torch.equal(*outputs)


def test_only_the_down_projection_is_read_in_part():
    model = grouped_query()
    other = [{"input_ids": batch["input_ids"].flip(1)} for batch in BATCHES]
    report = TrainingFree(model, BATCHES, other).evaluated(scores_of(model).mask("h", "top-k", 0.5))
    shares = report.maps.groupby("role")["share_read"].mean()
    assert shares["down"] == 0.5 and (shares.drop("down") == 1).all()
    assert report.rule == "h-top-k" and report.rotation_weights == 0


def test_kept_tokens_are_bounded(monkeypatch):
    model = grouped_query()
    monkeypatch.setattr(input_thresholds, "KEPT_BYTES", 8 * 80 * 24)
    assert [len(h) for _, h in scores_of(model).parts] == [24, 24]
