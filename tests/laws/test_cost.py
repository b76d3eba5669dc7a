"""Weights read, against counting the entries of three small matrices."""

import math

import pandas as pd
import pytest
import torch

from sparsity_utils.laws.cost import weights_read_at, with_weights_read
from sparsity_utils.neurons.rules import METRICS


@pytest.mark.parametrize("metric", ["relu", "top-k", "top-k-norm", "fat", "cett", "cett-ppl"])
def test_the_share_is_that_of_counted_entries(metric):
    d, d_ff = 7, 20
    generator = torch.Generator().manual_seed(0)
    nonzero = torch.rand(d_ff, generator=generator) < 0.6
    active = nonzero & (torch.rand(d_ff, generator=generator) < 0.5)
    gate, up, down = (
        torch.zeros(rows, columns, dtype=torch.bool) for rows, columns in ((d_ff, d), (d_ff, d), (d, d_ff))
    )
    gate[:] = True
    up[nonzero if metric in ("top-k-norm", "cett", "cett-ppl") else active] = True
    down[:, active] = True
    counted = sum(int(matrix.sum()) for matrix in (gate, up, down)) / (3 * d * d_ff)
    found = METRICS[metric].weights_read(float(active.double().mean()), float(nonzero.double().mean()))
    assert found == pytest.approx(counted, abs=1e-12)


def test_the_share_of_non_zeros_is_that_of_the_same_run():
    table = pd.DataFrame(
        {
            "run": ["a", "a", "b", "b"],
            "metric": ["relu", "cett", "cett-ppl", "relu"],
            "activation_ratio": [0.4, 0.1, 0.3, 1.0],
        }
    )
    read = with_weights_read(table)["weights_read"].tolist()
    assert read == pytest.approx([1.8 / 3, 1.5 / 3, 2.3 / 3, 1.0])


def test_weights_read_at_a_rise_lie_between_the_measured_settings():
    rows = [("a", "relu", 0.5, 1.0), ("a", "fat", 0.3, 1.02), ("a", "fat", 0.1, 1.08), ("a", "cett", 0.2, 1.02)]
    rows += [("a", "cett", 0.1, 1.03), ("a", "cett-ppl", 0.25, 1.01)]
    table = pd.DataFrame(rows, columns=["run", "metric", "activation_ratio", "ppl_ratio"])
    found = weights_read_at(table.assign(activation="relu", d_model=8, n_layers=2), 5.0).loc["relu", 8, 2]
    share = (math.log(1.05) - math.log(1.02)) / (math.log(1.08) - math.log(1.02))
    assert found["fat"] == pytest.approx((1.6 - share * 0.4) / 3)
    assert math.isnan(found["cett"])  # never cost 5%
    assert list(found.index) == ["cett", "fat"]


def test_weights_read_are_no_mean_of_the_runs_that_reach_the_price():
    rows = [("a", "fat", 0.3, 1.02), ("a", "fat", 0.1, 1.08), ("b", "fat", 0.3, 1.06), ("b", "fat", 0.1, 1.08)]
    rows += [(run, "relu", 0.5, 1.0) for run in "ab"]
    table = pd.DataFrame(rows, columns=["run", "metric", "activation_ratio", "ppl_ratio"])
    table = table.assign(activation="relu", d_model=8, n_layers=2)
    assert math.isnan(weights_read_at(table, 5.0).loc[("relu", 8, 2), "fat"])  # b costs more at its mildest
    shares = [math.log(1.07 / low) / math.log(1.08 / low) for low in (1.02, 1.06)]  # of the way to the harsher setting
    read = sum((1.6 - 0.4 * share) / 3 for share in shares) / 2
    assert weights_read_at(table, 7.0).loc[("relu", 8, 2), "fat"] == pytest.approx(read)
