"""Verdicts on Lazy Neuron follow planted shares; arms are missing, runs diverge; power, tables and figures."""

import math

import numpy as np
import pandas as pd
import pytest
from planted import check_stated
from planted_lazy_neuron import ARMS, FALLS, OTHER_SHAPES, planted

from sparsity_utils.console import InputError
from sparsity_utils.findings import lazy_neuron, lazy_neuron_figures, lazy_neuron_power, one_dimension
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Estimate, mean_over_runs
from sparsity_utils.study.tables import Tables

LARGER = {"depth_2": 0.14, "depth_8": 0.26, "d_ff_40": 0.14, "d_ff_160": 0.26}  # 6 points in two doublings


def judged(table):
    """Verdicts by key."""
    return {row.claim.key: row for row in lazy_neuron.verdicts(lazy_neuron.analyse(table))}


def words(table):
    return {key: row.verdict for key, row in judged(table).items()}


def shapes_of(shares):
    """A table one_dimension: {(d_model, n_layers, d_ff): share of non-zeros}, half of it active at CETT-PPL."""
    rows = []
    for (d_model, n_layers, d_ff), share in shares.items():
        run = {"role": "stable", "activation": "relu", "d_model": d_model, "n_layers": n_layers, "d_ff": d_ff}
        run |= {"parameters": 1000, "width_depth_ratio": d_model / n_layers, "validation_loss": 3.0, "fit": True}
        for seed, step in ((0, 1), (0, 2), (1, 1), (1, 2)):
            about = {"run": f"{d_model}x{n_layers}-{d_ff}-{seed}", "seed": seed, "step": step, "tokens": 100.0 * step}
            rows.append({**run, **about, "nonzero_share": share, "activation_ratio": share / 2})
    return pd.DataFrame(rows)


def test_what_is_published_is_supported_where_it_is_planted():
    rows = judged(planted(FALLS | LARGER))
    check_stated(lazy_neuron, list(rows.values()))
    assert {row.verdict for row in rows.values()} == {SUPPORTED}
    assert rows["half_at_start_plain"].here == pytest.approx(50, abs=0.3)
    assert rows["falls_in_every_layer_plain"].here == pytest.approx(20, abs=0.5)
    assert rows["fresh_data"].here == pytest.approx(0, abs=0.5)
    assert rows["deeper_sparser_equal_steps"].here == pytest.approx(-6, abs=0.3)
    assert rows["deeper_sparser_equal_steps"].reason == "3 pairs; depth_2 to depth_8"
    assert rows["count_rises_equal_steps"].here == pytest.approx(math.log2(4 * 0.24 / 0.36) / 2, abs=0.02)


def test_without_a_fall_the_falls_are_refuted_and_with_a_small_one_left_open():
    falls = [key for key in words(planted()) if "falls" in key or key in ("random_labels", "random_input")]
    none = words(planted(dict.fromkeys(ARMS, 0.02)))
    assert {none[key] for key in falls} == {NOT_SUPPORTED} and none["fresh_pairs"] == NOT_SUPPORTED
    small = words(planted(dict.fromkeys(ARMS, 0.08)))  # less than claimed, and below 45%
    assert {small[key] for key in falls} == {INCONCLUSIVE}


@pytest.mark.parametrize(
    ("layer", "word"), [(0.2, SUPPORTED), (0.1, INCONCLUSIVE), (0.07, INCONCLUSIVE), (0.0, NOT_SUPPORTED)]
)
def test_one_layer_decides_for_all(layer, word):
    row = judged(planted(FALLS | {"plain": (0.2, 0.2, layer, 0.2)}))["falls_in_every_layer_plain"]
    assert row.verdict == word and row.here == pytest.approx(100 * layer, abs=0.5)
    if layer < 0.2:
        assert row.reason == "3 seeds; decides: layer 2"


@pytest.mark.parametrize(
    ("start", "word"),
    [
        (0.5, SUPPORTED),
        (0.53, INCONCLUSIVE),
        (0.55, NOT_SUPPORTED),
        (0.4, NOT_SUPPORTED),
        ((0.5, 0.5, 0.5, 0.54), INCONCLUSIVE),  # the mean is 51%, a layer is outside
    ],
)
def test_half_at_the_start_is_asked_of_the_mean_and_of_every_layer(start, word):
    row = judged(planted({"plain": 0.2}, start))["half_at_start_plain"]
    assert row.verdict == word
    assert ("outside: layer 3 54" in row.reason) == isinstance(start, tuple)


@pytest.mark.parametrize(
    ("arm", "key"),
    [
        ("uniform_no_decay", "random_labels_no_decay"),
        ("unigram_no_decay", "random_labels_no_decay"),
        ("uniform", "random_labels"),
        ("unigram", "random_labels"),
        ("random_text", "random_input"),
        ("fresh_pairs", "fresh_pairs"),
    ],
)
def test_each_arm_decides_its_own_claim(arm, key):
    refuted = judged(planted(FALLS | {arm: 0.0}))
    assert refuted[key].verdict == NOT_SUPPORTED and refuted[key].reason == f"3 seeds; decides: {arm}"
    open_ = judged(planted({name: fall for name, fall in FALLS.items() if name != arm}))
    assert open_[key].verdict == INCONCLUSIVE and f"no runs of {arm} with every seed" in open_[key].reason
    others = {name for name, row in open_.items() if row.verdict == SUPPORTED}
    assert others == {name for name, row in judged(planted()).items() if row.verdict == SUPPORTED} - {key}


@pytest.mark.parametrize(
    ("difference", "word"), [(0.0, SUPPORTED), (0.05, INCONCLUSIVE), (-0.07, INCONCLUSIVE), (0.13, NOT_SUPPORTED)]
)
def test_fresh_data_are_the_same_within_five_points_and_another_beyond_ten(difference, word):
    row = judged(planted(FALLS | {"ten_passes": 0.2 + difference}))["fresh_data"]
    assert (row.verdict, row.here) == (word, pytest.approx(100 * difference, abs=0.5))


@pytest.mark.parametrize(("slope", "word"), [(-0.04, SUPPORTED), (-0.01, INCONCLUSIVE), (0.03, NOT_SUPPORTED)])
@pytest.mark.parametrize(("small", "large", "key"), [("depth_2", "depth_8", "deeper"), ("d_ff_40", "d_ff_160", "more")])
def test_larger_is_judged_per_doubling(slope, word, small, large, key):
    rows = judged(planted(FALLS | {small: 0.2 + slope, large: 0.2 - slope}))
    (found,) = [row for name, row in rows.items() if name.startswith(key)]
    assert (found.verdict, found.here) == (word, pytest.approx(100 * slope, abs=0.3))


def test_the_count_may_fall():
    row = judged(planted(FALLS | {"d_ff_40": 0.0, "d_ff_160": 0.45}))["count_rises_equal_steps"]
    assert (row.verdict, row.here) == (NOT_SUPPORTED, pytest.approx(math.log2(4 * 0.05 / 0.5) / 2, abs=0.1))


def test_ends_are_found_by_shape_whatever_the_arms_are_called():
    table = planted(FALLS | LARGER)
    names = {"depth_2": "plain", "plain": "middle", "depth_8": "deep"}  # as a profile whose base has two layers
    found = lazy_neuron.analyse(table.assign(arm=table["arm"].replace(names)).query("arm not in ('gated', 'middle')"))
    assert (found.changes["n_layers"].small, found.changes["n_layers"].large) == ("plain", "deep")
    assert set(found.changes) == {"n_layers"}  # arms with another d_ff now differ in depth too
    longer = table.copy()
    longer.loc[longer["arm"] == "depth_8", "tokens"] *= 2
    assert lazy_neuron.analyse(longer).changes["n_layers"].large == "plain"  # unequal steps are not compared


def test_a_small_profile_leaves_claims_open_with_a_reason():
    rows = judged(planted({"plain": 0.2, "uniform": 0.2, "random_text": 0.2}, seeds=2, rates=(0.01,)))
    assert rows["random_input"].verdict == SUPPORTED
    for key in ("half_at_start_gated", "falls_in_every_layer_gated", "random_labels", "fresh_data", "fresh_pairs"):
        assert rows[key].verdict == INCONCLUSIVE and "no runs of" in rows[key].reason, key
    assert rows["deeper_sparser_equal_steps"].reason == "this study has no arms that differ in depth alone"
    assert rows["count_rises_equal_steps"].reason == "this study has no arms that differ in d_ff alone"
    missing = lazy_neuron.verdicts(lazy_neuron.analyse(None))
    assert {row.reason for row in missing} == {"not measured"} and len(missing) == len(lazy_neuron.CLAIMS)
    without = judged(planted({"gated": 0.2}))
    assert without["half_at_start_plain"].verdict == INCONCLUSIVE and without["half_at_start_gated"].here > 49
    neither = lazy_neuron.analyse(planted({"uniform": 0.2}))
    assert "no runs of plain or gated" in lazy_neuron_figures.layers_figure(neither.layers).words()


def test_the_rate_of_the_lower_loss_counts_and_a_diverged_seed_takes_its_rate_along():
    table = planted()
    diverged = table[(table["arm"] != "plain") | (table["learning_rate"] != 0.01) | (table["seed"] != 1)]
    rows = judged(diverged)
    assert rows["falls_in_every_layer_plain"].here == pytest.approx(15, abs=0.5)  # planted at the other rate
    rates = lazy_neuron.analyse(diverged).rates.set_index("arm")["learning_rate"]
    assert rates["plain"] == 0.02 and rates["gated"] == 0.01
    both = diverged[(diverged["arm"] != "plain") | (diverged["seed"] != 2)]
    assert "no runs of plain with every seed" in judged(both)["falls_in_every_layer_plain"].reason


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.drop(columns="d_ff"), "lazy_neuron table lacks the columns d_ff"),
        (lambda t: pd.concat([t, t]), "two rows for run"),
        (lambda t: t.assign(final_share=np.nan), "no final_share .NaN."),
        (lambda t: t.head(0), "no rows"),
    ],
)
def test_unusable_tables_are_input_errors(spoil, message):
    with pytest.raises(InputError, match=message):
        lazy_neuron.analyse(spoil(planted({"plain": 0.2})))


def test_points_of_both_studies_lie_on_lines_of_one_dimension():
    shapes = shapes_of({(32, 4, 80): 0.35, (32, 8, 80): 0.30, (16, 4, 80): 0.37, (64, 4, 80): 0.33, (32, 4, 320): 0.25})
    points = lazy_neuron.analyse(planted(FALLS | LARGER), shapes).points
    steps, tokens = lazy_neuron_figures.DATA
    along = lazy_neuron_figures.along
    assert along(points, steps, "n_layers")["n_layers"].tolist() == [2, 4, 8]
    assert along(points, steps, "n_layers")["non-zeros"].tolist() == pytest.approx([0.36, 0.3, 0.24], abs=0.003)
    assert along(points, tokens, "d_model")["d_model"].tolist() == [16, 32, 64]
    assert along(points, tokens, "d_ff")["CETT-PPL"].tolist() == pytest.approx([0.175, 0.125])
    assert along(points, steps, "d_model").empty and set(points["runs"]) == {2, 3}
    found = lazy_neuron.analyse(planted(FALLS | LARGER, noise=0.02))
    deep, runs = along(found.points, steps, "n_layers").iloc[-1], found.runs.query("arm == 'depth_8'")
    wanted = mean_over_runs(runs["final_share"])
    assert (deep["non-zeros"], deep["non-zeros reach"]) == pytest.approx((wanted.value, wanted.high - wanted.value))
    single = lazy_neuron.analyse(planted(FALLS, seeds=1)).points
    assert single["non-zeros reach"].isna().all() and len(single) == 5


def test_what_doubling_does_is_told_by_both_metrics_at_equal_steps_and_at_equal_tokens():
    shapes = shapes_of({(32, 4, 80): 0.35, (32, 8, 80): 0.30, (16, 4, 80): 0.37, (64, 4, 80): 0.33, (32, 4, 320): 0.25})
    found = lazy_neuron.analyse(planted(FALLS | LARGER), shapes)
    share, count = found.at_equal_tokens["d_ff"].share, found.at_equal_tokens["d_ff"].count
    assert (share["non-zeros"].value, share["CETT-PPL"].value) == pytest.approx((-0.05, -0.025))
    assert count["non-zeros"].value == pytest.approx(math.log2(4 * 0.25 / 0.35) / 2, abs=0.01)
    assert count["CETT-PPL"].value == pytest.approx(count["non-zeros"].value)  # half of the share everywhere
    table = lazy_neuron_figures.changes_table(found.changes, found.at_equal_tokens)
    steps, tokens = lazy_neuron_figures.DATA
    assert table["data"].tolist() == [steps] * 4 + [tokens] * 6
    rows = table[table["data"] == tokens].set_index(["dimension", "metric"])
    assert rows.loc[("d_model", "non-zeros"), "from_to"] == "16 to 64"
    assert rows.loc[("n_layers", "CETT-PPL"), "points_per_doubling"].startswith("-2.5 (")
    assert lazy_neuron_figures.points_table(found.points)["data"].unique().tolist() == [steps, tokens]
    points = lazy_neuron_figures.points_table(found.points).set_index(["data", "d_model", "n_layers", "d_ff"])
    widest = points.loc[(tokens, 64, 4, 80)]
    assert widest[["runs", "non-zeros_%", "CETT-PPL_%"]].tolist() == [2, 33, 16.5]
    assert widest[["non-zeros_per_layer", "CETT-PPL_per_layer"]].tolist() == pytest.approx([26.4, 13.2])


def test_tables_and_figures_show_what_was_found():
    found = lazy_neuron.analyse(planted(FALLS | LARGER))
    runs = lazy_neuron_figures.runs_table(found.runs).set_index("arm")
    assert runs.loc["d_ff_160", "final_%"] == pytest.approx(24, abs=0.3)
    assert runs.loc["d_ff_160", "non_zeros_per_layer"] == pytest.approx(0.24 * 160, abs=0.5)
    assert np.isnan(runs.loc["uniform", "CETT_neurons_per_layer"])
    changes = lazy_neuron_figures.changes_table(found.changes, found.at_equal_tokens)
    assert changes["from_to"].tolist() == ["depth_2 to depth_8"] * 2 + ["d_ff_40 to d_ff_160"] * 2
    assert changes["points_per_doubling"][0].startswith("-6.") or changes["points_per_doubling"][0].startswith("-5.9")
    assert set(lazy_neuron_figures.rates_table(found.rates)["at_edge"]) == {"yes"}
    layers = lazy_neuron_figures.layers_figure(found.layers)
    assert "Plain ReLU FFN, 3 seeds" in layers.words() and "Gated ReLU FFN" in layers.words()
    needs = lazy_neuron_figures.needs_figure(found.falls, lazy_neuron.FALL)
    labels = [text.get_text() for text in needs.axes[0].get_yticklabels()]
    assert labels[0] == "text, plain FFN" and not set(labels) & set(OTHER_SHAPES)
    assert len(labels) == len(ARMS) - len(OTHER_SHAPES)
    sizes = lazy_neuron_figures.sizes_figure(found.points)
    assert len(sizes.axes) == 6 and "T5-Base, published" in sizes.words()


def test_a_study_has_the_figures_of_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_neuron.initial_gradient, "analyse", lambda: None)
    monkeypatch.setattr(lazy_neuron.initial_gradient, "figure", lambda found: "gradient")
    assert [name for name, _ in lazy_neuron.figures(Tables("tests", tmp_path))] == ["11_gradient"]
    planted({"plain": 0.2}).to_csv(tmp_path / "lazy_neuron.csv", index=False)
    names = [name for name, _ in lazy_neuron.figures(Tables("tests", tmp_path))]
    assert names == ["11_gradient", "11_layers", "11_needs"]
    planted(FALLS).to_csv(tmp_path / "lazy_neuron.csv", index=False)
    assert "11_sizes" in [name for name, _ in lazy_neuron.figures(Tables("tests", tmp_path))]


def test_sizes_at_equal_tokens_are_judged_where_a_study_has_their_shapes(tmp_path):
    rows = one_dimension.of_study(Tables("tests", tmp_path))
    assert [row.claim for row in rows] == list(one_dimension.CLAIMS)
    assert {row.reason for row in rows} == {one_dimension.MISSING}
    shapes = shapes_of({(32, 4, 80): 0.35, (32, 8, 80): 0.3, (16, 4, 80): 0.37, (64, 4, 80): 0.33, (32, 4, 320): 0.25})
    for name in ("one_dimension", "relu_vs_silu"):
        shapes.to_csv(tmp_path / f"{name}.csv", index=False)
    shapes[shapes["d_ff"] == 80].to_csv(tmp_path / "relu_vs_silu.csv", index=False)
    rows = {row.claim.key: row for row in one_dimension.of_study(Tables("tests", tmp_path))}
    assert rows["more_neurons_sparser"].here == pytest.approx(-5, abs=1e-6)


@pytest.fixture(scope="module")
def chances():
    return lazy_neuron_power.power()


def test_power_is_small_where_it_must_be_and_large_where_it_should(chances):
    table = chances.set_index(["claim", "effect"])
    assert table.iloc[:, 1:].sum(axis=1).between(99, 101).all()
    every, deeper = lazy_neuron.EVERY_LAYER["plain"].claim, lazy_neuron.DEEPER.claim
    for (claim, effect), row in table.iterrows():
        if effect.startswith(("zero", "margin", "the count stays", "53%")) and claim != lazy_neuron.FRESH_DATA.claim:
            assert row["supported %"] <= 8, (claim, effect)
    assert table.loc[(every, "zero"), "not supported %"] == 100
    assert table.loc[(every, "published (T5-Base): 47 points"), "supported %"] == 100
    assert 3 <= table.loc[(deeper, "zero"), "not supported %"] <= 7  # the level of a one-sided test
    same = table.loc[lazy_neuron.FRESH_DATA.claim]
    assert same.loc["zero", "supported %"] > 95 and same.loc["margin: 5 points", "supported %"] <= 7
    assert same.loc["10 points", "not supported %"] <= 7
    pd.testing.assert_frame_equal(lazy_neuron_power.power(), chances)


def test_every_primary_claim_has_its_power_stated(chances):
    stated = lazy_neuron.claims()
    assert set(stated.loc[stated["rank"] == "primary", "question"]) <= set(chances["claim"])


@pytest.mark.parametrize(
    ("fall", "final", "word"),
    [
        ((0.11, 0.2), (0.3, 0.39), SUPPORTED),
        ((0.0, 0.02), (0.46, 0.5), NOT_SUPPORTED),
        ((0.05, 0.09), (0.41, 0.44), INCONCLUSIVE),
        ((0.09, 0.2), (0.3, 0.41), INCONCLUSIVE),
        ((math.nan, math.nan), (math.nan, math.nan), INCONCLUSIVE),
    ],
)
def test_a_fall_is_refuted_by_the_final_share_alone(fall, final, word):
    estimates = (Estimate(sum(ends) / 2, *ends, 3) for ends in (fall, final))
    assert lazy_neuron.fall_word(*estimates) == word
