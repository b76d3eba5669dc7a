"""Root finders: a bracketed one for the threshold of a layer, one from a good guess for the CETT of a model."""

import math
from collections.abc import Callable

Point = tuple[float, float]  # x, f(x)
SECANT_STEPS = 6  # an almost straight function needs two or three


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


def find_root_near(
    f: Callable[[float], float],
    low: Point,
    guess: float,
    slope: float,
    limit: float,
    f_tolerance: float,
    x_tolerance: float,
) -> float:
    """A root of an almost straight `f` above `low`, where f <= 0, from a `guess`: the secant method, kept in bounds.

    The first step has the given `slope`. Where steps do not shrink the bracket any more, as at a jump, `find_root`
    ends the search; where f stays below zero up to `limit`, the answer is `limit`. `x_tolerance` is a share of x.

    Returns: x as `find_root` does, or `limit`.
    """
    below, above, before, x = low, None, None, guess
    for _ in range(SECANT_STEPS):
        point = (x, f(x))
        if abs(point[1]) <= f_tolerance or (x == limit and point[1] < 0):
            return x
        below, above = (below, point) if point[1] > 0 else (point, above)
        if before is not None:
            slope = (point[1] - before[1]) / (x - before[0])
        aim = x - point[1] / slope if slope > 0 else math.inf
        before = point
        if above is None:
            x = min(limit, max(aim, x * 1.01), x * 2)
        elif above[0] - below[0] <= x_tolerance * above[0]:
            return below[0]
        else:
            x = aim if below[0] < aim < above[0] else (below[0] + above[0]) / 2
    if above is None:
        above = (limit, f(limit))
        if above[1] <= f_tolerance:
            return limit
    return find_root(f, below, above, f_tolerance, x_tolerance * above[0])
