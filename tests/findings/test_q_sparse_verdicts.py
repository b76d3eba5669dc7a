"""Claims of Q-Sparse on planted runs: each verdict, what is missing, and the law against its printed numbers."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sparsity_utils.console import InputError
from sparsity_utils.findings import q_sparse
from sparsity_utils.findings.q_sparse_arms import ACTIVE, ARMS, LEVELS
from sparsity_utils.findings.q_sparse_figures import (
    arms_table,
    decoding_table,
    frontier_figure,
    gradients_figure,
    law_table,
    loss_figure,
    rates_table,
    sizes_figure,
)
from sparsity_utils.findings.q_sparse_power import power
from sparsity_utils.laws.arms import at_chosen_rates, chosen_rates, paired, run_means
from sparsity_utils.laws.sparsity_law import PRINTED, SparsityLaw, exponential_fit, held_out_errors
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED

SEEDS = (20, 21, 22)
NOISE = {20: 0.001, 21: -0.001, 22: 0.0}  # of a seed, the same in all arms; and of an arm:


def jitter(arm: str, seed: int) -> float:
    return 1e-4 * np.sin(7 * len(arm) + 3 * seed)


def table(losses: dict[str, float], rates=(0.01, 0.02), layers: int = 2, **columns) -> pd.DataFrame:
    """An experiment: loss of each arm at its better rate; at the other one it is 0.1 more."""
    rows = []
    for place, (arm, loss) in enumerate(losses.items()):
        for rate in rates:
            for seed in SEEDS:
                worse = 0.1 if rate != rates[place % len(rates)] else 0.0
                found = loss + worse + NOISE[seed] + jitter(arm, seed)
                about = {name: of[arm] if isinstance(of, dict) else of for name, of in columns.items()}
                for layer in range(layers):
                    row = {"run": f"{arm}-{rate}-{seed}", "arm": arm, "learning_rate": rate, "seed": seed}
                    row |= {"d_model": 64, "n_layers": 4, "parameters": 188416, "read_parameters": 250000}
                    row |= {"validation_loss": found, "loss": found, "layer": layer, "final_share": 0.2 + 0.1 * layer}
                    row |= {"initial_share": 0.5, "activation_ratio": 0.1, "weights_read": 0.5, "rise_untrained": 0.02}
                    rows.append(row | about)
    return pd.DataFrame(rows)


def good() -> dict[str, float]:
    """Losses by which every claim on losses is supported."""
    law = {arm: 3.0 + 0.02 * np.exp(0.6 / (1 - s)) - 0.02 * np.exp(0.6) for arm, s in LEVELS.items()}
    return {
        **law,
        "no_straight_through": law["keep_8"] + 0.05,
        "ratio": law["keep_8"] - 0.01,
        "unit": law["keep_8"] - 0.01,
        "block": law["keep_8"],
        "ternary_dense": 3.2,
        "ternary": 3.2 + 0.5 * (law["keep_8"] - 3.0),
        "relu": 3.0,
        "relu_l1_weak": 3.005,
        "relu_l1_strong": 3.01,
    }


SHARES = dict.fromkeys(ARMS, 0.3) | {"relu_l1_strong": 0.01}


def sizes(gap_power: float = -0.1, rise_slope: float = -0.01) -> pd.DataFrame:
    counts = {"16x2": 5888, "32x2": 23552, "48x3": 79488}
    losses, parameters, rise = {}, {}, {}
    for shape, count in counts.items():
        for kind in ("dense", "keep_6"):
            dense = 5.0 - 0.3 * np.log10(count / 5888)
            losses[f"{shape}_{kind}"] = dense + (kind == "keep_6") * 0.05 * (count / 188416) ** gap_power
            parameters[f"{shape}_{kind}"] = count
            rise[f"{shape}_{kind}"] = 0.02 + rise_slope * np.log10(count / 188416)
    reads = {arm: 1.2 * count for arm, count in parameters.items()}
    return table(losses, parameters=parameters, rise_untrained=rise, read_parameters=reads)


def active(gain: float = 0.03) -> pd.DataFrame:
    losses = {arm: 4.0 - gain * (arm in ("keep_10", "keep_7")) for arm in ACTIVE}
    return table(losses, read_parameters={arm: 80000 * (1 + 0.1 * s) for arm, s in ACTIVE.items()})


def flow(bottom: float = 0.4) -> pd.DataFrame:
    ways = {"dense": 1.0, "straight-through": 0.95, "no straight-through": bottom}
    rows = [
        {"way": way, "seed": seed, "layer": layer, "norm": (1 + 0.01 * seed) * (1 + (norm - 1) * (1 - layer / 11))}
        for way, norm in ways.items()
        for seed in range(5)
        for layer in range(12)
    ]
    return pd.DataFrame(rows)


def words(found) -> dict[str, str]:
    return {verdict.claim.key: verdict.verdict for verdict in q_sparse.verdicts(found)}


def test_planted_effects_are_found():
    losses = good() | {"keep_6": 3.05}  # the gap of 64x4 on the planted line of sizes
    found = q_sparse.analyse(table(losses, final_share=SHARES), sizes(), active(), flow())
    judged = words(found)
    judged.pop("convex")
    assert set(judged.values()) == {SUPPORTED}
    law = q_sparse.analyse(table(good(), final_share=SHARES))
    assert words(law)["convex"] == SUPPORTED


def test_planted_opposites_count_against():
    losses = {arm: 3.0 + 0.3 * s for arm, s in LEVELS.items()}  # a line
    losses |= {"no_straight_through": losses["keep_8"] - 0.01, "block": losses["keep_8"] + 0.05}
    losses |= {"ratio": losses["keep_8"] + 0.02, "unit": losses["keep_8"] + 0.02, "relu": 3.0}
    losses |= {"ternary_dense": 3.2, "ternary": 3.6, "relu_l1_strong": 3.2, "keep_6": 3.05}
    upwards = sizes(gap_power=0.2, rise_slope=0.01)
    found = q_sparse.analyse(table(losses, final_share=0.3), upwards, active(gain=-0.03), flow(bottom=1.2))
    judged = words(found)
    assert judged.pop("gradients_kept") == SUPPORTED
    judged.pop("convex")  # the gap of 64x4 lies off the planted line
    assert set(judged.values()) == {NOT_SUPPORTED}, judged


def test_a_line_is_not_convex():
    losses = {arm: 3.0 + 0.3 * s for arm, s in LEVELS.items()}
    assert words(q_sparse.analyse(table(losses)))["convex"] == NOT_SUPPORTED


def test_between_the_margins_nothing_is_decided():
    losses = good()
    losses |= {"no_straight_through": losses["keep_8"] + 0.01, "keep_11": losses["dense"] * 1.015}
    losses |= {"block": losses["keep_8"] + 0.02}
    judged = words(q_sparse.analyse(table(losses, final_share=SHARES | {"relu_l1_strong": 0.09})))
    for key in ("straight_through", "matches_dense", "blocks_as_good", "penalty_pushes"):
        assert judged[key] == INCONCLUSIVE, key


def test_without_runs_or_arms_claims_are_undecided_and_say_why():
    assert {verdict.verdict for verdict in q_sparse.verdicts(None)} == {INCONCLUSIVE}
    found = q_sparse.analyse(table({"dense": 3.0, "keep_8": 3.1}))
    reasons = {verdict.claim.key: verdict.reason for verdict in q_sparse.verdicts(found)}
    assert "keep_11" in reasons["matches_dense"] and "equal_active" in reasons["interior_best"]
    assert all(verdict.verdict == INCONCLUSIVE for verdict in q_sparse.verdicts(found))


def test_sizes_without_the_arms_that_leave_inputs_out_are_undecided_and_drawn():
    dense = sizes()[lambda rows: rows["arm"].str.endswith("_dense")]
    found = q_sparse.analyse(table({"dense": 3.0, "keep_8": 3.1}), dense)
    assert {verdict.verdict for verdict in q_sparse.verdicts(found) if verdict.claim.key == "gap_shrinks"} == {
        INCONCLUSIVE
    }
    assert len(sizes_figure(found).axes) == 2


def test_two_sizes_give_no_slope_and_no_number_of_it():
    two = sizes()[lambda rows: ~rows["arm"].str.startswith("48x3")]
    found = q_sparse.analyse(table({"other": 3.0}), two, active())
    (verdict,) = [one for one in q_sparse.verdicts(found) if one.claim.key == "interior_best"]
    assert verdict.verdict == INCONCLUSIVE
    assert verdict.reason == "this study has no runs of three sizes with every seed"


def test_arms_of_a_profile_of_ones_own_are_shown_under_their_names():
    assert list(arms_table(q_sparse.analyse(table({"dense": 3.0, "mine": 3.1}))).index) == ["ReLU², reads all", "mine"]
    one, other = (table({arm: 3.0}).assign(run=lambda rows, arm=arm: arm + rows["run"]) for arm in ("dense", "keep_8"))
    first = one["seed"].min()
    neither_whole = pd.concat([one[one["seed"] == first], other[other["seed"] != first]])
    assert arms_table(q_sparse.analyse(neither_whole)).empty


def test_the_gap_of_one_seed_below_zero_leaves_the_power_of_size_undecided():
    found = q_sparse.analyse(table(good() | {"keep_6": 2.99}), sizes())
    (verdict,) = [one for one in q_sparse.verdicts(found) if one.claim.key == "gap_shrinks"]
    assert verdict.verdict == INCONCLUSIVE and "not above zero" in verdict.reason


def test_what_larger_heads_may_be_worth_is_taken_off():
    small = {
        verdict.claim.key: verdict for verdict in q_sparse.verdicts(q_sparse.analyse(table(good()), sizes(), active()))
    }
    more = active().assign(read_parameters=lambda rows: np.where(rows["arm"] == "dense", 8e4, 16e4))
    large = {
        verdict.claim.key: verdict for verdict in q_sparse.verdicts(q_sparse.analyse(table(good()), sizes(), more))
    }
    assert large["interior_best"].here < small["interior_best"].here - 0.05


def test_what_the_heads_may_be_worth_varies_with_the_seed():
    def judged(steeper: dict[int, float]):
        """The verdict on the best S, where each seed's loss falls by so much more per e-fold of what is read."""
        more = sizes().assign(
            loss=lambda rows: rows["loss"] - rows["seed"].map(steeper) * np.log(rows["read_parameters"])
        )
        found = q_sparse.analyse(table({"other": 3.0}), more, active())
        (verdict,) = [one for one in q_sparse.verdicts(found) if one.claim.key == "interior_best"]
        return verdict

    same, varied = judged(dict.fromkeys(SEEDS, 0.0)), judged({20: 0.1, 21: -0.1, 22: 0.0})
    reads = np.log([1 + 0.1 * ACTIVE[arm] for arm in ("dense", "keep_10", "keep_7")])
    beyond = reads[1:].mean() - reads[0]
    assert varied.here == pytest.approx(same.here)
    reach = stats.t.ppf(0.95, 2) * 0.1 * beyond / math.sqrt(3)  # 0.1 is the deviation of -0.1, 0, 0.1
    assert np.diff(varied.interval) / 2 == pytest.approx(reach, rel=0.02)
    assert np.diff(same.interval) < 0.1 * np.diff(varied.interval)


def test_the_rate_that_counts_is_of_the_lowest_mean_loss_among_those_with_every_seed():
    rows = table({"dense": 3.0, "keep_8": 3.1})
    chosen = at_chosen_rates(rows).drop_duplicates("run")
    assert chosen.groupby("arm")["learning_rate"].unique().map(list).to_dict() == {"dense": [0.01], "keep_8": [0.02]}
    survivors = rows[rows["run"] != "dense-0.01-21"]  # that run diverged
    rates = chosen_rates(survivors).set_index("arm")
    assert rates.loc["dense", "learning_rate"] == 0.02 and rates.loc["keep_8", "tried"] == "0.01, 0.02"
    assert rates["at_edge"].all()
    none = rows[~rows["run"].isin(["dense-0.01-21", "dense-0.02-22"])]
    assert set(at_chosen_rates(none)["arm"]) == {"keep_8"}
    assert "dense" in paired(run_means(at_chosen_rates(none)), "keep_8", "dense", "loss").reason


def test_numbers_of_layers_become_means_and_doubled_runs_are_refused():
    rows = table({"dense": 3.0})
    means = run_means(at_chosen_rates(rows))
    np.testing.assert_allclose(means["final_share"], 0.25)
    assert len(means) == 3 and "layer" not in means
    with pytest.raises(InputError, match="two rows"):
        at_chosen_rates(pd.concat([rows, rows]))
    with pytest.raises(InputError, match="lacks the columns"):
        at_chosen_rates(rows.drop(columns="validation_loss"))


def test_the_printed_law_has_its_optimum_elsewhere():
    grid = np.linspace(0, 0.94, 94001)
    reducible = PRINTED.a(grid) * (1 - grid) ** PRINTED.alpha
    np.testing.assert_allclose(PRINTED.best(), grid[reducible.argmin()], atol=1e-4)
    assert abs(PRINTED.best() - 0.502) < 1e-3 and abs(1 - PRINTED.reducible(PRINTED.best()) - 0.0194) < 1e-3
    low, high = PRINTED.best_as_rounded()
    assert 0.42 < low < 0.4558 < PRINTED.best() < high < 0.58
    assert SparsityLaw(b=0.01, c=1.0, beta=0.5, alpha=0.1).best() == 0  # leaving out never pays
    assert law_table().loc["best S, of the printed coefficients", "value"] == "50.2%"


def test_the_form_is_recovered_and_a_line_is_a_line():
    s = np.array([0, 0.3125, 0.5, 0.625, 0.8125])
    a, c, beta = exponential_fit(s, 2.0 + 0.3 * np.exp(0.5 / (1 - s)))
    grid = np.linspace(0, 0.8, 9)
    np.testing.assert_allclose(a + c * np.exp(beta / (1 - grid)), 2.0 + 0.3 * np.exp(0.5 / (1 - grid)), rtol=1e-3)
    curved, straight = held_out_errors(s, 2.0 + 0.3 * np.exp(0.5 / (1 - s))), held_out_errors(s, 2.0 + 0.3 * s)
    assert curved["exponential"] < 0.1 * curved["line"] and straight["line"] < 1e-9 < straight["exponential"]
    assert exponential_fit(s, 2.0 - 0.3 * s)[1] == 0  # a falling loss has no rising part
    with pytest.raises(InputError, match="three shares"):
        exponential_fit([0, 0.5, 0.5], [1, 2, 2])


def test_tables_and_figures_show_every_arm_that_was_trained():
    found = q_sparse.analyse(table(good(), final_share=SHARES), sizes(), active(), flow())
    shown = arms_table(found)
    assert list(shown.index) == [name for name, _ in ARMS.values()]
    assert shown.loc["ReLU, L1 penalty 0.01", "non-zero neurons %"] == "1.0"
    assert (
        shown.loc["ReLU², reads 8 of 16", "costs"].startswith("+0.0") and shown.loc["ReLU², reads all", "costs"] == ""
    )
    assert len(rates_table(found)) == len(ARMS) + 6 + len(ACTIVE)
    assert len(arms_table(q_sparse.analyse(table({"dense": 3.0})))) == 1
    drawn = [loss_figure(found), frontier_figure(found), sizes_figure(found), gradients_figure(found.flow)]
    assert [len(figure.axes) for figure in drawn] == [2, 1, 2, 1]
    marks = {tuple(line.get_xdata()) for line in drawn[0].axes[0].lines}
    assert tuple(100 * s for s in LEVELS.values()) in marks  # the means, one for each share


def test_speeds_are_those_of_the_rate_that_counts_and_none_where_a_word_is_wrong():
    found = q_sparse.analyse(table(good()))
    row = {"arm": "keep_8", "engine": "kernels", "way": "teal-top-k", "read_share": 0.5, "wrong": 0}
    row |= {f"{part}{name}": 1.5 for name in ("speedup", "strict_speedup") for part in ("", "low_", "high_")}
    rate = found.rates.set_index("arm").loc["keep_8", "learning_rate"]
    others = {"learning_rate": 0.03 - rate, "tokens_per_second": 1.0}
    rows = [row | {"learning_rate": rate, "tokens_per_second": 1234.0}, row | others]
    rows.append(rows[0] | {"way": "as trained", "wrong": 1})
    shown = decoding_table(pd.DataFrame(rows), found)
    assert shown["tokens per second"].tolist() == ["1,234", "-"] and shown["weights read %"].tolist() == [50.0, 50.0]
    assert shown["times transformers"].tolist() == ["1.50 (1.50 to 1.50)", "-"]


def test_power_is_what_the_margins_promise():
    found = power()
    pd.testing.assert_frame_equal(found, power())
    columns = ["supported %", "not supported %", "inconclusive %"]
    assert found[columns].sum(axis=1).between(99, 101).all() and set(found["claim"]) <= {
        c.claim for c in q_sparse.CLAIMS
    }
    at_margin = found[found["effect"].str.startswith("margin")]
    assert (at_margin["supported %"] <= 7).all() and len(at_margin) == 4  # 5% of 2,000 draws, and their spread
    assert (found.loc[found["effect"] == "zero", "not supported %"] <= 7).all()
