"""Claims on one dimension at a time: planted slopes come back, against a literal regression and at the margins."""

import numpy as np
import pandas as pd
import pytest
from planted import by_claim, check_stated, study
from scipy import stats

from sparsity_utils.console import InputError
from sparsity_utils.findings import one_dimension
from sparsity_utils.laws import data_law
from sparsity_utils.laws.lines import lines_of
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Estimate

SHAPES = [
    *((32, 2, 80), (32, 4, 80), (32, 8, 80), (16, 4, 80), (64, 4, 80)),
    *((32, 4, 40), (32, 4, 160), (32, 4, 320)),
]
MIDDLE = np.array((32, 4, 80))
RESIDUALS = np.array([1, -2, 3, 1, -1, 2, -3, -1]) * 1e-4


def parameters(shape):
    d_model, n_layers, d_ff = shape
    return n_layers * (4 * d_model**2 + 3 * d_model * d_ff)


def made(slopes, shapes=SHAPES, seeds=(0, 1, 2), unit="decades", noise=1.0):
    """Checkpoints of runs whose non-zero share has these slopes (width, depth, d_ff); seeds differ, their mean not."""
    rows = []
    for shape, residual in zip(shapes, RESIDUALS, strict=False):
        along = [
            np.log2(size / centre) if unit == "doublings" else np.log10(parameters(shape) / parameters(MIDDLE))
            for size, centre in zip(shape, MIDDLE, strict=True)
        ]
        moved = np.array(shape) != MIDDLE
        share = 0.4 + sum(np.array(slopes) * moved * along) + noise * residual
        for seed in seeds:
            name = "x".join(map(str, shape))
            value = share + 0.01 * (seed - np.mean(seeds))
            about = {
                "run": f"{name}-{seed}", "activation": "relu", "d_model": shape[0], "n_layers": shape[1],
                "d_ff": shape[2], "parameters": parameters(shape), "width_depth_ratio": shape[0] / shape[1],
                "seed": seed, "role": "stable", "validation_loss": 3.0, "activation_ratio": 0.2, "fit": True,
            }  # fmt: skip
            for step in range(5):
                tokens = 190 * parameters(shape) * (step + 1) / 5
                rows.append(about | {"step": step, "tokens": tokens, "nonzero_share": value})
    return pd.DataFrame(rows)


def lines(main=-0.03, second=-0.03):
    """Two lines of sizes whose weak tail has these slopes per decade; one layer stands apart."""
    tables = []
    for slope, shapes in ((main, ((16, 1), (40, 2), (60, 3), (80, 4))), (second, ((16, 2), (24, 3), (32, 4)))):
        table = study(shapes, ("relu",))
        decades = np.log10(table["parameters"] / 1e5)
        wobble = 1e-4 * (table["n_layers"] % 2)
        tail = np.where(table["n_layers"] == 1, 0.9, 0.15 + slope * decades + wobble)
        ratio = table["activation_ratio"].groupby(table["run"]).transform("last")
        stable = table["tokens"] * table["parameters"] / 1e6
        tables.append(table.assign(activation_ratio=ratio, nonzero_share=ratio + tail, tokens=stable))
    return tables


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(data_law, "RESAMPLES", 20)


def test_slopes_are_a_literal_regression():
    means = one_dimension.shape_means(made((-0.01, -0.08, -0.04)))
    assert means["runs"].tolist() == [3] * 8
    found = one_dimension.parameter_slopes(means)
    design = np.zeros((8, 4))
    design[:, 0] = 1
    for row, shape in enumerate(means[["d_model", "n_layers", "d_ff"]].to_numpy()):
        for column in range(3):
            if shape[column] != MIDDLE[column]:
                design[row, 1 + column] = np.log10(parameters(shape) / parameters(MIDDLE))
    values = means["value"].to_numpy()
    expected = np.linalg.solve(design.T @ design, design.T @ values)
    residuals = values - design @ expected
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * (residuals @ residuals) / 4)  # 8 shapes - 4
    for column, name in enumerate(("d_model", "n_layers", "d_ff"), start=1):
        half = stats.t.ppf(0.95, 4) * errors[column]
        assert found[name].value == pytest.approx(expected[column])
        assert (found[name].low, found[name].high) == pytest.approx((expected[column] - half, expected[column] + half))
    assert [found[name].value for name in found] == pytest.approx([-0.01, -0.08, -0.04], abs=2e-3)


@pytest.mark.parametrize(
    ("slopes", "verdict", "shown"),
    [
        ((0.0, -0.1, 0.0), SUPPORTED, -10),
        ((-0.02, -0.06, 0.0), SUPPORTED, -6),
        ((0.1, -0.06, -0.2), SUPPORTED, -6),
        ((-0.04, -0.1, 0.0), NOT_SUPPORTED, -4),
        ((0.0, -0.04, 0.0), NOT_SUPPORTED, -4),
        ((-0.03, -0.1, 0.0), INCONCLUSIVE, -3),
        ((0.0, -0.05, 0.0), INCONCLUSIVE, -5),
    ],
)
def test_depth_drives_the_trend_of_non_zeros(slopes, verdict, shown):
    row = by_claim(one_dimension.verdicts(made(slopes), lines_of(*lines())))[one_dimension.DEPTH_DRIVES.claim]
    assert (row.verdict, row.here) == (verdict, pytest.approx(shown, abs=0.3))
    assert row.reason.startswith("8 shapes, 24 runs; width ") and ", depth " in row.reason


@pytest.mark.parametrize(
    ("main", "second", "verdict", "shown"),
    [
        (-0.03, -0.02, SUPPORTED, -2),
        (-0.03, 0.02, NOT_SUPPORTED, 2),
        (0.03, -0.02, NOT_SUPPORTED, 3),
        (-0.03, 0.0, INCONCLUSIVE, 0),
    ],
)
def test_the_weak_tail_shrinks_on_both_lines(main, second, verdict, shown):
    row = by_claim(one_dimension.verdicts(None, lines_of(*lines(main, second))))[one_dimension.TAIL_SHRINKS.claim]
    assert (row.verdict, row.here) == (verdict, pytest.approx(shown, abs=0.1))
    assert row.reason.startswith("3 sizes; decides: ")  # without the size of one layer


def test_lines_of_another_study_leave_the_weak_tail_open():
    shapes, tail = made((0, 0, 0)), one_dimension.TAIL_SHRINKS.claim
    of_both = lines_of(*lines())
    row = by_claim(one_dimension.verdicts(shapes, of_both))[tail]
    assert (row.verdict, row.reason) == (INCONCLUSIVE, one_dimension.APART)
    shapes["run"] = shapes["run"].replace({"32x2x80-0": "relu-24x3-0"})  # a run of the second line
    assert by_claim(one_dimension.verdicts(shapes, of_both))[tail].verdict == SUPPORTED


@pytest.mark.parametrize(
    ("slopes", "verdicts"),
    [
        ((0.0, -0.03, -0.04), (SUPPORTED, SUPPORTED, SUPPORTED)),
        ((0.0, -0.02, 0.0), (INCONCLUSIVE, INCONCLUSIVE, SUPPORTED)),
        ((0.0, 0.01, 0.01), (NOT_SUPPORTED, NOT_SUPPORTED, SUPPORTED)),
        ((0.05, -0.01, -0.03), (INCONCLUSIVE, SUPPORTED, SUPPORTED)),
    ],
)
def test_larger_is_sparser_per_doubling(slopes, verdicts):
    rows = one_dimension.verdicts(made(slopes, unit="doublings"), lines_of(*lines()))[2:]
    assert [row.verdict for row in rows] == list(verdicts)
    assert [row.here for row in rows[:2]] == pytest.approx([100 * slopes[1], 100 * slopes[2]], abs=0.1)


def test_the_count_of_non_zeros_rises_by_one_doubling_where_the_share_stays():
    count = one_dimension.verdicts(made((0, 0, 0), noise=0.1), lines_of(*lines()))[4]
    assert (count.verdict, count.here) == (SUPPORTED, pytest.approx(1, abs=1e-3))
    assert count.claim.unit == "doublings per doubling of d_ff"
    falling = made((0, 0, 0), noise=0.1)
    falling["nonzero_share"] *= (falling["d_ff"] / 80) ** -1.2
    count = one_dimension.verdicts(falling, lines_of(*lines()))[4]
    assert (count.verdict, count.here) == (NOT_SUPPORTED, pytest.approx(-0.2, abs=1e-2))


def test_claims_are_stated_before_their_verdicts():
    rows = one_dimension.verdicts(made((0, -0.1, -0.04)), lines_of(*lines()))
    check_stated(one_dimension, rows)
    assert set(one_dimension.claims()["rank"]) == {"secondary"}
    missing = one_dimension.verdicts(None, lines_of(lines()[0]))
    assert [row.claim for row in missing] == [row.claim for row in rows]
    assert {row.verdict for row in missing} == {INCONCLUSIVE} and all(row.reason for row in missing)


def test_unequally_trained_shapes_are_inconclusive():
    shapes = made((0, -0.1, -0.04))
    shapes.loc[shapes["n_layers"] == 8, "tokens"] *= 2
    rows = one_dimension.verdicts(shapes, lines_of(*lines()))
    assert {row.verdict for row in (rows[0], *rows[2:])} == {INCONCLUSIVE}
    assert "sizes differ in tokens per parameter, 190 to 380" in rows[0].reason


def test_the_centre_is_found_and_missed():
    means = one_dimension.shape_means(made((0, 0, 0)))
    assert one_dimension.centre(means)[["d_model", "n_layers", "d_ff"]].tolist() == list(MIDDLE)
    off = means[(means["n_layers"] != 4) | (means["d_ff"] == 40)]
    with pytest.raises(InputError, match=r"No shape differs from all others .* 32x2x80, 32x4x40, 32x"):
        one_dimension.centre(off)


def test_one_dimension_alone_has_one_slope_from_any_centre():
    deep = made((0, -0.1, 0), [(32, 2, 80), (32, 8, 80), (32, 16, 80), (32, 4, 80)])
    slopes = one_dimension.parameter_slopes(one_dimension.shape_means(deep))
    assert slopes["n_layers"].value == pytest.approx(-0.1, abs=1e-3) and not slopes["n_layers"].reason
    assert slopes["d_model"].reason == "no shape differs in d_model alone"
    row = one_dimension.verdicts(deep, lines_of(*lines()))[0]
    assert (row.verdict, "width none" in row.reason) == (INCONCLUSIVE, True)


def test_too_few_shapes_are_inconclusive():
    few = made((0, -0.1, -0.04), [(32, 4, 80), (32, 2, 80), (64, 4, 80), (32, 4, 40)])
    rows = one_dimension.verdicts(few, lines_of(*lines()))
    assert rows[0].verdict == rows[3].verdict == INCONCLUSIVE
    assert rows[0].reason.startswith("too few shapes: 4 leave 0 degrees of freedom")


def test_an_unknown_slope_decides_nothing():
    nothing = Estimate(np.nan, np.nan, np.nan, 0, "none")
    steep, flat = Estimate(-0.1, -0.11, -0.09, 8), Estimate(0.0, -0.01, 0.01, 8)
    assert one_dimension.depth_drives({"d_model": nothing, "n_layers": steep}) == (INCONCLUSIVE, nothing)
    assert one_dimension.depth_drives({"d_model": flat, "n_layers": nothing})[0] == INCONCLUSIVE
    tail = one_dimension.TAIL_SHRINKS.judged_all({"main": steep, "second": nothing}, "sizes")
    assert tail.verdict == INCONCLUSIVE and tail.reason.startswith("none; decides: second")
    assert one_dimension.share_falls(nothing) == INCONCLUSIVE


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.drop(columns="d_ff"), "one_dimension table lacks the columns d_ff"),
        (lambda t: pd.concat([t, t]), "two rows for run"),
        (lambda t: pd.concat([t, t.assign(run=t["run"] + "b")]), "d_ff 80, seed 0; keep one"),
        (lambda t: t.assign(nonzero_share=np.nan), "no nonzero_share .NaN."),
        (lambda t: t.assign(activation="silu"), "no relu runs"),
        (lambda t: t.assign(nonzero_share=0.0), "share of non-zeros above 0"),
    ],
)
def test_unusable_tables_are_input_errors(spoil, message):
    with pytest.raises(InputError, match=message):
        one_dimension.verdicts(spoil(made((0, 0, 0))), lines_of(*lines()))
