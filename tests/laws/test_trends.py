"""Trends across runs: against closed forms and scipy, with planted breakpoints, and at the edge of too few runs."""

import numpy as np
import pytest
from scipy import optimize, stats

from sparsity_utils.console import InputError
from sparsity_utils.laws import trends
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Estimate

SIZES = np.repeat([3e4, 1e5, 3e5], 2)
SEEDS = np.tile([0, 1], 3)
RATIOS = np.repeat([6.0, 12, 24, 48, 72, 96, 130, 180, 282], 2)
RATIO_SEEDS = np.tile([0, 1], 9)


def test_line_is_the_closed_form():
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    y = 1.5 - 0.7 * x + 0.1 * rng.normal(size=12)
    line, reference = trends.fit_line(x, y), stats.linregress(x, y)
    assert (line.slope.value, line.intercept) == pytest.approx((reference.slope, reference.intercept))
    half = stats.t.ppf(0.95, 10) * reference.stderr
    assert (line.slope.low, line.slope.high) == pytest.approx((reference.slope - half, reference.slope + half))
    np.testing.assert_allclose(line.predict(x), reference.intercept + reference.slope * x)


def test_seeds_as_blocks_remove_an_offset_of_a_seed():
    y = 0.1 + 0.01 * np.log10(SIZES) + np.array([0, 1e-3, 1e-3, 0, 0, 1e-3])
    plain = trends.fit_line(np.log10(SIZES), y, SEEDS)
    shifted = trends.fit_line(np.log10(SIZES), y + 0.5 * SEEDS, SEEDS)
    assert (plain.slope.low, plain.slope.high) == pytest.approx((shifted.slope.low, shifted.slope.high))
    assert shifted.intercept == pytest.approx(plain.intercept + 0.25)  # the mean over the seeds


def test_means_of_many_are_those_of_each():
    values = np.random.default_rng(0).normal(size=(5, 4))
    for found, row in zip(trends.means_over_runs(values), values, strict=True):
        each = trends.mean_over_runs(row)
        np.testing.assert_allclose([found.value, found.low, found.high], [each.value, each.low, each.high])
        assert found.n == each.n == 4


def test_mean_over_runs_and_pairs_against_scipy():
    values = np.array([0.004, 0.006, 0.001, 0.005])
    estimate, reference = trends.mean_over_runs(values), stats.ttest_1samp(values, 0).confidence_interval(0.90)
    assert (estimate.low, estimate.high) == pytest.approx((reference.low, reference.high))
    within = [trends.decide(trends.mean_over_runs(other), -0.01, 0.01) for other in (values, 3 * values, values + 0.05)]
    assert within == [SUPPORTED, INCONCLUSIVE, NOT_SUPPORTED]


def test_means_of_nothing_one_and_equal_values():
    for values in ([], [0.3]):
        assert f"only {len(values)} runs" in trends.mean_over_runs(values).reason
        assert trends.decide(trends.mean_over_runs(values), -0.01, 0.01) == INCONCLUSIVE
    assert trends.decide(trends.mean_over_runs([0.005] * 3), -0.01, 0.01) == SUPPORTED


def test_verdicts_from_intervals():
    def interval(low, high):
        return Estimate((low + high) / 2, low, high, 4)

    nothing = Estimate(np.nan, np.nan, np.nan, 0, "none")
    assert [trends.decide(e) for e in (interval(1, 2), interval(-2, -1), interval(-1, 1), nothing)] == [
        *(SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE, INCONCLUSIVE)
    ]
    cases = (interval(-0.5, 0.5), interval(1.5, 2), interval(-2, -1.5), interval(0, 2), interval(-2, 2), nothing)
    assert [trends.decide(e, -1, 1) for e in cases] == [
        *(SUPPORTED, NOT_SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE, INCONCLUSIVE, INCONCLUSIVE)
    ]


def test_run_slopes_are_one_number_per_run():
    tokens = np.tile([1e6, 1e7, 1e8, 1e9], 3)
    runs = np.repeat(["a", "b", "c"], 4)
    values = np.concatenate([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]])
    assert trends.run_slopes(tokens, values, runs) == pytest.approx({"a": -0.1, "b": 0, "c": 0.1})
    assert trends.run_slopes(tokens[:6], values[:6], runs[:6]).keys() == {"a"}  # two points of "b" are no slope


def test_correlated_checkpoints_do_not_make_a_trend():
    """Random walks of 30 checkpoints: a test over checkpoints sees trends everywhere, the test over runs at its 10%."""
    rng, tokens = np.random.default_rng(0), np.geomspace(1e6, 1e8, 30)
    over_runs = over_checkpoints = 0
    for _ in range(100):
        walks = 0.3 + 0.001 * rng.normal(size=(4, 30)).cumsum(axis=1)
        slopes = trends.run_slopes(np.tile(tokens, 4), walks.ravel(), np.repeat(range(4), 30))
        over_runs += trends.decide(trends.mean_over_runs(list(slopes.values()))) != INCONCLUSIVE
        over_checkpoints += trends.decide(trends.fit_line(np.log10(tokens), walks[0]).slope) != INCONCLUSIVE
    assert over_runs <= 20 and over_checkpoints >= 60


def test_planted_breakpoint_comes_back():
    noise = 5e-4 * np.random.default_rng(1).normal(size=RATIOS.size)
    y = 0.08 + 3.5e-4 * np.minimum(RATIOS - 114, 0) + 0.002 * RATIO_SEEDS + noise
    found = trends.fit_two_segments(RATIOS, y, RATIO_SEEDS)
    assert not found.breakpoint.reason
    assert found.breakpoint.low <= 114 <= found.breakpoint.high
    assert found.breakpoint.high - found.breakpoint.low < 25
    assert found.slope == pytest.approx(3.5e-4, rel=0.1) and found.plateau == pytest.approx(0.081, abs=1e-3)
    assert found.aicc < trends.fit_line(RATIOS, y, RATIO_SEEDS).aicc
    np.testing.assert_allclose(found.predict(RATIOS) + 0.002 * (RATIO_SEEDS - 0.5), y, atol=2e-3)


def saturating(noise=5e-4):
    """A plateau at 8% approached with a scale of 30, an offset of the second seed, and independent errors."""
    errors = noise * np.random.default_rng(1).normal(size=RATIOS.size)
    return 0.08 - 0.03 * np.exp((6 - RATIOS) / 30) + 0.002 * RATIO_SEEDS + errors


def test_planted_saturation_comes_back_and_matches_scipy():
    y = saturating()
    found = trends.fit_saturation(RATIOS, y, RATIO_SEEDS)
    assert not found.scale.reason and found.scale.low < 30 < found.scale.high
    assert (found.gap, found.plateau, found.start) == pytest.approx((0.03, 0.081, 6), rel=0.05)

    def curve(x, rise, scale, first, second):
        return np.where(RATIO_SEEDS == 0, first, second) - rise * np.exp((6 - x) / scale)

    (rise, scale, *effects), _ = optimize.curve_fit(curve, RATIOS, y, p0=(0.02, 50, 0.08, 0.08))
    assert found.scale.value == pytest.approx(scale, rel=0.01)  # the grid's step
    assert (found.gap, found.plateau) == pytest.approx((rise, np.mean(effects)), rel=0.01)
    assert found.rmse == pytest.approx(np.std(y - curve(RATIOS, rise, scale, *effects)), rel=0.01)
    np.testing.assert_allclose(found.predict([6, 1e6]), [found.plateau - found.gap, found.plateau])


def test_a_smooth_bend_is_no_breakpoint():
    found = trends.fit_two_segments(RATIOS, saturating(), RATIO_SEEDS).breakpoint
    assert found.reason == "a smooth saturating curve describes the points as well (AICc)"
    assert np.isfinite([found.value, found.low, found.high]).all()  # for a plot


def test_forms_are_compared_on_the_same_points():
    """The planted form comes first; parameters and AICc are those of the single fits."""
    bend = 0.08 + 3.5e-4 * np.minimum(RATIOS - 114, 0) + 5e-4 * np.random.default_rng(0).normal(size=RATIOS.size)
    for y, best in ((saturating(), "smooth saturation"), (bend, "slope, then flat")):
        table = trends.compare_trends(trends.fit_trends(RATIOS, y, RATIO_SEEDS)).set_index("form")
        assert (
            table.index[0] == best and table["delta_aicc"].iloc[0] == 0 and table["delta_aicc"].is_monotonic_increasing
        )
        assert table["parameters"].to_dict() == {"straight line": 3, "slope, then flat": 4, "smooth saturation": 4}
        assert table["aicc"]["straight line"] == trends.fit_line(RATIOS, y, RATIO_SEEDS).aicc
    line = trends.compare_trends(trends.fit_trends(RATIOS, 0.1 + 1e-3 * RATIOS + (-1.0) ** np.arange(18) * 1e-4))
    assert line["form"][0] == "straight line" and line["parameters"][0] == 2
    few = trends.compare_trends(trends.fit_trends([1, 2, 3] * 2, [1, 2, 4] * 2))
    assert few["aicc"].isna().tolist() == [False, True, True]


def test_breakpoint_interval_holds_the_planted_value_about_as_often_as_it_says():
    rng, held = np.random.default_rng(2), 0
    for _ in range(60):
        y = 0.08 + 3.5e-4 * np.minimum(RATIOS - 114, 0) + 1e-3 * rng.normal(size=RATIOS.size)
        found = trends.fit_two_segments(RATIOS, y).breakpoint
        held += found.low <= 114 <= found.high
    assert 48 <= held < 60


def test_a_breakpoint_outside_the_sampled_ratios_is_inconclusive():
    inside = RATIOS <= 96
    x, y = RATIOS[inside], 0.08 + 3.5e-4 * np.minimum(RATIOS - 114, 0)[inside]
    y = y + 1e-3 * np.random.default_rng(0).normal(size=y.size)
    assert "a straight line" in trends.fit_two_segments(x, y).breakpoint.reason
    # the first ratio alone is off a plateau: the slope before the breakpoint rests on one ratio
    y = np.where(RATIOS == 6, 0.05, 0.08) + 1e-3 * np.random.default_rng(0).normal(size=RATIOS.size)
    reason = trends.fit_two_segments(RATIOS, y).breakpoint.reason
    assert reason == "the interval reaches an end of the sampled range, 6 to 282"


@pytest.mark.parametrize(
    "fit",
    [lambda *a: trends.fit_two_segments(*a).breakpoint, lambda *a: trends.fit_saturation(*a).scale, trends.fit_optimum],
)
def test_too_few_ratios_are_inconclusive(fit):
    assert fit([1, 2, 3, 4] * 3, [1, 2, 3, 3] * 3).reason == "only 4 positions; at least 5 are needed"
    assert fit([1, 2, 3, 4, 5], [1, 2, 3, 3, 3]).reason == "too few runs: 5 leave 2 degrees of freedom"
    assert not fit([1, 2, 3, 4, 5] * 2, [3.2, 2.2, 1.9, 2.2, 3.1, 3.1, 2.2, 2.0, 2.2, 3.2]).value > 5


def test_optimum_of_a_parabola_in_the_log_ratio():
    noise = 2e-3 * np.random.default_rng(4).normal(size=RATIOS.size)
    bowl = 0.02 * np.log(RATIOS / 60) ** 2
    found = trends.fit_optimum(RATIOS, 3 + bowl + 0.05 * RATIO_SEEDS + noise, RATIO_SEEDS)
    curvature, slope, _ = np.polyfit(np.log(RATIOS), bowl + noise, 2)  # seeds are balanced: their offset cancels
    assert found.value == pytest.approx(np.exp(-slope / (2 * curvature)), rel=0.01)  # the grid's step
    assert found.low < 60 < found.high and not found.reason
    falling = trends.fit_optimum(RATIOS, 3 - 0.1 * np.log(RATIOS) + noise)
    assert "sampled range" in falling.reason
    assert "sampled range" in trends.fit_optimum(RATIOS, 3 - bowl + noise).reason


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trends.fit_line([1, 2, np.nan], [1, 2, 3]), "x must be one row of finite numbers"),
        (lambda: trends.fit_two_segments(RATIOS, np.full(18, np.inf)), "y must be one row"),
        (lambda: trends.mean_over_runs([0.1, np.nan]), "values must be one row"),
        (lambda: trends.fit_line([1, 2, 3], [1, 2, 3], groups=[0]), "give one label per point"),
        (lambda: trends.fit_line([1, 2, 3], [1, 2]), "x has 3 numbers and y 2"),
    ],
)
def test_unusable_numbers_are_input_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
