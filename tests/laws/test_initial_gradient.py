"""Gradients at initialisation: against autograd draw by draw, against sums over all V, and against quadrature."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from sparsity_utils.console import InputError
from sparsity_utils.laws import initial_gradient
from sparsity_utils.laws.initial_gradient import CROSS_ENTROPY, ENTRIES, LOSSES, SQUARED_ERROR, initial_gradients

P = (0.5, -1.0, 2.0, 0.0, 1.25)
ACTIVE = [0, 2, 4]


def literal(matrix, p, loss):
    """d loss / d p of one draw by autograd; `matrix` has a column for every neuron."""
    p = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    outputs = torch.from_numpy(matrix) @ torch.relu(p)
    label = torch.zeros(len(matrix), dtype=torch.float64)
    label[0] = 1
    value = cross_entropy(outputs[None], label[None]) if loss == CROSS_ENTROPY else ((outputs - label) ** 2).sum() / 2
    value.backward()
    return p.grad.numpy()


@pytest.mark.parametrize("outputs", [2, 7])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_and_slopes_are_those_of_autograd(loss, outputs):
    found = initial_gradients(P, outputs, 0.3, draws=5, seed=3)[loss]
    rng = np.random.default_rng(3).spawn(2)[0]
    matrices = np.random.default_rng(0).normal(size=(5, outputs, len(P)))  # columns of silent neurons must not matter
    matrices[:, :, ACTIVE] = np.sqrt(0.3) * rng.standard_normal((5, outputs, 3))
    gradients = np.array([literal(matrix, P, loss) for matrix in matrices])
    assert not gradients[:, [1, 3]].any()
    active = np.array(P)[ACTIVE]
    slopes = [np.polyfit(active, gradient[ACTIVE], 1)[0] for gradient in gradients]
    np.testing.assert_allclose(found.p, active)
    np.testing.assert_allclose(found.mean, gradients[:, ACTIVE].mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.error, gradients[:, ACTIVE].std(axis=0, ddof=1) / np.sqrt(5), rtol=1e-12)
    assert found.slope == pytest.approx(np.polyfit(active, found.mean, 1)[0])
    assert (found.slope, found.slope_error) == pytest.approx((np.mean(slopes), np.std(slopes, ddof=1) / np.sqrt(5)))
    assert found.draws == 5


@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_over_all_matrices_of_signs_is_positive_and_measured(loss):
    p, variance = np.array([0.5, 2.0]), 0.4
    signs = np.sqrt(variance) * np.array(list(itertools.product((-1, 1), repeat=6))).reshape(-1, 3, 2)  # all 64
    exact = np.mean([literal(matrix, p, loss) for matrix in signs], axis=0)
    found = initial_gradients(p, 3, variance, draws=40_000, entries="Rademacher")[loss]
    assert (exact > 0).all() and (np.abs(found.mean - exact) < 4 * found.error).all()
    assert (4 * found.error < exact / 4).all()  # so that the line above can fail
    if loss == SQUARED_ERROR:
        np.testing.assert_allclose(exact, variance * 3 * p)
        assert (found.predicted, found.predicted_error) == (pytest.approx(variance * 3), 0)
    else:
        assert np.isnan(found.predicted) and np.isnan(found.predicted_error)


def test_the_exact_slope_of_cross_entropy_is_that_of_quadrature():
    variance, p = 0.3, np.array(P)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)  # of N(0, 1), up to sqrt(2 pi)
    difference = np.sqrt(2 * variance * np.sum(p[p > 0] ** 2)) * nodes  # of the two outputs
    right = 1 / (1 + np.exp(-difference))
    exact = variance * np.sum(weights * 2 * right * (1 - right)) / np.sqrt(2 * np.pi)  # 1 - q^2 - (1 - q)^2
    found = initial_gradients(p, 2, variance, draws=40_000)[CROSS_ENTROPY]
    assert found.predicted == pytest.approx(exact, abs=4 * found.predicted_error)
    assert found.slope == pytest.approx(exact, abs=4 * found.slope_error)
    assert 4 * found.predicted_error < 0.02 * exact and 4 * found.slope_error < 0.2 * exact


def test_with_small_outputs_the_factor_of_cross_entropy_is_that_of_equal_probabilities():
    found = initial_gradients(P, 5, 1e-6, draws=10)[CROSS_ENTROPY]
    assert found.predicted == pytest.approx(1e-6 * (1 - 1 / 5), rel=1e-4)


@pytest.mark.parametrize("entries", ENTRIES)
def test_entries_have_mean_zero_and_variance_one(entries):
    values = ENTRIES[entries](np.random.default_rng(0), (200, 500))
    assert values.shape == (200, 500) and values.dtype == np.float64
    assert (values.mean(), values.var()) == pytest.approx((0, 1), abs=0.02)


@pytest.mark.parametrize("entries", ENTRIES)
def test_a_seed_gives_the_same_numbers_in_blocks_of_any_size(entries, monkeypatch):
    def slopes(seed):
        found = initial_gradients(P, 7, 0.3, draws=11, entries=entries, seed=seed)
        return [number for one in found.values() for number in (one.slope, one.slope_error, one.predicted)]

    first = slopes(1)
    assert slopes(2) != pytest.approx(first, nan_ok=True)
    monkeypatch.setattr(initial_gradient, "BLOCK", 50)  # two matrices at a time, and one at the end
    assert slopes(1) == pytest.approx(first, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"p": (1.0, 1.0, -1.0)}, "two different numbers above 0"),
        ({"p": (-1.0, 0.0)}, "two different numbers above 0"),
        ({"p": (1.0, np.nan)}, "p must be one row of finite numbers"),
        ({"p": ((1.0, 2.0),)}, "p must be one row of finite numbers"),
        ({"outputs": 1}, "outputs is 1"),
        ({"draws": 1}, "draws is 1"),
        ({"variance": 0.0}, "variance is 0.0"),
        ({"variance": np.nan}, "variance is nan"),
        ({"entries": "normal"}, "entries is 'normal'; choose one of Gaussian, uniform, Rademacher"),
    ],
)
def test_bad_input_is_told(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        initial_gradients(**{"p": P, "outputs": 3, "variance": 0.1, "draws": 4} | changes)
