"""The bar over a measurement: it begins before the first trial ends, never runs backwards, and ends at 100%."""

import io
import re

import pytest
import torch
from metric_cases import model_for, padded_batches, with_own_labels
from tqdm import tqdm

from sparsity_utils.console import share_bar
from sparsity_utils.neurons.find import find_ffns, layer_count
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.calibration import KeptTokens
from sparsity_utils.sparsity.metrics import apply_thresholds, measure_sparsity
from sparsity_utils.sparsity.work import Work


@pytest.fixture
def shown(monkeypatch):
    """What a person sees, as text to be read: every update is drawn at once."""
    printed = io.StringIO()
    monkeypatch.delenv("CI")
    monkeypatch.setattr("sparsity_utils.console.tqdm", lambda **how: tqdm(**how | {"mininterval": 0, "file": printed}))
    return printed


def percents(printed):
    return [int(found) for found in re.findall(r"(\d+)%", printed.getvalue())]


def cases():
    """Evaluation and calibration: none, of the same size, of another, and of unknown length."""
    model = model_for("silu")
    batches, others = (with_own_labels(model, padded_batches(seed, (9, 8), (15, 17))) for seed in (3, 4))
    yield model, lambda: batches, {}
    yield model, lambda: batches, {"calibration": others}
    yield model, lambda: iter(batches), {"calibration": iter(others)}
    yield model, lambda: batches, {"metric": "cett", "cett": 0.2}
    yield model, lambda: batches, {"metric": "top-k", "k": 3}
    yield model, lambda: iter(batches), {"metric": "relu"}


@pytest.mark.parametrize("sample", [96, 2048])
@pytest.mark.parametrize("case", range(6))
def test_one_bar_runs_from_0_to_100_without_a_step_back(shown, monkeypatch, case, sample):
    monkeypatch.setattr("sparsity_utils.sparsity.calibration.SAMPLE_TOKENS", sample)  # a part of the text, all of it
    model, batches, how = list(cases())[case]
    apply_thresholds(model, list(batches()), Thresholds("relu", (0.0,) * layer_count(find_ffns(model))))  # seen before
    report = measure_sparsity(model, batches(), show_progress=True, **how)
    seen = percents(shown)
    assert seen[0] == 0 and seen[-1] == 100 and seen == sorted(seen)
    assert len(set(seen)) > 4
    assert not any(module._forward_hooks for module in model.modules())
    shown.truncate(0)
    apply_thresholds(model, batches(), report.thresholds, show_progress=True)
    seen = percents(shown)
    assert seen[-1] == 100 and seen == sorted(seen) and len(set(seen)) > 3


def test_an_estimate_shows_before_the_first_trial_and_at_every_layer(shown, monkeypatch):
    model = model_for("silu")
    batches = with_own_labels(model, padded_batches(3, (9, 8), (15, 17)))
    before, ratio = [], KeptTokens.ppl_ratio
    monkeypatch.setattr(KeptTokens, "ppl_ratio", lambda *given: before.append(shown.getvalue()) or ratio(*given))
    measure_sparsity(model, batches, show_progress=True)
    assert len(before) > 2 and before[0].count("%") >= 4  # two layers of two batches
    assert re.search(r"[1-9]\d*%\|.*\d\d:\d\d<\d\d:\d\d", before[0])  # elapsed<left


def test_a_bar_is_silent_where_it_is_not_wanted_and_changes_no_number(shown, monkeypatch):
    model = model_for("silu")
    batches = with_own_labels(model, padded_batches(3, (9, 8), (15, 17)))
    silent = measure_sparsity(model, batches)
    assert shown.getvalue() == ""
    loud = measure_sparsity(model, batches, show_progress=True)
    assert (loud.thresholds, loud.ppl_ratio, loud.interval) == (silent.thresholds, silent.ppl_ratio, silent.interval)
    shown.truncate(0)
    monkeypatch.setenv("CI", "1")
    measure_sparsity(model, batches, show_progress=True)
    assert percents(shown) == []


def test_the_share_is_what_is_done_of_all_that_is_expected():
    model = model_for("silu")
    work = Work(model, bar := share_bar("test", shown=False))
    bar.update = lambda amount: setattr(bar, "n", bar.n + amount)
    down = sum(layer.mlp.down_proj.weight.numel() for layer in model.model.layers)
    assert work.of_an_error == pytest.approx(down / 2 / sum(weight.numel() for weight in model.parameters()))
    work.left |= {"calibration": 300.0, "evaluation": 500.0}
    work.begin("sample", 200.0)
    work.add(100.0)
    assert bar.n == pytest.approx(10)
    work.begin("sample", 600.0)  # more than was thought: the bar stands
    work.add(100.0)
    assert bar.n == pytest.approx(100 * 200 / 1500)
    work.begin("sample", 2600.0)
    work.add(50.0)
    assert bar.n == pytest.approx(100 * 200 / 1500)
    work.begin("evaluation", 250.0)  # what comes before it is over
    work.add(10.0)
    assert bar.n == pytest.approx(100 * 260 / 500)
    work.add(1e6)
    assert bar.n == pytest.approx(99)  # not before the end


def test_each_layer_counts_its_rows_for_a_part_of_a_token_pass():
    model = model_for("silu")
    work = Work(model, share_bar("test", shown=False))
    assert work.modules == {layer.mlp.down_proj for layer in model.model.layers}
    work.ran(model, (), torch.zeros(3, 5, 16))
    work.ran(model, (), (torch.zeros(3, 5, 16), None))
    assert work.done == 15
    work.ran(model, (), None)
    assert work.done == 15
