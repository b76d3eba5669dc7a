"""Ways in turn: their order, what they measure, and the interval of a median against its coverage."""

import time

import numpy as np
import pytest

from kernels.timing import alternate, median_interval, speedups, timed


def test_all_ways_take_their_turn_and_every_other_round_is_backwards():
    called = []
    ways = {name: lambda name=name: called.append(name) or float(len(called)) for name in "abc"}
    measured = alternate(ways, 3, warm_up=True)
    assert "".join(called) == "abc" + "abc" + "cba" + "abc"
    assert {name: values.tolist() for name, values in measured.items()} == {
        "a": [4, 9, 10], "b": [5, 8, 11], "c": [6, 7, 12]
    }  # fmt: skip
    called.clear()
    assert alternate(ways, 1)["c"].tolist() == [3]


def test_a_steady_drift_meets_ways_alike():
    clock = iter(range(100))
    measured = alternate(dict.fromkeys("abcd", lambda: float(next(clock))), 6)
    assert {values.mean() for values in measured.values()} == {11.5}


def test_a_call_is_timed():
    assert 0.02 <= timed(lambda: time.sleep(0.02)) < 1


@pytest.mark.parametrize("n", [5, 6, 15, 40])
def test_the_interval_of_a_median_covers_it_at_least_as_often_as_it_says(n):
    random = np.random.default_rng(0)
    ends = np.array([median_interval(random.exponential(size=n)) for _ in range(4000)])
    assert (ends[:, 0] <= ends[:, 1]).all() and (ends[:, 1] <= ends[:, 2]).all()
    inside = (ends[:, 0] <= np.log(2)) & (np.log(2) <= ends[:, 2])
    assert 0.89 <= inside.mean() <= 0.98


def test_below_five_values_a_median_has_no_interval():
    low, median, high = median_interval(np.array([3.0, 1.0, 2.0]))
    assert median == 2 and np.isnan(low) and np.isnan(high)


def test_a_way_without_times_has_no_speedup_and_gives_none():
    fast, slow, none = (np.full(5, seconds) for seconds in (1.0, 2.0, np.nan))
    found = speedups({"dense": slow, "whole": none, "own": fast}, "own", ("whole",))
    assert found["speedup"] == 2 and np.isnan(found["strict_speedup"])
    found = speedups({"dense": slow, "whole": none, "own": fast}, "own", ("whole", "dense"))
    assert found["strict_speedup"] == 2  # over the fastest that has times
    assert np.isnan(list(speedups({"dense": slow, "own": none}, "own", ("dense",)).values())).all()
