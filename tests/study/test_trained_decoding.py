"""Decoding of models that were trained to be sparse: same function, same words, shares read, no speed when wrong."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from small import tiny_study

from sparsity_utils import paths, sparse_kernels
from sparsity_utils.console import InputError
from sparsity_utils.decoding.masked_text import MaskedText
from sparsity_utils.decoding.speed import greedy
from sparsity_utils.models.input_training import trained_thresholds
from sparsity_utils.neurons.linears import find_linears, sparse_inputs
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.study.makers import trained_decoding as module
from sparsity_utils.study.makers.input_speeds import WHOLE
from sparsity_utils.study.plan import decoded_runs, planned
from sparsity_utils.study.study import Study
from sparsity_utils.text.windows import measurement_batches

EXPERIMENT = {
    "common": {"shape": "16x2", "d_ff": 32, "activation": "relu2", "tokens": 5000, "checkpoints": 6, "rates": [0.01]},
    "seeds": [1, 0],
    "arms": {
        "dense": {},
        "keep_8": {"keep": 8},
        "keep_3": {"keep": 3, "rates": [0.01, 0.02]},
        "relu_l1_strong": {"activation": "relu", "l1": 1e-4},
        "block": {"keep": 8, "block": 16},  # which is not timed
    },
}
KEPT = {"keep_8": 8 / 16, "keep_3": 3 / 16}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A tiny study with the experiment."""
    decoding = {"prompt": 20, "new_tokens": 6, "rounds": 5}
    folder = tmp_path_factory.mktemp("trained_decoding")
    return tiny_study(folder, experiments={"q_sparse": EXPERIMENT}, trained_decoding=decoding)


@pytest.fixture(scope="module")
def table(study):
    return study.table("trained_decoding")


def trained(study, arm):
    """The run of an arm, with the first of its rates."""
    configs = study.configs("trained_decoding")
    place = [run.arm for run in decoded_runs(study.profile)].index(arm)
    (run,) = study.trained_runs([configs[place]])
    return run


def window(study, length=20):
    """The beginning of the text that is decoded after, (1, length)."""
    return measurement_batches(study.corpus.tokens("validation"), 32, "evaluation", 32)[0]["input_ids"][:1, :length]


def test_runs_are_of_the_first_seed_and_every_rate(study):
    runs = [(run.arm, run.train.learning_rate) for run in decoded_runs(study.profile)]
    assert runs == [("dense", 0.01), ("keep_3", 0.01), ("keep_3", 0.02), ("keep_8", 0.01), ("relu_l1_strong", 0.01)]
    assert {run.train.seed for run in decoded_runs(study.profile)} == {1}
    assert planned(study.profile, "trained_decoding") == [(run.model, run.train) for run in decoded_runs(study.profile)]


def test_one_row_for_each_run_and_way(table):
    found = table.groupby(["arm", "learning_rate"])[["engine", "way"]].apply(lambda ways: list(map(tuple, ways.values)))
    whole = [("transformers", WHOLE), ("kernels", WHOLE)]
    for arm, rate in (("keep_8", 0.01), ("keep_3", 0.01), ("keep_3", 0.02)):
        assert found[arm, rate] == [*whole, ("transformers", "as trained"), ("kernels", "teal-top-k")]
    for arm in ("dense", "relu_l1_strong"):
        assert found[arm, 0.01] == [*whole, ("kernels", "relu"), ("kernels", "relu, certified")]
    described = pd.read_csv(paths.RESULTS / "columns.csv").query("table == 'trained_decoding'")
    assert list(table.columns) == list(described["column"])
    assert len(table) == 5 * 4 and (table["wrong"] == 0).all() and (table["tokens_per_second"] > 0).all()
    assert (table["low_tokens_per_second"] <= table["tokens_per_second"]).all()
    itself = table[table["way"] == WHOLE].set_index("engine")
    assert (itself.loc["transformers", "speedup"] == 1).all() and (itself.loc["kernels", "strict_speedup"] == 1).all()


@pytest.mark.parametrize("arm", KEPT)
def test_thresholds_compute_what_was_trained(study, arm):
    run = trained(study, arm)
    hooked, plain = (run.load(run.last_step, as_trained=how) for how in (True, False))
    thresholds = trained_thresholds(plain)
    widths = [linear.inputs for linear in find_linears(plain)]
    assert thresholds.values == tuple(KEPT[arm] * width for width in widths) and set(widths) == {16, 32}
    tokens = window(study, 32)
    with torch.no_grad():
        wanted, whole = (model(input_ids=tokens).logits for model in (hooked, plain))
        with sparse_inputs(plain, thresholds):
            assert torch.equal(plain(input_ids=tokens).logits, wanted)
    assert not torch.allclose(whole, wanted, atol=1e-2)


@pytest.mark.parametrize("arm", KEPT)
def test_kernels_write_the_text_of_the_trained_model(study, arm):
    run = trained(study, arm)
    hooked, plain = (run.load(run.last_step, as_trained=how) for how in (True, False))
    prompt = window(study, 12)
    with evaluating(hooked):
        wanted, _ = greedy(hooked, prompt, 16)
    with evaluating(plain), sparse_kernels(plain, trained_thresholds(plain)):
        found, _ = greedy(plain, prompt, 16)
    assert torch.equal(found, wanted)


def test_what_thresholds_cannot_stand_for_is_refused(study):
    run = trained(study, "dense")
    model = run.load(run.last_step)
    assert trained_thresholds(model) is None
    for change in ({"block": 16}, {"rescale": "ratio"}, {"quantised": True}):
        model.config.kept_inputs = {"keep": 8, **change}
        with pytest.raises(InputError, match=r"thresholds stand for inputs that are chosen among all of a map"):
            trained_thresholds(model)


def test_kept_inputs_are_the_weights_that_are_read(table):
    share = table.set_index(["arm", "learning_rate", "engine", "way"]).sort_index()["read_share"]
    assert (share.xs(WHOLE, level="way") == 1).all() and (share.xs("as trained", level="way") == 1).all()
    maps = 4 * 16 * 16 + 3 * 16 * 32
    for arm, kept in KEPT.items():
        # Down may be left with less, since exact zeros of ReLU² are not read though they are among the largest.
        assert kept * (maps - 16 * 32) / maps <= share[arm, 0.01, "kernels", "teal-top-k"] <= kept


def test_zeros_are_the_weights_that_are_not_read(study, table):
    """Counted on the model's own decoding: the rule on neurons reads gate, and of up and down what is not zero."""
    share = table.set_index(["arm", "way"]).sort_index()["read_share"]["relu_l1_strong"]
    run, prompt, nonzero = trained(study, "relu_l1_strong"), window(study), []
    model = run.load(run.last_step)
    with evaluating(model):
        text, _ = greedy(model, prompt, 6)
        state = model(input_ids=prompt, use_cache=True).past_key_values
        for layer in model.model.layers:
            layer.mlp.act_fn.register_forward_hook(lambda module, args, s: nonzero.append((s != 0).double().mean()))
        for place in range(5):
            state = model(input_ids=text[:, place : place + 1], past_key_values=state, use_cache=True).past_key_values
    active, matrix = float(sum(nonzero)) / len(nonzero), 16 * 32
    maps = 4 * 16 * 16 + 3 * matrix
    assert share["relu"] == pytest.approx((maps - 2 * matrix * (1 - active)) / maps, rel=1e-6) and 0 < active < 1
    model = run.load(run.last_step)
    with sparse_kernels(model, Thresholds("relu", (0.0, 0.0)), certified=True) as kernels:
        copies = sum(kernel.certificate.nbytes for kernel in kernels) / 2 / 4  # in weights of a layer
    undecided = 1 - (copies - (share["relu, certified"] - share["relu"]) * maps) / matrix  # rows of gate still read
    assert active - 1e-6 <= undecided <= 1 + 1e-6


def test_a_wrong_word_has_no_speed(study, table, monkeypatch):
    monkeypatch.setattr(MaskedText, "differing", lambda text, words: (3, 2) if min(text.read) < 0.4 else (0, 0))
    settings = replace(study.profile.trained_decoding, rounds=1)
    again = module.trained_decoding([({"arm": "keep_3"}, trained(study, "keep_3"))], window(study), settings)
    wrong = again["way"].isin(["as trained", "teal-top-k"])
    speeds = ["tokens_per_second", "low_tokens_per_second", "speedup", "strict_speedup"]
    assert again.loc[wrong, speeds].isna().all(axis=None) and (again.loc[wrong, "wrong"] == 2).all()
    assert again.loc[~wrong, "tokens_per_second"].notna().all() and list(again.columns) == [
        name for name in table.columns if name != "learning_rate"
    ]


def test_nothing_is_compared_with_a_way_that_is_wrong():
    about = {"run": "a"}
    ways = [
        module.Way(None, None, MaskedText(torch.zeros(3), None, None, 0.0, []), {**about, "engine": engine, "way": way})
        for engine, way in (("transformers", WHOLE), ("kernels", WHOLE), ("kernels", "relu"))
    ]
    judged = [{"differing": 0, "wrong": 0}, {"differing": 1, "wrong": 1}, {"differing": 1, "wrong": 0}]
    found = module.rows(ways, judged, {place: np.full(5, float(place + 1)) for place in range(3)})
    pd.testing.assert_series_equal(found["tokens_per_second"], pd.Series([2.0, np.nan, 2 / 3]), check_names=False)
    pd.testing.assert_series_equal(found["speedup"], pd.Series([1.0, np.nan, 1 / 3]), check_names=False)
    assert found["strict_speedup"].isna().all() and found["differing"].tolist() == [0, 1, 1]


def test_a_diverged_run_is_left_out(study, table, monkeypatch):
    own, bad, timed = study.trained_runs, study.configs("trained_decoding")[-2].key, []  # keep_8

    def diverged(configs):
        runs = own(configs)
        changed = [replace(run, manifest={**run.manifest, "diverged": "It diverged."}) for run in runs]
        return [other if run.folder.name == bad else run for run, other in zip(runs, changed, strict=True)]

    monkeypatch.setattr(study, "trained_runs", diverged)
    monkeypatch.setattr(module, "trained_decoding", lambda runs, *others: timed.extend(runs))
    with pytest.warns(UserWarning, match=r"It diverged\. The study goes on without it"):
        module.MAKERS[0].make(study)
    assert [about["arm"] for about, _ in timed] == ["dense", "keep_3", "keep_3", "relu_l1_strong"]
    monkeypatch.setattr(module, "decoded_runs", lambda profile: [])
    monkeypatch.setattr(study, "configs", lambda question: [])
    with pytest.raises(InputError, match=r"Every run of trained_decoding diverged"):
        module.MAKERS[0].make(study)


def test_settings_that_cannot_be_measured_are_refused(study):
    settings = study.profile.trained_decoding
    for changes, match in (({"new_tokens": 1}, r"trained_decoding\.new_tokens is 1"), ({"rounds": 0}, "rounds is 0")):
        with pytest.raises(InputError, match=match):
            replace(settings, **changes)
    long = replace(study.profile, trained_decoding=replace(settings, new_tokens=32))
    with pytest.raises(InputError, match="longer than the model's context of 32"):
        Study(study.name, study.folder, long).made("trained_decoding")
    none = replace(study.profile, experiments={})
    with pytest.raises(InputError, match="has no runs of q_sparse"):
        Study(study.name, study.folder, none).made("trained_decoding")
