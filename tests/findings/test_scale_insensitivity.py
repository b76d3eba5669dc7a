"""Verdicts on size: planted slopes by both metrics, a second line of sizes, and who converges sooner."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from planted import AT_SECOND, SHAPES, by_claim, check_stated, study
from scipy import stats

from sparsity_utils.console import InputError
from sparsity_utils.findings import scale_insensitivity
from sparsity_utils.laws import data_law
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED
from sparsity_utils.models.config import ACTIVATIONS


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals are tested with the laws; here they only need to be there."""
    monkeypatch.setattr(data_law, "RESAMPLES", 20)


def judged(*tables):
    return scale_insensitivity.verdicts(scale_insensitivity.analyse(*tables))


@pytest.mark.parametrize(
    ("slope", "verdict"), [(0.0, SUPPORTED), (0.016, SUPPORTED), (-0.06, NOT_SUPPORTED), (0.03, INCONCLUSIVE)]
)
def test_scale_insensitivity_rests_on_sound_limits(slope, verdict):
    checkpoints = study(noise=1e-4, limit=lambda activation, ratio, size: 0.3 + slope * np.log10(size / 1e5))
    rows = by_claim(judged(checkpoints))
    for activation, published in (("relu", "+1.6 points per decade"), ("silu", "-2.6 points per decade")):
        row = rows[f"The {ACTIVATIONS[activation]} limit does not depend on scale"]
        assert row.verdict == verdict and row.claim.published == published
        assert row.here == pytest.approx(100 * slope, abs=0.3)
        assert "rests on the limits A0 of the data law" in row.reason and row.reason.startswith("4 sizes, 8 runs")
    assert rows["The ReLU share of non-zero neurons does not depend on scale"].here == pytest.approx(0, abs=1e-9)


def test_scale_insensitivity_falls_back_to_measured_means_and_says_so():
    checkpoints = study(activations=("relu",))
    flat = checkpoints["run"] == "relu-60x3-1"
    checkpoints.loc[flat, "activation_ratio"] = 0.2
    checkpoints.loc[flat, "fit"] &= checkpoints.loc[flat, "step"] > 9  # the curve of both seeds keeps its trend
    row = by_claim(judged(checkpoints))["The ReLU limit does not depend on scale"]
    assert "rests on the mean of the last five stable checkpoints: 1 of 12 fits" in row.reason
    assert "first 60x3 seed 1, no trend" in row.reason
    assert row.here == pytest.approx(0, abs=0.5)


def test_measured_values_of_unequal_training_are_inconclusive():
    checkpoints = study(activations=("relu",), noise=0.0)
    equal = checkpoints.assign(tokens=checkpoints["tokens"] * checkpoints["parameters"] / 1e6)
    claim = "The ReLU share of non-zero neurons does not depend on scale"
    rows = [by_claim(judged(table))[claim] for table in (checkpoints, equal)]
    assert [row.verdict for row in rows] == [INCONCLUSIVE, SUPPORTED]
    assert "sizes differ in tokens per parameter, 73 to 1141" in rows[0].reason and "differ" not in rows[1].reason


def planted_metrics(cett=0.0, nonzero=0.0, **kwargs):
    """Sizes on a slope per decade by CETT-PPL and by non-zeros, equally far trained."""
    checkpoints = study(noise=1e-4, limit=lambda activation, ratio, size: 0.3 + cett * np.log10(size / 1e5), **kwargs)
    sizes = checkpoints["parameters"]
    return checkpoints.assign(
        nonzero_share=0.4 + nonzero * np.log10(sizes / 1e5), tokens=checkpoints["tokens"] * sizes / 1e6
    )


@pytest.mark.parametrize(
    ("cett", "nonzero", "verdict"), [(0.0, -0.07, NOT_SUPPORTED), (-0.07, -0.07, SUPPORTED), (0.0, 0.0, SUPPORTED)]
)
def test_whether_the_metric_changes_the_dependence_on_scale(cett, nonzero, verdict):
    row = by_claim(judged(planted_metrics(cett, nonzero)))[
        "The gap between CETT-PPL and the share of non-zero ReLU neurons does not depend on scale"
    ]
    assert row.verdict == verdict and row.here == pytest.approx(100 * (cett - nonzero), abs=0.3)


def test_a_second_line_has_verdicts_of_its_own():
    rows = by_claim(judged(planted_metrics(), planted_metrics(-0.07, 0.05)))
    shares = "The ReLU share of non-zero neurons does not depend on scale"
    assert (rows[shares].here, rows[f"{shares}{AT_SECOND}"].here) == pytest.approx((0, 5), abs=0.1)
    assert rows[f"The ReLU limit does not depend on scale{AT_SECOND}"].here == pytest.approx(-7, abs=0.5)
    missing = judged(planted_metrics())
    assert [row.claim.claim for row in missing] == list(rows)
    assert {(row.verdict, row.reason) for row in missing[5:]} == {
        (INCONCLUSIVE, "this study has no sizes at a second width-depth ratio")
    }


def test_the_spread_of_sizes_is_pooled_over_the_lines():
    """Sizes off the line on the second line widen the interval on the first, at more degrees of freedom."""
    shapes = SHAPES[:3]
    straight, bent = planted_metrics(shapes=shapes), planted_metrics(shapes=shapes)
    bent["nonzero_share"] += np.where(bent["d_model"] == 60, 0.02, 0.0)
    claim = "The ReLU share of non-zero neurons does not depend on scale"
    row = by_claim(judged(straight, bent))[claim]
    x = np.log10([11.5 * layers * d**2 for d, layers in shapes])
    y = np.array([0.4, 0.42, 0.4])
    residuals = y - np.polyval(np.polyfit(x, y, 1), x)
    half = stats.t.ppf(0.95, 2) * np.sqrt(residuals @ residuals / 2 / np.sum((x - x.mean()) ** 2))
    assert row.interval == pytest.approx((-100 * half, 100 * half))
    assert row.reason.startswith("3 sizes, 6 runs; spread of 6 sizes on 2 lines")


def test_limits_of_one_line_are_not_pooled_with_measured_means_of_another():
    known = planted_metrics()
    flat = planted_metrics(activations=("relu",)).assign(activation_ratio=0.3)
    for lines in ((known, flat), (flat, known)):
        rows = by_claim(judged(*lines))
        for where in ("", AT_SECOND):
            row = rows[f"The ReLU limit does not depend on scale{where}"]
            assert "rests on the mean of the last five stable checkpoints: 12 of 24 fits" in row.reason
    silu = rows[f"The SiLU limit does not depend on scale{AT_SECOND}"]
    assert "rests on the limits A0" in silu.reason


def legends(figure):
    return [text.get_text() for axes in figure.axes for text in axes.get_legend().texts]


def test_the_figures_print_the_slopes_of_the_verdicts():
    tables = [planted_metrics(0.01, -0.05), planted_metrics(-0.02, 0.03, shapes=SHAPES[:3])]
    main, second = (table.assign(p=1.0) for table in tables)
    scale = scale_insensitivity.analyse(main, second)
    rows = by_claim(scale_insensitivity.verdicts(scale))
    of_both, of_main = legends(scale_insensitivity.second_line(scale)), legends(scale_insensitivity.figure(scale))
    for what in ("ReLU limit", "SiLU limit", "ReLU share of non-zero neurons"):
        for where, labels in (("", of_main), ("", of_both), (AT_SECOND, of_both)):
            row = rows[f"The {what} does not depend on scale{where}"]
            numbers = f"{row.here:+.1f} [{row.interval[0]:+.1f}, {row.interval[1]:+.1f}] points per decade"
            assert any(label.endswith(numbers) and label.startswith(what[:4]) for label in labels), (what, where)


def test_one_axis_has_both_metrics_of_all_lines_the_published_values_and_a_model_as_it_was_measured():
    other = ((20, 2), (30, 3), (40, 4))  # ratio 10
    main, second = (table.assign(p=1.0) for table in (planted_metrics(0.01, -0.05), planted_metrics(shapes=other)))
    scale = scale_insensitivity.analyse(main, second)
    row = {"model": "llama", "activation": "silu", "parameters": 1e8, "p": 1.0, "text": "english", "low": 0.4}
    pretrained = pd.DataFrame([row | {"activation_ratio": 0.5, "high": 0.7}, row | {"activation_ratio": 0.9, "p": 5.0}])
    figure = scale_insensitivity.one_axis(scale, pretrained)
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    drawn = {"relu": "ReLU, CETT-PPL-1%", "silu": "SiLU, CETT-PPL-1%", "nonzero": "ReLU, not zero"}
    for (line, ratio), (name, about) in product({"main": 20, "second": 10}.items(), drawn.items()):
        sizes = scale.outcomes[name].slopes[line].sizes
        np.testing.assert_allclose(lines[f"{about}, ratio {ratio}"][:, 1], 100 * sizes["value"])
    assert lines["ReLU, not zero, published"] == pytest.approx(np.array([[0.8e9, 18.49], [1.5e9, 16.18]]), rel=1e-3)
    assert len(lines["SiLU, CETT-PPL-1%, published"]) == 5
    (model,) = figure.axes[0].containers
    assert model.get_label() == "llama, SiLU, english" and model[0].get_xydata() == pytest.approx(np.array([[1e8, 50]]))
    ((_, low), (_, high)) = model[2][0].get_segments()[0]
    assert (low, high) == pytest.approx((40, 70))
    assert "llama" not in scale_insensitivity.one_axis(scale).words()


def convergence_study(shift):
    """Each size's fall in tokens per parameter is `shift` decades later per decade of parameters."""
    checkpoints = planted_metrics(activations=("relu",))
    x, sizes = checkpoints["tokens"] / checkpoints["parameters"], checkpoints["parameters"] / 1e5
    return checkpoints.assign(activation_ratio=0.2 + 0.05 * np.exp(-x / (10 * sizes**shift)))


@pytest.mark.parametrize(("shift", "verdict"), [(0.3, SUPPORTED), (-0.3, NOT_SUPPORTED)])
def test_who_converges_faster(shift, verdict):
    checkpoints = convergence_study(shift)
    row = by_claim(judged(checkpoints))[scale_insensitivity.SMALL_CONVERGE_FASTER.claim]
    assert row.verdict == verdict and 0 < row.here / shift < 1.1  # the window bounds the half-way point
    flat = checkpoints.assign(activation_ratio=0.3)
    row = by_claim(judged(flat))[scale_insensitivity.SMALL_CONVERGE_FASTER.claim]
    assert row.verdict == INCONCLUSIVE and "8 of 8 runs left out (first: no trend" in row.reason


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: t.drop(columns=["width_depth_ratio", "fit"]),
            "checkpoints table lacks the columns width_depth_ratio, fit",
        ),
        (lambda t: t.head(0), "checkpoints table has no rows"),
        (lambda t: pd.concat([t, t.head(1)]), "two rows for run relu-40x2-0, step 0"),
        (
            lambda t: pd.concat([t, t.assign(run=t["run"] + "b")]),
            "two rows for activation relu, d_model 40, n_layers 2",
        ),
        (
            lambda t: t.assign(activation_ratio=t["activation_ratio"].where(t["step"] != 3)),
            "no activation_ratio .NaN. at",
        ),
        (lambda t: t.assign(validation_loss=np.nan), "no validation_loss .NaN."),
        (lambda t: t.assign(activation=t["activation"].replace("silu", "tanh")), "is known for 'tanh'"),
    ],
)
def test_unusable_checkpoint_tables_are_input_errors(spoil, message):
    with pytest.raises(InputError, match=message):
        judged(spoil(study(SHAPES[:1])))


def test_claims_are_stated_before_their_verdicts():
    check_stated(scale_insensitivity, judged(study(), study()))
