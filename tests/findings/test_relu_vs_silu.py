"""ReLU beside SiLU on made-up studies whose answer is known."""

import pytest
from planted import AT_SECOND, SHAPES, by_claim, check_stated, study
from scipy import stats

from sparsity_utils.findings import relu_vs_silu
from sparsity_utils.laws import data_law, lines
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals are tested with the laws; here they only need to be there."""
    monkeypatch.setattr(data_law, "RESAMPLES", 20)


def judged(*tables):
    return relu_vs_silu.verdicts(relu_vs_silu.analyse(*tables))


def test_relu_vs_silu_on_a_study_that_follows_the_paper():
    rows = judged(study(), study(SHAPES[:3]))
    assert [row.verdict for row in rows] == [SUPPORTED] * 11
    row = by_claim(rows)["ReLU ends sparser than SiLU"]
    assert row.here == pytest.approx(24, abs=1)  # 45 - 20 points, less what is left of either law
    assert row.interval[0] < row.here < row.interval[1]


def test_relu_vs_silu_on_a_study_that_contradicts_the_paper():
    checkpoints = study(silu_loss=1.05)
    checkpoints["activation"] = checkpoints["activation"].map({"relu": "silu", "silu": "relu"})  # the other way round
    rows = judged(checkpoints)
    assert [row.verdict for row in rows[:4]] == [NOT_SUPPORTED] * 4
    assert rows[0].here == pytest.approx(5, abs=0.2)
    assert {row.verdict for row in rows[4:6]} == {NOT_SUPPORTED}


def test_each_line_has_verdicts_of_its_own_and_its_sizes_count_once():
    """The second line is turned round. A size with many seeds weighs as much as one with a single seed."""
    second = study(SHAPES[:3], limit=lambda activation, ratio, size: {"relu": 0.45, "silu": 0.2}[activation])
    rows = by_claim(judged(study(), second))
    row, other = (rows[f"ReLU ends sparser than SiLU{where}"] for where in ("", AT_SECOND))
    assert (row.verdict, other.verdict) == (SUPPORTED, NOT_SUPPORTED)
    assert other.here == pytest.approx(-26, abs=1)
    assert other.reason == "3 sizes, 6 runs; spread of 7 sizes on 2 lines"
    checkpoints = study(SHAPES[:3], seeds=(0, 1, 2))
    few = checkpoints[(checkpoints["d_model"] == 40) | (checkpoints["seed"] == 0)]
    values = lines.relu_sparser(few)
    expected = values.groupby("d_model")["value"].mean().to_numpy()
    reference = stats.ttest_1samp(expected, 0).confidence_interval(0.90)
    row = by_claim(judged(few))["ReLU ends sparser than SiLU"]
    assert row.here == pytest.approx(100 * expected.mean())
    assert row.interval == pytest.approx((100 * reference.low, 100 * reference.high))


def test_a_study_without_a_second_line_says_so():
    rows = judged(study())
    assert [row.claim.claim for row in rows] == relu_vs_silu.claims()["question"].tolist()
    assert {(row.verdict, row.reason) for row in rows[7:]} == {
        (INCONCLUSIVE, "this study has no sizes at a second width-depth ratio")
    }


def test_one_activation_alone_leaves_comparisons_inconclusive():
    rows = by_claim(judged(study(activations=("relu",))))
    assert rows["ReLU reaches the loss of SiLU"].verdict == INCONCLUSIVE
    assert rows["ReLU reaches the loss of SiLU"].reason == "no size has the runs that this needs"
    assert rows["The SiLU activation ratio rises with data"].verdict == INCONCLUSIVE
    assert rows["The ReLU activation ratio falls with data"].verdict == SUPPORTED


def test_a_simpler_form_that_does_as_well_is_not_evidence_against_the_published_one():
    """Twelve noisy points that do follow the logspace form: AICc prefers fewer parameters."""
    checkpoints = study(noise=4e-3, points=12, end=12e6)
    row = by_claim(judged(checkpoints))["The published logspace law describes ReLU best"]
    assert row.interval[1] < 0 and row.verdict == INCONCLUSIVE


def test_losses_are_paired_at_equal_tokens_only():
    checkpoints = study()
    other = (checkpoints["activation"] == "silu") & (checkpoints["role"] == "final") & (checkpoints["d_model"] == 40)
    checkpoints.loc[other, "tokens"] *= 1.5
    assert judged(checkpoints)[0].reason == "3 sizes, 6 runs"


def test_claims_are_stated_before_their_verdicts():
    check_stated(relu_vs_silu, judged(study(), study()))
