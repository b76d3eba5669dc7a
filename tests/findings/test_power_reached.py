"""The power that a study reached: effects of the plan, spread of the runs."""

import numpy as np
import pandas as pd
import pytest
from planted import study, with_d_ff
from scipy import stats

from sparsity_utils import paths
from sparsity_utils.findings import one_dimension, power, power_reached
from sparsity_utils.findings.relu_vs_silu import RELU_SPARSER
from sparsity_utils.laws import power_inputs
from sparsity_utils.laws.lines import MAIN, SECOND

SHAPES = {MAIN: ((16, 2), (32, 4), (48, 6)), SECOND: ((32, 2), (48, 3), (64, 4))}
EFFECT = 0.02  # of the plan, in every outcome


def lines(by_seed):
    """SiLU lies 0.2 above ReLU; its two seeds by `by_seed` above and below that."""
    tables = {}
    for line, shapes in SHAPES.items():
        table = with_d_ff(study(shapes, noise=1e-5, limit=lambda a, ratio, size: 0.2 + 0.2 * (a == "silu")))
        table["activation_ratio"] += by_seed * (2 * table["seed"] - 1) * (table["activation"] == "silu")
        tables[line] = table
    return tables


@pytest.fixture(scope="module")
def shapes():
    wide = tuple((8 * d, 4) for d in range(2, 8))
    return with_d_ff(study(wide, ("relu",), limit=lambda a, ratio, size: 0.1 + 1e-3 * ratio))


@pytest.fixture(scope="module")
def inputs():
    """A plan that supposed runs to vary a hundred times as much as they do, with components of its own."""
    names = [(name, ratio) for name in power_inputs.OUTCOMES for ratio in (8, 16)]
    names.append((power_inputs.RATIO_OUTCOME, np.nan))
    rows = [(name, ratio, 0.4, EFFECT, 3.0, 2.0, 6, 4) for name, ratio in names]
    return pd.DataFrame(rows, columns=power_inputs.COLUMNS)


def test_effects_are_those_of_the_plan_and_the_spread_that_of_the_runs(shapes, inputs):
    """Two seeds of each of six sizes on two lines, four degrees of freedom: a noncentral t distribution."""
    tables, draws = lines(by_seed=0.02), 600
    table = power_reached.reached_table(tables, shapes, pd.DataFrame(), inputs, draws)
    assert list(table.columns) == power.COLUMNS
    rows = table[table["claim"] == RELU_SPARSER.claim].set_index("effect")
    spread = power_inputs.spreads(tables, shapes)["relu_sparser"].rows.iloc[0]
    assert spread["sd_seed"] == pytest.approx(0.02 * np.sqrt(2), rel=0.01) and spread["sd_fit"] == 0
    error = spread["sd_seed"] / np.sqrt(2 * 3)  # of the mean of a line
    expected = stats.nct.sf(stats.t.ppf(0.95, 4), 4, EFFECT / error)
    found = rows.loc[power.FIRST]
    assert found["value"] == pytest.approx(100 * EFFECT) and 0.2 < expected < 0.8
    assert found["supported"] == pytest.approx(expected, abs=3.5 * np.sqrt(expected * (1 - expected) / draws))
    assert (found["runs"], found["sizes"]) == (12, 6)


def test_what_varies_less_than_planned_is_decided(shapes, inputs):
    table = power_reached.reached_table(lines(by_seed=1e-3), shapes, pd.DataFrame(), inputs, draws=40)
    rows = table[(table["claim"] == RELU_SPARSER.claim) & (table["effect"] == power.FIRST)]
    assert rows["supported"].tolist() == [1.0]
    assert one_dimension.DEPTH_DRIVES.claim not in set(table["claim"])  # without shapes of one dimension at a time


def test_what_was_reached_is_shown_beside_what_was_promised(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    about = {"question": "relu_vs_silu", "claim": "it falls", "rank": "primary", "unit": "points", "value": 2.0}
    shares = pd.DataFrame({"supported": [0.804, 0.5], "not_supported": 0.0, "inconclusive": [0.196, 0.5]})
    shares = pd.concat([shares, shares.iloc[:1]], ignore_index=True)
    promised = shares.assign(**about, effect=["published", "margin", "first study"], runs=24, sizes=7)
    promised.to_csv(tmp_path / "power.csv")
    alone = power.shown_power("relu_vs_silu")
    assert alone.columns.tolist() == ["claim", "rank", "effect", "supported %", "not supported %", "inconclusive %"]
    reached = promised.iloc[[0, 2]].assign(supported=0.3, inconclusive=0.7, value=[2.0, 1.9])  # the last is another
    reached.to_csv(tmp_path / power.REACHED)
    shown = power.shown_power("relu_vs_silu")
    assert shown["effect"].tolist() == ["published: 2 points", "margin: 2 points", "first study: 2 points"]
    assert shown["supported % promised"].tolist() == [80, 50, 80]
    assert shown["supported % reached"].tolist()[0] == 30 and shown["supported % reached"].iloc[1:].isna().all()
    assert shown["inconclusive % reached"].iloc[0] == 70
