"""Metrics on made-up tables whose answer is known."""

import numpy as np
import pandas as pd
import pytest
from planted import check_stated

from sparsity_utils.console import InputError
from sparsity_utils.findings import metrics
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED


def metrics_table(gap=0.05, cut=0.6, runs=3):
    """Loss added by sparsity: 0.01 / ratio for CETT, `gap` more for Top-k; plain ReLU keeps 30% and costs nothing."""
    rows = []
    for run in range(runs):

        def add(metric, setting, ratio, added, run=run):
            rows.append((f"run{run}", "relu", metric, setting, ratio * (1 + 0.01 * run), np.exp(added)))

        add("relu", np.nan, 0.3, 0.0)
        add("cett-ppl", 1.0, 0.3 * (1 - cut), 0.01)
        for ratio in (0.05, 0.1, 0.2, 0.4):
            add("cett", ratio, ratio, 0.01 / ratio)
        for ratio in (0.06, 0.12, 0.24, 0.48):
            add("top-k", ratio, ratio, 0.01 / ratio + gap)
            add("fat", ratio, ratio, 0.01 / ratio + 2 * gap)
    return pd.DataFrame(rows, columns=["run", "activation", "metric", "setting", "activation_ratio", "ppl_ratio"])


def test_metrics_verdicts():
    lowest, cut = metrics.verdicts(metrics_table())
    assert (lowest.verdict, cut.verdict) == (SUPPORTED, SUPPORTED)
    assert lowest.here == pytest.approx(0.05, abs=0.02) and "decides: top-k" in lowest.reason
    assert cut.here == pytest.approx(60)
    lowest, cut = metrics.verdicts(metrics_table(gap=-0.05, cut=-0.1))
    assert (lowest.verdict, cut.verdict) == (NOT_SUPPORTED, NOT_SUPPORTED)
    assert {row.verdict for row in metrics.verdicts(metrics_table(runs=1))} == {INCONCLUSIVE}


def test_metrics_that_share_no_activation_ratio_are_inconclusive():
    table = metrics_table()
    table.loc[table["metric"] == "fat", "activation_ratio"] += 0.5
    lowest, _ = metrics.verdicts(table)
    assert lowest.verdict == INCONCLUSIVE and "decides: fat" in lowest.reason
    assert metrics.verdicts(table[table["metric"] == "relu"])[0].verdict == INCONCLUSIVE


def test_gap_is_the_mean_difference_on_the_shared_useful_range():
    """Straight lines in log ratio are interpolated exactly; where CETT triples perplexity nothing is compared."""
    rows = [("cett", 0.01, np.log(3)), ("cett", 0.1, 0.2), ("cett", 0.4, 0.1)]
    rows += [("top-k", 0.01, 9.0), ("top-k", 0.1, 0.3), ("top-k", 0.4, 0.1), ("fat", 0.1, 0.2), ("fat", 0.4, 0.1)]
    table = pd.DataFrame(rows, columns=["metric", "activation_ratio", "loss"])
    gaps = metrics._loss_gaps(table.assign(ppl_ratio=np.exp(table["loss"])))
    assert gaps == pytest.approx({"top-k": 0.05, "fat": 0.0})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.drop(columns="ppl_ratio"), "metrics table lacks the columns ppl_ratio"),
        (lambda t: t.assign(ppl_ratio=np.nan), "metrics table has no ppl_ratio"),
        (lambda t: pd.concat([t, t]), "metrics table has two rows for run run0, metric relu"),
    ],
)
def test_unusable_metrics_tables_are_input_errors(spoil, message):
    with pytest.raises(InputError, match=message):
        metrics.verdicts(spoil(metrics_table()))


def test_claims_are_stated_before_their_verdicts():
    check_stated(metrics, metrics.verdicts(metrics_table()))
