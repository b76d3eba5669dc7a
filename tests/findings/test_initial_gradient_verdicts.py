"""Claims on the gradient at initialisation: verdicts follow planted gradients in every direction; table and figure."""

from dataclasses import replace

import numpy as np
import pytest
from planted import check_stated

from sparsity_utils.findings import initial_gradient
from sparsity_utils.findings.initial_gradient import GAUSSIAN, excess
from sparsity_utils.laws.initial_gradient import CROSS_ENTROPY, LOSSES, SQUARED_ERROR, InitialGradient
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED

P = np.array([0.5, 1.0, 2.0])
EXACT = InitialGradient(P, 2 * P, np.full(3, 0.1), 2.0, 0.02, 2.0, 0.01, 100)
UNKNOWN = replace(EXACT, predicted=np.nan, predicted_error=np.nan)


def made(loss=CROSS_ENTROPY, case=(GAUSSIAN, 32), **changes):
    """What `analyse` finds where all is exact but the gradient of one loss in one case."""
    found = {(GAUSSIAN, outputs): dict.fromkeys(LOSSES, EXACT) for outputs in (32, 1024)}
    found |= {("uniform", 32): {CROSS_ENTROPY: UNKNOWN, SQUARED_ERROR: EXACT}}
    found[case] = found[case] | {loss: replace(found[case][loss], **changes)}
    return found


def words(found):
    return {verdict.claim.key: verdict.verdict for verdict in initial_gradient.verdicts(found)}


@pytest.fixture(scope="module")
def drawn():
    """Real draws, few of them."""
    return initial_gradient.analyse({(GAUSSIAN, 8): 400, (GAUSSIAN, 3): 400, ("Rademacher", 3): 400})


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("outputs", [32, 1024])
@pytest.mark.parametrize(
    ("slope", "error", "verdict"),
    [
        (2.0, 0.02, SUPPORTED),
        (2.05, 0.02, SUPPORTED),
        (2.0, 0.1, INCONCLUSIVE),  # 15% to each side
        (2.1, 0.02, NOT_SUPPORTED),
        (1.9, 0.02, NOT_SUPPORTED),
        (-2.0, 0.02, NOT_SUPPORTED),
        (4.0, 0.2, NOT_SUPPORTED),
    ],
)
def test_the_exact_size_is_judged_for_each_loss_at_the_worse_number_of_outputs(loss, outputs, slope, error, verdict):
    found = words(made(loss, (GAUSSIAN, outputs), slope=slope, slope_error=error))
    assert found.pop(initial_gradient.EXACT[loss].key) == verdict
    assert set(found.values()) == {SUPPORTED}


def test_the_interval_is_three_errors_of_both_slopes():
    found = excess(replace(EXACT, slope=2.2, slope_error=0.03, predicted=2.0, predicted_error=0.04))
    error = 1.1 * np.sqrt((0.03 / 2.2) ** 2 + (0.04 / 2.0) ** 2)  # relative errors add in squares
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1 - 3 * error, 0.1 + 3 * error))
    assert found.n == 100


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("lowest", "verdict"), [(0.31, SUPPORTED), (0.29, INCONCLUSIVE), (-0.29, INCONCLUSIVE), (-0.31, NOT_SUPPORTED)]
)
def test_the_sign_is_judged_at_the_lowest_neuron_where_entries_are_not_gaussian(loss, lowest, verdict):
    planted = made(loss, ("uniform", 32), mean=np.array([lowest, 2.0, 4.0]))
    assert words(planted) == {
        "exact_cross_entropy": SUPPORTED, "exact_squared_error": SUPPORTED, "positive_gradient": verdict,
    }  # fmt: skip
    row = initial_gradient.verdicts(planted)[-1]
    assert (row.here, row.interval) == (pytest.approx(10 * lowest), pytest.approx((10 * lowest - 3, 10 * lowest + 3)))
    assert row.reason == f"100 draws; decides: p = 0.5, uniform V, {loss}"
    assert words(made(loss, mean=np.array([-5.0, 2.0, 4.0])))["positive_gradient"] == SUPPORTED  # Gaussian V


def test_what_is_stated_is_what_is_judged_and_intervals_name_their_level(drawn):
    rows = initial_gradient.verdicts(drawn)
    check_stated(initial_gradient, rows)
    assert rows.table()["interval"].str.endswith("(99.7%)").all()


def test_the_table_has_a_row_per_case_and_loss_and_no_exact_slope_where_none_is_known():
    table = initial_gradient.table(made(slope=2.05))
    assert table["entries_of_V"].tolist() == [GAUSSIAN] * 4 + ["uniform"] * 2
    assert table["loss"].tolist() == [*LOSSES] * 3
    assert table.loc[0].tolist()[1:] == ["32", CROSS_ENTROPY, "100", "2.05", "2", "+2.5% (-0.9 to +5.9)", "10.0"]
    assert table.loc[4, ["exact_slope", "excess"]].tolist() == ["not known"] * 2
    assert table.loc[5, "excess"] == "+0.0% (-3.4 to +3.4)"


def test_half_of_the_neurons_are_active_and_the_stated_draws_are_made(drawn):
    for gradients in drawn.values():
        for gradient in gradients.values():
            assert gradient.draws == 400 and gradient.p.size == initial_gradient.WIDTH // 2
            assert (gradient.p[0], gradient.p[-1]) == (initial_gradient.SMALLEST, initial_gradient.LARGEST)


def test_the_figure_shows_every_mean_beside_its_exact_line(drawn):
    shown = initial_gradient.figure(drawn)
    for axes, loss in zip(shown.axes, LOSSES, strict=True):
        assert axes.get_legend_handles_labels()[1] == ["8 outputs", "3 outputs"]
        for number, outputs in enumerate((8, 3)):
            gradient, unit = drawn[GAUSSIAN, outputs][loss], outputs if loss == SQUARED_ERROR else 1
            exact, (points, _, (bars,)) = axes.lines[4 * number], axes.containers[number]
            np.testing.assert_allclose(points.get_ydata(), 1e3 * gradient.mean / unit)
            np.testing.assert_allclose(exact.get_ydata(), [0, 1e3 * gradient.predicted * 4.0 / unit])
            ends = np.array(bars.get_segments())[:, :, 1]
            np.testing.assert_allclose(np.diff(ends)[:, 0], 6e3 * gradient.error / unit)
    assert "Panel 2: Squared error, per output" in shown.words() and "400 at 8 outputs" in shown.words()
