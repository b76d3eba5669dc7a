"""Claims, how an estimate decides them, and the tables of verdicts."""

import re
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
from planted import AT_SECOND, SHAPES, study

from sparsity_utils.findings import (
    claims,
    digits,
    lazy_neuron,
    q_sparse,
    relu_vs_silu,
    scale_insensitivity,
    width_depth_ratio,
)
from sparsity_utils.findings.claims import Claim, Verdicts
from sparsity_utils.laws import data_law
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Estimate, no_estimate
from sparsity_utils.paths import collection

FINDINGS = {notebook.stem.partition("_")[2]: None for notebook in collection()} | dict.fromkeys(
    ("one_dimension", "initial_gradient", "digits")
)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals are tested with the laws; here they only need to be there."""
    monkeypatch.setattr(data_law, "RESAMPLES", 20)


def claim(**changes):
    usual = {"key": "key", "question": "made_up", "claim": "It is", "published": "so", "unit": "points", "test": "none"}
    return Claim(**usual | changes)


def estimate(low, high, reason=""):
    return Estimate((low + high) / 2, low, high, 4, reason)


@pytest.mark.parametrize(
    ("region", "low", "high", "word"),
    [
        ((0, np.inf), 0.1, 2, SUPPORTED),
        ((0, np.inf), -0.1, 2, INCONCLUSIVE),
        ((0, np.inf), 0, 0, INCONCLUSIVE),
        ((0, np.inf), -2, -0.1, NOT_SUPPORTED),
        ((-1, 1), -0.9, 0.9, SUPPORTED),
        ((-1, 1), -0.9, 1.1, INCONCLUSIVE),
        ((-1, 1), 1.1, 2, NOT_SUPPORTED),
        ((-1, 1), -2, -1.1, NOT_SUPPORTED),
        ((-1, 1), -2, 2, INCONCLUSIVE),
        ((-1, 1), np.nan, np.nan, INCONCLUSIVE),
    ],
)
def test_an_estimate_inside_the_region_supports_and_wholly_outside_speaks_against(region, low, high, word):
    found = claim(region=region).judged(estimate(low, high), "first", "", "second")
    assert (found.verdict, found.reason) == (word, "first; second")
    assert (found.here, *found.interval) == pytest.approx(
        (50 * (low + high), 100 * low, 100 * high), nan_ok=True
    )  # in percent


@pytest.mark.parametrize(
    ("ends", "word", "name"),
    [
        ({"a": (1, 2), "b": (0.5, 3)}, SUPPORTED, "b"),
        ({"a": (-1, 2), "b": (-0.5, 3), "c": (1, 2)}, INCONCLUSIVE, "a"),
        ({"a": (-1, 2), "b": (np.nan, np.nan)}, INCONCLUSIVE, "b"),
        ({"a": (-2, -1), "b": (np.nan, np.nan), "c": (-5, 1)}, NOT_SUPPORTED, "a"),
    ],
)
def test_a_claim_on_several_holds_if_it_holds_of_each_and_names_the_one_that_decides(ends, word, name):
    estimates = {key: estimate(*pair, "none" if np.isnan(pair[0]) else "") for key, pair in ends.items()}
    found = claim().judged_all(estimates, "runs", "a note")
    assert (found.verdict, found.interval) == (word, pytest.approx(tuple(100 * np.array(ends[name])), nan_ok=True))
    rests_on = "none" if np.isnan(ends[name][0]) else "4 runs"
    rests_on = "none" if np.isnan(ends[name][0]) else "4 runs"
    assert found.reason == f"{rests_on}; decides: {name}; a note"


def test_without_an_estimate_nothing_is_decided():
    found = claim().undecided("nothing was run")
    assert (found.verdict, found.reason) == (INCONCLUSIVE, "nothing was run") and np.isnan(found.here)
    assert claim().counted(no_estimate("too few"), "runs").reason == "too few"


@pytest.mark.parametrize(("shapes", "seeds"), [(SHAPES[:1], (0,)), (SHAPES[:2], (0,)), (SHAPES[:1], (0, 1))])
def test_small_studies_pass_through_every_question(shapes, seeds):
    checkpoints = study(shapes, seeds=seeds)
    for finding in (relu_vs_silu, width_depth_ratio, scale_insensitivity):
        rows = finding.verdicts(finding.analyse(checkpoints))
        words = {row.verdict for row in rows}
        assert words <= {SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE} and all(row.reason for row in rows)
        assert finding is relu_vs_silu or words == {INCONCLUSIVE}


def test_tables_are_text_rounded_and_complete():
    rows = Verdicts([claim().judged(estimate(0.6, 0.6)), claim(claim="It may be").undecided("no runs")])
    table, details = rows.table(), rows.details()
    assert list(table.columns) == ["question", "published", "here", "interval", "verdict"]
    assert table.loc[0].tolist() == ["It is", "so", "60.0 points", "60.0 to 60.0", SUPPORTED]
    finer = Verdicts([claim(scale=1.0, decimals=3).judged(estimate(-0.0044, 0.0316))]).table()
    assert finer.loc[0, ["here", "interval"]].tolist() == ["0.014 points", "-0.004 to 0.032"]
    assert table.loc[1].tolist() == ["It may be", "so", "none", "none", INCONCLUSIVE]
    assert details.loc[1].tolist() == ["It may be", "none", "90% interval above 0", "no runs"]
    rounded = [claims._rounded(x, 2) for x in (-0.001, 0.0, -1.234, 12.34, -123.4)]
    assert rounded == ["0.00", "0.00", "-1.23", "12.3", "-123"]


def test_an_interval_of_another_level_says_so():
    rows = Verdicts([claim(level=0.95).judged(estimate(0.5, 0.7)), claim(level=0.95).undecided("no runs")])
    assert rows.table()["interval"].tolist() == ["50.0 to 70.0 (95%)", "none"]
    rows = Verdicts([claim(level=0.9973).judged(estimate(0.5, 0.7))])
    assert rows.table()["interval"].tolist() == ["50.0 to 70.0 (99.7%)"]


@pytest.fixture(scope="module")
def stated():
    """The claims of the whole collection."""
    return pd.concat([import_module(f"sparsity_utils.findings.{name}").claims() for name in FINDINGS])


def test_no_claim_is_stated_twice(stated):
    assert stated["question"].is_unique and len(stated) > 40


def test_the_primary_claims_are_those_that_the_docstring_names(stated):
    primary = set(stated.loc[stated["rank"] == "primary", "question"])
    scale = [scale_insensitivity.ON_LINES[name].claim for name in ("relu", "silu")]
    at_both = {*(claim.claim for claim in relu_vs_silu.ON_LINES), *scale}
    planned = {*at_both, *(at + AT_SECOND for at in at_both), width_depth_ratio.RATIO_RISES.claim}
    assert len(planned) == 13 and " ".join(claims.__doc__.split()).count("Thirteen claims of the collection") == 1
    seeds = {lazy_neuron: 3, q_sparse: 3, digits: 7}  # experiments whose unit is a seed
    words = {3: "three of", 7: "the seven of"}
    for finding, count in seeds.items():
        own = finding.claims()
        named = set(own.loc[own["rank"] == "primary", "question"])
        assert len(named) == count and f"- {words[count]} `{finding.__name__.partition('.')[2]}`" in claims.__doc__
        planned |= named
    assert primary == planned
    ranks = stated.set_index("question")["rank"]
    assert ranks["The ReLU share of non-zero neurons does not depend on scale"] == "secondary"


def test_a_threshold_names_the_level_of_its_interval():
    held = [value for name in FINDINGS for value in vars(import_module(f"sparsity_utils.findings.{name}")).values()]
    every = [one for value in held for one in (value if isinstance(value, tuple | list) else [value])]
    found = {one for one in every if isinstance(one, Claim) and "% interval" in one.threshold}
    assert len(found) > 30
    for one in found:
        assert set(re.findall(r"(\d+)% interval", one.threshold)) == {f"{100 * one.level:.0f}"}, one.key
