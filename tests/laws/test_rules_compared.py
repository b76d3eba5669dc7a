"""Rules compared on the same documents and over seeds, against loops over resampled documents and planted answers."""

import numpy as np
import pandas as pd
import pytest
from planted_training_free import tables
from scipy import stats

from sparsity_utils.laws.one_model import REPLICATES
from sparsity_utils.laws.rules_compared import (
    against,
    against_over_seeds,
    block_errors,
    choice,
    chosen,
    over_units,
    perplexity_ratio,
    shares,
)


@pytest.fixture(scope="module")
def planted():
    found = tables(documents=12)
    return found["training_free"], found["training_free_documents"]


def test_one_setting_is_found_among_those_of_its_method(planted):
    table, documents = planted
    assert len(chosen(table[table["model"] == "planted"], choice("teal"))) == 1
    assert len(chosen(documents, choice("wina", level=0.5, by="weights", rotated=True))) == 12
    assert chosen(table, choice("teal", level=0.51)).empty


def test_excesses_are_compared_document_by_document(planted):
    table, documents = planted
    found = against(table, documents, choice("wina"), choice("teal-top-k"))
    one, other = (chosen(documents, choice(name)).to_dict("records") for name in ("wina", "teal-top-k"))
    weights, values = np.random.default_rng(0).poisson(1.0, (REPLICATES, 12)), []
    for row in [np.ones(12), *weights]:
        ours = sum(w * (a["loss"] - a["loss_dense"]) for w, a in zip(row, one, strict=True))
        rival = sum(w * (b["loss"] - b["loss_dense"]) for w, b in zip(row, other, strict=True))
        values.append(ours / rival - 1)
    assert found.value == pytest.approx(values[0]) and found.n == 12
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(values[1:], (2.5, 97.5))))
    assert against(table, documents, choice("wina"), choice("wina")).value == 0


def test_settings_that_skip_other_shares_are_not_compared(planted):
    table, documents = planted
    moved = table.assign(skipped=table["skipped"] + 0.0051 * (table["method"] == "wina"))
    assert "skipped differs by 0.5 points" in against(moved, documents, choice("wina"), choice("teal-top-k")).reason
    seeds = moved[moved["model"] != "planted"]
    assert "skipped differs" in against_over_seeds(seeds, choice("wina"), choice("teal-top-k")).reason
    nowhere = choice("wina", level=0.9)
    assert against(table, documents, nowhere, choice("teal")).reason == "not measured"
    assert against_over_seeds(seeds, nowhere, choice("teal")).reason == "not measured"
    assert perplexity_ratio(documents, nowhere).reason == "not measured"


def test_seeds_have_a_t_interval(planted):
    table, _ = planted
    seeds = table[table["model"] != "planted"]
    found = against_over_seeds(seeds, choice("wina"), choice("teal-top-k"))
    ratios = [
        float(chosen(rows, choice("wina"))["excess"].iloc[0] / chosen(rows, choice("teal-top-k"))["excess"].iloc[0]) - 1
        for _, rows in seeds.groupby("seed")
    ]
    half = stats.t.ppf(0.975, 4) * np.std(ratios, ddof=1) / np.sqrt(5)
    mean = np.mean(ratios)
    assert (found.value, found.low, found.high, found.n) == pytest.approx((mean, mean - half, mean + half, 5))
    assert over_units([0.1]).reason == "only 1; at least 2 are needed"


def test_perplexity_rises_by_the_exponential_of_the_excess(planted):
    _, documents = planted
    rows = chosen(documents, choice("teal"))
    expected = np.exp((rows["loss"] - rows["loss_dense"]).sum() / rows["tokens"].sum())
    assert perplexity_ratio(documents, choice("teal")).value == pytest.approx(expected)


def test_score_and_allocation_share_the_advantage():
    table = tables(excess={("gate", "top-k"): 0.08, ("gate", "cett"): 0.04, ("n", "top-k"): 0.02, ("n", "cett"): 0.01})[
        "training_free"
    ].query("model == 'planted'")
    found = shares(table, 0.5)  # factors: 4 by the score, 2 by the allocation, 8 in all
    assert found["advantage"] == pytest.approx(1 / 8 - 1)
    assert (found["score"], found["allocation"]) == pytest.approx((2 / 3, 1 / 3))
    assert shares(table.assign(excess=-table["excess"]), 0.5) is None and shares(table, 0.9) is None


def test_errors_of_blocks_are_quotients():
    blocks = pd.DataFrame({"uniform": [0.2, 0.4], "greedy": [0.1, 0.3]})
    assert block_errors(blocks).tolist() == pytest.approx([0.5, 0.75])
