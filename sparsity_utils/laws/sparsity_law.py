"""How loss grows with the share S of inputs that are left out, and which S is best at equally many active parameters.

Q-Sparse (arXiv 2407.10969, section 3.4) prints L = E + A(S) / N^alpha with A(S) = B + C exp(beta / (1 - S)). With N_a =
N (1 - S) active parameters the best S is where A(S) (1 - S)^alpha is smallest. The unit of N is not printed; the best S
does not depend on it.
"""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar

from sparsity_utils.console import check

Array = NDArray[np.float64]
LARGEST = 0.95  # of the shares that are looked at; A(S) leaves every scale towards 1
BETAS = np.geomspace(0.01, 10, 40)  # that are tried first
ROUNDING = 0.005  # of a coefficient with two decimals


@dataclass(frozen=True)
class SparsityLaw:
    """The coefficients of A(S) and of N."""

    b: float
    c: float
    beta: float
    alpha: float

    def a(self, s: ArrayLike) -> Array:
        """A(S)."""
        return self.b + self.c * np.exp(self.beta / (1 - np.asarray(s, dtype=float)))

    def reducible(self, s: float) -> float:
        """What is left of the reducible loss at equally many active parameters, as a share of that at S = 0."""
        return float(self.a(s) / self.a(0.0)) * (1 - s) ** self.alpha

    def best(self) -> float:
        """The S with the smallest loss at equally many active parameters; 0 where leaving out never pays."""
        found = minimize_scalar(self.reducible, bounds=(0, LARGEST), method="bounded", options={"xatol": 1e-8})
        return float(found.x) if found.fun < 1 else 0.0

    def best_as_rounded(self) -> tuple[float, float]:
        """The smallest and the largest `best` of all coefficients that are printed like these, to two decimals."""
        names = ("b", "c", "beta", "alpha")
        ends = [(getattr(self, name) - ROUNDING, getattr(self, name) + ROUNDING) for name in names]
        corners = itertools.product(*ends)
        found = [replace(self, **dict(zip(names, corner, strict=True))).best() for corner in corners]
        return min(found), max(found)


PRINTED = SparsityLaw(b=0.01, c=1.89, beta=0.05, alpha=0.10)
PRINTED_BEST = 0.4558  # printed beside them; of 1.58-bit weights 0.6125, whose coefficients are not printed


def exponential_fit(s: ArrayLike, loss: ArrayLike) -> tuple[float, float, float]:
    """(a, c, beta) of loss = a + c exp(beta / (1 - S)) by least squares; c is not negative.

    Raises InputError for fewer than three different S.
    """
    s, loss = np.asarray(s, dtype=float), np.asarray(loss, dtype=float)
    check(len(np.unique(s)) >= 3, f"A curve of loss over sparsity needs three shares, not {len(np.unique(s))}.")
    place = min(range(len(BETAS)), key=lambda at: _linear_part(s, loss, float(BETAS[at]))[2])
    around = (BETAS[max(place - 1, 0)], BETAS[min(place + 1, len(BETAS) - 1)])
    beta = float(minimize_scalar(lambda beta: _linear_part(s, loss, beta)[2], bounds=around, method="bounded").x)
    a, c, _ = _linear_part(s, loss, beta)
    return a, c, beta


def _linear_part(s: Array, loss: Array, beta: float) -> tuple[float, float, float]:
    """(a, c, sum of squared errors) of loss = a + c exp(beta / (1 - S)) at a given beta."""
    growth = np.exp(beta / (1 - s) - beta)  # 1 at S = 0, so that the two columns are of one size
    (a, c), *_ = np.linalg.lstsq(np.column_stack([np.ones_like(s), growth]), loss, rcond=None)
    if c < 0:
        a, c = loss.mean(), 0.0
    return float(a), float(c * math.exp(-beta)), float(((a + c * growth - loss) ** 2).sum())


def held_out_errors(s: ArrayLike, loss: ArrayLike) -> dict[str, float]:
    """Root mean square error of the exponential form and of a line at S that neither was fitted to.

    Every S but the smallest and the largest is left out in turn.
    """
    s, loss = np.asarray(s, dtype=float), np.asarray(loss, dtype=float)
    order = np.argsort(s)
    s, loss = s[order], loss[order]
    check(len(s) >= 5, f"{len(s)} shares are too few to leave one out; at least 5 are needed.")
    errors: dict[str, list[float]] = {"exponential": [], "line": []}
    for out in range(1, len(s) - 1):
        rest = np.arange(len(s)) != out
        a, c, beta = exponential_fit(s[rest], loss[rest])
        errors["exponential"].append(a + c * math.exp(beta / (1 - s[out])) - loss[out])
        slope, intercept = np.polyfit(s[rest], loss[rest], 1)
        errors["line"].append(intercept + slope * s[out] - loss[out])
    return {form: float(np.sqrt(np.mean(np.square(found)))) for form, found in errors.items()}
