"""One bracketed root finder, for the threshold of a layer and for the CETT of a model."""

import math
from collections.abc import Callable

Point = tuple[float, float]  # x, f(x)


def find_root(f: Callable[[float], float], low: Point, high: Point, f_tolerance: float, x_tolerance: float) -> float:
    """A root of `f` between `low`, where f <= 0, and `high`, where f > 0, by the ITP method.

    ITP (Oliveira & Takahashi 2020, doi:10.1145/3423597) steps to the secant point, pushed a little towards the
    middle, and never needs more than one evaluation beyond bisection, also when `f` has jumps.

    Returns: the first x tried with |f(x)| <= `f_tolerance`; or, where `f` jumps over its root, the lower end of a
    bracket no wider than `x_tolerance`.
    """
    (a, f_a), (b, f_b) = low, high
    push = 0.1 / (b - a)  # kappa_1; kappa_2 = 2
    radius = x_tolerance * 2.0 ** max(1, math.ceil(math.log2((b - a) / x_tolerance)))
    while b - a > x_tolerance:
        middle = (a + b) / 2
        secant = (b * f_a - a * f_b) / (f_a - f_b)
        towards = math.copysign(1.0, middle - secant)
        shift = min(push * (b - a) ** 2, abs(middle - secant))
        x = secant + towards * shift
        allowed = max(radius - (b - a) / 2, 0.0)
        if abs(x - middle) > allowed:
            x = middle - towards * allowed
        if not a < x < b:  # floating point has no number left between the ends
            x = middle
            if not a < x < b:
                break
        f_x = f(x)
        if abs(f_x) <= f_tolerance:
            return x
        if f_x > 0:
            b, f_b = x, f_x
        else:
            a, f_a = x, f_x
        radius /= 2
    return a
