"""A rule that the package does not have: its class alone brings it to measurements, masks, options and costs."""

import literal_metrics as literal
import pytest
import torch
from metric_cases import model_for, padded_batches

from sparsity_utils.__main__ import command_parser
from sparsity_utils.console import InputError, check
from sparsity_utils.decoding.decode import kernel_rule
from sparsity_utils.neurons import rules
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.metrics import apply_thresholds, measure_sparsity


class Loudest(rules.Rule):
    """Active: |h_i| >= share of the token's largest |h|."""

    name, label = "loudest", "Loudest"
    knob = rules.Knob("share", float, "of the token's largest")
    decided_on = "neuron"

    def active(self, ffn, sizes, value):
        return (sizes >= value * sizes.amax(-1, keepdim=True)) & (sizes != 0)

    def check_value(self, value, d_ff=0):
        check(0 <= value <= 1, f"share is {value}; choose 0 to 1.")


@pytest.fixture(autouse=True)
def added(monkeypatch):
    for registry in (rules.RULES, rules.METRICS):
        monkeypatch.setitem(registry, Loudest.name, Loudest())


def dropped(h, share):
    """The set D, neuron by neuron, (tokens, d_ff)."""
    sizes = [[abs(float(value)) for value in row] for row in h]
    return torch.tensor([[size < share * max(row) or size == 0 for size in row] for row in sizes])


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_it_is_measured_as_it_is_defined(act):
    model, batches, share = model_for(act), padded_batches(1), 0.3
    report = measure_sparsity(model, batches, "loudest", share=share)
    for (_, row), (_, h, n) in zip(report.layers.iterrows(), literal.all_neurons(model, act, batches), strict=True):
        out = dropped(h, share)
        assert row.activation_ratio == pytest.approx(1 - float(out.double().mean()), abs=1e-12)
        assert row.cett == pytest.approx(literal.truncation_error(n, out)[0], abs=1e-9)
    assert 0 < report.activation_ratio < report.nonzero_share and report.ppl_ratio != 1
    assert report.thresholds == Thresholds("loudest", (share, share)) and report.calibrated_on == "none"
    applied = apply_thresholds(model, batches, report.thresholds)
    assert (applied.ppl_ratio, applied.activation_ratio) == (report.ppl_ratio, report.activation_ratio)


@pytest.mark.parametrize(
    ("metric", "knobs", "sentence"),
    [
        ("loudest", {}, "Metric 'loudest' needs share: give share=..., on the command line --share."),
        ("loudest", {"share": 2.0}, "share is 2.0; choose 0 to 1."),
        ("fat", {"share": 0.5, "eps": 0.1}, "share was given, and metric 'fat' does not use it: leave share out."),
        ("loudest", {"share": 0.5, "shear": 0.5}, "shear was given, and metric 'loudest' does not use it"),
    ],
)
def test_its_knob_is_asked_for_and_checked(metric, knobs, sentence):
    with pytest.raises(InputError, match=sentence):
        measure_sparsity(model_for("relu"), padded_batches(1), metric, **knobs)


def test_the_command_line_kernels_and_costs_know_it():
    words = ["measure", "some_model", "--text", "some_text", "--metric", "loudest", "--share", "0.25"]
    options = command_parser().parse_args(words)
    assert (options.metric, options.share, options.eps) == ("loudest", 0.25, None)
    with pytest.raises(InputError, match="The kernels have no rule 'loudest'"):
        kernel_rule(find_ffns(model_for("relu"))[0], Thresholds("loudest", (0.5, 0.5)))
    assert rules.METRICS["loudest"].weights_read(0.1, 0.4) == pytest.approx((1 + 0.4 + 0.1) / 3)
