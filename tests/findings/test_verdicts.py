"""Verdicts on made-up studies whose answer is known, and errors for tables that cannot be used."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from planted import SHAPES, by_claim, study
from scipy import stats

from sparsity_utils.console import InputError
from sparsity_utils.findings import claims, judgement, verdicts
from sparsity_utils.laws import limits, outcomes
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED

WORDS = {SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals are tested with the laws; here they only need to be there."""
    monkeypatch.setattr(limits, "RESAMPLES", 20)


def metrics_table(gap=0.05, cut=0.6, runs=3):
    """Loss added by sparsity: 0.01 / ratio for CETT, `gap` more for Top-k; plain ReLU keeps 30% and costs nothing."""
    rows = []
    for run in range(runs):

        def add(metric, setting, ratio, added, run=run):
            rows.append((f"run{run}", "relu", metric, setting, ratio * (1 + 0.01 * run), np.exp(added)))

        add("relu", np.nan, 0.3, 0.0)
        add("cett-ppl", 1.0, 0.3 * (1 - cut), 0.01)
        for ratio in (0.05, 0.1, 0.2, 0.4):
            add("cett", ratio, ratio, 0.01 / ratio)
        for ratio in (0.06, 0.12, 0.24, 0.48):
            add("top-k", ratio, ratio, 0.01 / ratio + gap)
            add("fat", ratio, ratio, 0.01 / ratio + 2 * gap)
    return pd.DataFrame(rows, columns=["run", "activation", "metric", "setting", "activation_ratio", "ppl_ratio"])


def report(rise=0.01, interval=(0.005, 0.018), **changes):
    """What verdicts need of a sparsity report."""
    ends = tuple(1 + end for end in interval)
    usual = {"metric": "cett-ppl", "calibrated_on": "calibration", "documents": 25, "note": ""}
    return SimpleNamespace(ppl_ratio=1 + rise, ppl_ratio_interval=ends, **usual | changes)


@pytest.mark.parametrize(
    ("interval", "p", "expected"),
    [
        ((0.005, 0.018), 1.0, SUPPORTED),
        ((0.0, 0.0199), 1.0, SUPPORTED),
        ((-0.001, 0.018), 1.0, INCONCLUSIVE),
        ((0.005, 0.021), 1.0, INCONCLUSIVE),
        ((0.005, 0.021), 2.0, SUPPORTED),
        ((0.021, 0.03), 1.0, NOT_SUPPORTED),
        ((-0.01, -0.001), 1.0, NOT_SUPPORTED),
        ((np.nan, np.nan), 1.0, INCONCLUSIVE),
    ],
)
def test_a_promised_price_is_held_within_twice_of_it(interval, p, expected):
    (row,) = verdicts.quickstart(report(interval=interval), p)
    assert (row.verdict, row.here) == (expected, pytest.approx(1.0))
    assert row.threshold.startswith(f"90% interval inside 0 to {2 * p:g}%")
    assert row.reason == ("one document: no interval" if np.isnan(interval[0]) else "25 documents")


@pytest.mark.parametrize("changes", [{"metric": "cett"}, {"calibrated_on": "evaluation"}])
def test_a_price_is_promised_by_cett_ppl_on_other_documents_only(changes):
    with pytest.raises(InputError, match="about 'cett-ppl' with other documents"):
        verdicts.quickstart(report(**changes))


def test_limits_table_has_planted_limits_per_seed_and_for_all():
    table = limits.limits_table(study(limit=lambda activation, ratio, size: {"relu": 0.15, "silu": 0.5}[activation]))
    assert list(table.columns) == limits.LIMITS
    assert len(table) == 2 * len(SHAPES) * 3
    common = table[table["seed"] == "all"]
    assert table["sound"].all() and set(table["seed"]) == {"all", "0", "1"}
    np.testing.assert_allclose(common.loc[common["activation"] == "relu", "limit"], 0.15, atol=3e-3)
    np.testing.assert_allclose(common.loc[common["activation"] == "silu", "limit"], 0.50, atol=3e-3)
    assert (common["low"] < common["limit"]).all() and (common["limit"] < common["high"]).all()
    by_seed = table[table["seed"] != "all"]
    assert (common[["spread", "last_five_spread"]] > 0).all(axis=None)
    assert by_seed[["low", "high", "spread", "last_five_spread"]].isna().all(axis=None)


def test_seeds_have_intervals_of_their_own_where_asked_for():
    checkpoints = study(SHAPES[:1], ("relu",))
    plain, table = limits.limits_table(checkpoints), limits.limits_table(checkpoints, seed_intervals=True)
    assert (table["low"] < table["limit"]).all() and (table["limit"] < table["high"]).all()
    pd.testing.assert_frame_equal(table.drop(columns=["low", "high"]), plain.drop(columns=["low", "high"]))
    pd.testing.assert_series_equal(table.iloc[0], plain.iloc[0])  # the common curve


def test_spread_is_the_range_over_seeds():
    checkpoints = study(SHAPES[:1], ("relu",), seeds=(0, 1, 2))
    table = limits.limits_table(checkpoints).set_index("seed")
    for values, spread in (("limit", "spread"), ("last_five_mean", "last_five_spread")):
        seeds = table.loc[["0", "1", "2"], values]
        assert table.loc["all", spread] == pytest.approx(seeds.max() - seeds.min())
    assert np.isnan(limits.limits_table(study(SHAPES[:1], ("relu",), seeds=(0,)))["last_five_spread"]).all()


def test_last_five_mean_is_the_mean_of_the_last_five_stable_checkpoints():
    checkpoints = study(SHAPES[:1], ("relu",), (0,)).sample(frac=1, random_state=0)
    stable = checkpoints[checkpoints["role"] == "stable"]
    expected = stable.nlargest(5, "tokens")["activation_ratio"].mean()
    table = limits.limits_table(checkpoints)
    np.testing.assert_allclose(table["last_five_mean"], expected)


def test_warm_up_points_are_not_fitted():
    checkpoints = study(noise=0.0)
    early = checkpoints["tokens"] <= 0.7e6
    spoilt = checkpoints.assign(activation_ratio=checkpoints["activation_ratio"].where(~early, 0.9))
    pd.testing.assert_series_equal(limits.limits_table(checkpoints)["limit"], limits.limits_table(spoilt)["limit"])


def test_runs_without_a_limit_are_unsound_and_say_why():
    checkpoints = study(SHAPES[:1], ("relu",)).assign(activation_ratio=0.3)
    table = limits.limits_table(checkpoints)
    assert not table["sound"].any() and table["reason"].str.startswith("no trend").all() and table["limit"].isna().all()
    table = limits.limits_table(checkpoints.assign(fit=False))
    assert table["reason"].str.startswith("too few points: 0").all()
    np.testing.assert_allclose(table["last_five_mean"], 0.3)


def test_a_limit_with_a_wide_interval_is_unsound(monkeypatch):
    checkpoints = study(SHAPES[:1], ("relu",))
    monkeypatch.setattr(limits, "WIDEST_INTERVAL", 1e-5)
    table = limits.limits_table(checkpoints)
    common = table[table["seed"] == "all"].iloc[0]
    assert not common["sound"] and "interval of the limit spans" in common["reason"]


def test_relu_vs_silu_on_a_study_that_follows_the_paper():
    rows = verdicts.relu_vs_silu(study(), study(SHAPES[:3]))
    assert [row.verdict for row in rows] == [SUPPORTED] * 11
    row = by_claim(rows)["ReLU ends sparser than SiLU"]
    assert row.here == pytest.approx(24, abs=1)  # 45 - 20 points, less what is left of either law
    assert row.interval[0] < row.here < row.interval[1]


def test_relu_vs_silu_on_a_study_that_contradicts_the_paper():
    checkpoints = study(silu_loss=1.05)
    checkpoints["activation"] = checkpoints["activation"].map({"relu": "silu", "silu": "relu"})  # the other way round
    rows = verdicts.relu_vs_silu(checkpoints)
    assert [row.verdict for row in rows[:4]] == [NOT_SUPPORTED] * 4
    assert rows[0].here == pytest.approx(5, abs=0.2)
    assert {row.verdict for row in rows[4:6]} == {NOT_SUPPORTED}


def test_each_line_has_verdicts_of_its_own_and_its_sizes_count_once():
    """The second line is turned round. A size with many seeds weighs as much as one with a single seed."""
    second = study(SHAPES[:3], limit=lambda activation, ratio, size: {"relu": 0.45, "silu": 0.2}[activation])
    rows = by_claim(verdicts.relu_vs_silu(study(), second))
    row, other = (rows[f"ReLU ends sparser than SiLU{where}"] for where in ("", claims.SECOND_LINE))
    assert (row.verdict, other.verdict) == (SUPPORTED, NOT_SUPPORTED)
    assert other.here == pytest.approx(-26, abs=1)
    assert other.reason == "3 sizes, 6 runs; spread of 7 sizes on 2 lines"
    checkpoints = study(SHAPES[:3], seeds=(0, 1, 2))
    few = checkpoints[(checkpoints["d_model"] == 40) | (checkpoints["seed"] == 0)]
    values = outcomes.relu_sparser(few)
    expected = values.groupby("d_model")["value"].mean().to_numpy()
    reference = stats.ttest_1samp(expected, 0).confidence_interval(0.90)
    row = by_claim(verdicts.relu_vs_silu(few))["ReLU ends sparser than SiLU"]
    assert row.here == pytest.approx(100 * expected.mean())
    assert row.interval == pytest.approx((100 * reference.low, 100 * reference.high))


def test_a_study_without_a_second_line_says_so():
    rows = verdicts.relu_vs_silu(study())
    assert [row.claim for row in rows] == claims.claims_table("relu_vs_silu")["question"].tolist()
    assert {(row.verdict, row.reason) for row in rows[7:]} == {
        (INCONCLUSIVE, "this study has no sizes at a second width-depth ratio")
    }


@pytest.mark.parametrize(("shapes", "seeds"), [(SHAPES[:1], (0,)), (SHAPES[:2], (0,)), (SHAPES[:1], (0, 1))])
def test_small_studies_pass_through_every_question(shapes, seeds):
    checkpoints = study(shapes, seeds=seeds)
    for question in (verdicts.relu_vs_silu, verdicts.width_depth, verdicts.scale_insensitivity):
        rows = question(checkpoints)
        assert {row.verdict for row in rows} <= WORDS and all(row.reason for row in rows)
    assert {row.verdict for row in verdicts.scale_insensitivity(checkpoints)} == {INCONCLUSIVE}
    assert {row.verdict for row in verdicts.width_depth(checkpoints)} == {INCONCLUSIVE}


def test_one_activation_alone_leaves_comparisons_inconclusive():
    rows = by_claim(verdicts.relu_vs_silu(study(activations=("relu",))))
    assert rows["ReLU reaches the loss of SiLU"].verdict == INCONCLUSIVE
    assert rows["ReLU reaches the loss of SiLU"].reason == "no size has the runs that this needs"
    assert rows["The SiLU activation ratio rises with data"].verdict == INCONCLUSIVE
    assert rows["The ReLU activation ratio falls with data"].verdict == SUPPORTED
    with pytest.raises(InputError, match="no relu runs"):
        verdicts.width_depth(study(activations=("silu",)))


def test_a_simpler_form_that_does_as_well_is_not_evidence_against_the_published_one():
    """Twelve noisy points that do follow the logspace form: AICc prefers fewer parameters."""
    checkpoints = study(noise=4e-3, points=12, end=12e6)
    row = by_claim(verdicts.relu_vs_silu(checkpoints))["The published logspace law describes ReLU best"]
    assert row.interval[1] < 0 and row.verdict == INCONCLUSIVE


def test_losses_are_paired_at_equal_tokens_only():
    checkpoints = study()
    other = (checkpoints["activation"] == "silu") & (checkpoints["role"] == "final") & (checkpoints["d_model"] == 40)
    checkpoints.loc[other, "tokens"] *= 1.5
    assert verdicts.relu_vs_silu(checkpoints)[0].reason == "3 sizes, 6 runs"


WIDE = ((24, 4), (48, 4), (72, 3), (96, 2), (144, 2), (130, 1), (180, 1), (282, 1))  # ratios 6 to 282


def test_width_depth_finds_the_planted_breakpoint_and_optimum():
    checkpoints = study(
        WIDE, ("relu",), limit=lambda activation, ratio, size: 0.2 + 4e-4 * min(ratio - 114, 0), optimum=140, noise=1e-4
    )
    rises, breaks, optimum = verdicts.width_depth(checkpoints)
    assert [row.verdict for row in (rises, breaks, optimum)] == [SUPPORTED] * 3
    assert rises.here == pytest.approx(4, abs=0.3)  # points per 100
    assert breaks.interval[0] < 114 < breaks.interval[1]
    assert optimum.here == pytest.approx(140, rel=0.2)


def test_width_depth_elsewhere_is_not_supported_and_outside_is_inconclusive():
    early = study(WIDE, ("relu",), limit=lambda a, ratio, size: 0.2 + 1e-3 * min(ratio - 50, 0), optimum=20, noise=1e-4)
    rises, breaks, optimum = verdicts.width_depth(early)
    assert (rises.verdict, breaks.verdict, optimum.verdict) == (SUPPORTED, NOT_SUPPORTED, NOT_SUPPORTED)
    narrow = tuple((6 * ratio, 6) for ratio in (6, 10, 16, 24, 36, 48))
    line = study(narrow, ("relu",), limit=lambda a, ratio, size: 0.1 + 1e-3 * ratio, optimum=140)
    rises, breaks, optimum = verdicts.width_depth(line)
    assert (rises.verdict, breaks.verdict, optimum.verdict) == (SUPPORTED, INCONCLUSIVE, INCONCLUSIVE)
    assert "sampled ratios 6 to 48" in breaks.reason
    assert "the interval reaches an end of the sampled range, 6 to 48" in optimum.reason


def test_a_breakpoint_found_elsewhere_is_no_evidence_where_the_published_one_was_not_sampled():
    narrow = ((64, 1), (44, 2), (36, 3), (32, 4), (28, 5), (24, 7))
    saturating = study(narrow, ("relu",), limit=lambda a, ratio, size: 0.1 + 0.12 * (1 - np.exp(-ratio / 8)))
    _, breaks, optimum = verdicts.width_depth(saturating)
    assert (breaks.verdict, optimum.verdict) == (INCONCLUSIVE, INCONCLUSIVE)
    assert "the published position lies outside the sampled ratios" in breaks.reason


def test_metrics_verdicts():
    lowest, cut = verdicts.metrics(metrics_table())
    assert (lowest.verdict, cut.verdict) == (SUPPORTED, SUPPORTED)
    assert lowest.here == pytest.approx(0.05, abs=0.02) and "closest: top-k" in lowest.reason
    assert cut.here == pytest.approx(60)
    lowest, cut = verdicts.metrics(metrics_table(gap=-0.05, cut=-0.1))
    assert (lowest.verdict, cut.verdict) == (NOT_SUPPORTED, NOT_SUPPORTED)
    assert {row.verdict for row in verdicts.metrics(metrics_table(runs=1))} == {INCONCLUSIVE}


def test_metrics_that_share_no_activation_ratio_are_inconclusive():
    table = metrics_table()
    table.loc[table["metric"] == "fat", "activation_ratio"] += 0.5
    lowest, _ = verdicts.metrics(table)
    assert lowest.verdict == INCONCLUSIVE and "closest: fat" in lowest.reason
    assert verdicts.metrics(table[table["metric"] == "relu"])[0].verdict == INCONCLUSIVE


def test_gap_is_the_mean_difference_on_the_shared_useful_range():
    """Straight lines in log ratio are interpolated exactly; where CETT triples perplexity nothing is compared."""
    rows = [("cett", 0.01, np.log(3)), ("cett", 0.1, 0.2), ("cett", 0.4, 0.1)]
    rows += [("top-k", 0.01, 9.0), ("top-k", 0.1, 0.3), ("top-k", 0.4, 0.1), ("fat", 0.1, 0.2), ("fat", 0.4, 0.1)]
    table = pd.DataFrame(rows, columns=["metric", "activation_ratio", "loss"])
    gaps = verdicts._loss_gaps(table.assign(ppl_ratio=np.exp(table["loss"])))
    assert gaps == pytest.approx({"top-k": 0.05, "fat": 0.0})


def test_tables_are_text_rounded_and_complete():
    rows = [*verdicts.metrics(metrics_table()), *verdicts.relu_vs_silu(study(activations=("relu",)))]
    table = verdicts.to_table(rows)
    assert list(table.columns) == ["question", "published", "here", "interval", "verdict"]
    assert table.map(lambda cell: isinstance(cell, str)).all(axis=None)
    assert table.loc[1, ["here", "interval"]].tolist() == ["60.0 % fewer", "60.0 to 60.0"]
    assert table.loc[2, ["here", "interval"]].tolist() == ["none", "none"]
    assert verdicts.details(rows)["test"].tolist() == [row.test for row in rows]
    assert [judgement._rounded(x) for x in (-0.001, 0.0, -1.234, 12.34, -123.4)] == [
        "0.00",
        "0.00",
        "-1.23",
        "12.3",
        "-123",
    ]


def test_claims_are_stated_before_their_verdicts():
    """What a notebook prints first is word for word what its verdicts are judged by."""
    judged = {
        "quickstart": verdicts.quickstart(report()),
        "metrics": verdicts.metrics(metrics_table()),
        "relu_vs_silu": verdicts.relu_vs_silu(study(), study()),
        "width_depth_ratio": verdicts.width_depth(study()),
        "scale_insensitivity": verdicts.scale_insensitivity(study(), study()),
    }
    for question, rows in judged.items():
        stated = claims.claims_table(question)
        assert stated["question"].tolist() == [row.claim for row in rows]
        assert stated["threshold"].tolist() == [row.threshold for row in rows]
        assert stated["published"].tolist() == [row.published for row in rows]
        assert stated["test"].tolist() == [row.test for row in rows]
        assert {row.question for row in rows} == {question}


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
        verdicts.scale_insensitivity(spoil(study(SHAPES[:1])))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.drop(columns="ppl_ratio"), "metrics table lacks the columns ppl_ratio"),
        (lambda t: t.assign(ppl_ratio=np.nan), "metrics table has no ppl_ratio"),
        (lambda t: pd.concat([t, t]), "metrics table has two rows for run run0, metric relu"),
    ],
)
def test_unusable_metrics_tables_are_input_errors(spoil, message):
    with pytest.raises(InputError, match=message):
        verdicts.metrics(spoil(metrics_table()))


def test_no_claim_is_stated_twice():
    sentences = [claim.claim for claim in claims.CLAIMS]
    assert len(set(sentences)) == len(sentences)


def test_the_primary_claims_are_those_that_the_docstring_names():
    primary = [claim for claim in claims.CLAIMS if claim.primary]
    at_both = {claim.claim for claim in (*claims.PAIRED, *claims.line_claims()[:2])}
    assert len(primary) == 13 and claims.__doc__.count("Thirteen claims are primary") == 1
    assert {claim.claim for claim in primary} == {
        *at_both, *(sentence + claims.SECOND_LINE for sentence in at_both), claims.RATIO_RISES.claim
    }  # fmt: skip
    ranks = claims.claims_table("scale_insensitivity").set_index("question")["rank"]
    assert ranks["The SiLU limit does not depend on scale"] == "primary"
    assert ranks["The ReLU share of non-zero neurons does not depend on scale"] == "secondary"
