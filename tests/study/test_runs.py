"""The run store: what names a run, that it is trained once, and that damage is found, said and repaired."""

import dataclasses
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small import write_text

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.models.pretrained import open_checkpoint
from sparsity_utils.study import runs
from sparsity_utils.study.runs import RunConfig, find_run, train_run
from sparsity_utils.study.sections import parsed
from sparsity_utils.text.config import CorpusConfig
from sparsity_utils.text.corpus import Corpus, build_corpus
from sparsity_utils.text.windows import TrainingBatches


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    text = write_text(tmp_path_factory.mktemp("text"))
    return build_corpus(CorpusConfig("path", str(text), vocabulary=300, validation_share=0.2))


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    torch.set_num_threads(1)


def config(corpus: Corpus, **changes) -> RunConfig:
    settings = {"tokens": 4000, "batch_tokens": 256, "checkpoints": 8, "validation_tokens": 512}
    model = ModelConfig(8, 1, vocabulary=300, context=32, head_size=8, base_width=16)
    return RunConfig(model, TrainConfig(**{**settings, **changes}), corpus.hash, corpus.tokenizer_hash, 1)


def test_the_key_names_everything_that_decides_the_weights(corpus):
    base = config(corpus)
    others = [
        dataclasses.replace(base, model=dataclasses.replace(base.model, activation="silu")),
        config(corpus, seed=1),
        config(corpus, learning_rate=0.02),
        dataclasses.replace(base, corpus="other"),
        dataclasses.replace(base, tokenizer="other"),
        dataclasses.replace(base, threads=2),
        dataclasses.replace(base, recipe=base.recipe + 1),
    ]
    assert len({each.key for each in [base, *others]}) == len(others) + 1
    assert config(corpus).key == base.key


LATER = [
    *(
        "ffn plain",
        "keep 8",
        "keep 8 block 2",
        "keep 8 straight_through false",
        "keep 8 rescale ratio",
        "quantised true",
    ),
    *("l1 0.1", "targets uniform distinct_tokens 512", "targets unigram distinct_tokens 512", "distinct_tokens 512"),
    *("text random targets function distinct_tokens 512", "devices 2", "micro_tokens 128", "recompute true"),
]


def later(base: RunConfig, written: str) -> RunConfig:
    """`base` with settings written as "name value name value"."""
    names, values = written.split()[::2], written.split()[1::2]
    given = {name: parsed(value) for name, value in zip(names, values, strict=True)}
    own = {"model": {}, "train": {}}
    for name, value in given.items():
        own["model" if name in {field.name for field in dataclasses.fields(ModelConfig)} else "train"][name] = value
    model = dataclasses.replace(base.model, ffn_ratio=2.0, **own["model"])
    return dataclasses.replace(base, model=model, train=dataclasses.replace(base.train, **own["train"]))


def test_settings_that_joined_later_count_where_they_are_set_and_only_there(corpus):
    base = later(config(corpus), "")
    others = [later(base, written) for written in LATER]
    assert len({each.key for each in [base, *others]}) == len(others) + 1
    first = ["activation", "base_width", "context", "d_model", "ffn_ratio", "head_size", "n_layers", "vocabulary"]
    assert sorted(base.identity()["model"]) == first  # of the first study
    for each, written in zip(others, LATER, strict=True):
        stored = json.loads(json.dumps(each.identity()))
        assert RunConfig.from_identity(stored) == each and RunConfig.from_identity(stored).key == each.key
        added = {name for part in ("model", "train") for name in set(stored[part]) - set(base.identity()[part])}
        assert added == set(written.split()[::2])
    assert RunConfig.from_identity(base.identity()) == base


FIRST_STUDY = {  # keys of its runs: shape, activation, tokens, seed
    "2a822b821dbbe46a": (16, 1, "relu", 560_000, 0),
    "d2a361d09cc818cc": (16, 2, "relu", 1_120_000, 0),
    "1a0024333de422a8": (24, 3, "relu", 3_780_000, 1),
    "3a139407474124c3": (48, 3, "silu", 15_100_000, 0),
    "9124c92f879551fc": (64, 4, "silu", 35_800_000, 0),
}
ITS_TEXT = (
    "44df982c3bb5fcea5ed0029dc6ec7ff0805f36304d41e566fb4fb98b4fbb88df",  # token ids
    "c88abf483e35aeb260aaf0f7a6e5d2cbc54210aecf762d7a6bcb0f98998c435d",  # tokenizer
)


@pytest.mark.parametrize(("key", "settings"), FIRST_STUDY.items())
def test_runs_of_the_first_study_have_the_keys_that_they_had(key, settings):
    """A run is found by its key: what decides its weights must be written as it was when it was trained."""
    d_model, n_layers, activation, tokens, seed = settings
    model = ModelConfig(d_model, n_layers, activation, vocabulary=1024, context=256, head_size=16, base_width=64)
    train = TrainConfig(tokens, seed=seed, batch_tokens=4096, learning_rate=0.01)
    assert RunConfig(model, train, *ITS_TEXT, threads=1).key == key


def test_a_finished_run_is_never_trained_again(corpus, monkeypatch):
    shares = []
    first = train_run(config(corpus), corpus, shares.append)
    assert shares[-1] == 1.0 and shares == sorted(shares)
    monkeypatch.setattr(runs, "train", lambda *args: pytest.fail("trained again"))
    again = train_run(config(corpus), corpus)
    pd.testing.assert_frame_equal(again.checkpoints, first.checkpoints)
    assert not list(paths.runs().glob(".*.working"))
    assert not (again.folder / "state.safetensors").exists()


def test_the_table_of_checkpoints_describes_the_run(corpus):
    table = train_run(config(corpus), corpus).checkpoints
    assert list(table["role"])[-1] == "final" and set(table["role"][:-1]) == {"stable"}
    first = table.iloc[0]
    assert (first["d_model"], first["n_layers"], first["parameters"], first["width_depth_ratio"]) == (8, 1, 736, 8.0)
    warm_up = 0.05 * 4000
    assert list(table["fit"]) == [row.role == "stable" and row.tokens >= 2 * warm_up for row in table.itertuples()]
    assert table["fit"].sum() >= 5 and table["validation_loss"].is_monotonic_decreasing


def test_checkpoints_open_with_transformers(corpus):
    from transformers import AutoModelForCausalLM

    run = train_run(config(corpus), corpus)
    for step in run.checkpoints["step"]:
        folder = run.folder / "checkpoints" / f"step-{step:06d}"
        opened, loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict(), run.load(step).state_dict()
        stored = load_file(folder / "model.safetensors")
        assert all(
            torch.equal(opened[name], tensor) and torch.equal(loaded[name], tensor) for name, tensor in stored.items()
        )
    model, tokenizer = open_checkpoint(folder)  # the last one has a tokenizer
    text = corpus.documents("validation")["domain"].iloc[0]
    assert tokenizer(text)["input_ids"] == corpus.tokenizer().encode(text).ids
    assert model.config.vocab_size == len(tokenizer)


def as_before(folder):
    """Change a run's folder to the form that runs had before a checkpoint was a folder; return the step of the last."""
    for each in sorted(folder.glob("checkpoints/step-*")):
        step = int(each.name.removeprefix("step-"))
        shutil.copyfile(each / "config.json", folder / "config.json")
        os.replace(each / "model.safetensors", folder / "checkpoints" / f"{step:06d}.safetensors")
        shutil.rmtree(each)
    return step


def test_a_run_trained_before_a_checkpoint_was_a_folder_opens_and_is_found_done(corpus, monkeypatch):
    run = train_run(config(corpus), corpus)
    wanted = {step: run.load(step).state_dict() for step in run.checkpoints["step"]}
    last = as_before(run.folder)
    stored = [*sorted(run.folder.glob("checkpoints/*")), run.folder / "config.json"]
    files = {str(file.relative_to(run.folder)): runs._sha256(file) for file in stored}
    assert list(files)[-2:] == [f"checkpoints/{last:06d}.safetensors", "config.json"]
    (run.folder / "manifest.json").write_text(json.dumps(run.manifest | {"files": files}))
    monkeypatch.setattr(runs, "train", lambda *args: pytest.fail("trained again"))
    found = train_run(config(corpus), corpus)
    for step, weights in wanted.items():
        assert all(torch.equal(found.load(step).state_dict()[name], tensor) for name, tensor in weights.items())
    brought = shutil.copytree(run.folder, run.folder.with_name("brought"))
    flat = brought / "checkpoints" / f"{last:06d}.safetensors"
    assert runs.Run(brought, found.manifest).last_weights == flat
    os.replace(flat, brought / "model.safetensors")  # as an archive of it brings the last checkpoint
    shutil.rmtree(brought / "checkpoints")
    assert runs.Run(brought, found.manifest).load(last).config.hidden_size == 8
    assert not runs._damaged(runs.Run(brought, found.manifest))
    edit(brought / "model.safetensors")
    assert runs._damaged(runs.Run(brought, found.manifest)) == ["model.safetensors"]
    with pytest.raises(InputError, match="There is no config"):
        runs.Run(brought, found.manifest).load(min(wanted))
    edit(found.last_weights)
    with pytest.warns(UserWarning, match=rf"{last:06d}\.safetensors is not what was written"):
        assert find_run(config(corpus)) is None


def test_a_run_begun_before_a_checkpoint_was_a_folder_is_finished(corpus, monkeypatch):
    whole = train_run(dataclasses.replace(config(corpus), threads=3), corpus)  # another key, the same weights
    steps = list(whole.checkpoints["step"])
    original = TrainingBatches.__call__

    def stopped(self, step):
        if step == steps[4]:
            raise KeyboardInterrupt
        return original(self, step)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(TrainingBatches, "__call__", stopped)
        train_run(config(corpus), corpus)
    assert as_before(paths.runs() / f".{config(corpus).key}.working") == steps[4]
    run = train_run(config(corpus), corpus)
    assert find_run(config(corpus)) == run and "config.json" in run.manifest["files"]
    assert sum(name.endswith(".safetensors") for name in run.manifest["files"]) == len(steps)
    for step in steps:
        weights = whole.load(step).state_dict()
        assert all(torch.equal(run.load(step).state_dict()[name], tensor) for name, tensor in weights.items())


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def edit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, edit, lambda file: file.unlink()], ids=["truncated", "edited", "missing"])
@pytest.mark.parametrize("what", ["checkpoint", "manifest"])
def test_damage_is_found_said_and_repaired(corpus, damage, what):
    run = train_run(config(corpus), corpus)
    last = run.folder / "checkpoints" / f"step-{run.checkpoints['step'].max():06d}" / "model.safetensors"
    before = last.read_bytes()
    file = last if what == "checkpoint" else run.folder / "manifest.json"
    damage(file)
    said = rf"8x1 relu seed 0 \({run.folder.name}\) is damaged: .*{file.name} is not what was written"
    with pytest.warns(UserWarning, match=said):
        assert find_run(config(corpus)) is None
    with pytest.warns(UserWarning, match=said):
        train_run(config(corpus), corpus)
    assert last.read_bytes() == before


def test_a_run_killed_just_before_its_end_is_not_lost(corpus, monkeypatch):
    whole = train_run(dataclasses.replace(config(corpus), threads=3), corpus)  # another key, the same weights

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(runs, "_sha256", killed)
        train_run(config(corpus), corpus)
    steps = []
    original = TrainingBatches.__call__
    monkeypatch.setattr(TrainingBatches, "__call__", lambda self, step: steps.append(step) or original(self, step))
    run = train_run(config(corpus), corpus)
    assert not steps and not run.diverged
    assert list(run.checkpoints["validation_loss"]) == list(whole.checkpoints["validation_loss"])


def test_what_a_killed_process_was_writing_aside_is_not_kept(corpus):
    for name in (".state.safetensors.half", "checkpoints/.step-000001.half"):
        (runs.working_folder(config(corpus)) / name).mkdir(parents=True)
    assert not list(train_run(config(corpus), corpus).folder.rglob(".*"))


def test_two_that_want_the_same_run_train_it_once(corpus, monkeypatch):
    trained = []
    original = runs.train
    monkeypatch.setattr(runs, "train", lambda *args: trained.append(1) or original(*args))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: train_run(config(corpus), corpus).folder, range(4)))
    assert len(trained) == 1 and len(set(found)) == 1


def test_a_diverged_run_is_kept_as_such(corpus, monkeypatch):
    bad = config(corpus, learning_rate=1e6)
    run = train_run(bad, corpus)
    assert "8x1 relu seed 0: Training stopped at step" in run.diverged and "learning rate 1e+06" in run.diverged
    monkeypatch.setattr(runs, "train", lambda *args: pytest.fail("trained again"))
    assert train_run(bad, corpus).diverged == run.diverged


def test_a_measurement_is_computed_once_per_setting(corpus):
    run, calls = train_run(config(corpus), corpus), []

    def measure():
        calls.append(1)
        return pd.DataFrame({"step": [1, 2], "value": [0.1, 0.25]})

    assert not run.has_measured("curve", {"p": 1})
    first, again = (run.measured("curve", {"p": 1}, measure) for _ in range(2))
    assert run.has_measured("curve", {"p": 1}) and len(calls) == 1
    pd.testing.assert_frame_equal(first, again)
    run.measured("curve", {"p": 2}, measure)
    assert len(calls) == 2
    assert find_run(config(corpus)) is not None  # measurements do not count as damage


def test_the_manifest_says_on_what_the_run_was_made(corpus):
    manifest = json.loads((train_run(config(corpus), corpus).folder / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["device"]
    assert len(manifest["commit"].removesuffix("-dirty")) == 40 or manifest["commit"] == "unknown"
    assert manifest["config"]["corpus"] == corpus.hash and manifest["config"]["train"]["seed"] == 0
