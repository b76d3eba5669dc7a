"""The printed theory, against masks tried one by one and the counter-example worked out by hand."""

from itertools import combinations

import pytest
import torch

from sparsity_utils.sparsity import optimality
from sparsity_utils.sparsity.optimality import (
    check_lemma,
    check_stack,
    counter_example,
    diagonalised,
    largest,
    stack_errors,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(9, 7), (4, 7)])
def test_with_diagonal_columns_no_mask_of_all_of_its_size_errs_less(shape):
    weight, v = diagonalised(normal(*shape))
    gram = weight.T @ weight
    assert (gram - gram.diag().diag()).abs().max() < 1e-12 and torch.allclose(v @ v.T, torch.eye(7).double())
    for x in normal(20, 7, seed=1):
        kept = largest(x[None].abs() * weight.norm(dim=0), 3)[0]
        best = min(
            float((weight @ x.clone().index_fill(0, torch.tensor(left), 0)).square().sum())
            for left in combinations(range(7), 3)
        )
        assert float((weight @ (x * ~kept)).square().sum()) == pytest.approx(best, abs=1e-12)
    found = check_lemma(weight, normal(20, 7, seed=1), 3)
    assert found.draws == 20 * optimality.TRIED and found.violations == 0 and found.identity < 1e-12


def test_without_orthogonal_columns_the_lemma_fails_and_the_bound_by_eigenvalues_holds():
    weight, x = normal(9, 7), normal(50, 7, seed=1)
    found = check_lemma(weight, x, 3)
    assert found.violations > 0 and found.identity > 0.01
    norms = weight.norm(dim=0)
    for row in x:
        dropped = ~largest(row[None].abs() * norms, 3)[0]
        unit = (weight / norms)[:, dropped]
        low, *_, high = torch.linalg.eigvalsh(unit.T @ unit).tolist()
        error = float((weight @ (row * dropped)).square().sum())
        total = float((row * norms)[dropped].square().sum())
        assert low * total <= error * (1 + 1e-9) and error <= high * total * (1 + 1e-9)


def test_the_counter_example_is_the_one_worked_out_by_hand():
    first, second, x = counter_example()
    assert x.tolist() == [[1, 0.9], [1, -0.9], [-1, 0.9], [-1, -0.9]]
    keep = torch.tensor([[False, True]] * 4)  # WINA: 1.2 * 0.9 > 1
    u, v = stack_errors(first, second, x, (keep, keep))
    assert (u + v).square().sum(-1).tolist() == pytest.approx([100.0] * 4) and v.abs().max() == 0
    u, v = stack_errors(first, second, x, (~keep, ~keep))
    assert u.square().sum(-1).tolist() == pytest.approx([0.011664] * 4) and v.abs().max() == 0
    found = check_stack(first, second, x, 0.5)
    assert found == (4, 0, 4, 4)


def test_a_stack_is_checked_vector_by_vector():
    first, (second, _), x = normal(8, 6), diagonalised(normal(5, 8, seed=1)), normal(30, 6, seed=2)
    found, violations, beaten, less = check_stack(first, second, x, 0.5), 0, 0, 0
    for row in x:
        bounds, errors = [], []
        for norms in (True, False):
            score = row.abs() * (first.norm(dim=0) if norms else 1)
            masked = row * largest(score[None], 3)[0]
            hidden = first @ masked
            kept = largest((hidden.abs() * (second.norm(dim=0) if norms else 1))[None], 4)[0]
            error = second @ (first @ row) - second @ (hidden * kept)
            u, v = second @ (first @ (row - masked)), second @ (hidden * ~kept)
            assert torch.allclose(u + v, error)
            bounds.append(float(2 * u @ u + 2 * v @ v))
            errors.append(float(error @ error))
            violations += errors[-1] > bounds[-1]
        beaten, less = beaten + (bounds[1] < bounds[0]), less + (errors[1] < errors[0])
    assert found == (30, violations, beaten, less) and 0 < beaten < 30
