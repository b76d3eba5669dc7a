"""Verdicts of notebook 08 on made-up held-out runs whose answer is known, and its figure where nothing is predicted."""

from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import pytest
from planted_design import LINE, designed, study

from sparsity_utils.console import InputError
from sparsity_utils.findings import design_a_sparse_model
from sparsity_utils.findings.budget import Machine
from sparsity_utils.laws.design import CURVES, fit_design
from sparsity_utils.laws.holdout import held_out
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED
from sparsity_utils.study.plan import planned
from sparsity_utils.study.profiles import read_profile


def verdict_rows(share=1.0, off=0.0, mean_off=0.1, split="shape", shapes=12):
    """Held-out runs of `shapes` shapes, two seeds each: a share of them inside, all predictions `off` by so much."""
    rows = []
    for number, seed in product(range(shapes), (0, 1)):
        about = {
            "activation": "relu",
            "d_model": 16 + 4 * number,
            "n_layers": 2,
            "seed": seed,
            "width_depth_ratio": 8 + 2 * number,
            "tokens": 1e5 * (number + 1),
        }
        inside = (2 * number + seed) < share * 2 * shapes
        wobble = 0.001 * (number % 3 - 1)
        for quantity, scale in (("activation ratio", 1.0), ("loss", 3.0)):
            measured = 0.2 * scale
            rows.append(
                {**about, "split": split, "quantity": quantity, "parameters": 1000 * (number + 1), "measured": measured,
                 "predicted": measured + scale * (off + wobble), "low": 0.1 * scale, "high": 0.3 * scale,
                 "inside": inside, "mean_of_others": measured + mean_off, "extrapolates": ""}
            )  # fmt: skip
    return pd.DataFrame(rows)


def judged(**changes):
    both = pd.concat([verdict_rows(**changes), verdict_rows(**changes | {"split": "size"})], ignore_index=True)
    names = ("covers", "better", "reaches", "loss covers", "loss reaches")
    return dict(zip(names, design_a_sparse_model.verdicts(both), strict=True))


def test_good_predictions_support_every_claim():
    rows = judged()
    assert {name: row.verdict for name, row in rows.items()} == dict.fromkeys(rows, SUPPORTED)
    assert rows["covers"].here == 100 and rows["covers"].interval[0] == pytest.approx(100 * 0.05 ** (1 / 24))
    assert rows["better"].here == pytest.approx(10 - 0.0667, abs=0.01)
    assert "24 of 24 runs of 12 shapes" in rows["covers"].reason


def test_bad_predictions_support_none():
    rows = judged(share=0.5, off=0.15, mean_off=0.05)
    assert {name: row.verdict for name, row in rows.items()} == dict.fromkeys(rows, NOT_SUPPORTED)
    assert rows["reaches"].here == pytest.approx(15, abs=0.01) and rows["loss reaches"].here == pytest.approx(
        75, abs=0.1
    )


def test_a_few_runs_inside_decide_nothing():
    rows = judged(shapes=3)
    assert rows["covers"].verdict == INCONCLUSIVE and rows["better"].verdict == SUPPORTED
    one = judged(shapes=1)
    assert one["reaches"].verdict == one["better"].verdict == INCONCLUSIVE
    assert "at least 2 are needed" in one["reaches"].reason


def test_a_shape_that_was_trained_at_two_lengths_counts_once():
    rows = verdict_rows()
    again = rows[rows["d_model"] == 16].assign(tokens=1e6)
    covers, better, *_ = design_a_sparse_model.verdicts(pd.concat([rows, again], ignore_index=True))
    assert "26 of 26 runs of 12 shapes" in covers.reason and "12 pairs" in better.reason


def test_the_second_study_can_be_judged():
    """Its design has one shape at two lengths with the same seeds, and sizes of one seed."""
    profile = read_profile("long")
    held = held_out(designed(profile, filter(partial(planned, profile), CURVES), noise=0.1))
    shape = held.query("split == 'size' and quantity == 'loss' and d_model == 48 and n_layers == 6")
    assert shape.groupby(["activation", "seed"]).size().unstack(0).max().to_dict() == {"relu": 2, "silu": 1}
    found = dict(zip(design_a_sparse_model.CLAIMS, design_a_sparse_model.verdicts(held), strict=True))
    assert all(np.isfinite([one.here, *one.interval]).all() for one in found.values())
    rows = design_a_sparse_model.beyond_the_fit(held)
    assert not rows.duplicated(["activation", "d_model", "n_layers", "seed", "tokens"]).any()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.drop(columns="inside"), "lacks the columns inside"),
        (lambda t: pd.concat([t, t.tail(1)]), "two rows"),
        (lambda t: t.assign(predicted=np.nan), "no predicted"),
    ],
)
def test_held_out_rows_that_cannot_be_used_are_an_input_error(spoil, message):
    with pytest.raises(InputError, match=message):
        design_a_sparse_model.verdicts(spoil(verdict_rows()))


@pytest.mark.parametrize(
    "which",
    [
        {"seeds": (0,), "relu": LINE, "silu": LINE},
        {"relu": LINE, "silu": LINE},
        {"relu": LINE[:2], "silu": LINE[:2]},
    ],
)
def test_a_study_too_small_to_hold_anything_out_decides_nothing(which):
    rows = design_a_sparse_model.verdicts(held_out(study(**which)))
    assert {row.verdict for row in rows} == {INCONCLUSIVE} and all(row.reason for row in rows)


def test_the_claims_are_stated_beforehand():
    claims = [row.claim for row in design_a_sparse_model.verdicts(verdict_rows())]
    assert claims == list(design_a_sparse_model.CLAIMS.values())
    assert design_a_sparse_model.claims()["question"].tolist() == [claim.claim for claim in claims]


def test_a_study_too_small_to_predict_is_drawn_with_its_reason():
    tiny = study(seeds=(0,), relu=LINE, silu=LINE)
    on = Machine(50.0, "float32", pd.DataFrame(), {}, frozenset())
    figure = design_a_sparse_model.figure(fit_design(tiny), held_out(tiny), pd.DataFrame(), on, 100_000, 1e7)
    assert "No prediction: only 8 runs" in figure.texts[0].get_text()
