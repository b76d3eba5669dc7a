"""The search for thresholds and CETT: one root finder, error curves, and solutions that are absent or not unique."""

import math

import families
import literal_metrics as literal
import pytest
import torch
from metric_cases import model_for, padded_batches, with_own_labels
from torch import nn

from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.sparsity.calibration import Calibration, every_nth, solve_cett
from sparsity_utils.sparsity.error_curve import ErrorCurve
from sparsity_utils.sparsity.literal import bisect_cett_ppl
from sparsity_utils.sparsity.metrics import measure_sparsity
from sparsity_utils.sparsity.passes import checked
from sparsity_utils.sparsity.search import find_root, find_root_near


class Curved:
    """A calibration whose PPL ratio is a known function of CETT, and whose sample is a little off."""

    model, tolerance, whole = nn.Identity(), 1e-3, False

    def __init__(self, log_ratio, off=1.0):
        self.ppl_ratio = lambda cett: math.exp(log_ratio(cett))
        self.aligned_at = []
        if off:
            self.sample = Curved(lambda cett: off * log_ratio(cett), off=None)

    def align(self, cett):
        self.aligned_at.append(cett)


@pytest.mark.parametrize("off", [1.0, 1.15, 0.8])
@pytest.mark.parametrize("power", [1.6, 2.0, 2.6])
def test_a_smooth_rise_is_solved_in_few_passes_over_all_tokens(power, off):
    for scale in (0.03, 0.25, 4.0, 60.0):
        calibration = Curved(lambda c, scale=scale: scale * c**power, off)
        solved = solve_cett([calibration], 1.0)
        assert solved.cett == pytest.approx((math.log(1.01) / scale) ** (1 / power), rel=1e-3)
        assert solved.evaluations <= 4 and solved.note == ""
        assert len(calibration.aligned_at) == 1 and calibration.aligned_at[0] == pytest.approx(solved.cett, rel=0.3)


def test_levels_are_measured_again_where_the_sample_misled():
    calibration = Curved(lambda c: 0.2 * c * c, off=4.0)  # the sample's CETT is half of the true one
    solved = solve_cett([calibration], 1.0)
    assert solved.cett == pytest.approx(math.sqrt(math.log(1.01) / 0.2), rel=1e-3)
    assert calibration.aligned_at == pytest.approx([solved.cett / 2, solved.cett], rel=0.05)


def test_the_mean_is_over_ppl_ratios():
    solved = solve_cett([Curved(lambda c: 2 * c * c), Curved(lambda c: 0.1 * c * c)], 50.0)
    assert sum(solved.ppl_ratios) / 2 == pytest.approx(1.5, rel=1e-3)
    assert solved.ppl_ratios == pytest.approx([math.exp(2 * solved.cett**2), math.exp(0.1 * solved.cett**2)])


@pytest.mark.parametrize("off", [1.0, 0.1, 10.0])
def test_a_rise_that_no_cett_reaches_is_said(off):
    solved = solve_cett([Curved(lambda c: 0.005 * c * c, off)], 1.0)
    assert solved.cett == 1 and solved.note == "no CETT in [0, 1] raises perplexity by 1%; CETT 1 was used"
    falling = solve_cett([Curved(lambda c: -0.1 * c, off)], 2.5)
    assert falling.cett == 1 and falling.note == "no CETT in [0, 1] raises perplexity by 2.5%; CETT 1 was used"


def test_a_model_that_hardly_uses_its_ffns_reaches_no_rise():
    model = model_for("silu")
    for block in model.model.layers:
        block.mlp.down_proj.weight.data *= 1e-4
    report = measure_sparsity(model, padded_batches(1), p=100)
    assert report.target_cett == 1 and report.activation_ratio == 0 and report.note.startswith("no CETT in [0, 1]")


@pytest.mark.parametrize("off", [1.0, 1.3])
def test_a_perplexity_that_falls_on_the_way_is_said(off):
    solved = solve_cett([Curved(lambda c: 0.2 * c * c - 0.05 * c, off)], 1.0)
    assert solved.ppl_ratios[0] == pytest.approx(1.01, abs=2e-5)
    assert solved.note.startswith("perplexity did not rise with CETT throughout")


def test_a_fall_on_the_sample_alone_is_not_taken_for_the_truth():
    calibration = Curved(lambda c: 0.2 * c * c)
    calibration.sample = Curved(lambda c: 0.2 * c * c - 0.05 * c, off=None)
    solved = solve_cett([calibration], 1.0)
    assert solved.note == "" and solved.cett == pytest.approx(math.sqrt(math.log(1.01) / 0.2), rel=1e-3)


def test_a_jump_over_the_target_gives_the_side_below_it():
    solved = solve_cett([Curved(lambda c: 0.0 if c < 0.25 else 1.0)], 1.0)
    assert 0.249 < solved.cett < 0.25 and solved.ppl_ratios == (1.0,)


@pytest.mark.parametrize("off", [1.0, 2.0])
def test_a_jump_at_the_start_is_said(off):
    solved = solve_cett([Curved(lambda c: 0.0 if c == 0 else 1.0, off)], 1.0)
    assert solved.cett == 0 and solved.ppl_ratios == (1.0,)
    assert solved.note == "every CETT tried raises perplexity by more than 1%; CETT 0 was used"
    late = solve_cett([Curved(lambda c: 0.0 if c < 1e-5 else 1.0, off)], 1.0)
    assert 0 <= late.cett < 1e-5 and late.ppl_ratios == (1.0,)


@pytest.mark.filterwarnings("error")
def test_a_perplexity_beyond_floating_point_is_infinite():
    model = model_for("silu")
    model.lm_head.weight.data *= 1e5
    batches = with_own_labels(model, padded_batches(1))
    report = measure_sparsity(model, batches, "cett", cett=0.9)
    assert report.ppl_ratio == math.inf and report.loss_sparse > 709
    assert measure_sparsity(model, batches, p=1.0).ppl_ratio <= 1.01 + 1e-4


def test_find_root_on_smooth_functions_and_jumps():
    count = []

    def cubic(x):
        count.append(x)
        return x**3 - 2

    assert find_root(cubic, (0.0, -2.0), (3.0, 25.0), 0.0, 1e-12) == pytest.approx(2 ** (1 / 3), abs=1e-12)
    assert len(count) < 20  # bisection needs 42
    count.clear()

    def jump(x):
        count.append(x)
        return -1.0 if x <= 0.7 else 1e6

    root = find_root(jump, (0.0, -1.0), (1.0, 1e6), 0.0, 1e-9)
    assert 0.7 - 1e-9 <= root <= 0.7 and len(count) <= 31  # bisection and one


@pytest.mark.parametrize("guess", [0.02, 0.3, 0.8])
def test_find_root_near_needs_few_steps_and_never_leaves_the_bounds(guess):
    tried = []

    def nearly_straight(x):
        tried.append(x)
        return x**1.2 - 0.2

    root = find_root_near(nearly_straight, (0.0, -0.2), guess, 1.0, 1.0, 1e-9, 1e-12)
    assert root == pytest.approx(0.2 ** (1 / 1.2), abs=1e-8)
    assert len(tried) <= 11 and all(0 < x <= 1 for x in tried)
    assert find_root_near(lambda x: -1.0, (0.0, -1.0), guess, 1.0, 1.0, 1e-9, 1e-12) == 1.0
    steep = find_root_near(lambda x: -1.0 if x <= 0.37 else 1e6, (0.0, -1.0), guess, 1.0, 1.0, 1e-9, 1e-9)
    assert 0.37 - 1e-9 <= steep <= 0.37


def test_the_error_curve_reuses_its_points():
    model = model_for("gelu")
    with evaluating(model):
        calibration = Calibration(model, list(checked(model, padded_batches(1), "test")), 1e-3, with_loss=False)
    curve = calibration.sample.curves[0]
    assert calibration.whole
    before = len(curve.points)
    value = curve.threshold(0.2, 1e-2)
    trials = len(curve.points) - before
    assert curve.threshold(0.2, 1e-2) == value and len(curve.points) == before + trials
    assert curve.points == sorted(curve.points)
    assert all(curve.error(eps) == error for eps, error in list(curve.points)[1:-1])


def test_an_error_curve_goes_below_its_first_points():
    ffn = find_ffns(model_for("silu"))[0]
    h = torch.randn(40, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curve = ErrorCurve([(ffn, h)])
    for cett in (1e-4, 1e-2):
        n = h[:, :, None] * ffn.down_weight.T
        size = n.norm(dim=-1)
        value = curve.threshold(cett, 1e-9)
        assert literal.truncation_error(n, size < value)[0] <= cett * (1 + 1e-9)
        assert literal.truncation_error(n, size <= size[size >= value * (1 - 1e-8)].min())[0] > cett


def test_an_error_curve_over_experts_is_the_mean_over_their_rows():
    model = model_for("silu")
    generator = torch.Generator().manual_seed(1)
    parts = [(ffn, torch.randn(rows, 33, generator=generator, dtype=torch.float64))
             for ffn, rows in zip(find_ffns(model), (7, 22), strict=True)]  # fmt: skip
    both, single = ErrorCurve(parts), [ErrorCurve([part]) for part in parts]
    for eps in (0.05, 0.2, 1.0):
        assert both.error(eps) == pytest.approx((7 * single[0].error(eps) + 22 * single[1].error(eps)) / 29)
    sizes = [h.abs() * ffn.column_norms() for ffn, h in parts]
    share = sum(int((size >= 0.2).sum()) for size in sizes) / (29 * 33)
    assert both.activation_ratio(0.2) == pytest.approx(share)


# A sample of the windows with a pass over all of them, against all windows kept in memory


def long_batches(windows=64, length=24):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(23, (windows, length), generator=generator)
    return [{"input_ids": part} for part in ids.split(9)]


def test_levels_bring_the_sample_to_all_tokens(monkeypatch):
    model, batches = model_for("silu"), with_own_labels(model_for("silu"), masked(long_batches()))
    exact = measure_sparsity(model, batches, "cett", cett=0.2)
    solved = measure_sparsity(model, batches, p=5.0)
    monkeypatch.setattr("sparsity_utils.sparsity.calibration.SAMPLE_TOKENS", 96)  # 4 of 64 windows
    sampled = measure_sparsity(model, batches, "cett", cett=0.2)
    assert sampled.thresholds != exact.thresholds
    assert exact.cett == pytest.approx(0.2, rel=2e-3) and sampled.cett == pytest.approx(0.2, rel=1e-2)
    assert sampled.activation_ratio == pytest.approx(exact.activation_ratio, abs=2e-3)
    quick = measure_sparsity(model, batches, p=5.0)
    assert math.log(quick.ppl_ratio) == pytest.approx(math.log(1.05), rel=6e-3)
    assert quick.activation_ratio == pytest.approx(solved.activation_ratio, abs=0.01)


def test_a_second_alignment_needs_no_dense_losses(monkeypatch):
    model, batches = model_for("silu"), with_own_labels(model_for("silu"), masked(long_batches()))
    monkeypatch.setattr("sparsity_utils.sparsity.calibration.SAMPLE_TOKENS", 96)
    with evaluating(model):
        kept = list(checked(model, batches, "test"))
        twice, once = (Calibration(model, kept, 1e-3, with_loss=True) for _ in range(2))
        twice.align(0.2)
        heads = []
        hook = model.lm_head.register_forward_hook(lambda *given: heads.append(given))
        twice.align(0.3)
        assert heads == []
        hook.remove()
        once.align(0.3)
        assert twice.dense.value == once.dense.value
        assert twice.factors == pytest.approx(once.factors, rel=1e-2)  # other points of the curves are known


def masked(batches):
    return [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]


def test_the_literal_algorithm_ends_where_the_search_does():
    model = model_for("gelu")
    batches = with_own_labels(model, masked(long_batches(24)))
    book = bisect_cett_ppl(model, batches, 10.0)
    found = measure_sparsity(model, batches, p=10.0)
    assert book.ppl_ratio == pytest.approx(1.1, rel=2e-3) and found.ppl_ratio == pytest.approx(1.1, rel=2e-3)
    assert book.activation_ratio == pytest.approx(found.activation_ratio, abs=0.01)
    slow = literal.measure(model, "gelu", "cett", book.thresholds.values, batches)
    assert book.ppl_ratio == pytest.approx(slow[1], abs=1e-9)
    assert book.activation_ratio == pytest.approx(sum(row[0] for row in slow[0]) / 2, abs=1e-9)


@pytest.mark.parametrize("shows", ["labels", "attention_mask"])
def test_the_sample_takes_windows_that_have_something_to_measure(monkeypatch, shows):
    """Of 64 windows the 4 that an even sample would take first have nothing to predict, or are all padding."""
    model = model_for("silu")
    batches = with_own_labels(model, masked(long_batches()))
    nothing = torch.arange(64) % 16 == 8
    for batch, rows in zip(batches, nothing.split(9), strict=True):
        batch[shows] = batch[shows].masked_fill(rows[:, None], -100 if shows == "labels" else 0)
    solved = measure_sparsity(model, batches, p=5.0)
    monkeypatch.setattr("sparsity_utils.sparsity.calibration.SAMPLE_TOKENS", 96)
    quick = measure_sparsity(model, batches, p=5.0)
    assert math.log(quick.ppl_ratio) == pytest.approx(math.log(1.05), rel=6e-3)
    assert quick.activation_ratio == pytest.approx(solved.activation_ratio, abs=0.015)


@pytest.mark.parametrize("family", ["vit", "t5"])
def test_the_sample_counts_the_tokens_of_the_longest_input(monkeypatch, family):
    """An image of 5 tokens; a text of 7 tokens with an answer of 4."""
    model, batch = families.build(family), families.inputs(family)
    if family == "t5":
        model.config.decoder_start_token_id = 0
        batch = {"input_ids": batch["input_ids"], "labels": batch["decoder_input_ids"]}
    monkeypatch.setattr("sparsity_utils.sparsity.calibration.SAMPLE_TOKENS", 7)
    with evaluating(model):
        calibration = Calibration(model, list(checked(model, [batch], "test")), 1e-3, with_loss=False)
    assert [part.windows for part in calibration.sample.batches] == [1]  # of three


def test_a_calibration_keeps_no_more_than_it_says():
    """Of a half-precision model no second copy of its weights; of its activations those of every third token."""
    ffn = find_ffns(model_for("silu", dtype=torch.bfloat16))[0]
    h = torch.randn(90, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert every_nth(h, 3).untyped_storage().nbytes() == 30 * 33 * 2 and torch.equal(every_nth(h, 3), h[::3])
    cached = [value for value in vars(ErrorCurve([(ffn, h)]).parts[0]).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in cached) == 90 * (8 * 33 + 4)
