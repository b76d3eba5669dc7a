"""Ratio, breakpoint and optimum on made-up studies whose answer is known, and what depth costs."""

import numpy as np
import pandas as pd
import pytest
from planted import check_stated, study

from sparsity_utils.console import InputError
from sparsity_utils.findings import width_depth_ratio
from sparsity_utils.findings.width_depth_ratio import cost_beside_sparsity
from sparsity_utils.laws import data_law
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals are tested with the laws; here they only need to be there."""
    monkeypatch.setattr(data_law, "RESAMPLES", 20)


def judged(checkpoints):
    return width_depth_ratio.verdicts(width_depth_ratio.analyse(checkpoints))


WIDE = ((24, 4), (48, 4), (72, 3), (96, 2), (144, 2), (130, 1), (180, 1), (282, 1))  # ratios 6 to 282


def test_width_depth_finds_the_planted_breakpoint_and_optimum():
    checkpoints = study(
        WIDE, ("relu",), limit=lambda activation, ratio, size: 0.2 + 4e-4 * min(ratio - 114, 0), optimum=140, noise=1e-4
    )
    rises, breaks, optimum = judged(checkpoints)
    assert [row.verdict for row in (rises, breaks, optimum)] == [SUPPORTED] * 3
    assert rises.here == pytest.approx(4, abs=0.3)  # points per 100
    assert breaks.interval[0] < 114 < breaks.interval[1]
    assert optimum.here == pytest.approx(140, rel=0.2)


def test_width_depth_elsewhere_is_not_supported_and_outside_is_inconclusive():
    early = study(WIDE, ("relu",), limit=lambda a, ratio, size: 0.2 + 1e-3 * min(ratio - 50, 0), optimum=20, noise=1e-4)
    rises, breaks, optimum = judged(early)
    assert (rises.verdict, breaks.verdict, optimum.verdict) == (SUPPORTED, NOT_SUPPORTED, NOT_SUPPORTED)
    narrow = tuple((6 * ratio, 6) for ratio in (6, 10, 16, 24, 36, 48))
    line = study(narrow, ("relu",), limit=lambda a, ratio, size: 0.1 + 1e-3 * ratio, optimum=140)
    rises, breaks, optimum = judged(line)
    assert (rises.verdict, breaks.verdict, optimum.verdict) == (SUPPORTED, INCONCLUSIVE, INCONCLUSIVE)
    assert "sampled ratios 6 to 48" in breaks.reason
    assert "the interval reaches an end of the sampled range, 6 to 48" in optimum.reason


def test_a_breakpoint_found_elsewhere_is_no_evidence_where_the_published_one_was_not_sampled():
    narrow = ((64, 1), (44, 2), (36, 3), (32, 4), (28, 5), (24, 7))
    saturating = study(narrow, ("relu",), limit=lambda a, ratio, size: 0.1 + 0.12 * (1 - np.exp(-ratio / 8)))
    _, breaks, optimum = judged(saturating)
    assert (breaks.verdict, optimum.verdict) == (INCONCLUSIVE, INCONCLUSIVE)
    assert "the published position lies outside the sampled ratios" in breaks.reason


def costs(shapes):
    table = pd.DataFrame(shapes, columns=["d_model", "n_layers"])
    return table.assign(
        width_depth_ratio=table["d_model"] / table["n_layers"], flops_per_token=1e6 * table["n_layers"],
        training_us=10.0 * table["n_layers"], training_low=9.0 * table["n_layers"],
        training_high=12.0 * table["n_layers"], forward_us=4.0 + table["n_layers"],
    )  # fmt: skip


def test_costs_stand_beside_what_they_buy():
    shapes = ((80, 4), (100, 2))
    checkpoints = study(shapes, ("relu",), (0, 1, 2))
    table = cost_beside_sparsity(checkpoints, costs([*shapes, (8, 8)]))
    assert table["d_model"].tolist() == [100, 80] and (table["seeds"] == 3).all()  # the widest first
    assert table["training"].tolist() == [1, 2] and table["flops"].tolist() == [1, 2]
    assert table["training_low"].tolist() == pytest.approx([0.9, 1.8]) and table["forward"][1] == pytest.approx(8 / 6)
    stable = checkpoints[(checkpoints["role"] == "stable") & (checkpoints["d_model"] == 80)]
    means = stable.groupby("run")["activation_ratio"].apply(lambda values: values.tail(5).mean())
    assert (table["activation_ratio"][1], table["spread"][1]) == pytest.approx((means.mean(), np.ptp(means)))
    final = checkpoints[(checkpoints["role"] == "final") & (checkpoints["d_model"] == 80)]["validation_loss"]
    assert (table["loss"][1], table["loss_spread"][1]) == pytest.approx((final.mean(), np.ptp(final)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cost_beside_sparsity(study(((80, 4),), ("relu",)), costs([(8, 8)])), "has no row for 80x4"),
        (lambda: cost_beside_sparsity(study(((80, 4),), ("relu",)), costs([(80, 4)] * 2)), "two rows for d_model 80"),
        (
            lambda: cost_beside_sparsity(study(((80, 4),)), costs([(80, 4)]).assign(training_us=np.nan)),
            "no training_us .NaN.",
        ),
        (lambda: cost_beside_sparsity(study(((80, 4),)), costs([(80, 4)]).drop(columns="forward_us")), "lacks the col"),
    ],
)
def test_unusable_costs_are_input_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_claims_are_stated_before_their_verdicts():
    check_stated(width_depth_ratio, judged(study()))


def test_a_study_of_silu_alone_has_no_width_depth_claims():
    with pytest.raises(InputError, match="no relu runs"):
        judged(study(activations=("silu",)))
