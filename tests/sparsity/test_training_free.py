"""One protocol for training-free rules, against literal versions of what it counts and solves."""

import math

import numpy as np
import pytest
import torch
from families import build, left_behind
from linear_maps import grouped_query

from sparsity_utils.console import InputError
from sparsity_utils.neurons.input_rules import INPUT_RULES, TRAINING_FREE, InputRule
from sparsity_utils.neurons.linears import find_linears, sparse_inputs
from sparsity_utils.neurons.rotations import rotated
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity import training_free as module
from sparsity_utils.sparsity.input_thresholds import calibrated, greedy_sparsities
from sparsity_utils.sparsity.metrics import measure_sparsity
from sparsity_utils.sparsity.training_free import TrainingFree


def text(seed, documents=4, length=10):
    """Documents of random tokens, the last window of each padded."""
    ids = torch.randint(0, 41, (2 * documents, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1::2, 6:] = 0
    rows = {"input_ids": ids, "attention_mask": mask, "documents": torch.arange(2 * documents) // 2}
    return [{name: value[start : start + 4] for name, value in rows.items()} for start in range(0, 2 * documents, 4)]


CALIBRATION, EVALUATION, ALLOCATION = text(1), text(2, documents=6), text(3, documents=2)


def written(model, seed, documents=40, length=20):
    """Documents that the model itself writes, so that it predicts them and masks make it worse."""
    generator, ids = torch.Generator().manual_seed(seed), torch.full((documents, 1), 7)
    for _ in range(length - 1):
        with torch.no_grad():
            chances = model(input_ids=ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "documents": torch.arange(documents)}]


def harness(model, **options):
    return TrainingFree(model, CALIBRATION, EVALUATION, ALLOCATION, **options)


def literal(model, batches=EVALUATION):
    """Loss and accuracy token by token."""
    losses, correct = [], []
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row, ids, mask in zip(logits.log_softmax(-1), batch["input_ids"], batch["attention_mask"], strict=True):
            for place in range(len(ids) - 1):
                if mask[place] and mask[place + 1]:
                    losses.append(-float(row[place, ids[place + 1]]))
                    correct.append(int(row[place].argmax()) == int(ids[place + 1]))
    return np.mean(losses), np.mean(correct), len(losses)


class Watched:
    """Thresholds that note what they keep of each map on real tokens, from a position on."""

    def __init__(self, thresholds, first=0):
        self.thresholds, self.values, self.first, self.shares = thresholds, thresholds.values, first, {}

    def active_inputs(self, linear, x):
        active = self.thresholds.active_inputs(linear, x).clone()
        active[:, : self.first] = True
        batch = next(one for one in EVALUATION if len(one["input_ids"]) == len(x) and one is self.batch)
        self.shares.setdefault(linear.index, []).append(active[batch["attention_mask"].bool()].double().flatten())
        return active


@pytest.mark.parametrize("dense_share", [0.0, 0.5, 0.39])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("name", ["teal", "wina", "was"])
def test_a_report_is_what_masked_passes_give(name, rotate, dense_share):
    model = grouped_query()
    report = harness(model, dense_share=dense_share).at(name, 0.25, rotate=rotate)
    maps = rotated(model) if rotate else find_linears(model)
    watched = Watched(calibrated(model, CALIBRATION, name, 0.25, maps=maps), int(dense_share * 10))
    losses = []
    with sparse_inputs(model, watched, maps):
        for batch in EVALUATION:
            watched.batch = batch
            losses.append(literal(model, [batch]))
    tokens = sum(count for _, _, count in losses)
    assert report.loss_sparse == pytest.approx(sum(loss * n for loss, _, n in losses) / tokens, rel=1e-10)
    assert report.accuracy_sparse == pytest.approx(sum(right * n for _, right, n in losses) / tokens)
    loss, accuracy, count = literal(model)
    assert (report.loss_dense, report.accuracy_dense) == (pytest.approx(loss, rel=1e-10), pytest.approx(accuracy))
    assert (report.tokens, report.documents) == (count, 6) and left_behind(model) == []

    shares = [float(torch.cat(watched.shares[one.index]).mean()) for one in maps]
    sizes = [one.weight.numel() for one in maps]
    np.testing.assert_allclose(report.maps["share_read"], shares, rtol=1e-12)
    assert report.sparsity == pytest.approx(1 - np.dot(shares, sizes) / sum(sizes))
    turning = 2 * 2 * 24**2 if rotate else 0
    assert report.rotation_weights == turning
    assert report.weights_read == pytest.approx((np.dot(shares, sizes) + turning) / sum(sizes))
    rest = 41 * 24 + 24
    assert report.model_read == pytest.approx((np.dot(shares, sizes) + turning + rest) / (sum(sizes) + rest))
    assert report.excess == report.loss_sparse - report.loss_dense
    assert report.ppl_ratio == pytest.approx(math.exp(report.excess))


def test_neuron_rules_read_what_they_skip_no_more_than_that():
    """CATS skips rows of up and columns of down; CETT, which needs h, columns of down alone."""
    model = grouped_query()
    found = harness(model)
    cats = found.at("cats", 0.5)
    by_role = cats.maps.groupby("role")["share_read"].mean()
    assert all(by_role[role] == 1 for role in ("q", "k", "v", "o", "gate"))
    assert by_role["up"] == by_role["down"] == pytest.approx(0.5, abs=0.1)
    measured = measure_sparsity(model, EVALUATION, "cett", cett=0.3, calibration=CALIBRATION)
    cett = found.evaluated(measured.thresholds)
    by_role = cett.maps.groupby("role")["share_read"].mean()
    assert by_role["up"] == 1 and by_role["down"] < 0.8
    assert (cett.loss_sparse, cett.loss_dense) == pytest.approx((measured.loss_sparse, measured.loss_dense))


def test_documents_in_two_texts_are_refused():
    model = grouped_query()
    with pytest.raises(InputError, match="Document 0 of the calibration text is also in the evaluation text"):
        TrainingFree(model, text(1), text(1))
    with pytest.raises(InputError, match="Document 0 of the calibration text is also in the allocation text"):
        TrainingFree(model, text(1), text(2), text(1))


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("name", ["teal", "wina", "cats"])
def test_equal_weights_are_read(name, rotate):
    model = grouped_query()
    found = harness(model)
    if name == "cats" and rotate:
        with pytest.raises(InputError, match="'cats' is on gates"):
            found.at_weights_read(name, 0.8, rotate=rotate)
        return
    report = found.at_weights_read(name, 0.8, rotate=rotate)
    assert report.weights_read == pytest.approx(0.8, abs=0.07)  # thresholds of so few tokens are met roughly
    nominal = 1 - (1920 / 4416 if name == "cats" else 1) * report.calibrated_sparsity + 1152 / 4416 * rotate
    assert nominal == pytest.approx(0.8, abs=0.07 if name == "wina" else 1e-3)


def test_more_than_a_rule_can_save_is_refused():
    found = harness(grouped_query())
    with pytest.raises(InputError, match=r"'cats' reads 0\.\d+ to 1 of the weights of this model; 0\.2 is outside"):
        found.at_weights_read("cats", 0.2)
    with pytest.raises(InputError, match=r"'teal' reads 0 to 1 of the weights"):
        found.at_weights_read("teal", 1.2)


@pytest.mark.parametrize(("greedy", "p"), [(False, 5.0), (True, 0.3)])
def test_perplexity_rises_by_what_was_asked_on_the_calibration_text(greedy, p):
    model = grouped_query()
    for block in model.model.layers:  # else they matter little
        block.self_attn.o_proj.weight.data *= 3
        block.mlp.down_proj.weight.data *= 3
    calibration = written(model, 1)
    found = TrainingFree(model, calibration, written(model, 2), written(model, 3), greedy_step=0.1)
    report = found.at_perplexity("teal", p, greedy=greedy)
    dense, _, _ = literal(model, calibration)
    with sparse_inputs(model, report.thresholds):
        sparse, _, _ = literal(model, calibration)
    assert sparse - dense == pytest.approx(math.log1p(p / 100), rel=0.1)
    assert 0 < report.calibrated_sparsity < 1


def test_the_sparsity_that_is_told_is_that_of_the_mask_however_near_it_comes(monkeypatch):
    monkeypatch.setattr(module, "REALISED", -1.0)  # never met
    found, asked = harness(grouped_query()), []

    def masks(sparsity):
        asked.append(sparsity)
        return found.thresholds("teal", sparsity)

    report = found.at_realised(masks, 0.5)
    assert len(asked) == module.CORRECTIONS and report.calibrated_sparsity == asked[-1]


def test_a_greedy_report_uses_the_allocation_of_its_sparsity():
    model = grouped_query()
    maps = find_linears(model)
    report = harness(model, greedy_step=0.05).at("wina", 0.3, greedy=True)
    sparsities, _ = greedy_sparsities(model, ALLOCATION, "wina", 0.3, step=0.05)
    expected = tuple(INPUT_RULES["wina"].value(one, s, None) for one, s in zip(maps, sparsities, strict=True))
    assert report.thresholds == Thresholds("wina", expected)
    with pytest.raises(InputError, match="needs allocation text, and goes up to a sparsity of"):
        TrainingFree(model, CALIBRATION, EVALUATION).at("wina", 0.3, greedy=True)


def test_reports_are_compared_on_the_same_resampled_documents():
    found = harness(grouped_query())
    one, other = found.at("teal", 0.5), found.at("wina", 0.5)
    difference, low, high = one.compared(other)
    assert difference == pytest.approx(one.excess / other.excess - 1)
    assert low <= difference <= high
    assert one.compared(one) == (0.0, 0.0, 0.0)
    assert one.excess_interval[0] <= one.excess <= one.excess_interval[1]
    elsewhere = TrainingFree(found.model, CALIBRATION, text(5)).at("wina", 0.5)
    with pytest.raises(InputError, match="of different text or models"):
        one.compared(elsewhere)


class Loudest(InputRule):
    """Kept: |x_j| max_i |W_ij| > t, a rule that the package does not have."""

    name, label = "loudest", "Loudest"

    def scores(self, linear, sizes):
        return sizes * linear.weight.abs().amax(0)


def test_an_added_rule_is_calibrated_allocated_and_judged(monkeypatch):
    for rules in (INPUT_RULES, TRAINING_FREE):  # of thresholds, of measurements
        monkeypatch.setitem(rules, "loudest", Loudest())
    found = harness(grouped_query(), greedy_step=0.1)
    for report in (
        found.at("loudest", 0.5),
        found.at("loudest", 0.5, greedy=True),
        found.at("loudest", 0.5, rotate=True),
    ):
        assert report.rule == "loudest" and report.sparsity == pytest.approx(0.5, abs=0.1) and report.excess != 0


def test_bad_input_is_refused():
    model = grouped_query()
    found = harness(model)
    with pytest.raises(InputError, match="The rule is 'magic'; choose one of teal"):
        found.at("magic", 0.5)
    with pytest.raises(InputError, match="sparsity is 1"):
        found.at("teal", 1.2)
    with pytest.raises(InputError, match=r"of 24 and of 40 inputs is a share of 0\.3"):
        found.at("wina", 0.3)
    with pytest.raises(InputError, match="dense_share is 1"):
        harness(model, dense_share=1.0)
    with pytest.raises(InputError, match="p is 0"):
        found.at_perplexity("teal", 0.0)
    with pytest.raises(InputError, match="BertForMaskedLM does not predict the next token"):
        TrainingFree(build("bert"), CALIBRATION, EVALUATION)
