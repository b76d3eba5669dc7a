"""The data laws as published: coefficients of Figure 4 and section 4.1 of arXiv 2411.02335 v4, D in 1e9 tokens.

ReLU: A(D) = exp(-c D^alpha + b) + A0. SiLU: A(D) = -c / D^alpha + A0. Named after `laws.FORMS`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsity_utils.laws.data_law import TOKEN_UNIT
from sparsity_utils.laws.limits import published_form

TOKENS_PER_PARAMETER = 190  # at least; "0.1B" and so on are non-embedding parameters


class PublishedLaw(NamedTuple):
    """One published fit; `b` is NaN for SiLU, whose form has none."""

    activation: str
    model: str
    d_model: int
    n_layers: int
    alpha: float
    b: float
    c: float
    limit: float  # A0

    def predict(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """Activation ratio after `tokens` training tokens, by the published coefficients."""
        d = np.asarray(tokens, dtype=float) / TOKEN_UNIT
        if published_form(self.activation) == "logspace":
            return np.exp(-self.c * d**self.alpha + self.b) + self.limit
        return -self.c / d**self.alpha + self.limit


NONE = float("nan")
PUBLISHED_LAWS = (
    PublishedLaw("relu", "0.1B", 768, 16, 0.101, -0.0151, 3.20, 0.0614),
    PublishedLaw("relu", "0.2B", 1024, 20, 0.449, -3.05, 0.286, 0.0674),
    PublishedLaw("relu", "0.4B", 1280, 24, 0.683, -3.46, 0.0790, 0.0690),
    PublishedLaw("relu", "0.8B", 1536, 28, 1.01, -3.49, 7.97e-3, 0.0721),
    PublishedLaw("relu", "1.2B", 1792, 32, 1.33, -3.89, 9.03e-4, 0.0782),
    PublishedLaw("relu", "2.4B", 2304, 40, 1.53, -3.46, 1.56e-4, 0.0648),
    PublishedLaw("silu", "0.1B", 768, 16, 0.479, NONE, 0.102, 0.409),
    PublishedLaw("silu", "0.2B", 1024, 20, 0.844, NONE, 0.208, 0.390),
    PublishedLaw("silu", "0.4B", 1280, 24, 1.03, NONE, 0.420, 0.385),
    PublishedLaw("silu", "0.8B", 1536, 28, 0.995, NONE, 0.562, 0.383),
    PublishedLaw("silu", "1.2B", 1792, 32, 0.967, NONE, 0.538, 0.382),
)
# The scripts beside the authors' curves (published_curves.COMMIT) hold the same coefficients but for this model.
REVISED_LAW = PublishedLaw("relu", "2.4B", 2304, 40, 2.11, -3.82, 9.04e-6, 0.0712)
