"""Verdicts on digits, on planted tables whose answers are known."""

import numpy as np
import pandas as pd
import pytest

from sparsity_utils.console import InputError
from sparsity_utils.findings import digits
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED

IMAGES = 500
NOISY = ["accuracy_gaussian", "accuracy_impulse", "accuracy_shot"]


def planted(gain=0.03, clean=0.0, error=(40.0, 10.0), seeds=8, scatter=0.002):
    """Both arms of all models: top-k gains `gain` under noise, `clean` without; error: gap of the last bin by arm."""
    random, rows = np.random.default_rng(0), []
    for model in digits.MODELS:
        for noise in (0.0, 0.4, 0.8):
            for seed in range(seeds):
                base = 0.95 - 0.4 * noise + 0.05 * random.normal()  # seeds differ much more than arms
                for arm, gap in zip(digits.ARMS, error, strict=True):
                    more = (arm == digits.TOP_K) * (gain if noise else clean) + scatter * random.normal()
                    row = {"model": model, "arm": arm, "label_noise": noise, "seed": seed, "accuracy": base + more}
                    others = base - 0.2 + (arm == digits.TOP_K) * gain + scatter * random.normal()
                    row |= dict.fromkeys(NOISY, others if noise == 0 else np.nan)
                    rows.append({**row, "images": IMAGES, **dict.fromkeys(digits.GAPS, 0.0), "gap_9": gap})
    return pd.DataFrame(rows)


def words(table):
    return {found.claim.key: found.verdict for found in digits.verdicts(table)}


def test_planted_gains_are_found_with_their_size_and_sign():
    found = {one.claim.key: one for one in digits.verdicts(planted())}
    assert {one.verdict for one in found.values()} == {SUPPORTED} and len(found) == 14
    for name in ("labels_40", "labels_80", "gaussian", "impulse", "shot"):
        assert found[f"digits_mlp_{name}"].here == pytest.approx(3, abs=0.3)
    error = found["digits_transformer_calibration"]
    assert error.here == pytest.approx(100 * (40 - 10) / IMAGES) == error.interval[0]  # every seed has the same gaps
    assert found["digits_mlp_clean"].interval[0] > -1 and found["digits_mlp_clean"].reason == "8 seeds"


def test_planted_losses_speak_against_and_no_difference_is_inconclusive():
    against = words(planted(gain=-0.03, clean=-0.03, error=(10.0, 40.0)))
    assert set(against.values()) == {NOT_SUPPORTED}
    none = words(planted(gain=0.0, scatter=0.0, error=(10.0, 10.0)))
    assert none.pop("digits_mlp_clean") == none.pop("digits_transformer_clean") == SUPPORTED  # not worse than a point
    assert set(none.values()) == {INCONCLUSIVE}


def test_a_loss_of_a_point_on_clean_images_is_not_excluded_by_a_wide_interval():
    assert words(planted(clean=-0.009, scatter=0.01))["digits_mlp_clean"] == INCONCLUSIVE
    assert words(planted(clean=-0.005, scatter=0.001))["digits_mlp_clean"] == SUPPORTED


def test_gaps_of_seeds_cancel_before_their_size_counts():
    gaps, images = np.array([[3.0, -1.0], [-2.0, -1.0]]), np.array([10, 10])
    assert digits.calibration_error(gaps, images) == pytest.approx((1 + 2) / 20)
    table = planted(seeds=4)
    opposite = (table["arm"] == digits.ALL) & (table["seed"] % 2 == 1)
    table.loc[opposite, "gap_9"] *= -1
    assert digits.lower_error(table, "mlp").value == pytest.approx(-10 / IMAGES)


def test_the_bootstrap_draws_seeds_in_pairs_and_again_the_same():
    table = planted(error=(0.0, 0.0))
    shared = table["seed"] * 7.0  # between seeds the error differs, between arms it never does
    table["gap_9"] = shared + np.where(table["arm"] == digits.ALL, 5.0, 0.0)
    found = digits.lower_error(table, "mlp")
    assert (found.low, found.value, found.high) == pytest.approx((0.01, 0.01, 0.01))
    table["gap_9"] = shared * np.where(table["arm"] == digits.ALL, 1.0, 0.5)
    spread = digits.lower_error(table, "mlp")
    assert spread.low < spread.value < spread.high and spread == digits.lower_error(table, "mlp")
    means = table[(table["model"] == "mlp") & (table["label_noise"] == 0) & (table["arm"] == digits.ALL)]["gap_9"] / 2
    usual = 1.645 * means.std(ddof=0) / np.sqrt(len(means)) / IMAGES  # of the mean of one value per seed
    assert (spread.high - spread.low) / 2 == pytest.approx(usual, rel=0.1)


def test_without_a_table_or_with_one_seed_nothing_is_decided():
    assert {one.verdict for one in digits.verdicts(None)} == {INCONCLUSIVE}
    single = digits.verdicts(planted(seeds=1))
    assert {one.verdict for one in single} == {INCONCLUSIVE} and all("only 1" in one.reason for one in single)


def test_claims_are_stated_once_and_those_of_the_mlp_are_primary():
    claims = digits.claims()
    assert claims["question"].is_unique and list(claims["rank"]) == ["primary"] * 7 + ["secondary"] * 7
    margins = claims["threshold"].value_counts().to_dict()
    assert margins == {"90% interval above 0": 12, "90% interval above -1 point": 2}
    assert digits.CLAIMS["mlp", "labels_40"].published == "+2.69 points (ViT)"
    assert digits.CLAIMS["mlp", "calibration"].published == "0.94 points lower (ViT)"


def test_a_table_that_lacks_an_arm_a_column_or_a_number_is_refused():
    table = planted(seeds=2)
    with pytest.raises(InputError, match=r"one arm alone of mlp, label noise 0\.4, seed 1; measure both"):
        digits.verdicts(table.drop(table.query("model == 'mlp' and arm == 'all' and label_noise == 0.4").index[1]))
    with pytest.raises(InputError, match="lacks the columns gap_3"):
        digits.verdicts(table.drop(columns="gap_3"))
    table.loc[0, "accuracy_shot"] = np.nan
    with pytest.raises(InputError, match="no accuracy_shot"):
        digits.figure(table)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_figure_shows_both_arms_and_the_published_gains(seeds):
    figure = digits.figure(planted(seeds=seeds))
    assert len(figure.axes) == 6
    assert figure.axes[0].get_legend_handles_labels()[1] == ["all neurons", "top-k"]
    gains = figure.axes[1]
    published = next(line for line in gains.get_lines() if line.get_label() == "published")
    assert list(published.get_xdata())[1:3] == [2.69, 5.45] and len(gains.get_yticklabels()) == 7
    assert f"{seeds} seed" in figure.get_supxlabel() and len(figure._repr_png_()[0]) > 10_000
