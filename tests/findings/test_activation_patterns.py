"""Verdicts of notebook 05 on made-up tables whose answer is known, and errors for tables that cannot be used."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from sparsity_utils.console import InputError
from sparsity_utils.findings import activation_patterns, dead_neurons
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED

SIZES = ((24, 2), (36, 3), (48, 4))
NAMES = ("neurons", "vocabulary", "dead", "transfer")
TOKENS = 200


def models(activations=("relu", "silu"), sizes=SIZES, seeds=(0, 1)):
    for activation, (d_model, n_layers), seed in product(activations, sizes, seeds):
        about = {"activation": activation, "d_model": d_model, "n_layers": n_layers, "seed": seed}
        yield {"run": f"{activation}-{d_model}-{seed}", **about}


def neurons(differs="activation", **which):
    """Frequencies whose shape differs between activation functions, or between sizes; a little between seeds."""
    rows = []
    for about in models(**which):
        kind = about["activation"] == "relu" if differs == "activation" else about["d_model"] == 24
        grid = (np.arange(about["n_layers"] * 30) + 0.5) / (about["n_layers"] * 30)
        frame = pd.DataFrame({"layer": np.arange(grid.size) // 30, "neuron": np.arange(grid.size) % 30})
        for domain in ("code", "prose"):
            frequency = grid ** ((3 if kind else 1) + 0.05 * about["seed"])
            rows.append(frame.assign(domain=domain, frequency=frequency, **about))
    return pd.concat(rows, ignore_index=True)


def vocabulary(noise=0.3, middle=0.1, ends=0.6, **which):
    """Token ratios: one pattern for all models plus noise, of its own strength in the middle and the outer layers."""
    rng, rows = np.random.default_rng(0), []
    truth = rng.normal(size=TOKENS)

    def seen(strength):
        return truth + strength * rng.normal(size=TOKENS)

    for about in models(**which):
        frame = pd.DataFrame(
            {"token_id": range(TOKENS), "count": 50, "activation_ratio": seen(noise), "first": seen(ends)}
        )
        frame = frame.assign(middle=seen(middle) if about["n_layers"] > 2 else np.nan, last=seen(ends))
        rows.append(frame.assign(**about))
    return pd.concat(rows, ignore_index=True)


def dead(end=0.004, fall=0.03, dying=0.02, **which):
    """Dead share rising to `end`, activation ratio falling by `fall`, a share `dying` of it in neurons that die."""
    rows = []
    for number, about in enumerate(models(**{"activations": ("relu",), **which})):
        steps = np.arange(10)
        for layer in range(about["n_layers"]):
            done = steps / 9 * (1 + 0.1 * number)
            frame = pd.DataFrame({"step": steps, "tokens": 10.0 ** (5 + steps / 9), "fit": steps > 1, "layer": layer})
            frame = frame.assign(neurons=30, dead_share=end * done, activation_ratio=0.2 - fall * done)
            rows.append(frame.assign(dying_ratio=0.01 - dying * fall * done, dead_share_zero=0.0, **about))
    return pd.concat(rows, ignore_index=True)


def transfer(foreign=1.012, silu=0.0, p=1.0, domains=("code", "prose", "maths"), **which):
    rows = []
    for number, about in enumerate(models(**which)):
        for a, b in product(domains, domains):
            ratio = 1.01 if a == b else foreign + (silu if about["activation"] == "silu" else 0)
            rows.append({**about, "calibrated_on": a, "applied_to": b, "ppl_ratio": ratio + 1e-4 * number, "p": p})
    return pd.DataFrame(rows)


def judged(**changed):
    makers = {"neurons": neurons, "vocabulary": vocabulary, "dead": dead, "transfer": transfer}
    tables = {name: changed.get(name, make()) for name, make in makers.items()}
    alike = activation_patterns.likeness(tables["neurons"], tables["vocabulary"])
    curves = dead_neurons.curves_of(tables["dead"])
    rows = activation_patterns.verdicts(alike, curves, tables["transfer"])
    return dict(zip(("tokens", "neurons", "middle", "increase", "little", "transfer"), rows, strict=True))


def test_a_study_that_follows_the_claims():
    rows = judged()
    assert {name: row.verdict for name, row in rows.items()} == dict.fromkeys(rows, SUPPORTED)
    assert rows["tokens"].interval[0] < rows["tokens"].here < rows["tokens"].interval[1]
    assert rows["little"].here == pytest.approx(2) and "the ratio fell by" in rows["little"].reason
    assert rows["transfer"].here == pytest.approx(1.2, abs=0.1) and "1.0" in rows["transfer"].reason
    assert "2 seeds" in rows["neurons"].reason and "1 pairs" not in rows["middle"].reason


def test_a_study_that_contradicts_them():
    rows = judged(
        neurons=neurons("size"),
        vocabulary=vocabulary(noise=3, middle=2, ends=0.1),
        dead=dead(end=-0.004, dying=0.6),
        transfer=transfer(foreign=1.05),
    )
    assert {name: row.verdict for name, row in rows.items()} == dict.fromkeys(rows, NOT_SUPPORTED)


def test_a_size_that_a_seed_lacks_is_left_out_of_the_comparison_of_seeds():
    table = neurons()
    size = table["d_model"].max()
    uneven = table[(table["d_model"] < size) | (table["seed"] > 0)]
    even = table[table["d_model"] < size]
    one, other, whole = (judged(neurons=chosen)["neurons"] for chosen in (uneven, even, table))
    assert one == other and one.here != whole.here
    assert f"{size}x" not in one.reason and f"{size}x" in whole.reason


def test_the_slope_of_the_dead_share_is_per_decade_of_tokens():
    rows = judged(dead=dead(sizes=SIZES[:1], seeds=(0, 1)))
    assert rows["increase"].here == pytest.approx(0.4 * 1.05)  # runs rise to 0.4 and 0.44 points over one decade
    assert "dead at the end, 0.40 to 0.44" in rows["increase"].reason


def test_one_bad_pair_or_activation_function_decides():
    table = vocabulary()
    spoilt = (table["activation"] == "silu") & (table["d_model"] == 36)
    table.loc[spoilt, "activation_ratio"] = np.random.default_rng(1).normal(size=int(spoilt.sum()))
    row = judged(vocabulary=table)["tokens"]
    assert row.verdict == NOT_SUPPORTED and "decides: SiLU" in row.reason and "36x3" in row.reason
    row = judged(transfer=transfer(silu=0.05))["transfer"]
    assert row.verdict == NOT_SUPPORTED and "decides: SiLU" in row.reason
    assert "highest mean 6." in row.reason and "SiLU, code on" in row.reason


def test_the_bound_of_transfer_follows_p():
    assert judged(transfer=transfer(foreign=1.05, p=5.0))["transfer"].verdict == SUPPORTED


def test_two_layer_models_leave_the_middle_inconclusive():
    row = judged(vocabulary=vocabulary(sizes=SIZES[:2]))["middle"]
    assert row.verdict == INCONCLUSIVE and row.reason == "no two sizes have three layers or more"


def test_the_middle_is_compared_on_the_pairs_that_have_one():
    table = vocabulary()
    table.loc[table["d_model"] == 24, ["first", "last"]] = 1.0  # would hide every correlation with this size
    row = judged(vocabulary=table)["middle"]
    assert row.verdict == SUPPORTED and "2 pairs of sizes" in row.reason


def test_a_ratio_that_did_not_fall_has_nothing_to_explain():
    row = judged(dead=dead(fall=-0.01))["little"]
    assert row.verdict == INCONCLUSIVE and row.reason.startswith("the activation ratio of 6 runs did not fall")


@pytest.mark.parametrize("which", [{"seeds": (0,)}, {"sizes": SIZES[:1]}, {"activations": ("relu",)}])
def test_small_studies_pass_through(which):
    rows = judged(
        neurons=neurons(**which),
        vocabulary=vocabulary(**which),
        dead=dead(**{"activations": ("relu",), **which}),
        transfer=transfer(domains=("code",), **which),
    )
    assert all(row.reason for row in rows.values())
    assert rows["transfer"].verdict == INCONCLUSIVE and rows["transfer"].reason == "only one domain"
    assert {rows["tokens"].verdict, rows["neurons"].verdict} & {INCONCLUSIVE}


def test_rare_tokens_are_not_compared():
    row = judged(vocabulary=vocabulary().assign(count=activation_patterns.OFTEN - 1))["tokens"]
    assert row.verdict == INCONCLUSIVE
    few = vocabulary()
    few.loc[few["token_id"] >= 12, "count"] = 1
    assert judged(vocabulary=few)["tokens"].reason.startswith("only 12 vocabulary tokens")


def test_claims_are_stated_before_their_verdicts():
    rows = list(judged().values())
    assert list(activation_patterns.CLAIMS.values()) == [row.claim for row in rows]
    assert activation_patterns.claims()["question"].tolist() == [row.claim.claim for row in rows]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"neurons": neurons().drop(columns="frequency")}, "activation patterns table lacks the columns frequency"),
        ({"vocabulary": vocabulary().assign(last=np.nan)}, "token patterns table has no last"),
        ({"dead": pd.concat([dead(), dead()])}, "dead neurons table has two rows for run relu-24-0, step 0, layer 0"),
        ({"transfer": transfer().head(0)}, "transfer table has no rows"),
    ],
    ids=NAMES,
)
def test_unusable_tables_are_input_errors(changed, message):
    with pytest.raises(InputError, match=message):
        judged(**changed)
