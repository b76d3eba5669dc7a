"""Arithmetic of a decoder's shape: parameters, operations, and the integer shape nearest to what is wanted.

Importing this loads nothing heavy.
"""

import math
from dataclasses import dataclass

from sparsity_utils.console import InputError
from sparsity_utils.models.config import ModelConfig

WIDTH_STEP = 4  # d is a multiple of it, so that d_ff = 2.5 d is even and even head sizes exist
SHAPE_TOLERANCE = 0.10


@dataclass(frozen=True)
class Shape:
    """The integer shape nearest to what was asked, and how far it is from it."""

    d_model: int
    n_layers: int
    parameters: int  # non-embedding
    parameters_error: float  # relative to what was asked
    ratio_error: float  # likewise, of d_model / n_layers

    def __str__(self) -> str:
        return (
            f"{self.d_model}x{self.n_layers}: {self.parameters:,} parameters ({self.parameters_error:+.1%}), "
            f"ratio {self.d_model / self.n_layers:.3g} ({self.ratio_error:+.1%})"
        )


def non_embedding_parameters(d_model: int, n_layers: int, ffn_ratio: float = 2.5, ffn: str = "gated") -> int:
    """Weights of all attention and FFN matrices, (4 + 3 ffn_ratio) n_layers d^2: 11.5 n_layers d^2 at ratio 2.5.

    A plain FFN has two matrices in place of three.
    """
    matrices = {"gated": 3, "plain": 2}[ffn]
    return n_layers * (4 * d_model**2 + matrices * d_model * d_ff(d_model, ffn_ratio))


def d_ff(d_model: int, ffn_ratio: float = 2.5) -> int:
    """Neurons of one FFN."""
    return round(d_model * ffn_ratio)


def solve_shape(parameters: int, ratio: float, ffn_ratio: float = 2.5) -> Shape:
    """The (d_model, n_layers) nearest to `parameters` non-embedding parameters at width-depth ratio `ratio`.

    Nearest is the smallest sum of the two absolute log errors. Raises InputError when no pair of integers is
    within 10% of both.
    """
    if parameters <= 0 or ratio <= 0:
        raise InputError(
            f"A shape needs positive parameters and ratio, not {parameters} and {ratio}; correct the profile."
        )
    ideal_layers = (parameters / ((4 + 3 * ffn_ratio) * ratio**2)) ** (1 / 3)

    def shape(d_model: int, n_layers: int) -> Shape:
        count = non_embedding_parameters(d_model, n_layers, ffn_ratio)
        return Shape(d_model, n_layers, count, count / parameters - 1, d_model / n_layers / ratio - 1)

    candidates = [
        shape(d_model, n_layers)
        for n_layers in range(max(1, math.floor(ideal_layers * 0.8)), math.ceil(ideal_layers * 1.25) + 1)
        for d_model in _widths_near(ratio * n_layers)
        + _widths_near(math.sqrt(parameters / n_layers / (4 + 3 * ffn_ratio)))
    ]
    best = min(candidates, key=lambda s: abs(math.log1p(s.parameters_error)) + abs(math.log1p(s.ratio_error)))
    if max(abs(best.parameters_error), abs(best.ratio_error)) > SHAPE_TOLERANCE:
        raise InputError(
            f"No integer shape has {parameters:,} parameters at width-depth ratio {ratio:g} within "
            f"{SHAPE_TOLERANCE:.0%}; the nearest is {best}. Choose another ratio or size."
        )
    return best


def _widths_near(width: float) -> list[int]:
    below = max(WIDTH_STEP, math.floor(width / WIDTH_STEP) * WIDTH_STEP)
    return [below, below + WIDTH_STEP]


def head_count(config: ModelConfig) -> int:
    """Heads for the even head size that divides d_model and is nearest (in log) to the one wanted.

    Raises InputError when the nearest is off by more than a factor of two.
    """
    sizes = [size for size in range(2, config.d_model + 1, 2) if config.d_model % size == 0]
    size = min(sizes, key=lambda s: abs(math.log(s / config.head_size)))
    if abs(math.log2(size / config.head_size)) > 1 and config.d_model > config.head_size:
        raise InputError(
            f"model.d_model {config.d_model} is not divisible into heads: no even head size near {config.head_size} "
            f"divides it (nearest: {size}). Choose a d_model with more divisors or another head_size."
        )
    return config.d_model // size


def training_flops_per_token(config: ModelConfig) -> float:
    """Multiply-adds x 2 of one forward and backward pass (x 3) per token: matrices, head and causal attention.

    Matrices: 6 N. Head: 6 d V. Attention scores and values: 6 n_layers d context (half of the square is masked).
    As in PaLM, arXiv 2204.02311, appendix B, with the causal half counted once.
    """
    matrices = non_embedding_parameters(config.d_model, config.n_layers, config.ffn_ratio, config.ffn)
    head = config.d_model * config.vocabulary
    attention = config.n_layers * config.d_model * config.context
    return 6.0 * (matrices + head + attention)


def representative_layers(layers: int) -> dict[str, int]:
    """Positions of the first, the middle (`layers` // 2) and the last layer; fewer than three layers have no middle."""
    middle = {"middle": layers // 2} if layers > 2 else {}
    return {"first": 0, **middle, "last": layers - 1}
