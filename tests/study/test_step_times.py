"""Times of training steps and forward passes: rows in order, unusable input. No speed is asserted."""

import numpy as np
import pytest

from sparsity_utils.console import InputError
from sparsity_utils.models.config import ModelConfig
from sparsity_utils.study.makers import speeds as module
from sparsity_utils.study.makers.speeds import PASSES, step_times

SMALL = {"vocabulary": 300, "context": 32, "head_size": 4, "base_width": 16}
CONFIGS = [ModelConfig(16, 1, **SMALL), ModelConfig(8, 4, **SMALL)]


def test_a_table_of_two_small_shapes():
    table = step_times(CONFIGS, batch_tokens=64, rounds=5)
    assert table[["d_model", "n_layers", "width_depth_ratio"]].to_numpy().tolist() == [[16, 1, 16], [8, 4, 2]]
    assert table["parameters"].tolist() == [16 * 16 * 11.5, 4 * 8 * 8 * 11.5]
    assert table["flops_per_token"][0] == 6 * (16 * 16 * 11.5 + 16 * 300 + 16 * 32)
    for name in PASSES:
        low, median, high = (table[f"{name}_{part}"] for part in ("low", "us", "high"))
        assert (low > 0).all() and (low <= median).all() and (median <= high).all()
    assert (table["rounds"] == 5).all() and (table["threads"] >= 1).all()


def test_shapes_alternate_and_the_first_turn_is_not_counted(monkeypatch):
    """A clock that is told what it is given: call number n takes n microseconds per token of a batch of 64."""
    calls = []
    monkeypatch.setattr(module, "timed", lambda work, device: calls.append(work) or 64e-6 * len(calls))
    table = step_times(CONFIGS, batch_tokens=64, rounds=3)
    assert len(calls) == 4 * 2 * 2 and calls[:4] == calls[4:8] == calls[11:7:-1] and len(set(map(id, calls))) == 4
    assert table["training_us"].tolist() == pytest.approx([12, 10])  # calls 5, 12, 13 and 7, 10, 15
    assert table["forward_us"].tolist() == pytest.approx([11, 9])  # 6, 11, 14 and 8, 9, 16
    assert table[["training_low", "forward_high"]].isna().all(axis=None)  # three rounds have no 90% interval


def test_a_step_trains_and_a_forward_pass_does_not():
    works = module._works(CONFIGS[0], 64, rounds=2)
    model = works["training"].__self__.model
    before = model.lm_head.weight.detach().clone()
    assert works["forward"]() == pytest.approx(np.log(300), abs=1.5)  # about a guess, before training
    assert (model.lm_head.weight == before).all()
    works["training"]()
    assert (model.lm_head.weight != before).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: step_times([], 64, 5), "0 shapes and 5 rounds"),
        (lambda: step_times(CONFIGS, 64, 0), "2 shapes and 0 rounds"),
        (lambda: step_times(CONFIGS, 50, 1), "not a multiple of model.context"),
    ],
)
def test_unusable_input_is_an_input_error(call, message):
    with pytest.raises(InputError, match=message):
        call()
