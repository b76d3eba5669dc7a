"""The power table: planted components and effects come back, and shares agree with the formula of a t test."""

import numpy as np
import pandas as pd
import pytest
from planted import AT_SECOND, study
from scipy import stats
from small import profile_content, write_profile, write_text

from sparsity_utils.console import InputError
from sparsity_utils.findings import one_dimension, power, relu_vs_silu, scale_insensitivity, width_depth_ratio
from sparsity_utils.laws import data_law, power_inputs
from sparsity_utils.laws.lines import MAIN, SECOND
from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.study.profiles import read_profile

MADE = dict.fromkeys((*power_inputs.OUTCOMES, power_inputs.RATIO_OUTCOME), (0.01, 0.005))  # sd_seed, sd_fit


def inputs(first=0.02, level=0.4, ratios=(8, 16), **changed):
    rows = []
    for name, (seed, fit) in (MADE | changed).items():
        for ratio in ratios if name in power_inputs.OUTCOMES else (np.nan,):
            rows.append((name, ratio, level, first, seed, fit, 6, 4))
    return pd.DataFrame(rows, columns=power_inputs.COLUMNS)


def runs(*shapes):
    """(d_model, n_layers, d_ff, seeds) as a plan has them; SiLU runs beside ReLU are not counted twice."""
    return [
        (
            ModelConfig(d_model, n_layers, activation, head_size=8, ffn_ratio=d_ff / d_model),
            TrainConfig(90000, seed=seed),
        )
        for d_model, n_layers, d_ff, seeds in shapes
        for activation in ("relu", "silu")
        for seed in range(seeds)
    ]


LINES = {
    "relu_vs_silu": runs((16, 2, 40, 3), (32, 4, 80, 3), (48, 6, 120, 3)),
    "second_line": runs((32, 2, 80, 3), (48, 3, 120, 3), (64, 4, 160, 3)),
}
DIMENSIONS = {
    "one_dimension": runs(
        *((32, layers, 80, 2) for layers in (2, 4, 8)), (16, 4, 80, 2), (64, 4, 80, 2), (32, 4, 160, 2)
    )
}


def by_effect(table, claim):
    return table[table["claim"] == claim].set_index("effect")


def one_sided_power(effect, error, dof, level=0.95):
    """Probability that a t interval lies above 0."""
    return stats.nct.sf(stats.t.ppf(level, dof), dof, effect / error)


def test_components_that_were_planted_come_back():
    rng, size = np.random.default_rng(0), np.repeat(range(8), [5, 3, 2, 1, 4, 3, 2, 4])
    x = np.linspace(0, 1, 8)[size]
    design = np.column_stack([np.ones(size.size), x])
    found = []
    for _ in range(800):
        values = 0.3 + 2 * x + 0.02 * rng.normal(size=8)[size] + 0.01 * rng.normal(size=size.size)
        squares = power_inputs.squares(values, size, design)
        seed, fit = squares.components()
        found.append((seed**2, fit**2))
    assert (squares.degrees_seed, squares.degrees_fit) == (16, 6)
    assert np.sqrt(np.mean(found, axis=0)) == pytest.approx([0.01, 0.02], rel=0.06)  # truncation at 0 lifts it a little


def test_components_of_a_balanced_design_are_those_of_the_analysis_of_variance():
    rng, size = np.random.default_rng(1), np.repeat(range(5), 3)
    values = 3 * rng.normal(size=5)[size] + rng.normal(size=15)
    squares = power_inputs.squares(values, size, np.ones((15, 1)))
    (seed, fit), degrees = squares.components(), [squares.degrees_seed, squares.degrees_fit]
    groups = values.reshape(5, 3)
    within = groups.var(axis=1, ddof=1).mean()
    between = 3 * groups.mean(axis=1).var(ddof=1)
    assert (seed, fit, degrees) == (
        pytest.approx(np.sqrt(within)),
        pytest.approx(np.sqrt((between - within) / 3)),
        [10, 4],
    )


def test_a_negative_component_is_zero_and_single_seeds_leave_it_unknown():
    values, size = np.array([1.0, -1, 1, -1]), np.array([0, 0, 1, 1])
    assert power_inputs.squares(values, size, np.ones((4, 1))).components() == pytest.approx((np.sqrt(2), 0))
    alone = power_inputs.squares(values, np.arange(4), np.ones((4, 1)))
    assert np.isnan(alone.components()).all() and (alone.degrees_seed, alone.degrees_fit) == (0, 3)


def test_drawn_components_cover_the_truth_as_often_as_they_should():
    """The fiducial 5% and 95% points of both sums of squares lie around what was planted in 90% of studies."""
    rng, size, below = np.random.default_rng(2), np.repeat(range(6), 3), []
    for _ in range(300):
        values = 0.02 * rng.normal(size=6)[size] + 0.01 * rng.normal(size=18)
        squares = power_inputs.squares(values, size, np.ones((18, 1)))
        seed, fit = squares.drawn(rng, 200)
        assert seed.shape == fit.shape == (200, 1)
        between = 3 * fit**2 + seed**2  # the variance of the mean of a size, times its runs
        below.append([np.mean(seed < 0.01), np.mean(between < 3 * 0.02**2 + 0.01**2)])
    covered = np.mean((np.array(below) > 0.05) & (np.array(below) < 0.95), axis=0)
    np.testing.assert_allclose(covered, 0.9, atol=0.06)
    assert np.all(squares.drawn(np.random.default_rng(0), 5)[0] == squares.drawn(np.random.default_rng(0), 5)[0])


def test_inputs_of_a_study_with_planted_slopes(monkeypatch):
    monkeypatch.setattr(data_law, "RESAMPLES", 20)
    shapes = ((16, 1), (16, 2), (24, 3), (32, 4))
    main = study(
        shapes, noise=1e-4, limit=lambda a, ratio, size: 0.3 - 0.04 * np.log10(size / 1e5) + 0.1 * (a == "silu")
    )
    second = study(((32, 2), (48, 3), (64, 4)), noise=1e-4)
    main["nonzero_share"] = np.where(main["n_layers"] > 1, 0.3, 0.9)
    wide = study(tuple((8 * d, 4) for d in range(2, 8)), ("relu",), limit=lambda a, ratio, size: 0.1 + 1e-3 * ratio)
    table = power_inputs.power_inputs({MAIN: main, SECOND: second}, wide).set_index(["outcome", "width_depth_ratio"])
    assert list(table.reset_index().columns) == power_inputs.COLUMNS
    assert table.loc[("relu_ratio", 8), "first_effect"] == pytest.approx(-0.04, abs=2e-3)
    assert table.loc[("relu_ratio", 16), "first_effect"] == pytest.approx(0, abs=2e-3)
    assert table.loc[("relu_sparser", 8), "first_effect"] == pytest.approx(0.1, abs=0.02)
    assert table.loc[("nonzero_share", 8), ["mean", "first_effect"]].tolist() == pytest.approx([0.3, 0], abs=1e-9)
    assert table.loc[("relu_ratio", 8), ["degrees_seed", "degrees_fit"]].tolist() == [6, 2]  # one layer is left out
    ratio = table.loc["shape_ratio"].iloc[0]
    assert ratio["first_effect"] == pytest.approx(1e-3, rel=0.05) and ratio["degrees_fit"] == 4


@pytest.fixture(scope="module")
def table():
    return power.simulated(LINES, inputs(), draws=600)


def test_shares_of_means_agree_with_the_noncentral_t_distribution(table):
    """Three seeds a size: the mean of a size has variance sd_fit^2 + sd_seed^2 / 3, six sizes less two lines."""
    error = np.sqrt((0.005**2 + 0.01**2 / 3) / 3)
    rows = by_effect(table, relu_vs_silu.RELU_FALLS.claim)
    for effect, value in (("zero", 0.0), ("first study", 0.02)):
        expected = one_sided_power(value, error, 4)
        assert rows.loc[effect, "supported"] == pytest.approx(
            expected, abs=3.5 * np.sqrt(expected * (1 - expected) / 600)
        )
        assert rows.loc[effect, "value"] == pytest.approx(100 * value)
    assert rows.loc["zero", ["supported", "not_supported", "inconclusive"]].sum() == pytest.approx(1)
    assert rows["runs"].tolist() == [18] * 3 and set(rows["sizes"]) == {6} and set(rows["rank"]) == {"primary"}


def test_nothing_is_supported_at_a_margin_more_often_than_promised(table):
    margin = table[table["effect"] == "margin"]
    assert len(margin) == 10 and margin["supported"].max() <= 0.05 + 3.5 * np.sqrt(0.05 * 0.95 / 600)
    assert margin["value"].tolist() == pytest.approx([1, 1] + [3] * 8)


def test_published_effects_are_those_of_the_printed_laws(table):
    falls = by_effect(table, relu_vs_silu.RELU_FALLS.claim).loc["published", "value"]
    law = next(law for law in power.PUBLISHED_LAWS if (law.activation, law.model) == ("silu", "0.1B"))
    end = 190 * 11.5 * 16 * 768**2 / 1e9
    change = -0.102 / end**0.479 + 0.102 / (end / 10) ** 0.479
    assert float(law.predict(end * 1e9) - law.predict(end * 1e8)) == pytest.approx(change)
    assert 0 < falls < 10 and by_effect(table, relu_vs_silu.RELU_SPARSER.claim).loc[
        "published", "value"
    ] == pytest.approx(32.1)
    on_lines = list(scale_insensitivity.ON_LINES.values())
    scale = [by_effect(table, claim.claim).loc["published", "value"] for claim in on_lines[:2]]
    assert scale == pytest.approx([1.6, -2.6])
    assert "published" not in by_effect(table, on_lines[2].claim).index


def test_the_first_study_counts_at_its_own_width_depth_ratio_only():
    table = power.simulated(LINES, inputs(ratios=(8,)), draws=20)
    first = table[table["effect"] == "first study"]
    assert len(first) == 8 and not first["claim"].str.endswith(AT_SECOND).any()  # the tail needs both
    assert one_dimension.TAIL_SHRINKS.claim not in set(first["claim"])


def test_large_effects_are_seen_and_small_spreads_decide():
    table = power.simulated({**LINES, **DIMENSIONS}, inputs(first=-0.05, **dict.fromkeys(MADE, (1e-4, 1e-4))), draws=20)
    decided = table[table["effect"].isin(["zero", "first study"]) & (table["question"] == "scale_insensitivity")]
    assert decided.loc[decided["effect"] == "zero", "supported"].eq(1).all()
    assert decided.loc[decided["effect"] == "first study", "not_supported"].eq(1).all()
    drives = by_effect(table, one_dimension.DEPTH_DRIVES.claim)
    assert drives.loc["zero", "not_supported"] == 1 and drives.loc["first study: depth alone", "supported"] == 1
    assert drives.loc["first study: depth alone", "value"] == pytest.approx(-15)  # three times the slope of the line
    deeper = by_effect(table, one_dimension.DEEPER_SPARSER.claim)
    alone = "first study: depth alone; d_ff twice the margin"
    assert deeper.loc[alone, ["value", "supported"]].tolist() == pytest.approx([-15 * np.log10(2), 1])
    more = by_effect(table, one_dimension.MORE_NEURONS_SPARSER.claim)
    assert more.loc[alone, ["value", "supported"]].tolist() == pytest.approx([-4, 1])


def test_the_ratio_is_simulated_with_the_rule_of_its_verdict():
    shapes = runs(*((d, n, 4, 2) for d, n in ((120, 1), (84, 2), (72, 3), (60, 4), (48, 6), (36, 11))))
    table = power.simulated({"width_depth_ratio": shapes}, inputs(first=1e-3), draws=60)
    rows = by_effect(table, width_depth_ratio.RATIO_RISES.claim)
    assert rows.loc["first study", ["value", "supported"]].tolist() == [pytest.approx(10), 1]
    assert rows.loc["zero", "supported"] < 0.2 and rows["sizes"].tolist() == [6, 6]


def test_one_line_of_few_sizes_is_inconclusive():
    table = power.simulated({"relu_vs_silu": runs((16, 2, 40, 1))}, inputs(), draws=5)
    assert len(table) and table["inconclusive"].eq(1).all()


def test_the_same_design_gives_the_same_table():
    first, second = (power.simulated(LINES, inputs(), draws=10) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)


def test_inputs_that_lack_an_outcome_are_an_input_error():
    with pytest.raises(InputError, match="have no row for silu_rises; "):
        power.simulated(LINES, inputs().query("outcome != 'silu_rises'"), draws=5)


def test_a_profile_s_table_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(power, "DRAWS", 3)
    profile = read_profile(write_profile(tmp_path, profile_content(write_text(tmp_path / "text"))))
    written = pd.read_csv(power.write_power(profile, tmp_path))
    assert list(written.columns) == power.COLUMNS
    assert set(written["question"]) == {"relu_vs_silu", "scale_insensitivity", "width_depth_ratio"}


def test_without_the_first_study_s_line_its_effects_are_left_out_not_zero():
    table = power.simulated(DIMENSIONS, inputs(ratios=(16,), **dict.fromkeys(MADE, (1e-4, 1e-4))), draws=5)
    assert table["effect"].tolist() == ["zero", "margin of depth, width 0"]
    assert set(table["claim"]) == {one_dimension.DEPTH_DRIVES.claim} and table["not_supported"][0] == 1
