"""Training: the schedule, determinism, resumption bit for bit, the loss, divergence."""

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparsity_utils.console import InputError
from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.models.loss import CHUNK_TOKENS, linear_cross_entropy
from sparsity_utils.models.training import Diverged, Schedule, Training, checkpoint_folder, train, validation_loss
from sparsity_utils.text.windows import TrainingBatches, measurement_batches

MODEL = ModelConfig(16, 2, vocabulary=64, context=16, head_size=8, base_width=16)
TRAIN = TrainConfig(tokens=16 * 4 * 30, batch_tokens=16 * 4, checkpoints=8, seed=3)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, 5000).astype(np.uint16)


@pytest.fixture
def validation(tokens) -> list:
    return measurement_batches(tokens, 16, "evaluation", 320)


def weights(folder, step):
    return load_file(checkpoint_folder(folder, step) / "model.safetensors")


def test_a_run_is_the_same_twice(tokens, validation, tmp_path):
    first, second = (train(MODEL, TRAIN, tokens, validation, tmp_path / name) for name in "ab")
    timeless = [
        [{k: v for k, v in row.items() if k not in ("tokens_per_second", "flops_utilisation")} for row in rows]
        for rows in (first, second)
    ]
    assert timeless[0] == timeless[1]
    step = first[-1]["step"]
    assert all(torch.equal(a, weights(tmp_path / "b", step)[n]) for n, a in weights(tmp_path / "a", step).items())


def test_a_paused_run_is_charged_its_processor_time_alone(tokens, validation, tmp_path, monkeypatch):
    step = Training.train_step
    monkeypatch.setattr(Training, "train_step", lambda self: (time.sleep(0.05), step(self)))
    last = train(MODEL, TRAIN, tokens, validation, tmp_path)[-1]
    assert last["tokens"] / last["tokens_per_second"] < 0.05 * last["step"]  # seconds charged, and seconds slept


@pytest.mark.parametrize("killed_at", [1, 7, 20, 32])
def test_a_killed_run_ends_in_the_same_weights(tokens, validation, tmp_path, monkeypatch, killed_at):
    whole = train(MODEL, TRAIN, tokens, validation, tmp_path / "whole")
    monkeypatch.setattr("sparsity_utils.models.training.SAVE_EVERY", 0.0)  # a state after every step

    class Killed(BaseException):
        pass

    steps = iter(range(1, 1000))

    def kill(self, *args):
        if next(steps) > killed_at:
            raise Killed
        return original(self, *args)

    original = TrainingBatches.__call__
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(TrainingBatches, "__call__", kill)
        train(MODEL, TRAIN, tokens, validation, tmp_path / "cut")
    resumed_from = []
    with monkeypatch.context() as patched:
        patched.setattr(
            TrainingBatches, "__call__", lambda self, step: resumed_from.append(step) or original(self, step)
        )
        resumed = train(MODEL, TRAIN, tokens, validation, tmp_path / "cut")
    assert resumed_from[0] == killed_at  # it did not begin again
    assert [row["validation_loss"] for row in resumed] == [row["validation_loss"] for row in whole]
    for row in whole:
        cut = weights(tmp_path / "cut", row["step"])
        assert all(torch.equal(tensor, cut[name]) for name, tensor in weights(tmp_path / "whole", row["step"]).items())


def test_recomputing_changes_no_bit_and_micro_batches_the_order_of_sums_alone(tokens, validation, tmp_path):
    changes = {"whole": {}, "recomputed": {"recompute": True}, "pieces": {"micro_tokens": 16}}
    for name, change in changes.items():
        train(MODEL, dataclasses.replace(TRAIN, **change), tokens, validation, tmp_path / name)
    step = Schedule(TRAIN).steps
    whole = weights(tmp_path / "whole", step)
    for name, tensor in weights(tmp_path / "recomputed", step).items():
        assert torch.equal(tensor, whole[name])
    errors = [(tensor - whole[n]).norm() / whole[n].norm() for n, tensor in weights(tmp_path / "pieces", step).items()]
    assert 0 < max(errors) < 1e-5


def test_a_damaged_state_starts_the_run_again(tokens, validation, tmp_path):
    whole = train(MODEL, TRAIN, tokens, validation, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "state.safetensors").write_bytes(b"not tensors")
    with pytest.warns(UserWarning, match="state.safetensors.*cannot be read.*begins again"):
        again = train(MODEL, TRAIN, tokens, validation, tmp_path / "cut")
    assert [row["validation_loss"] for row in again] == [row["validation_loss"] for row in whole]


def test_training_lowers_the_loss_on_text_with_structure(tmp_path):
    text = np.tile(np.arange(64, dtype=np.uint16), 80)
    rows = train(MODEL, TRAIN, text, measurement_batches(text, 16, "evaluation", 320), tmp_path)
    assert rows[-1]["validation_loss"] < 0.5 * math.log(64)
    assert rows[-1]["role"] == "final" and {row["role"] for row in rows[:-1]} == {"stable"}


def test_schedule_warms_up_stays_and_decays():
    schedule = Schedule(TrainConfig(tokens=1_000_000, batch_tokens=1000, warmup_share=0.05, decay_share=0.1))
    assert (schedule.warmup, schedule.stable_end, schedule.steps) == (50, 1000, 1100)
    factors = [schedule.factor(step) for step in range(1100)]
    assert factors[0] == pytest.approx(1 / 50) and factors[49] == 1.0
    assert set(factors[49:1000]) == {1.0}
    assert factors[1099] == pytest.approx(0.1) and all(a > b for a, b in itertools.pairwise(factors[999:]))


@pytest.mark.parametrize("steps", [6, 37, 366, 5000])
def test_checkpoints_end_with_five_evenly_spaced_stable_ones(steps):
    schedule = Schedule(TrainConfig(tokens=steps * 100, batch_tokens=100, checkpoints=16))
    kept = schedule.checkpoints()
    stable = [step for step in kept if step <= schedule.stable_end]
    assert kept[-1] == schedule.steps and stable[-1] == schedule.stable_end
    assert len(set(np.diff(stable[-5:]))) == 1
    assert min(kept) >= 1 and kept == sorted(set(kept))
    if steps >= 366:
        assert len(kept) == 17
        growth = np.diff(np.log(stable[2:-5]))  # the first few are rounded to whole steps
        assert np.allclose(growth, growth.mean(), atol=0.12)


def test_data_order_is_a_function_of_seed_and_step(tokens):
    batches, again = TrainingBatches(tokens, 16, 64, seed=1), TrainingBatches(tokens, 16, 64, seed=1)
    forward = [batches(step)[0] for step in range(200)]  # more than one pass
    assert all(torch.equal(again(step)[0], forward[step]) for step in reversed(range(200)))
    assert not torch.equal(TrainingBatches(tokens, 16, 64, seed=2)(0)[0], forward[0])
    inputs, targets = batches(5)
    assert torch.equal(inputs[:, 1:], targets[:, :-1]) and inputs.shape == (4, 16)
    first_pass = torch.cat([forward[step] for step in range(batches.windows // 4)])
    assert len(torch.unique(first_pass, dim=0)) == len(first_pass)  # no window twice within a pass


def test_calibration_and_evaluation_share_no_token(tokens):
    numbered = np.arange(5000, dtype=np.uint16)
    parts = [
        torch.cat([b["input_ids"] for b in measurement_batches(numbered, 16, part, 800)])
        for part in ("calibration", "evaluation")
    ]
    assert parts[0].max() < parts[1].min()
    assert all(part.shape == (50, 16) for part in parts)
    with pytest.raises(InputError, match="9,999 calibration tokens are asked for, but the validation text has"):
        measurement_batches(numbered, 16, "calibration", 9999)


def test_a_corpus_smaller_than_one_batch_is_refused(tmp_path):
    with pytest.raises(InputError, match="50 tokens, less than one batch of 64 and the token after it"):
        train(MODEL, TRAIN, np.zeros(50, dtype=np.uint16), [], tmp_path)


def test_a_batch_that_is_no_whole_number_of_windows_is_refused(tokens):
    with pytest.raises(InputError, match=r"train\.batch_tokens 40 is not a multiple of model.context 16"):
        TrainingBatches(tokens, 16, 40, seed=0)


@pytest.mark.parametrize("rate", [1e6, float("inf")])
def test_divergence_names_step_rate_and_shape(tokens, validation, tmp_path, rate):
    config = TrainConfig(tokens=16 * 4 * 30, batch_tokens=64, checkpoints=8, learning_rate=rate)
    with pytest.raises(Diverged, match=r"stopped at step \d+: the loss is .* learning rate .*16x2 relu, seed 0"):
        train(MODEL, config, tokens, validation, tmp_path)


@pytest.mark.parametrize("tokens_count", [1, CHUNK_TOKENS - 1, CHUNK_TOKENS + 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_linear_cross_entropy_equals_the_plain_one(tokens_count, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens_count, 6, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(11, 6, generator=generator).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    targets = torch.randint(0, 11, (tokens_count,), generator=generator)
    loss = linear_cross_entropy(hidden, weight, targets, 1.7)
    (3 * loss).backward()
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = torch.nn.functional.cross_entropy(1.7 * exact_hidden @ exact_weight.T, targets)
    (3 * exact).backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for got, wanted in ((loss, exact), (hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert torch.linalg.vector_norm(got.double() - wanted) <= tolerance * torch.linalg.vector_norm(wanted)


def test_validation_loss_equals_the_models_own(tokens):
    from sparsity_utils.models.decoder import build_model

    model = build_model(MODEL, 0)
    ids = torch.from_numpy(tokens[:64].astype(np.int64)).view(4, 16)
    with torch.no_grad():
        wanted = model(input_ids=ids, labels=ids).loss.item()
    assert validation_loss(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}]) == pytest.approx(wanted, rel=1e-5)
