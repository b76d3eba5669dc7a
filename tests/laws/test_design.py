"""Predictions before training: planted laws found again, intervals that hold, words that warn."""

import numpy as np
import pandas as pd
import pytest
from planted_design import LINE, SECOND, SLOPES, study, truth
from scipy.special import expit, logit

from sparsity_utils.console import InputError
from sparsity_utils.laws.design import fit_design, joined, laws_and_means
from sparsity_utils.laws.holdout import COLUMNS, accuracy, against_published, held_out


@pytest.fixture(scope="module")
def exact():
    return fit_design(study())


# The laws


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(("parameters", "per_parameter", "ratio"), [(1e5, 100, 10), (2e4, 40, 30), (1e7, 300, 100)])
def test_planted_laws_are_found_again(exact, activation, parameters, per_parameter, ratio):
    tokens = per_parameter * parameters
    found = exact.predict(parameters, tokens, ratio, activation)
    share, loss = truth(activation, parameters, tokens, ratio)
    # what a run measures is the mean of its last stable checkpoints, not quite its end
    assert found.activation_ratio.value == pytest.approx(share, rel=1e-6)
    assert found.loss.value == pytest.approx(0.95 * loss, rel=1e-6)
    assert found.activation_ratio.low <= found.activation_ratio.value <= found.activation_ratio.high
    assert found.activation_ratio.high - found.activation_ratio.low < 0.01
    needed = expit(np.log(share / (1 - share)) + 1) if activation == "relu" else 1.0
    assert found.nonzero_share.value == pytest.approx(needed, rel=1e-6)


def test_the_table_of_coefficients_has_the_planted_slopes(exact):
    table = exact.activation_ratio.table.set_index(["term", "activation"])["coefficient"]
    planted = dict(zip(("at the reference", "decade of parameters"), SLOPES["relu"], strict=False))
    for term, value in planted.items():
        assert table[term, "ReLU"] == pytest.approx(value, abs=1e-6)
    assert table["decade of tokens per parameter", "SiLU"] == pytest.approx(SLOPES["silu"][2], abs=1e-6)
    assert table["decade of width-depth ratio", "all"] == pytest.approx(0.6, abs=1e-6)
    loss = exact.loss.table.set_index("term")["coefficient"]
    assert loss["decay"] == pytest.approx(np.log(0.95), abs=1e-6)
    assert loss["decade of width-depth ratio, squared"] == pytest.approx(0.08, abs=1e-6)


def test_a_run_weighs_the_same_however_many_checkpoints_it_has():
    table = study(noise=0.2)
    run = table["run"] == "relu-64x4-0"
    dense = pd.concat([table, *(table[run].assign(step=table["step"][run] + 100 * k) for k in (1, 2, 3))])
    dense = dense[~((dense["role"] == "final") & (dense["step"] > 100))]
    once, often = (fit_design(t).activation_ratio.coefficients for t in (table, dense))
    assert once == pytest.approx(often, abs=1e-9)


@pytest.mark.parametrize("parameters", [9e4, 1e9], ids=["inside", "four decades beyond"])
def test_intervals_hold_about_as_often_as_they_say(parameters):
    inside, tokens = [], 100 * parameters
    for seed in range(25):
        fitted, rng = fit_design(study(noise=0.2, seed=seed)), np.random.default_rng(1000 + seed)
        for activation in ("relu", "silu"):
            found = fitted.predict(parameters, tokens, 12, activation)
            share, loss = truth(activation, parameters, tokens, 12)
            off = 0.2 * rng.normal(size=2)
            run = expit(np.log(share / (1 - share)) + off[0]), 0.95 * loss * np.exp(0.1 * off[1])
            inside += [e.low <= x <= e.high for e, x in zip((found.activation_ratio, found.loss), run, strict=True)]
    assert len(inside) == 100
    assert 0.82 <= np.mean(inside) <= 0.98  # 0.9 with a standard deviation of 0.03, more with shared fits


def test_intervals_widen_beyond_the_fit():
    fitted = fit_design(study(noise=0.2))
    near, far = (fitted.predict(n, 100 * n, 16, "relu").loss for n in (1e5, 1e9))
    assert np.log(far.high / far.low) > 1.5 * np.log(near.high / near.low)


# Where a law is dropped


def without_order(table, activation="silu"):
    """Shapes of one function in turn above and below a level, whatever their data; seeds nearly alike."""
    own = table["activation"] == activation
    shape = table.loc[own, "parameters"].rank(method="dense")
    odds = -0.4 + 0.3 * (2 * (shape % 2) - 1) + 0.02 * table.loc[own, "seed"]
    return table.assign(activation_ratio=expit(odds).reindex(table.index).fillna(table["activation_ratio"]))


@pytest.fixture(scope="module")
def level():
    """Three shapes of SiLU more: with either seed left out, ten runs are enough for a mean with an interval."""
    return without_order(study(silu=(*LINE, *SECOND, (80, 2), (64, 3), (40, 7))))


def test_a_law_that_is_farther_off_than_the_mean_is_dropped_for_that_function_alone(level):
    fitted = fit_design(level)
    last = level[(level["role"] == "stable") & (level["activation"] == "silu")].groupby("run").tail(5)
    runs = last.groupby(["d_model", "n_layers", "run"])["activation_ratio"].mean()
    for parameters, ratio in ((1e4, 16), (1e9, 100)):
        found = fitted.predict(parameters, 100 * parameters, ratio, "silu")
        assert found.activation_ratio.value == pytest.approx(runs.mean(), rel=1e-12)
        assert found.by_mean == ("activation ratio",)
        assert found.loss.value == pytest.approx(0.95 * truth("silu", parameters, 100 * parameters, ratio)[1], rel=1e-6)
        share, _ = truth("relu", parameters, 100 * parameters, ratio)
        other = fitted.predict(parameters, 100 * parameters, ratio, "relu")  # not spoilt by the shared effect of shape
        assert other.activation_ratio.value == pytest.approx(share, rel=1e-6) and other.by_mean == ()
    shapes = runs.groupby(["d_model", "n_layers"])
    others = shapes.transform(lambda own: runs.drop(own.index).mean())
    off = np.sort(np.abs(logit(others) - logit(runs)))
    without = logit(others.groupby(["d_model", "n_layers"]).first())
    reach = np.hypot(off[int(np.ceil(0.9 * 21)) - 1], 1.6449 * np.sqrt(9 * without.var(ddof=0)))
    bounds = expit(logit(runs.mean()) + np.array([-reach, reach]))
    assert (found.activation_ratio.low, found.activation_ratio.high) == pytest.approx(tuple(bounds), rel=1e-4)
    table = fitted.activation_ratio.table.set_index("activation")
    assert table.loc["SiLU", "term"] == "mean of its runs" and fitted.activations == ("relu", "silu")
    assert table.loc["SiLU", "coefficient"] == pytest.approx(logit(runs.mean()))
    assert set(fitted.loss.table["activation"]) == {"ReLU", "SiLU", "all"} and not fitted.loss.levels


def test_held_out_runs_of_such_a_function_are_as_far_off_as_from_their_mean(level):
    found = held_out(level).query("activation == 'silu' and quantity == 'activation ratio' and split != 'size'")
    assert set(found["split"]) == {"shape", "seed"}
    assert found["predicted"].to_numpy() == pytest.approx(found["mean_of_others"].to_numpy(), rel=1e-12)


def test_every_law_may_be_dropped(level):
    both = fit_design(without_order(level, "relu"))
    assert set(both.activation_ratio.levels) == {"relu", "silu"} and not both.reason
    assert both.activation_ratio.table["term"].tolist() == ["mean of its runs"] * 2


@pytest.mark.parametrize(
    ("seeds", "spoil", "dropped"), [((0, 1), (), {"silu"}), ((0, 1, 2), ("relu",), {"relu", "silu"})]
)
def test_a_function_whose_runs_determine_no_law_alone_keeps_the_joint_one_while_it_is_nearer(seeds, spoil, dropped):
    """ReLU at one ratio alone, so that its runs tell no effect of shape."""
    table = without_order(study(relu=LINE, silu=(*LINE, *SECOND, (80, 2), (64, 3), (40, 7)), seeds=seeds))
    for activation in spoil:
        table = without_order(table, activation)
    fitted = fit_design(table)
    assert set(fitted.activation_ratio.levels) == dropped and not fitted.reason
    assert np.isfinite(fitted.predict(1e5, 1e7, 16, "relu").activation_ratio.value)
    assert "SiLU" not in set(fitted.activation_ratio.table.query("term != 'mean of its runs'")["activation"])


def test_the_errors_of_laws_and_means_are_those_of_held_out_shapes(level):
    table = laws_and_means(fit_design(level)).set_index(["quantity", "activation"])
    found = accuracy(held_out(level)).query("split == 'shape'").set_index(["quantity", "activation"])
    ratio = table.loc["activation ratio"]
    assert ratio["predicted"].to_dict() == {"ReLU": "law", "SiLU": "mean"}
    assert ratio.loc["ReLU", "error_of_law"] == pytest.approx(
        found.loc[("activation ratio", "relu"), "error"], abs=1e-9
    )
    means = found.loc["activation ratio", "error_of_mean"]
    assert ratio["error_of_mean"].to_numpy() == pytest.approx(means[["relu", "silu"]].to_numpy())
    assert ratio.loc["SiLU", "error_of_law"] > ratio.loc["SiLU", "error_of_mean"]
    assert set(table.loc["loss", "predicted"]) == {"law"} and len(table.loc["share of non-zero gates"]) == 1


def test_a_function_without_order_in_another_quantity_is_named_there():
    table = study()
    spoilt = without_order(table, "relu")["activation_ratio"]
    table["nonzero_share"] = table["nonzero_share"].where(table["activation"] == "silu", spoilt)
    assert fit_design(table).predict(1e5, 1e7, 16, "relu").by_mean == ("share of non-zero gates",)


def test_a_mean_of_too_few_runs_for_an_interval_drops_no_law():
    few = study(silu=(*LINE, *SECOND), seeds=(0,), relu=(*LINE, *SECOND, (80, 2), (64, 3), (40, 7)))
    assert not fit_design(without_order(few)).activation_ratio.levels


# What a prediction says of itself


def test_inside_the_fit_there_are_no_words(exact):
    assert exact.predict(1e5, 1e7, 16, "relu").extrapolates == ()
    assert exact.predict(1e5, 3e6, 16, "silu").extrapolates == ()  # 30 tokens per parameter were seen on the way


@pytest.mark.parametrize(
    ("parameters", "tokens", "ratio", "activation", "words"),
    [
        (188_416_000, 1.88e10, 16, "relu", ("parameters 3 decades above 188k",)),
        (294, 29_400, 16, "relu", ("parameters 1 decades below 2.94k",)),
        (1e5, 1e8, 16, "relu", ("tokens per parameter 1 decades above 100",)),
        (1e5, 2.5e5, 16, "relu", ("tokens per parameter 1 decades below 25",)),
        (1e5, 1e7, 400, "relu", ("width-depth ratio 1 decades above 40",)),
        (1e5, 1e7, 30, "silu", ("effect of shape taken from others, SiLU was trained at ratio 8 to 16",)),
        (
            1e5,
            1e7,
            400,
            "silu",
            (
                "width-depth ratio 1 decades above 40",
                "effect of shape taken from others, SiLU was trained at ratio 8 to 16",
            ),
        ),
    ],
)
def test_every_direction_of_extrapolation_is_named(exact, parameters, tokens, ratio, activation, words):
    assert exact.predict(parameters, tokens, ratio, activation).extrapolates == words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "Activation 'gelu' was not fitted; choose one of relu, silu"),
        ({"parameters": 0}, "parameters is 0"),
        ({"tokens": -1e6}, "tokens is"),
        ({"width_depth_ratio": float("nan")}, "width_depth_ratio is nan"),
        ({"width_depth_ratio": float("inf")}, "width_depth_ratio is inf"),
    ],
)
def test_an_impossible_question_is_an_input_error(exact, change, message):
    with pytest.raises(InputError, match=message):
        exact.predict(**{"parameters": 1e5, "tokens": 1e7, "width_depth_ratio": 16, "activation": "relu"} | change)


# Too little to fit


def test_an_activation_function_of_two_sizes_is_left_out():
    fitted = fit_design(study(silu=((16, 1), (32, 2))))
    assert fitted.activations == ("relu",) and not fitted.reason
    with pytest.raises(InputError, match="'silu' was not fitted; choose one of relu"):
        fitted.predict(1e5, 1e7, 16, "silu")


def test_a_cluster_of_shapes_of_one_size_is_one_size():
    assert fit_design(study(relu=((32, 8), (40, 5), (52, 3), (64, 2)), silu=LINE)).activations == ("silu",)


def test_with_two_ratios_the_loss_has_no_lowest_point():
    fitted = fit_design(study(relu=(*LINE, *SECOND)))
    assert not fitted.reason and "decade of width-depth ratio, squared" not in set(fitted.loss.table["term"])


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ({"seeds": (0,), "relu": LINE, "silu": LINE}, "only 8 runs, 3 sizes each activation function"),
        ({"relu": LINE, "silu": LINE}, "without 16x1 the other shapes do not determine the 7 coefficients"),
        ({"relu": LINE[:2], "silu": LINE[:2]}, "only 0 runs, 3 sizes each"),
    ],
)
def test_too_little_to_fit_is_a_reason_and_no_error(which, reason):
    table = study(**which)
    fitted = fit_design(table)
    assert reason in fitted.reason
    if fitted.activations:
        assert np.isnan(fitted.predict(1e5, 1e7, 16, "relu").activation_ratio.value)
    else:
        with pytest.raises(InputError, match="was not fitted; only 0 runs"):
            fitted.predict(1e5, 1e7, 16, "relu")
    held = held_out(table)
    assert held.empty and list(held.columns) == COLUMNS and accuracy(held).empty


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.drop(columns="nonzero_share"), "lacks the columns nonzero_share"),
        (lambda t: t.head(0), "no rows"),
        (lambda t: pd.concat([t, t.tail(1)]), "two rows for run"),
        (lambda t: t.assign(validation_loss=np.nan), "no validation_loss"),
        (lambda t: t.drop(index=t.index[-1]), r"Run silu-32x4-1-\d+ has no checkpoint after its decay"),
    ],
    ids=["column", "empty", "double", "gap", "unfinished"],
)
def test_a_table_that_cannot_be_used_is_an_input_error(spoil, message):
    with pytest.raises(InputError, match=message):
        fit_design(spoil(study()))


def test_a_run_that_two_questions_share_counts_once():
    table = study()
    again = joined([table, table[table["d_model"] == 64]])
    pd.testing.assert_frame_equal(again, table)


# Runs that were held out


@pytest.fixture(scope="module")
def held():
    return held_out(study(noise=0.1))


def test_held_out_runs_have_no_part_in_their_prediction(held):
    table = study(noise=0.1)
    run = (table["d_model"] == 48) & (table["activation"] == "relu")
    moved = table.assign(activation_ratio=table["activation_ratio"].where(~run, 0.9))
    where = "split == 'shape' and d_model == 48 and quantity == 'activation ratio'"
    before, after = held.query(where), held_out(moved).query(where)
    assert len(before) == 4  # two seeds, two functions
    assert before["predicted"].to_numpy() == pytest.approx(after["predicted"].to_numpy(), rel=1e-12)
    assert not after[after["activation"] == "relu"]["inside"].any()


def test_every_split_holds_out_what_it_says(held):
    counts = held[held["quantity"] == "loss"].groupby("split").size()
    assert counts["shape"] == counts["seed"] == 34  # every run
    sizes = held[held["split"] == "size"]
    assert set(zip(sizes["d_model"], sizes["n_layers"], strict=True)) == {(32, 4), (48, 3), (64, 4)}
    assert sizes["extrapolates"].str.contains("parameters").all()
    assert held["inside"].eq(held["measured"].between(held["low"], held["high"])).all()


def test_a_shape_without_another_seed_is_not_a_known_one():
    table = study(noise=0.1)
    lone = table[(table["d_model"] != 64) | (table["seed"] == 0)]
    seeds = held_out(lone).query("split == 'seed' and quantity == 'loss'")
    assert len(seeds) == 34 - 6 and not (seeds["d_model"] == 64).any()  # 64x4 of two functions, 64x3 of one


def test_the_mean_of_the_others_is_that_of_the_fitted_runs(held):
    table = study(noise=0.1)
    last = table[(table["role"] == "stable") & (table["activation"] == "silu")].groupby("run").tail(5)
    means = last.groupby(["d_model", "n_layers", "run"])["activation_ratio"].mean().reset_index()
    others = means[~((means["d_model"] == 24) & (means["n_layers"] == 3))]["activation_ratio"].mean()
    row = held.query("split == 'shape' and activation == 'silu' and d_model == 24 and quantity == 'activation ratio'")
    assert row["mean_of_others"].to_numpy() == pytest.approx([others] * 2)


def test_accuracy_counts_and_averages(held):
    table = accuracy(held).set_index(["split", "quantity", "activation"])
    rows = held.query("split == 'shape' and quantity == 'loss' and activation == 'relu'")
    found = table.loc["shape", "loss", "relu"]
    assert (found["runs"], found["inside"]) == (len(rows), rows["inside"].sum())
    assert found["error"] == pytest.approx(
        100 * ((rows["predicted"] - rows["measured"]) / rows["measured"]).abs().mean()
    )


def test_published_models_are_held_against_the_recipe(exact):
    table = against_published(exact).set_index(["activation", "model"])
    assert len(table) == 11 and table["extrapolates"].str.contains("parameters .* decades above 188k").all()
    row, law = table.loc["silu", "1.2B"], -0.538 / (190 * 11.5 * 32 * 1792**2 / 1e9) ** 0.967 + 0.382
    assert row["published"] == pytest.approx(law)
    expected = exact.predict(11.5 * 32 * 1792**2, 190 * 11.5 * 32 * 1792**2, 56, "silu").activation_ratio
    assert (row["predicted"], row["low"], row["high"]) == (expected.value, expected.low, expected.high)
