"""The bench of linear maps on tiny shapes: shares of the ideal are of the faster full read; wrong outputs refused."""

import numpy as np
import pytest

from kernels import linear_bench
from kernels.linear_bench import linear_speeds

TINY = {"odd": (24, (40,)), "three": (32, (24, 8, 8))}
OPTIONS = {"rounds": 2, "megabytes": 1, "device": "cpu", "maps": TINY}


def test_shares_of_the_ideal_are_of_the_faster_full_read(monkeypatch):
    monkeypatch.setattr(linear_bench, "alternate", lambda works, rounds: {way: TIMES[way] for way in works})
    table = linear_speeds(**OPTIONS).set_index(["maps", "weights", "sparsity"])
    half = table.loc["three", "float32", 0.5]
    assert len(table) == 2 * 2 * 3 and half["strict_speedup"] == pytest.approx(1.2) and half["of_ideal"] == 0.6
    assert table.loc[("odd", "8 bits", 0.5), "of_ideal"] == pytest.approx(0.75)  # torch has no such weights
    copies = int(1e6 // (32 * 40 * 4))
    assert half["gb_per_s"] == pytest.approx(0.5 * 32 * 40 * 4 * copies / 2.0 / 1e9)


TIMES = {
    way: np.array([seconds, seconds])
    for way, seconds in {"all rows": 3.0, "dense": 2.4, "0.25": 2.5, "0.5": 2.0, "0.75": 1.0}.items()
}


def test_no_speed_of_a_wrong_output(monkeypatch):
    right = linear_bench.dense
    monkeypatch.setattr(linear_bench, "dense", lambda linear, x: 1.001 * right(linear, x))
    with pytest.raises(RuntimeError, match="No speed is reported: odd, float32, all rows is off by"):
        linear_speeds(**OPTIONS)
