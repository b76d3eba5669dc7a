"""Quantities over documents: intervals against loops, gaps and bands against tables with a planted answer."""

import numpy as np
import pandas as pd
import pytest
from planted_pretrained import positions_table, prices_table

from sparsity_utils.laws.one_model import (
    REPLICATES,
    accuracy_lost,
    agreement,
    costs,
    dtype_difference,
    gaps,
    layer_ends,
    longest_run,
    over_documents,
    rise,
    sparse_band,
)


def test_the_interval_is_that_of_documents_drawn_one_by_one():
    rng = np.random.default_rng(3)
    sums = pd.DataFrame({"active": rng.uniform(1, 3, 7), "tokens": rng.integers(3, 9, 7)})
    found = over_documents(sums, lambda sums: sums["active"] / sums["tokens"])
    weights = np.random.default_rng(0).poisson(1.0, (REPLICATES, 7))
    values = []
    for row in weights:
        drawn = [document for document in range(7) for _ in range(row[document])]
        if drawn:
            values.append(sums["active"].iloc[drawn].sum() / sums["tokens"].iloc[drawn].sum())
    assert found.value == pytest.approx(sums["active"].sum() / sums["tokens"].sum())
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(values, (5, 95)))) and found.n == 7


def test_the_interval_has_the_width_of_a_mean():
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = over_documents(pd.DataFrame({"x": values, "n": 1}), lambda sums: sums["x"] / sums["n"])
    half = 1.645 * values.std() / 20
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_one_document_has_no_interval():
    found = over_documents(pd.DataFrame({"x": [1.0]}), lambda sums: sums["x"])
    assert found.reason == "only 1 documents; at least 2 are needed" and np.isnan(found.low)


def test_the_three_costs_are_those_of_sums():
    sums = pd.DataFrame(
        {"tokens": [100], "loss_dense": [300.0], "loss": [310.0], "right_dense": [40], "right": [37], "agreed": [90]}
    )
    found = [float(statistic(sums).iloc[0]) for statistic in (rise, accuracy_lost, agreement)]
    assert found == pytest.approx([np.exp(0.1) - 1, 0.03, 0.9])


def test_gaps_and_costs_are_those_that_were_planted():
    prices = prices_table(gap=0.02)
    found = gaps(prices.query("dtype == 'float32'"), "cett-ppl", ["top-k", "fat"])
    assert set(found) == {
        f"{label} at the ratio of {price}%, {text}"
        for label in ("Top-k", "FAT-ε")
        for price in (1, 10)
        for text in ("english", "python")
    }
    for name, estimate in found.items():
        planted = 0.02 if name.startswith("Top-k") else 0.04
        assert estimate.value == pytest.approx(planted, abs=0.004) and estimate.low < estimate.value < estimate.high
    agreed = gaps(prices.query("dtype == 'float32'"), "cett-ppl", ["top-k"], "agreed")
    assert all(estimate.value == pytest.approx(0.05, abs=0.01) for estimate in agreed.values())
    table = costs(prices).set_index(["text", "dtype", "metric", "price", "solved_on"])
    assert table.loc[("english", "float32", "cett-ppl", 1.0, "english"), "rise"] == pytest.approx(0.01, abs=0.002)
    assert dtype_difference(prices, 1.0).value == pytest.approx(0.002, abs=1e-9)


def test_a_planted_band_is_found_on_one_half_and_measured_on_the_other():
    positions = positions_table(quotient=0.2)
    band, quotient = sparse_band(positions, "english", "first", 0.5)
    assert band == range(3, 7) and quotient.n == 12
    assert quotient.low < 0.2 < quotient.high and quotient.value == pytest.approx(0.2, abs=0.03)
    band, none = sparse_band(positions, "english", "first delimiter", 0.5)
    assert not band and none.reason == "no such band of layers" and none.n == 12


def test_the_tested_half_has_no_say_in_the_band():
    positions = positions_table(quotient=0.2)
    first, second = (positions[positions["document"] % 2 == parity] for parity in (0, 1))
    changed = pd.concat([first, second.assign(activation_ratio=0.4)])
    band, quotient = sparse_band(changed, "python", "first", 0.5)
    assert band == range(3, 7) and quotient.value == pytest.approx(1.0)


def test_ends_of_layers():
    found = layer_ends(positions_table(ends=0.1))
    assert set(found) == {f"{end} layer, {text}" for end in ("first", "last") for text in ("english", "python")}
    assert all(estimate.value == pytest.approx(0.1, abs=0.02) for estimate in found.values())


@pytest.mark.parametrize(
    ("holds", "run"),
    [("", (0, 0)), ("000", (0, 0)), ("0110", (1, 3)), ("11011", (0, 2)), ("1101110", (3, 6)), ("1", (0, 1))],
)
def test_the_longest_run(holds, run):
    assert longest_run([mark == "1" for mark in holds]) == range(*run)
