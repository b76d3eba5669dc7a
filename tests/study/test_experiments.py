"""Experiments: how a profile writes them down, which runs they are, and what their table says of both ends of a run."""

import copy
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from literal_inputs import literal_maps
from small import profile_content, write_profile, write_text
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from sparsity_utils import measure_sparsity, paths
from sparsity_utils.console import InputError
from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.models.decoder import build_model
from sparsity_utils.models.input_training import KeptInputs
from sparsity_utils.models.training import random_data
from sparsity_utils.study import ends, plan
from sparsity_utils.study.profiles import read_profile
from sparsity_utils.study.runs import RunConfig, find_run, run_batches, validation_batches
from sparsity_utils.study.study import Study
from sparsity_utils.text.windows import TrainingBatches, measurement_batches

EVALUATED = 256  # tokens
COMMON = {"shape": "16x2", "tokens": 2048, "rates": [0.01], "checkpoints": 6}
LAZY = {
    "common": {**COMMON, "ffn": "plain"},
    "seeds": [0],
    "arms": {"plain": None, "unigram": {"targets": "unigram", "distinct_tokens": 640}},
}
KEPT = {
    "common": {**COMMON, "activation": "relu2"},
    "seeds": [1],
    "arms": {
        "dense": {"d_ff": 32, "rates": [0.01, 1e6]},  # the second diverges
        "keep_8": {"keep": 8, "block": 8, "rescale": "ratio"},
        "ternary": {"keep": 8, "quantised": True, "ffn_ratio": 2.0},
    },
}
SETTINGS = {  # of an arm's runs, once more
    "plain": {"ffn": "plain"},
    "unigram": {"ffn": "plain"},
    "dense": {"activation": "relu2", "ffn_ratio": 2.0},
    "keep_8": {"activation": "relu2", "keep": 8, "block": 8, "rescale": "ratio"},
    "ternary": {"activation": "relu2", "keep": 8, "quantised": True, "ffn_ratio": 2.0},
}


def content(folder, **experiments) -> dict:
    return {**copy.deepcopy(profile_content(folder)), "experiments": copy.deepcopy(experiments)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The tables of both experiments, trained and measured in this process; and what was warned of."""
    folder = tmp_path_factory.mktemp("experiments")

    def do_here(jobs, profile):
        for job in jobs:
            job.do(lambda share: None)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patch.setenv("SPARSITY_BUILD", str(folder / "build"))
        patch.setattr("sparsity_utils.study.study.do_jobs", do_here)
        written = content(write_text(folder / "text"), lazy_neuron=LAZY, q_sparse=KEPT)
        written["measure"] = {"calibration_tokens": 128, "evaluation_tokens": EVALUATED}
        written["train"]["validation_tokens"] = 256
        study = Study.from_profile(write_profile(folder, written))
        yield study, {question: study.table(question) for question in ("lazy_neuron", "q_sparse")}, warned


def test_a_table_has_a_row_per_layer_of_every_arm(built):
    study, tables, _warned = built
    described = pd.read_csv(paths.RESULTS / "columns.csv").groupby("table")["column"].apply(list)
    for question, arms in (("lazy_neuron", ["plain", "unigram"]), ("q_sparse", ["dense", "keep_8", "ternary"])):
        table = tables[question]
        assert list(table.columns)[: len(plan.ARM)] == list(plan.ARM) and list(table.columns) == described[question]
        assert list(table["arm"]) == [arm for arm in arms for _ in range(2)]
        assert list(table["layer"]) == [0, 1] * len(arms) and set(table["learning_rate"]) == {0.01}
        assert set(table["tokens"]) == {256 * 9} and "step" not in table
        pd.testing.assert_frame_equal(study.table(question), table)
    widths = tables["q_sparse"].set_index("arm")["d_ff"]
    assert (widths["dense"].iloc[0], widths["keep_8"].iloc[0], widths["ternary"].iloc[0]) == (32, 40, 32)
    plain = tables["lazy_neuron"]["parameters"].iloc[0]
    assert plain == 2 * (4 * 16 * 16 + 2 * 16 * 40)


def test_a_run_that_diverged_is_left_out_and_said(built):
    _study, _tables, warned = built
    (said,) = {str(each.message) for each in warned if "goes on" in str(each.message)}
    assert "learning rate 1e+06" in said and said.endswith("The study goes on without it.")


ARMS = [("lazy_neuron", arm) for arm in LAZY["arms"]] + [("q_sparse", arm) for arm in KEPT["arms"]]


def config_of(study: Study, question: str, arm: str) -> RunConfig:
    arms = [run.arm for run in study.profile.arm_runs(question)]
    config = study.configs(question)[arms.index(arm)]
    shared = {"context": 32, "head_size": 8, "base_width": 16}
    assert config.model == ModelConfig(16, 2, vocabulary=300, **shared, **SETTINGS[arm])
    return config


def literal(study: Study, config: RunConfig, model, ternary: bool) -> dict[str, list[float]]:
    """Shares of neurons and weights, gradients and the loss, counted on an unmodified decoder of transformers."""
    maps = literal_maps(model.double(), KeptInputs.of(config.model) or KeptInputs(), ternary)
    constant = "up_proj" if config.model.ffn == "plain" else "none"
    used = {name: linear for name, linear in maps.items() if constant not in name}
    batches = run_batches(config, study.corpus, EVALUATED)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    shares = [(maps[f"{layer}.mlp.down_proj"].read != 0).double().mean().item() for layer in range(2)]
    read = every = 0
    for linear in used.values():
        rows, columns = linear.weight.shape
        for token in linear.read.reshape(-1, columns):
            read += rows * int((token != 0).sum())
            every += rows * columns
    if "targets" in batches[0]:
        targets = torch.cat([batch["targets"] for batch in batches])
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
    else:
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    data = random_data(config.model, config.train).training(study.corpus.tokens("train"))
    inputs, targets = TrainingBatches(data[0], 32, 256, config.train.seed, data[1])(0)
    cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten()).backward()
    norms = [
        sum(m.weight.grad.square().sum().item() for n, m in used.items() if n.startswith(f"{layer}.")) ** 0.5
        for layer in range(2)
    ]
    return {"share": shares, "gradient": norms, "read": [read / every] * 2, "loss": [loss.item()] * 2}


@pytest.mark.parametrize(("question", "arm"), ARMS)
def test_a_table_equals_what_is_counted_on_an_unmodified_model(built, question, arm):
    study, tables, _warned = built
    config, rows = config_of(study, question, arm), tables[question].query("arm == @arm")
    run = find_run(config)
    folder, _file = run.checkpoint(run.last_step)
    last = literal(study, config, AutoModelForCausalLM.from_pretrained(folder), ternary=False)
    first = literal(study, config, build_model(config.model, config.train.seed), ternary=config.model.quantised)
    for column, wanted in {
        "initial_share": first["share"],
        "final_share": last["share"],
        "weights_read": last["read"],
    }.items():
        np.testing.assert_allclose(rows[column], wanted, atol=2e-4, err_msg=column)  # an input may be at a threshold
    for column, wanted in {
        "initial_gradient": first["gradient"],
        "final_gradient": last["gradient"],
        "loss": last["loss"],
    }.items():
        np.testing.assert_allclose(rows[column], wanted, rtol=5e-3 if config.model.quantised else 1e-4, err_msg=column)


def test_what_cannot_be_measured_is_empty_and_the_rest_is_not(built):
    _study, tables, _warned = built
    table = pd.concat(tables.values()).drop_duplicates("arm").set_index("arm")
    assert {arm for arm in table.index if np.isnan(table["activation_ratio"][arm])} == {"unigram", "ternary"}
    assert {arm for arm in table.index if not np.isnan(table["rise_untrained"][arm])} == {"plain", "unigram", "dense"}
    given = table["activation_ratio"].dropna()
    assert given.between(0, 1, inclusive="neither").all()
    assert table["weights_read"].between(0, 1, inclusive="right").all()
    assert table["weights_read"]["keep_8"] < 0.5001 < table["weights_read"]["plain"]


@pytest.mark.parametrize("arm", ["plain", "unigram"])
def test_reading_less_without_training_costs_what_masked_maps_lose(built, arm):
    study, tables, _warned = built
    config = config_of(study, "lazy_neuron", arm)
    run = find_run(config)
    losses = []
    for how in (KeptInputs(), KeptInputs(keep=10)):
        model = AutoModelForCausalLM.from_pretrained(run.checkpoint(run.last_step)[0]).double()
        literal_maps(model, how)
        logits, wanted = [], []
        for batch in run_batches(config, study.corpus, EVALUATED):
            targets = batch.get("targets", batch["input_ids"][:, 1:])
            with torch.no_grad():
                logits.append(model(input_ids=batch["input_ids"]).logits[:, : targets.shape[1]].flatten(0, 1))
            wanted.append(targets.flatten())
        losses.append(cross_entropy(torch.cat(logits), torch.cat(wanted)).item())
    rise = tables["lazy_neuron"].query("arm == @arm")["rise_untrained"].iloc[0]
    assert rise == pytest.approx(losses[1] - losses[0], abs=1e-4) and abs(rise) > 1e-3


def test_hooks_are_gone_after_a_measurement(built):
    study, _tables, _warned = built
    config = config_of(study, "lazy_neuron", "plain")
    model = ends.initial_model(config.model, 0)
    batches = run_batches(config, study.corpus, EVALUATED)
    first = ends.nonzero_shares(model, batches), ends.weights_read(model, batches)
    ends._loss_untrained(model, config, batches)
    ends.first_gradients(model, config, study.corpus)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(p.grad is not None for p in model.parameters())
    assert first == (ends.nonzero_shares(model, batches), ends.weights_read(model, batches))


def test_targets_learnt_by_heart_are_validated_on_the_windows_of_training(built):
    study, _tables, _warned = built
    config = config_of(study, "lazy_neuron", "unigram")
    tokens, targets = random_data(config.model, config.train).training(study.corpus.tokens("train"))
    windows = {tuple(tokens[i * 32 : i * 32 + 32]): tuple(targets[i * 32 : i * 32 + 32]) for i in range(20)}
    found = [
        (tuple(ids.tolist()), tuple(wanted.tolist()))
        for batch in validation_batches(config, study.corpus)
        for ids, wanted in zip(batch["input_ids"], batch["targets"], strict=True)
    ]
    assert len(found) == 256 // 32 and all(windows[ids] == wanted for ids, wanted in found)
    plain = config_of(study, "lazy_neuron", "plain")
    held = measurement_batches(study.corpus.tokens("validation"), 32, "evaluation", 256)
    for ours, wanted in zip(validation_batches(plain, study.corpus), held, strict=True):
        assert list(ours) == ["input_ids"] and torch.equal(ours["input_ids"], wanted["input_ids"])


def test_a_model_of_random_targets_is_not_measured_on_text(built):
    study, _tables, _warned = built
    batches = measurement_batches(study.corpus.tokens("validation"), 32, "evaluation", 256)
    runs = {arm: find_run(config_of(study, "lazy_neuron", arm)) for arm in ("plain", "unigram")}
    with pytest.raises(InputError, match=r"was trained on random data \(random_targets in its config\.json\)"):
        measure_sparsity(runs["unigram"].load(runs["unigram"].last_step), batches, metric="relu")
    assert measure_sparsity(runs["plain"].load(runs["plain"].last_step), batches, metric="relu").activation_ratio > 0


def test_runs_come_arm_by_arm_then_rate_then_seed(tmp_path):
    arms = {"a": {"rates": [0.02, 0.01], "d_ff": 24}, "b": {"shape": "8x1"}}
    experiment = {"common": {**COMMON, "activation": "silu"}, "seeds": [4, 2], "arms": arms}
    written = content(tmp_path, lazy_neuron=experiment)
    written["model"]["ffn_ratio"] = 3.0
    written["train"]["beta2"] = 0.9
    profile = read_profile(write_profile(tmp_path, written))
    runs = profile.arm_runs("lazy_neuron")
    told = [(run.arm, run.train.learning_rate, run.train.seed) for run in runs]
    assert told == [
        *(("a", 0.02, 4), ("a", 0.02, 2), ("a", 0.01, 4), ("a", 0.01, 2)),
        *(("b", 0.01, 4), ("b", 0.01, 2)),
    ]
    model = {"activation": "silu", "vocabulary": 300, "context": 32, "head_size": 8, "base_width": 16}
    assert runs[0].model == ModelConfig(16, 2, ffn_ratio=1.5, **model)
    assert runs[5].model == ModelConfig(8, 1, ffn_ratio=3.0, **model)
    train = {"batch_tokens": 256, "checkpoints": 6, "validation_tokens": 512, "beta2": 0.9, "learning_rate": 0.01}
    assert runs[5].train == TrainConfig(2048, seed=2, **train)
    assert plan.planned(profile, "lazy_neuron") == [(run.model, run.train) for run in runs]
    assert profile.arm_runs("q_sparse") == [] == plan.planned(profile, "q_sparse")


MISTAKES = [
    ({"arms": {"a": {"kep": 8}}}, r"experiments\.q_sparse: arms\.a: unknown key kep; known are activation, .*keep"),
    ({"arms": {"a": {"seed": 1}}}, r"arms\.a: unknown key seed"),
    ({"common": {"shape": "16x2", "rates": [0.1]}}, r"arms\.dense: tokens is missing; give it there or in common"),
    ({"common": {**COMMON, "rates": []}}, r"arms\.dense: rates are empty"),
    ({"common": {**COMMON, "rates": 0.1}}, r"arms\.dense: rates is 0\.1; it should be a list"),
    (
        {"common": {**COMMON, "rates": [0.1, 0.1]}},
        r"arms\.dense: rates are \[0\.1, 0\.1\]; name each learning rate once",
    ),
    ({"common": {**COMMON, "rates": [-1]}}, r"arms\.dense: train\.learning_rate is -1\.0"),
    ({"arms": {"a": {"keep": "half"}}}, r"arms\.a: keep is 'half'; it should be of type int"),
    ({"arms": {"a": {"quantised": 1}}}, r"arms\.a: quantised is 1; it should be of type bool"),
    ({"arms": {"a": {"keep": True}}}, r"arms\.a: keep is True; it should be of type int"),
    ({"arms": {"a": {"shape": "16"}}}, r"arms\.a: shape is '16', not of the form 48x4"),
    ({"arms": {"a": {"shape": "x2"}}}, r"arms\.a: shape is 'x2', not of the form 48x4"),
    ({"arms": {"a": {"d_ff": 0}}}, r"arms\.a: d_ff is 0; it must be positive"),
    ({"arms": {"a": 3}}, r"arms\.a: its value should hold 'key: value' lines, not 3"),
    ({"arms": {}}, r"arms are empty; name at least one"),
    ({"seeds": []}, r"experiments\.q_sparse: seeds need one or more, each once"),
    ({"seeds": [1, 1]}, r"seeds need one or more, each once"),
    ({"arms": {"a": {}, "b": {"keep": 16}}}, r"arms\.b: it is trained as a is; drop one of them"),
    ({"arms": {"a": {"keep": 0}}}, r"arms\.a: model\.keep is 0; choose 1 to 16"),
    ({"arms": {"a": {"keep": 8, "block": 16}}}, r"arms\.a: model\.block 16 does not divide the 40 inputs"),
    ({"arms": {"a": {"micro_tokens": 48}}}, r"arms\.a: train\.batch_tokens 256 is not divided .*whole windows"),
    ({"arms": {"a": {"devices": 3}}}, r"arms\.a: train\.batch_tokens 256 is not divided by train\.devices 3"),
    ({"arms": {"a": {"targets": "uniform"}}}, r"arms\.a: Random text and targets are drawn before training"),
    ({"lr": [0.1]}, r"unknown key experiments\.q_sparse\.lr; known are common, arms, seeds"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[str(changes)[:60] for changes, _ in MISTAKES])
def test_a_mistake_in_an_experiment_is_named(tmp_path, changes, message):
    experiment = {"common": COMMON, "seeds": [0], "arms": {"dense": {}}, **changes}
    with pytest.raises(InputError, match=rf"^Profile tiny\.yaml: .*{message}"):
        read_profile(write_profile(tmp_path, content(tmp_path, q_sparse=experiment)))


def test_an_unknown_experiment_and_a_missing_part_are_named(tmp_path):
    with pytest.raises(InputError, match=r"experiments has 'q_spare'; known are lazy_neuron, q_sparse, q_sparse_sizes"):
        read_profile(write_profile(tmp_path, content(tmp_path, q_spare={"common": COMMON, "seeds": [0], "arms": {}})))
    with pytest.raises(InputError, match=r"the key experiments\.q_sparse\.seeds is missing"):
        read_profile(write_profile(tmp_path, content(tmp_path, q_sparse={"common": COMMON, "arms": {"dense": {}}})))
