"""Time several ways of one job on one machine: all take turns in rounds, and ratios are taken within each round."""

import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from importlib.metadata import version
from typing import TypeVar

import numpy as np
import torch

Way = TypeVar("Way")


def timed(work: Callable[[], object], device: str = "cpu") -> float:
    """Seconds that one call of `work` takes; on "cuda" those of the work that it gives the GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternate(ways: Mapping[Way, Callable[[], float]], rounds: int, *, warm_up: bool = False) -> dict[Way, np.ndarray]:
    """What each way measures in each round, (rounds,).

    All ways take their turn in a round, every other round in reverse order, so that drift affects them alike. A way
    measures itself (as `timed` does), so that its preparations need not count. `warm_up`: run each once before that.
    """
    measured = {way: np.empty(rounds) for way in ways}
    for measure in ways.values() if warm_up else ():
        measure()
    for turn in range(rounds):
        for way in list(ways)[:: -1 if turn % 2 else 1]:
            measured[way][turn] = ways[way]()
    return measured


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Lower end of a 90% interval, median, upper end; the ends are NaN below five values.

    The ends are order statistics, by the sign test: the k-th smallest and the k-th largest value, k the largest number
    with 2 P(Binomial(n, 1/2) < k) <= 0.1.
    """
    ordered, n = np.sort(values), len(values)
    tails = np.cumsum([math.comb(n, k) for k in range(n + 1)]) / 2**n  # P(at most k of n values below the median)
    outside = int((2 * tails <= 0.1).sum())  # values to leave out on either side
    if outside == 0:
        return math.nan, float(np.median(values)), math.nan
    return float(ordered[outside - 1]), float(np.median(values)), float(ordered[n - outside])


def speedups(seconds: Mapping[str, np.ndarray], way: str, all_weights: Iterable[str]) -> dict[str, float]:
    """How much faster `way` is than another: the median over rounds of seconds of the other / seconds of `way`.

    Columns: speedup (over the way "dense") and strict_speedup (over the fastest way in `all_weights` that has times),
    each with its 90% interval, low_ and high_. A way without times, NaN, gives NaN.
    """
    others = [name for name in all_weights if name in seconds]
    timed_ways = [name for name in others if not np.isnan(seconds[name]).any()]
    fastest = min(timed_ways or others, key=lambda name: np.median(seconds[name]))
    columns: dict[str, float] = {}
    for name, other in (("speedup", "dense"), ("strict_speedup", fastest)):
        low, median, high = median_interval(seconds[other] / seconds[way])
        columns |= {name: median, f"low_{name}": low, f"high_{name}": high}
    return columns


def machine(device: str) -> dict[str, str | int]:
    """Device, threads, versions and date: what a speed was measured on."""
    backend = "triton" if device == "cuda" else "numba"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"
    versions = f"torch {torch.__version__}, {backend} {version(backend)}"
    return {"device": name, "threads": torch.get_num_threads(), "versions": versions, "date": str(date.today())}
