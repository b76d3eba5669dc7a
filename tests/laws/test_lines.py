"""Tests over sizes: against closed forms and a literal regression, their rates of error, and too few sizes."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sparsity_utils.console import InputError
from sparsity_utils.laws.lines import line_at, pooled_means, pooled_slopes, size_means
from sparsity_utils.laws.trends import NOT_SUPPORTED, SUPPORTED, decide, mean_over_runs

LINES = np.array(["a"] * 4 + ["b"] * 3)
X = np.array([3.8, 4.7, 5.2, 5.6, 4.4, 4.9, 5.3])
VALUES = np.array([0.21, 0.18, 0.19, 0.15, 0.30, 0.33, 0.32])


def test_means_are_the_closed_form():
    found = pooled_means(VALUES, LINES)
    own = {name: VALUES[name == LINES] for name in "ab"}
    spread = np.sqrt(sum(((y - y.mean()) ** 2).sum() for y in own.values()) / 5)  # 7 sizes - 2 lines
    for name, y in own.items():
        half = stats.t.ppf(0.95, 5) * spread / np.sqrt(y.size)
        assert (found[name].value, found[name].n) == (pytest.approx(y.mean()), y.size)
        assert (found[name].low, found[name].high) == pytest.approx((y.mean() - half, y.mean() + half))


def test_slopes_are_a_literal_regression():
    found = pooled_slopes(X, VALUES, LINES)
    design = np.column_stack([LINES == "a", LINES == "b", X * (LINES == "a"), X * (LINES == "b")]).astype(float)
    coefficients = np.linalg.solve(design.T @ design, design.T @ VALUES)
    residuals = VALUES - design @ coefficients
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * (residuals @ residuals) / 3)  # 7 sizes - 4
    for name, at in (("a", 2), ("b", 3)):
        half = stats.t.ppf(0.95, 3) * errors[at]
        assert found[name].value == pytest.approx(coefficients[at])
        assert (found[name].low, found[name].high) == pytest.approx((coefficients[at] - half, coefficients[at] + half))
        own = name == LINES
        heights = line_at(X[own], VALUES[own], found[name].value, X[own])
        np.testing.assert_allclose(heights, (design @ coefficients)[own])


def test_one_line_is_the_ordinary_test():
    mean, reference = pooled_means(VALUES[:4], ["a"] * 4)["a"], mean_over_runs(VALUES[:4])
    assert (mean.low, mean.high) == pytest.approx((reference.low, reference.high))
    slope, line = pooled_slopes(X[:4], VALUES[:4], ["a"] * 4)["a"], stats.linregress(X[:4], VALUES[:4])
    half = stats.t.ppf(0.95, 2) * line.stderr
    assert (slope.low, slope.high) == pytest.approx((line.slope - half, line.slope + half))


@pytest.mark.parametrize("position", [0, 1])
def test_published_limits_have_the_published_slopes_or_close(position):
    """A0 from 0.1B to 1.2B; the published slopes of +1.6 and -2.6 points are end to end, these are least squares."""
    sizes = [11.5 * layers * d**2 for d, layers in ((768, 16), (1024, 20), (1280, 24), (1536, 28), (1792, 32))]
    limits, slope, verdict = (
        ([0.0614, 0.0674, 0.0690, 0.0721, 0.0782], 0.0147, SUPPORTED),
        ([0.409, 0.390, 0.385, 0.383, 0.382], -0.0250, "inconclusive"),
    )[position]
    found = pooled_slopes(np.log10(sizes), limits, [0] * 5)[0]
    assert (round(found.value, 4), decide(found, -0.03, 0.03)) == (slope, verdict)


@pytest.mark.parametrize(
    ("values", "lines", "reason"),
    [
        ([0.1], ["a"], "too few sizes: 1 on 1 line leave 0 degrees of freedom"),
        ([0.1, 0.2], ["a", "b"], "too few sizes: 2 on 2 lines leave 0 degrees of freedom"),
    ],
)
def test_too_few_sizes_for_a_mean(values, lines, reason):
    for estimate in pooled_means(values, lines).values():
        assert estimate.reason == reason and np.isnan([estimate.value, estimate.low, estimate.high]).all()


def test_a_line_of_one_size_borrows_the_spread_of_another_for_its_mean_but_has_no_slope():
    lines = ["a", "a", "a", "b"]
    means = pooled_means([0.1, 0.2, 0.3, 0.5], lines)
    assert (means["b"].value, means["b"].n, means["b"].reason) == (pytest.approx(0.5), 1, "")
    assert means["b"].high - 0.5 == pytest.approx(stats.t.ppf(0.95, 2) * 0.1)
    slopes = pooled_slopes([1, 2, 4, 3], [0.1, 0.2, 0.3, 0.5], lines)
    alone = pooled_slopes([1, 2, 4], [0.1, 0.2, 0.3], lines[:3])
    assert slopes["b"].reason == "sizes at one position have no slope"
    assert slopes["a"] == alone["a"] and not slopes["a"].reason
    few = pooled_slopes([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.5], ["a", "a", "b", "b"])
    assert {e.reason for e in few.values()} == {"too few sizes: 4 on 2 lines leave 0 degrees of freedom"}


def test_no_sizes_have_no_estimates():
    assert pooled_means([], []) == {} and pooled_slopes([], [], []) == {}


def test_seeds_are_averaged_before_sizes():
    runs = pd.DataFrame({
        "line": "", "run": list("abcd"), "d_model": [8, 8, 8, 16], "n_layers": 2, "seed": [0, 1, 2, 0],
        "value": [0.1, 0.2, 0.6, 0.5], "parameters": [10, 10, 10, 40],
    })  # fmt: skip
    means = size_means(runs)
    assert means["value"].tolist() == pytest.approx([0.3, 0.5]) and means["runs"].tolist() == [3, 1]
    assert means["parameters"].tolist() == [10, 40] and "seed" not in means


def test_seeds_that_share_what_a_size_has_of_its_own_do_not_raise_the_rate_of_error():
    """Sizes spread twice as much as seeds: the test over sizes keeps its 5% on either side, one over runs does not."""
    rng, size = np.random.default_rng(0), np.repeat(range(7), [5, 5, 3, 1, 5, 3, 2])
    over_sizes = over_runs = slopes = 0
    for _ in range(400):
        values = 2 * rng.normal(size=7)[size] + rng.normal(size=size.size)
        means = np.bincount(size, values) / np.bincount(size)
        over_sizes += decide(pooled_means(means, LINES)["a"]) == SUPPORTED
        over_runs += decide(mean_over_runs(values[size < 4])) == SUPPORTED
        slopes += decide(pooled_slopes(X, means, LINES)["b"], -1e-9, 1e-9) == NOT_SUPPORTED
    assert over_sizes <= 32 and slopes <= 64  # 5% and, on two sides, 10%, by at most three standard errors
    assert over_runs > 60


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pooled_means([0.1, np.nan], ["a", "a"]), "values must be one row of finite numbers"),
        (lambda: pooled_means([0.1, 0.2], ["a"]), "give one label per size"),
        (lambda: pooled_slopes([1, np.inf], [0.1, 0.2], ["a", "a"]), "x must be one row"),
        (lambda: pooled_slopes([1], [0.1, 0.2], ["a", "a"]), "x has 1 numbers and values 2"),
    ],
)
def test_unusable_numbers_are_input_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
