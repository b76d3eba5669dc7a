"""What would decide open claims: seeds help where seeds vary, sizes where sizes do; plans are what they say."""

import re

import numpy as np
import pandas as pd
import pytest
from planted import study, with_d_ff
from scipy import stats

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.findings import deciding
from sparsity_utils.findings.relu_vs_silu import RELU_SPARSER
from sparsity_utils.findings.width_depth_ratio import RATIO_RISES
from sparsity_utils.laws import power_inputs
from sparsity_utils.laws.lines import MAIN, SECOND
from sparsity_utils.models.shapes import non_embedding_parameters

SHAPES = {MAIN: ((16, 2), (32, 4), (48, 6)), SECOND: ((32, 2), (48, 3), (64, 4))}
SPARSER = 0.05  # SiLU less ReLU
WIDE = study(tuple((8 * d, 4) for d in range(2, 8)), ("relu",), limit=lambda a, ratio, size: 0.1 + 1e-3 * ratio)


def planted(by_size=0.0, by_seed=0.0, second=0.0):
    """Lines on which SiLU lies about SPARSER above ReLU, its sizes and its two seeds in turn above and below that.

    second: what it lies further above on the second line.
    """
    tables = {}
    for line, shapes in SHAPES.items():
        table = with_d_ff(study(shapes, noise=1e-5, limit=lambda a, ratio, size: 0.2 + SPARSER * (a == "silu")))
        place = table["n_layers"].rank(method="dense") - 2  # -1, 0, 1
        off = by_size * place + by_seed * (2 * table["seed"] - 1) + second * (line == SECOND)
        table["activation_ratio"] += off * (table["activation"] == "silu")
        tables[line] = table
    return tables


def simulated(lines, plans, draws):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deciding, "PLANS", [plan for plan in deciding.PLANS if plan.name in plans])
        return deciding.deciding_table(lines, with_d_ff(WIDE), draws)


def shares(table, claim):
    return (1 - table[table["claim"] == claim].set_index("plan")["inconclusive"]).to_dict()


def test_a_longer_line_goes_on_as_it_did():
    runs = deciding.relu_runs(planted()[MAIN])
    longer = deciding._longer(runs, 2)
    assert longer["d_model"].unique().tolist() == [16, 32, 48, 64, 80]
    assert longer["n_layers"].unique().tolist() == [2, 4, 6, 8, 10] and longer["d_ff"].max() == 200
    largest = longer[longer["d_model"] == 80]
    assert largest["seed"].tolist() == [0, 1] and largest["parameters"].eq(non_embedding_parameters(80, 10, 2.5)).all()
    alone = deciding._longer(runs[runs["d_model"] == 16], 1)
    assert len(alone) == 4 and alone["d_model"].eq(16).all()  # one size gives no step


def test_every_copy_of_a_run_has_a_seed_of_its_own():
    runs = deciding.relu_runs(planted()[MAIN])
    more = deciding._more_seeds(runs, 4)
    assert len(more) == 24 and not more.duplicated().any()
    assert more.groupby("d_model")["seed"].apply(sorted).tolist() == [list(range(8))] * 3
    assert deciding._more_seeds(runs.iloc[:0], 4).empty


def test_sizes_decide_what_seeds_cannot():
    plans = ("as recorded", "8 times the seeds", "4 larger sizes")
    table = simulated(planted(by_size=0.04), plans, 150)
    assert list(table.columns) == deciding.COLUMNS
    decided = shares(table, RELU_SPARSER.claim)
    assert abs(decided["8 times the seeds"] - decided["as recorded"]) < 0.1
    assert decided["4 larger sizes"] > decided["as recorded"] + 0.15


def test_shares_are_the_mean_of_the_noncentral_t_distribution_over_what_spreads_may_be():
    """Two seeds a size, or sixteen; three sizes a line, and six less two lines leave four degrees of freedom."""
    lines = planted(by_seed=0.02)
    found = power_inputs.spreads(lines, with_d_ff(WIDE))["relu_sparser"]
    effect = found.rows["first_effect"].iloc[0]
    assert found.rows["sd_seed"].iloc[0] == pytest.approx(0.02 * np.sqrt(2), rel=0.01)
    assert found.rows["sd_fit"].iloc[0] == 0
    seed, fit = found.squares.drawn(np.random.default_rng(7), 20_000)
    table = simulated(lines, ("as recorded", "8 times the seeds"), 400)
    table = table[table["claim"] == RELU_SPARSER.claim].set_index("plan")
    expected = {}
    for plan, seeds in (("as recorded", 2), ("8 times the seeds", 16)):
        error = np.sqrt((fit**2 + seed**2 / seeds) / 3)
        above = expected[plan] = stats.nct.sf(stats.t.ppf(0.95, 4), 4, effect / error).mean()
        assert table.loc[plan, "supported"] == pytest.approx(above, abs=3.5 * np.sqrt(above * (1 - above) / 400))
    assert expected["8 times the seeds"] > expected["as recorded"] + 0.1
    assert table["effect"].tolist() == pytest.approx([100 * effect] * 2)
    assert table.loc["8 times the seeds", ["runs", "sizes", "training"]].tolist() == [96, 6, 8]


def test_each_line_has_its_own_effect_however_near_their_ratios(monkeypatch):
    near = {MAIN: ((48, 3), (64, 4), (80, 5)), SECOND: ((34, 2), (50, 3), (66, 4))}
    monkeypatch.setattr(f"{__name__}.SHAPES", near)
    table = simulated(planted(by_size=0.01, by_seed=0.01, second=0.15), ("as recorded", "4 larger sizes"), 5)
    effects = table[table["claim"].str.startswith(RELU_SPARSER.claim)].pivot(
        index="claim", columns="plan", values="effect"
    )
    assert (effects["as recorded"] == effects["4 larger sizes"]).all()
    first, second = effects["as recorded"]
    assert second - first == pytest.approx(15)


def test_sizes_of_one_layer_are_left_out(monkeypatch):
    lines = planted(by_size=0.01, by_seed=0.01)
    single = with_d_ff(study(((8, 1),), noise=1e-5))
    with_one = {MAIN: pd.concat([single, lines[MAIN]], ignore_index=True), SECOND: lines[SECOND]}
    expected, found = (simulated(tables, ("as recorded",), 5) for tables in (lines, with_one))
    pd.testing.assert_frame_equal(found, expected)


def test_shapes_of_one_size_have_plans_of_seeds_only():
    table = deciding.deciding_table(planted(by_size=0.01, by_seed=0.01), with_d_ff(WIDE), draws=5)
    ratio = table[table["claim"] == RATIO_RISES.claim]
    assert ratio["plan"].tolist() == [plan.name for plan in deciding.PLANS if not plan.sizes]
    assert ratio["runs"].tolist() == [12, 24, 48, 96]


@pytest.mark.parametrize(
    ("kept", "why"),
    [
        ("seed == 0", "too few runs to tell seeds from sizes in loss_difference, .*; give ReLU and SiLU runs of three"),
        (
            "n_layers in (2, 4)",
            "too few runs to tell seeds from sizes in relu_ratio, .*three sizes or more on each",
        ),
        ("seed == 0 or activation == 'silu'", "too few runs to tell seeds from sizes in loss_difference"),
        ("activation == 'relu'", "no runs for loss_difference, silu_rises, relu_sparser, silu_ratio; give ReLU"),
    ],
)
def test_a_study_that_does_not_tell_is_refused_and_known_beforehand(kept, why, tmp_path):
    lines = {line: table.query(kept) for line, table in planted().items()}
    shapes = with_d_ff(WIDE)
    with pytest.raises(InputError, match=why):
        deciding.deciding_table(lines, shapes, draws=5)
    for name, table in zip(deciding.TABLES, (*lines.values(), shapes), strict=True):
        assert "no table for" in deciding.cannot_tell(deciding.Tables("planted", tmp_path))
        table.to_csv(tmp_path / f"{name}.csv")
    assert re.search(why, deciding.cannot_tell(deciding.Tables("planted", tmp_path)))


def test_a_line_whose_last_step_drops_layers_goes_on_with_what_grows():
    runs = deciding.relu_runs(planted()[MAIN])
    shrunk = runs.assign(n_layers=runs["n_layers"].replace(6, 3))
    assert deciding._longer(shrunk, 4).query("d_model == 112")["n_layers"].tolist() == [3, 3]


def test_open_claims_alone_are_shown_with_the_cheapest_plan_that_is_enough(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    plans = [("as recorded", 1.0, 0.5), ("8 times the seeds", 8.0, 0.1), ("1 larger size", 4.0, 0.2)]
    rows = [
        {"question": "relu_vs_silu", "claim": claim, "effect": 1.29, "unit": "points", "runs": 1, "sizes": 1}
        | {"plan": plan, "training": training, "inconclusive": high if claim == "never" else still}
        for claim, high in (("open", 0), ("closed", 0), ("never", 0.9))
        for plan, training, still in plans
    ]
    pd.DataFrame(rows).to_csv(tmp_path / deciding.FILE)
    judged = pd.DataFrame(
        {"question": ["open", "closed", "never"], "verdict": ["inconclusive", "supported", "inconclusive"]}
    )
    judged.to_csv(tmp_path / "verdicts.csv")
    shown = deciding.shown_deciding("relu_vs_silu")
    assert shown["claim"].tolist() == ["open", "never"] and shown["found"].tolist() == ["1.29 points"] * 2
    assert shown["enough"].tolist() == ["1 larger size: 4 times the training", "none of these"]
    assert shown.loc[0, ["as recorded %", "1 larger size %"]].tolist() == [50, 80]
    assert deciding.shown_deciding("width_depth_ratio").empty
    (tmp_path / deciding.FILE).unlink()
    assert deciding.shown_deciding("relu_vs_silu").empty and "no deciding.csv" in capsys.readouterr().err


def test_the_recorded_table_is_that_of_the_recorded_study():
    """What all rows are about, and the shares of the first plan."""
    stored, tables = pd.read_csv(paths.RESULTS / deciding.FILE), deciding.lines_and_shapes(deciding.Tables.recorded())
    assert deciding.cannot_tell(deciding.Tables.recorded()) == ""
    shares = ["supported", "not_supported", "inconclusive"]
    few = deciding.deciding_table(*tables, draws=2)
    pd.testing.assert_frame_equal(few.drop(columns=shares), stored.drop(columns=shares), rtol=1e-4)
    np.testing.assert_allclose(stored[shares].sum(axis=1), 1, atol=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deciding, "PLANS", deciding.PLANS[:1])
        first = deciding.deciding_table(*tables)
    np.testing.assert_allclose(first[shares], stored[stored["plan"] == "as recorded"][shares], atol=0.011)
