"""Time per token of training and of a forward pass, shape by shape.

Shapes of equal parameters take nearly equal FLOPs and quite unequal time, because many thin layers are many small
products one after the other. All shapes alternate in one process, on random tokens: the time does not depend on them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kernels.timing import alternate, median_interval, timed
from sparsity_utils.console import InputError
from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.models.decoder import default_device, non_embedding_parameters, training_flops_per_token
from sparsity_utils.models.training import Training, validation_loss

PASSES = ("training", "forward")


def step_times(configs: Sequence[ModelConfig], batch_tokens: int, rounds: int) -> pd.DataFrame:
    """Time of one optimizer step and of one forward pass with its loss, per token and shape.

    Columns: d_model, n_layers, parameters, width_depth_ratio, flops_per_token (of training), training_us, training_low,
    training_high, forward_us, forward_low, forward_high (microseconds per token: median over rounds and its 90%
    interval, NaN below five rounds), rounds, threads (torch's, as they are). A step is that of the study's own runs,
    batch included. Raises InputError without shapes or rounds, or for a batch that is not whole windows.
    """
    if not configs or rounds < 1:
        raise InputError(f"{len(configs)} shapes and {rounds} rounds are too few to time; give at least one of each.")
    device = default_device().type
    works = {
        (place, name): partial(timed, work, device)
        for place, config in enumerate(configs)
        for name, work in _works(config, batch_tokens, rounds).items()
    }
    times = {key: 1e6 * seconds / batch_tokens for key, seconds in alternate(works, rounds, warm_up=True).items()}
    return pd.DataFrame(
        [_row(config, {name: times[place, name] for name in PASSES}) for place, config in enumerate(configs)]
    )


def _works(config: ModelConfig, batch_tokens: int, rounds: int) -> dict[str, Callable[[], object]]:
    """What is timed of one shape; every optimizer step lies in the stable stage."""
    tokens = np.random.default_rng(0).integers(config.vocabulary, size=batch_tokens + 1)
    settings = TrainConfig(tokens=max(6, rounds + 1) * batch_tokens, batch_tokens=batch_tokens)
    training = Training(config, settings, tokens, validation=[], folder=Path())
    batch = {"input_ids": torch.from_numpy(tokens[:-1]).view(-1, config.context)}  # (windows, context)
    return {"training": training.train_step, "forward": lambda: validation_loss(training.model, [batch])}


def _row(config: ModelConfig, times: dict[str, np.ndarray]) -> dict[str, float]:
    """times: of each pass, microseconds per token, (rounds,)."""
    row = {
        "d_model": config.d_model,
        "n_layers": config.n_layers,
        "parameters": non_embedding_parameters(config.d_model, config.n_layers, config.ffn_ratio),
        "width_depth_ratio": config.d_model / config.n_layers,
        "flops_per_token": training_flops_per_token(config),
    }
    for name in PASSES:
        low, median, high = median_interval(times[name])
        row |= {f"{name}_us": median, f"{name}_low": low, f"{name}_high": high}
    return row | {"rounds": len(times[PASSES[0]]), "threads": torch.get_num_threads()}
