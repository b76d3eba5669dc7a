"""Similarity measures against closed forms and scipy; pairs, parts and the bootstrap on made-up tables."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sparsity_utils.console import InputError
from sparsity_utils.laws import similarity
from sparsity_utils.laws.similarity import between_domains, frequency_distances, overlap, relative, spearman


def test_spearman_is_the_sum_of_squared_rank_differences():
    x, y = np.array([3.0, 1.0, 4.0, 1.5, 9.0, 2.6]), np.array([2.0, 7.0, 1.0, 8.0, 2.8, 1.8])
    d = [4 - 3, 1 - 5, 5 - 1, 2 - 6, 6 - 4, 3 - 2]  # ranks by hand
    assert spearman(x, y) == pytest.approx(1 - 6 * sum(v**2 for v in d) / (6 * 35))
    assert spearman(x, np.exp(x)) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)


def test_spearman_shares_ranks_works_along_rows_and_is_undefined_for_constants():
    rng = np.random.default_rng(0)
    x, y = rng.integers(4, size=(3, 20)), rng.integers(4, size=(3, 20))
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(spearman(x, y), expected)
    assert np.isnan(spearman(np.ones(5), np.arange(5))) and np.isnan(spearman([], []))


def test_overlap_of_the_most_active():
    x = np.arange(100.0)
    assert overlap(x, x) == 1 and overlap(x, -x) == 0
    shifted = np.roll(x, -5)  # its ten largest are at 85 to 94, of x at 90 to 99
    assert overlap(x, shifted) == pytest.approx(5 / 15)
    assert overlap(x, x, share=0.3) == 1 and overlap(np.zeros(100), x) == pytest.approx(10 / 100)  # all tie


def test_overlap_of_unrelated_patterns_is_about_its_closed_form():
    rng = np.random.default_rng(1)
    assert overlap(rng.random(100_000), rng.random(100_000)) == pytest.approx(0.1 / 1.9, abs=5e-3)


def test_where_no_neuron_is_ever_active_frequencies_stay_zero():
    assert relative(np.zeros(4)).tolist() == [0, 0, 0, 0]


def neurons_table(layers=3):
    """One model: two domains that agree in the first layer and are opposed in the last."""
    up = np.arange(20.0)
    rows = []
    for domain, sign in (("code", 1), ("prose", -1)):
        for layer in range(layers):
            values = sign * up if layer == layers - 1 else up
            rows.append(pd.DataFrame({"layer": layer, "neuron": range(20), "domain": domain, "frequency": values}))
    return pd.concat(rows)


def test_domains_are_compared_by_layer():
    table = between_domains(neurons_table()).set_index("part")
    assert table["spearman"].drop("all").to_dict() == pytest.approx({"first": 1, "middle": 1, "last": -1})
    assert table["overlap"].drop("all").to_dict() == {"first": 1, "middle": 1, "last": 0}
    assert list(between_domains(neurons_table(2))["part"]) == ["all", "first", "last"]
    assert set(table["one"]) == {"code"} and set(table["other"]) == {"prose"}
    alone = neurons_table().query("domain == 'code'")
    assert between_domains(alone).empty


def models_table(scale=None):
    """Frequencies of relu and silu models of two sizes and seeds; silu ones have another shape, sizes only a scale."""
    grid, rows = (np.arange(50) + 0.5) / 50, []
    for activation, shape in (("relu", 3.0), ("silu", 1.0)):
        for d_model, factor in ((8, 1.0), (16, 0.5)):
            for seed in (0, 1):
                about = {"activation": activation, "d_model": d_model, "n_layers": d_model // 8, "seed": seed}
                frame = pd.DataFrame({"domain": "code", "frequency": factor * grid**shape})
                rows.append(frame.assign(**about))
    return pd.concat(rows)


def test_distances_compare_models_that_differ_in_one_thing():
    table = models_table()
    sizes = frequency_distances(table, "size")
    assert len(sizes) == 4 and np.allclose(sizes["distance"], 0)  # a scale is no difference in shape
    activations = frequency_distances(table, "activation")
    grid = (np.arange(50) + 0.5) / 50
    x, y = grid**3 / (grid**3).mean(), grid / grid.mean()
    expected = max(abs(np.mean(x <= at) - np.mean(y <= at)) for at in (*x, *y))  # the largest gap of the two shares
    assert len(activations) == 4 and np.allclose(activations["distance"], expected) and expected > 0.2
    assert len(frequency_distances(table, "seed")) == 4
    assert list(sizes.columns) == ["activation", "seed", "domain", "one", "other", "distance"]
    with pytest.raises(InputError, match="against is 'width'; choose one of size"):
        frequency_distances(table, "width")


def vocabulary_table(tokens=40, sizes=((8, 2), (16, 3), (24, 4))):
    rng, rows = np.random.default_rng(2), []
    truth = rng.random(tokens)
    for d_model, n_layers in sizes:
        for seed in (0, 1):
            about = {"run": f"{d_model}-{seed}", "activation": "relu", "d_model": d_model, "n_layers": n_layers}
            frame = pd.DataFrame(
                {"token_id": range(tokens), "count": 10 * np.arange(tokens), "activation_ratio": truth}
            )
            frame = frame.assign(first=rng.random(tokens), middle=truth if n_layers > 2 else np.nan, last=-truth)
            rows.append(frame.assign(**about, seed=seed))
    return pd.concat(rows, ignore_index=True)


def test_token_patterns_keep_what_every_run_saw_often_and_average_seeds():
    table = vocabulary_table()
    rare = table[(table["token_id"] == 39) & (table["run"] == "8-0")].index
    patterns = similarity.token_patterns(table.drop(rare), often=20)
    assert list(patterns.index) == list(range(2, 39))  # 0 and 1 too rare, 39 missing in one run
    seeds = [table.query("run == @run").set_index("token_id")["first"] for run in ("8-0", "8-1")]
    np.testing.assert_allclose(patterns["relu", 8, 2, "first"], (seeds[0] + seeds[1]).loc[2:38] / 2)


def test_without_common_tokens_there_are_columns_but_no_pairs():
    patterns = similarity.token_patterns(vocabulary_table(), often=10**6)
    assert len(patterns) == 0 and ("relu", 16, 3, "activation_ratio") in patterns.columns
    assert similarity.size_correlations(patterns, "activation_ratio") == {}


def test_pairs_of_sizes_need_the_part():
    patterns = similarity.token_patterns(vocabulary_table(), often=1)
    assert similarity.size_pairs(patterns, "middle") == [("relu", (16, 3), (24, 4))]
    assert len(similarity.size_pairs(patterns, "activation_ratio")) == 3
    found = similarity.size_correlations(patterns, "last")
    assert found == {pair: pytest.approx(1) for pair in similarity.size_pairs(patterns, "last")}


def test_seeds_of_one_size_are_compared():
    table = vocabulary_table()
    found = similarity.seed_correlations(table, 1, "first")
    assert set(found) == {("relu", size, (0, 1)) for size in ((8, 2), (16, 3), (24, 4))}
    x, y = (table.query("run == @run and token_id > 0")["first"] for run in ("16-0", "16-1"))
    assert found["relu", (16, 3), (0, 1)] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert len(similarity.seed_correlations(table, 1, "middle")) == 2  # two layers have no middle
    assert similarity.seed_correlations(table.query("seed == 0"), 1, "first") == {}


def test_the_bootstrap_interval_is_that_of_the_fisher_transform():
    """Bivariate normal tokens: the interval of z = atanh(rho) is +-1.645 sqrt((1 + rho^2 / 2) / (n - 3)) wide."""
    rng, tokens = np.random.default_rng(3), 400
    x = rng.normal(size=tokens)
    y = 0.8 * x + 0.6 * rng.normal(size=tokens)
    columns = pd.MultiIndex.from_tuples([("relu", 8, 2, "activation_ratio"), ("relu", 16, 3, "activation_ratio")])
    patterns = pd.DataFrame(np.column_stack([x, y]), columns=columns)
    value = similarity.size_correlations(patterns, "activation_ratio")
    draws = similarity.size_correlations(patterns, "activation_ratio", similarity.bootstrap_draws(patterns))
    (pair,) = value
    estimate = similarity.percentile_estimate(value[pair], draws[pair], tokens)
    half = stats.norm.ppf(0.95) * np.sqrt((1 + estimate.value**2 / 2) / (tokens - 3))
    expected = np.tanh(np.arctanh(estimate.value) + np.array([-half, half]))
    np.testing.assert_allclose([estimate.low, estimate.high], expected, atol=0.012)


def test_too_few_tokens_give_a_reason():
    estimate = similarity.percentile_estimate(0.9, [0.9] * 10, 12)
    assert np.isnan(estimate.value) and estimate.reason == "only 12 vocabulary tokens; at least 30 are needed"
