"""One run on two devices: two gloo processes under torchrun, against one process; killed, and gone on with."""

import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from small import write_text

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.models.training import Schedule, saved_step
from sparsity_utils.study.runs import Run, RunConfig, find_run, train_run, working_folder
from sparsity_utils.text.config import CorpusConfig
from sparsity_utils.text.corpus import build_corpus

pytestmark = pytest.mark.slow
HALVES = {"devices": 1, "micro_tokens": 128}  # one process, whose sums have the order of two
TOLERANCE = 1e-5  # of weights, relative to their norm, where sums have another order: 7e-7 was seen


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSITY_BUILD", str(folder / "build"))
        text = write_text(folder / "text")
        yield build_corpus(CorpusConfig("path", str(text), vocabulary=300, validation_share=0.2))


def config(corpus, kept: dict | None = None, **changes) -> RunConfig:
    model = ModelConfig(16, 2, vocabulary=300, context=32, head_size=8, base_width=16, **kept or {})
    changes = {"tokens": 14_000, "devices": 2} | changes
    train = TrainConfig(batch_tokens=256, checkpoints=12, validation_tokens=512, **changes)
    return RunConfig(model, train, corpus.hash, corpus.tokenizer_hash, 1)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.last_weights)


def difference(run: Run, other: Run) -> float:
    """Largest over the weights: norm of the difference over the norm."""
    one, two = weights(run), weights(other)
    return max(float((one[name] - two[name]).norm() / two[name].norm()) for name in two)


class Stopped(BaseException):
    pass


def stop(share: float) -> None:
    if share > 0:
        raise Stopped


@pytest.fixture(scope="module")
def ends(corpus) -> tuple[Run, Run]:
    """A run of two devices, killed on its way: as two ended it, and as one did that was started by hand meanwhile."""
    # Another key, the same weights: a micro-batch that is the batch. With two and three threads instead, which wait for
    # each other on busy cores, such runs took a minute of processor more.
    wanted, other = (config(corpus, recompute=True, micro_tokens=tokens) for tokens in (None, 256))
    with pytest.raises(Stopped):
        train_run(wanted, corpus, stop)
    assert 0 < saved_step(working_folder(wanted)) < Schedule(wanted.train).steps
    shutil.copytree(working_folder(wanted), working_folder(other))
    by_hand = ["--standalone", "--nproc-per-node=1", "-m", "sparsity_utils.study.torchrun", str(working_folder(other))]
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT)}
    with subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *by_hand], env=environment) as process:
        whole = train_run(wanted, corpus)
        assert process.wait(timeout=400) == 0
    return whole, train_run(other, corpus)


def test_two_devices_killed_or_not_train_what_one_does_and_a_whole_checkpoint_comes_of_it(corpus, ends):
    whole, _ = ends
    alone, halves = (train_run(config(corpus, **one), corpus) for one in ({"devices": 1}, HALVES))
    assert len({run.folder for run in (whole, alone, halves)}) == 3
    assert "devices" not in alone.manifest and whole.manifest["devices"] == [2]
    assert 0 < difference(whole, alone) < TOLERANCE
    # Two halves of a batch, summed in the same order, are the same bits.
    assert all(torch.equal(tensor, weights(halves)[name]) for name, tensor in weights(whole).items())
    losses = [list(run.checkpoints["validation_loss"]) for run in (whole, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert whole.load(whole.last_step).config.hidden_size == 16
    assert {file.name for file in whole.folder.iterdir()} == {"manifest.json", "checkpoints"}
    assert find_run(config(corpus, recompute=True)) == whole


def test_two_devices_train_what_one_does_where_maps_read_few_inputs_with_ternary_weights(corpus):
    kept = {"keep": 8, "quantised": True, "ffn_ratio": 2.0}
    both, halves = (train_run(config(corpus, kept, tokens=3_000, **one), corpus) for one in ({}, HALVES))
    assert all(torch.equal(tensor, weights(halves)[name]) for name, tensor in weights(both).items())
    assert weights(both)["model.layers.1.mlp.up_proj.weight"].unique().numel() <= 3


def test_a_killed_run_goes_on_with_another_number(ends):
    whole, finished = ends
    assert finished.manifest["devices"] == [1, 2] and 0 < difference(finished, whole) < TOLERANCE


def test_what_a_process_says_of_its_input_is_told(corpus):
    odd = dataclasses.replace(config(corpus).train, batch_tokens=96)
    with pytest.raises(InputError, match="A batch has 3 windows, which 2 devices cannot share equally"):
        train_run(dataclasses.replace(config(corpus), train=odd), corpus)
