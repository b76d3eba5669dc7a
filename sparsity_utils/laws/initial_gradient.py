"""The gradient of an active ReLU neuron, averaged over random output weights: at initialisation it is positive.

This is the setting of a theorem of The Lazy Neuron Phenomenon (arXiv 2210.06313). A hidden layer has pre-activations p
and activations h = max(p, 0), the outputs are f = V h, and the entries of V are independent of each other, of p and of
the label y (sum of y = 1), with mean zero and variance v > 0. For an active neuron, p_i > 0, h_i = p_i and

    d loss / d p_i = sum_k V_ki r_k,    r_k = q_k - y_k    cross-entropy, q = softmax(f)
                                        r_k = f_k - y_k    squared error, loss 1/2 ||f - y||^2.

In the mean over V the label drops out, since E[V_ki] = 0; what is left is the sum over k of the covariances of V_ki
with q_k or f_k. With all other entries held, q_k and f_k increase in V_ki, because h_i > 0, so every covariance is
positive: on average a step of gradient descent lowers each active neuron. Its size is known exactly in two cases:

    squared error, any V:        sum_k E[V_ki f_k] = v n_out p_i
    cross-entropy, Gaussian V:   sum_k E[V_ki q_k] = v p_i E[1 - sum_k q_k^2].

The second is Stein's lemma, E[x g(x)] = v E[g'(x)] for x ~ N(0, v), with x = V_ki and g = q_k, whose derivative is
q_k (1 - q_k) p_i. Both are proportional to p_i, and `slope` is the factor. All numbers here are float64, and a seed
gives the same ones again.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsity_utils.console import check
from sparsity_utils.laws.trends import finite

CROSS_ENTROPY, SQUARED_ERROR = "cross-entropy", "squared error"
LOSSES = (CROSS_ENTROPY, SQUARED_ERROR)
LABEL = 0  # the right output; all outputs are alike, so that which one it is does not matter
BLOCK = 2**20  # random numbers at a time: 8 MB

Array = NDArray[np.float64]

# How to draw entries of mean zero and variance one.
ENTRIES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "Gaussian": lambda rng, shape: rng.standard_normal(shape),
    "uniform": lambda rng, shape: math.sqrt(12) * (rng.random(shape) - 0.5),
    "Rademacher": lambda rng, shape: np.where(rng.random(shape) < 0.5, -1.0, 1.0),  # -1 or 1
}


@dataclass(frozen=True, eq=False)
class InitialGradient:
    """The gradient of one loss by the pre-activations of active neurons, mean over draws of V, and what it should be.

    `slope` is the least-squares slope of the mean gradient on p, with an intercept. It is a linear function of the
    gradients, so its mean and standard error are those of the slopes of single draws. Errors are standard errors.
    """

    p: Array  # (active,), above 0
    mean: Array  # (active,)
    error: Array  # (active,), over draws
    slope: float
    slope_error: float  # over draws
    predicted: float  # of the slope; NaN where no exact value is known: cross-entropy, V not Gaussian
    predicted_error: float  # 0 where the prediction needs no draws
    draws: int


def initial_gradients(
    p: ArrayLike, outputs: int, variance: float, draws: int = 10_000, entries: str = "Gaussian", seed: int = 0
) -> dict[str, InitialGradient]:
    """Mean gradients over `draws` of V and their predictions, {loss: gradients}; both losses see the same draws.

    Args:
        p: pre-activations of the hidden neurons, (width,). At least two different ones must be above 0.
        outputs: n_out, 2 or more.
        variance: v, of the entries of V.
        entries: their distribution, a key of ENTRIES.

    Raises InputError for numbers that are not finite, too few or out of range, and for other entries.
    """
    p = finite(p, "p")
    active = p[p > 0]  # the others are zero: they have no gradient and add nothing to the outputs
    check(np.unique(active).size > 1, "p needs two different numbers above 0 for a slope; give more active neurons.")
    check(outputs > 1, f"outputs is {outputs}; a loss over classes needs 2 or more.")
    check(draws > 1, f"draws is {draws}; a standard error needs 2 or more.")
    check(0 < variance < math.inf, f"variance is {variance}; the entries of V need a finite one above 0.")
    check(entries in ENTRIES, f"entries is {entries!r}; choose one of {', '.join(ENTRIES)}.")
    measuring, predicting = np.random.default_rng(seed).spawn(2)
    matrices = _blocks(measuring, entries, draws, (outputs, active.size), variance)
    gradients = np.concatenate([_gradients(v, active) for v in matrices])  # (draws, losses, active)
    centred = active - active.mean()
    slopes = gradients @ (centred / (centred @ centred))  # (draws, losses)
    predictions = {CROSS_ENTROPY: (math.nan, math.nan), SQUARED_ERROR: (variance * outputs, 0.0)}
    if entries == "Gaussian":
        predictions[CROSS_ENTROPY] = _stein(predicting, draws, outputs, variance, float(active @ active))
    found = {}
    for at, loss in enumerate(LOSSES):
        (mean, error), (slope, slope_error) = _mean(gradients[:, at]), _mean(slopes[:, at])
        measured = (active, mean, error, float(slope), float(slope_error))
        found[loss] = InitialGradient(*measured, *predictions[loss], draws)
    return found


def _gradients(v: Array, active: Array) -> Array:
    """d loss / d p_i of each draw and loss, (block, losses, active), by the first equation above.

    v: (block, outputs, active)
    """
    outputs = v @ active  # (block, outputs)
    residuals = np.stack([_softmax(outputs), outputs], axis=1)  # (block, losses, outputs)
    residuals[:, :, LABEL] -= 1
    return residuals @ v


def _stein(rng: np.random.Generator, draws: int, outputs: int, variance: float, square: float) -> tuple[float, float]:
    """v E[1 - sum_k q_k^2] for Gaussian V, and its standard error, from draws of their own.

    For Gaussian V the outputs are exactly independent N(0, v ||h||^2), so that they are drawn directly.

    square: ||h||^2
    """
    blocks = _blocks(rng, "Gaussian", draws, (outputs,), variance * square)
    spread = np.concatenate([1 - np.sum(_softmax(f) ** 2, axis=1) for f in blocks])  # (draws,)
    mean, error = _mean(spread)
    return float(variance * mean), float(variance * error)


def _blocks(
    rng: np.random.Generator, entries: str, draws: int, shape: tuple[int, ...], variance: float
) -> Iterator[Array]:
    """`draws` arrays of this shape and variance, (block, *shape) at a time."""
    size = max(1, BLOCK // math.prod(shape))
    for start in range(0, draws, size):
        yield math.sqrt(variance) * ENTRIES[entries](rng, (min(size, draws - start), *shape))


def _softmax(logits: Array) -> Array:
    """Along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _mean(values: Array) -> tuple[Array, Array]:
    """Mean over the first axis, the draws, and its standard error."""
    return values.mean(axis=0), values.std(axis=0, ddof=1) / math.sqrt(len(values))
