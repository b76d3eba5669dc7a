"""Every metric against the slow reference written from the definitions; then options, notes and bad input."""

import math

import literal_metrics as literal
import pytest
import torch
from metric_cases import EXACT, model_for, padded_batches, with_own_labels
from tiny_granite import hooks_of

from sparsity_utils.console import InputError
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.calibration import solve_stabilised_cett
from sparsity_utils.sparsity.metrics import measure_sparsity
from sparsity_utils.sparsity.passes import checked, mean_losses

ACTS = ["relu", "silu", "gelu", "relu2"]


def assert_agrees(report, model, act, rule, values, batches):
    """Every number of the report against the literal version under the thresholds `values`."""
    rows, ratio = literal.measure(model, act, rule, values, batches)
    for (_, row), (activation_ratio, cett, skipped) in zip(report.layers.iterrows(), rows, strict=True):
        assert row.activation_ratio == pytest.approx(activation_ratio, abs=1e-6)
        assert row.cett == pytest.approx(cett, abs=1e-6)
        assert row.skipped_tokens == skipped
    assert report.activation_ratio == pytest.approx(sum(row[0] for row in rows) / len(rows), abs=1e-6)
    assert report.sparsity == pytest.approx(1 - report.activation_ratio)
    assert report.cett == pytest.approx(sum(row[1] for row in rows) / len(rows), abs=1e-6)
    assert report.skipped_tokens == sum(row[2] for row in rows)
    assert report.ppl_ratio == pytest.approx(ratio, abs=1e-6)
    assert report.loss_dense == pytest.approx(literal.loss(model, batches), abs=1e-9)
    assert report.ppl_ratio == pytest.approx(math.exp(report.loss_sparse - report.loss_dense))
    assert report.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    "rule, argument",
    [("relu", {}), ("top-k", {"k": 7}), ("top-k-norm", {"kept": 7}), ("fat", {"eps": 0.15})],
    ids=["relu", "top-k", "top-k-norm", "fat"],
)
def test_metrics_without_a_search_agree_with_their_definitions(act, rule, argument):
    model, batches = model_for(act), padded_batches(1)
    report = measure_sparsity(model, batches, rule, **argument)
    value = next(iter(argument.values()), 0)
    assert report.thresholds == Thresholds(rule, (value, value))
    assert report.calibrated_on == "none" and report.target_cett is None
    assert_agrees(report, model, act, rule, (value, value), batches)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("cett", [0.1, 0.3])
def test_cett_agrees_with_literal_bisection_on_disjoint_tokens(act, cett):
    model, batches, calibration = model_for(act), padded_batches(1), padded_batches(3)
    report = measure_sparsity(model, batches, "cett", calibration=calibration, cett=cett, tolerance=EXACT)
    layers = literal.all_neurons(model, act, calibration)
    expected = literal.thresholds(layers, cett)
    assert all(literal.crossings(n, cett) == 1 for _, _, n in layers)  # else more than one answer would be right
    for value, wanted, (_, _, n) in zip(report.thresholds.values, expected, layers, strict=True):
        assert torch.equal(n.norm(dim=-1) < value, n.norm(dim=-1) < wanted)
    assert report.calibrated_on == "calibration" and report.target_cett == cett
    assert_agrees(report, model, act, "cett", expected, batches)


@pytest.mark.parametrize("seed", range(4))
def test_every_threshold_is_a_crossing_of_the_error_curve(seed):
    model, batches = model_for("silu", seed), padded_batches(seed)
    layers = literal.all_neurons(model, "silu", batches)
    for cett in (0.02, 0.17, 0.6):
        report = measure_sparsity(model, batches, "cett", cett=cett, tolerance=EXACT)
        for value, (_, _, n) in zip(report.thresholds.values, layers, strict=True):
            size = n.norm(dim=-1)
            following = float(size[size >= value * (1 - 1e-9)].min())  # the neuron that a larger threshold would drop
            assert literal.truncation_error(n, size < value * (1 - 1e-9))[0] <= cett
            assert literal.truncation_error(n, size <= following)[0] > cett


# Random functions of a hundred tokens cross their target more than once on most seeds, and then any crossing is a
# solution. These seeds have one, which the tests establish before they compare.
ONE_SOLUTION = {"relu": 5, "silu": 2, "gelu": 2, "relu2": 0}


@pytest.mark.parametrize("act", ACTS)
def test_cett_ppl_agrees_with_literal_bisection(act):
    seed, p = ONE_SOLUTION[act], 50.0
    model = model_for(act, seed)
    batches, calibration = (with_own_labels(model, padded_batches(seed + shift)) for shift in (60, 50))
    ratio = literal.mean_ppl_ratio([model], act, calibration)
    cett = literal.solve_cett(ratio, p)
    layers = literal.all_neurons(model, act, calibration)
    assert literal.is_only_solution(ratio, p, cett) and all(literal.crossings(n, cett) == 1 for _, _, n in layers)

    report = measure_sparsity(model, batches, p=p, calibration=calibration, tolerance=EXACT)
    assert report.target_cett == pytest.approx(cett, abs=1e-6)
    assert_agrees(report, model, act, "cett", literal.thresholds(layers, cett), batches)
    own = measure_sparsity(model, calibration, p=p, tolerance=EXACT)
    assert own.calibrated_on == "evaluation" and own.thresholds == report.thresholds
    assert own.ppl_ratio == pytest.approx(ratio(cett), abs=1e-6) and 1.3 < own.ppl_ratio <= 1.5


@pytest.mark.parametrize("seed", range(4))
def test_a_solution_among_several_does_not_pass_the_target(seed):
    model = model_for("relu2", seed)
    batches = with_own_labels(model, padded_batches(seed))
    report = measure_sparsity(model, batches, p=5.0, tolerance=EXACT)
    solved = solve_stabilised_cett([model], batches, 5.0, tolerance=EXACT)
    assert (solved.cett, solved.ppl_ratios[0]) == (report.target_cett, pytest.approx(report.ppl_ratio, abs=1e-12))
    assert report.ppl_ratio <= 1.05 + 1e-9
    assert_agrees(report, model, "relu2", "cett", report.thresholds.values, batches)


def test_the_default_tolerance_stays_close_to_the_literal_solution():
    model = model_for("silu")
    batches = with_own_labels(model, padded_batches(3, rows=(9, 8), lengths=(15, 17)))
    fast = measure_sparsity(model, batches, p=10.0)
    exact = measure_sparsity(model, batches, p=10.0, tolerance=EXACT)
    assert fast.target_cett == pytest.approx(exact.target_cett, rel=0.02)
    assert fast.activation_ratio == pytest.approx(exact.activation_ratio, abs=0.005)


def test_stabilised_cett_of_three_models_agrees_with_literal_bisection():
    models = [model_for("silu", seed) for seed in (0, 1, 2)]
    batches = with_own_labels(models[0], padded_batches(12))
    for model in models[1:]:  # neighbours of the first, as checkpoints of one run are
        for parameter, first in zip(model.parameters(), models[0].parameters(), strict=True):
            parameter.data = first.data + 0.1 * parameter.data
    ratio = literal.mean_ppl_ratio(models, "silu", batches)
    cett = literal.solve_cett(ratio, 50.0)
    assert literal.is_only_solution(ratio, 50.0, cett)

    solved = solve_stabilised_cett(iter(models), iter(batches), p=50.0, tolerance=EXACT)
    assert solved.cett == pytest.approx(cett, abs=1e-6)
    for one, model in zip(solved.ppl_ratios, models, strict=True):
        assert one == pytest.approx(literal.mean_ppl_ratio([model], "silu", batches)(cett), abs=1e-6)
    assert sum(solved.ppl_ratios) / 3 == pytest.approx(ratio(cett), abs=1e-6)
    applied = measure_sparsity(models[2], batches, "cett", cett=solved.cett, tolerance=EXACT)
    assert applied.ppl_ratio == pytest.approx(solved.ppl_ratios[2], abs=1e-9)


def test_tokens_with_a_zero_ffn_output_are_skipped_and_counted():
    model = model_for("relu")
    for block in model.model.layers:  # all gates of a token have one sign: about half of the tokens give zero
        gate = block.mlp.gate_proj.weight.data
        gate[:] = gate[:, :1].abs() * gate[0]
    batches = padded_batches(5)
    for metric, options, value in (("relu", {}, 0), ("cett", {"cett": 0.2}, None), ("top-k", {"k": 3}, 3)):
        report = measure_sparsity(model, batches, metric, tolerance=EXACT, **options)
        layers = literal.all_neurons(model, "relu", batches)
        values = literal.thresholds(layers, 0.2) if value is None else (value,) * 2
        assert 0 < report.skipped_tokens < 2 * report.tokens
        assert_agrees(report, model, "relu", metric, values, batches)


def test_an_ffn_that_gives_nothing_has_no_cett():
    model = model_for("relu")
    for block in model.model.layers:
        block.mlp.up_proj.weight.data.zero_()
    report = measure_sparsity(model, padded_batches(1), "cett", cett=0.2)
    assert report.activation_ratio == 0 and math.isnan(report.cett) and report.skipped_tokens == 2 * report.tokens


def test_exact_zeros_are_inactive_whatever_the_threshold():
    model, batches = model_for("silu"), padded_batches(1)
    for block in model.model.layers:
        block.mlp.gate_proj.weight.data[[2, 5]] = 0  # s = silu(0) = 0
        block.mlp.up_proj.weight.data[9] = 0  # h = 0, s is not
    for metric, options, zeros in (
        ("relu", {}, 2), ("fat", {"eps": 0.0}, 2), ("top-k", {"k": 33}, 2), ("cett", {"cett": 0.0}, 3)
    ):  # fmt: skip
        report = measure_sparsity(model, batches, metric, **options)
        assert report.activation_ratio == pytest.approx(1 - zeros / 33, abs=1e-12)
        value = report.thresholds.values[0]
        assert_agrees(report, model, "silu", metric, (value, value), batches)


def test_ties_with_the_kth_largest_stay_active():
    ffn = find_ffns(model_for("relu"))[0]
    s = torch.tensor([[1.0, -1.0, 0.0, 2.0, 1.0], [0.0, 0.0, 0.0, 3.0, 0.0]])
    active = Thresholds("top-k", (2, 2)).active(ffn, s, s)
    assert active.tolist() == [[True, True, False, True, True], [False, False, False, True, False]]


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_the_output_bias_is_on_neither_side(act):
    model, batches = model_for(act, bias=True), padded_batches(6)
    report = measure_sparsity(model, batches, "cett", cett=0.25, tolerance=EXACT)
    values = literal.thresholds(literal.all_neurons(model, act, batches), 0.25)
    assert_agrees(report, model, act, "cett", values, batches)
    model.model.layers[-1].mlp.down_proj.bias.data += 100.0
    again = measure_sparsity(model, batches, "cett", cett=0.25, tolerance=EXACT)
    assert again.thresholds == report.thresholds and again.cett == report.cett


def test_cett_one_skips_everything_and_zero_only_exact_zeros():
    model, batches = model_for("gelu"), padded_batches(1)
    everything = measure_sparsity(model, batches, "cett", cett=1.0)
    assert everything.activation_ratio == 0 and everything.cett == pytest.approx(1.0, abs=1e-12)
    nothing = measure_sparsity(model, batches, "cett", cett=0.0)
    assert nothing.activation_ratio == 1 and nothing.cett == 0 and nothing.ppl_ratio == 1


def test_thresholds_come_from_calibration_tokens_alone():
    model, calibration = model_for("silu"), padded_batches(2)
    options = {"metric": "cett", "cett": 0.2}
    reports = [measure_sparsity(model, padded_batches(seed), calibration=calibration, **options) for seed in (7, 8)]
    own = measure_sparsity(model, calibration, **options)
    assert reports[0].thresholds == reports[1].thresholds == own.thresholds
    assert reports[0].activation_ratio != reports[1].activation_ratio
    assert [report.calibrated_on for report in (*reports, own)] == ["calibration", "calibration", "evaluation"]


def test_padding_changes_nothing():
    model, generator = model_for("silu"), torch.Generator().manual_seed(0)
    ids = torch.randint(23, (3, 7), generator=generator)
    bare = measure_sparsity(model, [{"input_ids": ids}], "cett", cett=0.2, tolerance=EXACT)
    padded = {"input_ids": torch.cat([ids, ids[:, :4]], 1), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    padded["attention_mask"][:, 7:] = 0
    report = measure_sparsity(model, [padded], "cett", cett=0.2, tolerance=EXACT)
    assert report.tokens == bare.tokens == 21
    for name in ("activation_ratio", "cett", "ppl_ratio", "loss_dense", "loss_sparse"):
        assert getattr(report, name) == pytest.approx(getattr(bare, name), abs=1e-9)


def test_batches_may_be_generators_and_their_split_does_not_matter():
    model, ids = model_for("silu"), torch.arange(5 * 8).view(5, 8) % 23
    whole = measure_sparsity(model, [{"input_ids": ids}], "cett", cett=0.3, tolerance=EXACT)
    parts = ({"input_ids": part} for part in ids.split([1, 3, 1]))
    split = measure_sparsity(model, parts, "cett", cett=0.3, tolerance=EXACT)
    assert split.activation_ratio == pytest.approx(whole.activation_ratio, abs=1e-12)
    assert split.ppl_ratio == pytest.approx(whole.ppl_ratio, abs=1e-12)


def test_a_known_dense_loss_saves_the_head_and_changes_no_number():
    model, batches, calls = model_for("silu"), padded_batches(1), []
    first = measure_sparsity(model, batches, "relu")
    model.lm_head.register_forward_hook(lambda m, a, out: calls.append(1))
    again = measure_sparsity(model, batches, "relu", dense=first.dense)
    assert len(calls) == len(batches)  # the sparse passes
    assert (again.ppl_ratio, again.activation_ratio) == (first.ppl_ratio, first.activation_ratio)


def test_the_model_is_left_as_it_was():
    model = model_for("silu").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = [parameter.clone() for parameter in model.parameters()]
    measure_sparsity(model, padded_batches(1), "cett", cett=0.2)
    with pytest.raises(InputError):
        measure_sparsity(model, [], "cett", cett=0.2)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert hooks_of(model) == [] and torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_agrees_with_float64_arithmetic_on_the_same_activations(dtype):
    model, ids = model_for("silu", dtype=dtype), torch.arange(6 * 9).view(6, 9) % 23
    report = measure_sparsity(model, [{"input_ids": ids}], "cett", cett=0.2)
    assert report.cett == pytest.approx(0.2, abs=2e-3)
    with torch.no_grad():
        h = []
        handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, a: h.append(a[0]))
        model(input_ids=ids)
        handle.remove()
    weight = model.model.layers[0].mlp.down_proj.weight.detach().double()
    n = h[0].flatten(0, 1).double()[:, :, None] * weight.T
    dropped = n.norm(dim=-1) < report.thresholds.values[0]
    assert report.layers.cett[0] == pytest.approx(literal.truncation_error(n, dropped)[0], abs=1e-5)
    assert report.layers.activation_ratio[0] == pytest.approx(1 - float(dropped.double().mean()), abs=1e-6)


# Losses and bad input


def test_losses_weigh_tokens_not_batches():
    model, batches = model_for("silu"), padded_batches(1, rows=(1, 7), lengths=(12, 3))
    batches[1]["labels"] = batches[1]["input_ids"].clone()
    batches[1]["labels"][2:] = -100
    with evaluating(model):
        mean = mean_losses(model, checked(model, batches, "test")).value
    assert mean == pytest.approx(literal.loss(model, batches), abs=1e-10)


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"metric": "cat"}, "The metric is 'cat'; choose one of relu, top-k, top-k-norm, fat, cett, cett-ppl"),
        ({"p": 0}, "p is 0; choose a rise of perplexity above 0 and at most 100 percent"),
        ({"p": -1.0}, "p is -1.0"),
        ({"p": 101.0}, "p is 101.0"),
        ({"p": math.nan}, "p is nan"),
        ({"metric": "top-k"}, "needs k"),
        ({"metric": "fat"}, "needs eps"),
        ({"metric": "cett"}, "needs cett"),
        ({"metric": "relu", "k": 3}, "k was given, and metric 'relu' does not use it"),
        ({"metric": "top-k", "k": 0}, "k is 0; choose a whole number from 1 to d_ff = 33"),
        ({"metric": "top-k", "k": 34}, "k is 34"),
        ({"metric": "top-k", "k": 2.5}, "k is 2.5"),
        ({"metric": "top-k", "k": math.nan}, "k is nan"),
        ({"metric": "fat", "eps": -0.1}, "eps is -0.1"),
        ({"metric": "fat", "eps": math.nan}, "eps is nan"),
        ({"metric": "cett", "cett": 1.5}, "cett is 1.5; choose 0 to 1"),
        ({"metric": "cett", "cett": -0.1}, "cett is -0.1"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
    ],
)
def test_impossible_arguments_are_named(options, sentence):
    with pytest.raises(InputError, match=sentence.replace("(", r"\(")):
        measure_sparsity(model_for("silu"), [{"input_ids": IDS}], **options)


@pytest.mark.parametrize(
    "batches, sentence",
    [
        ([], "The evaluation batches hold no token to predict"),
        ([{"input_ids": IDS[:, :1]}], r"shape \(2, 1\); give at least one row of two tokens"),
        ([{"input_ids": IDS[:0]}], r"shape \(0, 6\)"),
        ([{"input_ids": IDS[0]}], r"evaluation batch 0 has input_ids of shape \(6,\)"),
        ([{"input_ids": IDS}, {"input_ids": IDS + 20}], "evaluation batch 1 has token ids outside.*vocabulary of 23"),
        ([{"input_ids": IDS - 1}], "token ids outside"),
        ([{"input_ids": IDS.float()}], "token ids outside"),
        ([{"input_ids": IDS, "labels": IDS + 20}], "labels outside the model's vocabulary of 23"),
        ([{"input_ids": IDS, "attention_mask": IDS[:1]}], r"attention_mask of shape \(1, 6\)"),
        ([{"input_ids": IDS, "labels": torch.full_like(IDS, -100)}], "no token to predict"),
        ([{"labels": IDS}], "has no tensor input_ids"),
        ([{"input_ids": IDS.tolist()}], "has no tensor input_ids"),
        ({"input_ids": IDS}, "evaluation batch 0 is of type str: give a list, or a generator, of dicts of tensors"),
        (["some text"], "evaluation batch 0 is of type str"),
        ([IDS], "evaluation batch 0 is of type Tensor"),
        ([{"input_ids": IDS, "position_ids": IDS[:1]}], "position_ids without one row for each of input_ids"),
    ],
)
@pytest.mark.parametrize("metric", ["relu", "cett-ppl"])
def test_unusable_batches_are_named(batches, sentence, metric):
    with pytest.raises(InputError, match=sentence):
        measure_sparsity(model_for("silu"), batches, metric)


def test_calibration_batches_are_checked_under_their_own_name():
    with pytest.raises(InputError, match="The calibration batches hold no token"):
        measure_sparsity(model_for("silu"), [{"input_ids": IDS}], calibration=[])
    with pytest.raises(InputError, match="No checkpoint models were given"):
        solve_stabilised_cett([], [{"input_ids": IDS}])
    with pytest.raises(InputError, match="p is 0"):
        solve_stabilised_cett([model_for("silu")], [{"input_ids": IDS}], 0)


@pytest.mark.parametrize("metric, options", [("relu", {}), ("cett", {"cett": 0.1}), ("cett-ppl", {})])
def test_nan_logits_are_refused(metric, options):
    model = model_for("silu")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        measure_sparsity(model, [{"input_ids": IDS}], metric, **options)


def test_impossible_thresholds_are_named():
    with pytest.raises(InputError, match="The threshold rule is 'magic'"):
        Thresholds("magic", (0.0,))
    with pytest.raises(InputError, match="none may be negative or NaN"):
        Thresholds("fat", (0.1, math.nan))
