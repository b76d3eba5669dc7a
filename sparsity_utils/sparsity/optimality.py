"""What WINA's printed theory says of single maps and of stacks of two, in float64 (arXiv 2505.19427v2, section 3).

Lemma 3.1: where W^T W is diagonal, the k largest |x_j| ||W[:, j]|| are the k inputs with which W (g * x) errs least,
and the squared error is sum_dropped s_j^2. Theorem 3.2 is on stacks of linear maps: the error of a masked stack is
e = u + v, u what earlier errors become, v what the mask of this map adds, and for any alpha > 0

    ||e||^2 <= (1 + alpha) ||u||^2 + (1 + 1/alpha) ||v||^2.

It goes on to say that WINA's masks minimise this bound. They need not: ||u||^2 is of columns of the product of maps.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TRIED = 16  # other masks of the same size, for each vector
ALPHAS = (0.5, 1.0, 2.0)
ROUNDING = 1e-9  # relative: less is no violation


class LemmaChecks(NamedTuple):
    """What was found on some vectors."""

    draws: int  # vectors times other masks
    identity: float  # largest relative difference of ||W(x - g * x)||^2 and sum_dropped s_j^2
    violations: int  # other masks of as many inputs that err less


class StackChecks(NamedTuple):
    """What was found of stacks of two maps, by vector."""

    draws: int  # vectors
    violations: int  # vectors on which the inequality fails for an alpha
    beaten: int  # on which masks by |x_j| have a lower bound (alpha = 1) than WINA's
    errs_less: int  # on which they have a lower error


def diagonalised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W V and V, V the eigenvectors of W^T W, so that (W V)^T W V is diagonal; float64."""
    wide = weight.double()
    v = torch.linalg.eigh(wide.mT @ wide).eigenvectors  # (in, in)
    return wide @ v, v


def largest(scores: Tensor, k: int) -> Tensor:
    """True at the k largest of each row, (rows, in)."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k, dim=-1).indices, True)


def check_lemma(weight: Tensor, x: Tensor, k: int, seed: int = 0) -> LemmaChecks:
    """Lemma 3.1 on vectors `x`, (rows, in), of a map whose W^T W is diagonal, (out, in): k inputs stay.

    Other masks are the k largest |x_j|, and WINA's with one, two and more inputs exchanged at random.
    """
    weight, x = weight.double(), x.double()
    scores = x.abs() * torch.linalg.vector_norm(weight, dim=0)
    kept = largest(scores, k)
    error = ((x * ~kept) @ weight.mT).square().sum(-1)  # (rows,)
    expected = (scores * ~kept).square().sum(-1)
    scale = scores.square().sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
    rows, width = x.shape
    generator = torch.Generator().manual_seed(seed)
    violations, others = 0, [largest(x.abs(), k)]
    for tried in range(TRIED - 1):  # orders disturbed more and more: exchanged are inputs near the threshold first
        noise = torch.rand(rows, width, generator=generator, dtype=torch.float64).to(x) * 2.0 ** (tried / 2 - 6)
        others.append(largest(scores * noise.exp(), k))
    for other in others:
        found = ((x * ~other) @ weight.mT).square().sum(-1)
        violations += int((found < error - ROUNDING * scale).sum())
    return LemmaChecks(rows * TRIED, float(((error - expected).abs() / scale).max()), violations)


def stack_errors(first: Tensor, second: Tensor, x: Tensor, masks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """||u||^2 and ||v||^2 of each vector in a stack of two maps, (rows,) each, and u + v is its error.

    masks: what stays of the inputs of the first map, (rows, in), and of the second, (rows, hidden).
    """
    sparse = (x * masks[0]) @ first.mT  # (rows, hidden)
    u = (x @ first.mT - sparse) @ second.mT
    v = (sparse * ~masks[1]) @ second.mT
    return u, v


def check_stack(first: Tensor, second: Tensor, x: Tensor, share: float) -> StackChecks:
    """Theorem 3.2 on vectors `x`, (rows, in), of y = second (first x): a `share` of inputs stays at each map."""
    first, second, x = first.double(), second.double(), x.double()
    keeps = [max(1, round(share * weight.shape[1])) for weight in (first, second)]
    bounds, errors, violations = [], [], torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for norms in (True, False):
        sizes = [torch.linalg.vector_norm(weight, dim=0) if norms else 1.0 for weight in (first, second)]
        outer = largest(x.abs() * sizes[0], keeps[0])
        inner = largest(((x * outer) @ first.mT).abs() * sizes[1], keeps[1])
        u, v = stack_errors(first, second, x, (outer, inner))
        error, uu, vv = ((part).square().sum(-1) for part in (u + v, u, v))
        for alpha in ALPHAS:
            violations |= error > ((1 + alpha) * uu + (1 + 1 / alpha) * vv) * (1 + ROUNDING)
        bounds.append(2 * uu + 2 * vv)
        errors.append(error)
    lower, less = (int((rival < own * (1 - ROUNDING)).sum()) for own, rival in (bounds, errors))
    return StackChecks(len(x), int(violations.sum()), lower, less)


def counter_example() -> tuple[Tensor, Tensor, Tensor]:
    """Two diagonal maps and four vectors on which masks by |x_j| beat WINA's at k = 1: bound 0.023 against 200."""
    numbers = torch.tensor([[1.0, -1.0], [0.9, -0.9], [1.0, 1.2], [10.0, 0.1]], dtype=torch.float64)
    return numbers[2].diag(), numbers[3].diag(), torch.cartesian_prod(numbers[0], numbers[1])
