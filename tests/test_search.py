"""The search for thresholds and CETT: one root finder, error curves, and solutions that are absent or not unique."""

import math

import literal_metrics as literal
import pytest
import torch
from test_metrics import model_for, padded_batches
from torch import nn

from sparsity_utils.calibration import Calibration, ErrorCurve, solve_cett
from sparsity_utils.hooks import find_ffns
from sparsity_utils.metrics import measure_sparsity
from sparsity_utils.passes import checked, evaluating
from sparsity_utils.search import find_root


class Curved:
    """A calibration whose PPL ratio is a known function of CETT."""

    model, tolerance = nn.Identity(), 1e-3

    def __init__(self, log_ratio):
        self.ppl_ratio = lambda cett: math.exp(log_ratio(cett))


def test_a_quadratic_rise_is_solved_in_few_trials():
    for scale in (0.03, 0.25, 4.0, 60.0):
        solved = solve_cett([Curved(lambda c, scale=scale: scale * c * c)], 1.0)
        assert solved.cett == pytest.approx(math.sqrt(math.log(1.01) / scale), rel=1e-3)
        assert solved.evaluations <= 6 and solved.note == ""


def test_the_mean_is_over_ppl_ratios():
    solved = solve_cett([Curved(lambda c: 2 * c * c), Curved(lambda c: 0.1 * c * c)], 50.0)
    assert sum(solved.ppl_ratios) / 2 == pytest.approx(1.5, rel=1e-3)
    assert solved.ppl_ratios == pytest.approx([math.exp(2 * solved.cett**2), math.exp(0.1 * solved.cett**2)])


def test_a_rise_that_no_cett_reaches_is_said():
    solved = solve_cett([Curved(lambda c: 0.005 * c * c)], 1.0)
    assert solved.cett == 1 and solved.note == "no CETT in [0, 1] raises perplexity by 1%; CETT 1 was used"
    falling = solve_cett([Curved(lambda c: -0.1 * c)], 2.5)
    assert falling.cett == 1 and falling.note == "no CETT in [0, 1] raises perplexity by 2.5%; CETT 1 was used"
    model = model_for("silu")
    for block in model.model.layers:
        block.mlp.down_proj.weight.data *= 1e-4
    report = measure_sparsity(model, padded_batches(1), p=100)
    assert report.target_cett == 1 and report.activation_ratio == 0 and report.note.startswith("no CETT in [0, 1]")


def test_a_perplexity_that_falls_on_the_way_is_said():
    solved = solve_cett([Curved(lambda c: 0.2 * c * c - 0.05 * c)], 1.0)
    assert solved.ppl_ratios[0] == pytest.approx(1.01, abs=2e-5)
    assert solved.note.startswith("perplexity did not rise with CETT throughout")


def test_a_jump_over_the_target_gives_the_side_below_it():
    solved = solve_cett([Curved(lambda c: 0.0 if c < 0.25 else 1.0)], 1.0)
    assert 0.249 < solved.cett < 0.25 and solved.ppl_ratios == (1.0,)


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


def test_the_error_curve_reuses_its_points():
    model = model_for("gelu")
    with evaluating(model):
        curve = Calibration(model, list(checked(model, padded_batches(1), "test")), 1e-3, with_loss=False).curves[0]
    before = len(curve.points)
    value = curve.threshold(0.2, 1e-2)
    trials = len(curve.points) - before
    assert curve.threshold(0.2, 1e-2) == value and len(curve.points) == before + trials
    assert curve.points == sorted(curve.points)
    assert all(curve.error(eps) == error for eps, error in list(curve.points)[1:-1])


def test_an_error_curve_goes_below_its_first_points():
    ffn = find_ffns(model_for("silu"))[0]
    h = torch.randn(40, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curve = ErrorCurve(ffn, h)
    for cett in (1e-4, 1e-2):
        n = h[:, :, None] * ffn.down_weight.T
        size = n.norm(dim=-1)
        value = curve.threshold(cett, 1e-9)
        assert literal.truncation_error(n, size < value)[0] <= cett * (1 + 1e-9)
        assert literal.truncation_error(n, size <= size[size >= value * (1 - 1e-8)].min())[0] > cett
