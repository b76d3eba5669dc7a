"""The Poisson bootstrap against resampling with replacement, and against the closed form for a ratio of sums."""

import math

import numpy as np
import pytest

from sparsity_utils.sparsity.evaluation import REPLICATES, DocumentBootstrap, interval, standard_error


def documents(count=300):
    """Active neurons and tokens of documents whose lengths and ratios vary together."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(5, 200, count)
    return np.stack([tokens * rng.normal(0.3 + 0.001 * tokens, 0.1), tokens], axis=1)


def filled(values, seed=0):
    bootstrap = DocumentBootstrap(values.shape[1], seed)
    for number, row in enumerate(values):
        bootstrap.add(number, row)
    return bootstrap


def test_the_standard_error_is_that_of_resampled_documents_and_of_the_closed_form():
    values = documents()
    bootstrap = filled(values)
    ratios = bootstrap.replicates[:, 0] / bootstrap.replicates[:, 1]
    found = standard_error(ratios, bootstrap.documents)
    rng = np.random.default_rng(1)
    picks = rng.integers(0, len(values), (4000, len(values)))
    sums = values[picks].sum(1)
    assert found == pytest.approx(float((sums[:, 0] / sums[:, 1]).std()), rel=0.12)  # 3.5% of its own, thrice
    ratio = values[:, 0].sum() / values[:, 1].sum()
    closed = math.sqrt(((values[:, 0] - ratio * values[:, 1]) ** 2).sum()) / values[:, 1].sum()
    assert found == pytest.approx(closed, rel=0.12)
    low, high = interval(ratios, bootstrap.documents)
    assert low < ratio < high and (high - low) / 2 == pytest.approx(1.645 * closed, rel=0.15)


def test_a_document_may_come_in_parts():
    values = documents(20)
    whole, parts = filled(values), DocumentBootstrap(2)
    for share in (0.25, 0.75):
        for number, row in enumerate(values):
            parts.add(number, share * row)
    assert parts.documents == whole.documents == 20
    np.testing.assert_allclose(parts.replicates, whole.replicates, rtol=1e-12)
    mixed = DocumentBootstrap(2)
    for _ in range(2):
        for number, row in enumerate(values):
            mixed.add(number, row / 2)
    assert mixed.documents == 20
    np.testing.assert_allclose(mixed.replicates, whole.replicates, rtol=1e-12)


def test_one_seed_resamples_alike_and_two_do_not():
    values = documents(30)
    assert np.array_equal(filled(values).replicates, filled(values).replicates)
    independent = [filled(values, seed).replicates for seed in (0, 1)]
    correlation = np.corrcoef(independent[0][:, 1], independent[1][:, 1])[0, 1]
    assert abs(correlation) < 4 / math.sqrt(REPLICATES)


def test_one_document_has_no_error():
    bootstrap = filled(documents(1))
    ratios = bootstrap.replicates[:, 0] / np.maximum(bootstrap.replicates[:, 1], 1)
    assert math.isnan(standard_error(ratios, 1)) and all(map(math.isnan, interval(ratios, 1)))


def test_empty_replicates_are_left_out():
    assert standard_error(np.array([1.0, math.nan, 3.0]), 3) == pytest.approx(math.sqrt(2))
    assert interval(np.array([1.0, math.nan]), 3) == (pytest.approx(math.nan, nan_ok=True),) * 2
