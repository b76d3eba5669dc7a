"""What one CETT-PPL-1% measurement costs: seconds beside a plain forward pass and the literal algorithm, and memory.

All on one machine, in one process, alternating; medians over rounds. The literal algorithm takes minutes and runs once.
"""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from sparsity_utils import paths
from sparsity_utils.models.pretrained import load_weights
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.sparsity.literal import bisect_cett_ppl
from sparsity_utils.sparsity.metrics import measure_sparsity
from sparsity_utils.sparsity.passes import checked, mean_losses
from sparsity_utils.study.runs import RunConfig, train_run
from sparsity_utils.study.study import Study
from sparsity_utils.text.batches import measurement_batches

ROUNDS = 3
TOKENS, SUBSAMPLE = 32_768, 2_048
TRAINED_HERE = (((96, 4), 600_000), ((192, 6), 400_000))  # shape, tokens: minutes of training, kept in the run store
MEMORY_TOKENS = (8_192, 65_536, 524_288)


def search(study: Study) -> pd.DataFrame:
    """One row per model and way of measuring: seconds, plain forward passes, speed against literal, difference."""
    tables = []
    for name, model in _models(study):
        batches = measurement_batches(study.corpus.tokens("validation"), 256, "evaluation", TOKENS)
        subsample = measurement_batches(study.corpus.tokens("validation"), 256, "calibration", SUBSAMPLE)
        ways = {
            "forward": lambda model=model, batches=batches: _forward(model, batches),
            "all tokens": lambda model=model, batches=batches: measure_sparsity(model, batches),
            "subsample": lambda model=model, batches=batches, part=subsample: measure_sparsity(
                model, batches, calibration=part
            ),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        reports = {}
        for _ in range(ROUNDS):
            for way, work in ways.items():
                reports[way], taken = _timed(work)
                seconds[way].append(taken)
        reports["literal"], taken = _timed(lambda model=model, batches=batches: bisect_cett_ppl(model, batches))
        seconds["literal"] = [taken]
        tables.append(_rows(name, reports, {way: statistics.median(values) for way, values in seconds.items()}))
    return pd.concat(tables, ignore_index=True)


def _rows(name: str, reports: dict[str, Any], seconds: dict[str, float]) -> pd.DataFrame:
    exact = reports["literal"].activation_ratio
    return pd.DataFrame(
        {
            "model": name,
            "way": way,
            "tokens": TOKENS,
            "seconds": round(seconds[way], 2),
            "forward_passes": round(seconds[way] / seconds["forward"], 1),
            "times_literal": round(seconds["literal"] / seconds[way], 1),
            "activation_ratio": round(100 * reports[way].activation_ratio, 2),
            "points_from_literal": round(100 * (reports[way].activation_ratio - exact), 2),
            "standard_error": round(100 * getattr(reports[way], "standard_error", float("nan")), 2),
        }
        for way in ("all tokens", "subsample", "literal")
    )


def _models(study: Study) -> list[tuple[str, nn.Module]]:
    """The recorded models, and larger ones trained for this bench the first time it runs."""
    models = []
    for folder in sorted(path.parent for path in paths.RECORDED_MODELS.glob("*/model.safetensors")):
        model = load_weights(folder)
        models.append((f"{model.config.hidden_size}x{model.config.num_hidden_layers} {folder.name}", model))
    for shape, tokens in TRAINED_HERE:
        config = RunConfig(
            study.profile.model_config(*shape, "relu"),
            study.profile.train_config(tokens, 0),
            study.corpus.hash,
            study.corpus.tokenizer_hash,
            study.profile.threads,
        )
        run = train_run(config, study.corpus)
        models.append((f"{shape[0]}x{shape[1]} relu", run.load(run.checkpoints["step"].max())))
    return models


def _forward(model: nn.Module, batches: list) -> None:
    with evaluating(model):
        mean_losses(model, checked(model, batches, "evaluation"))


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def memory(study: Study) -> pd.DataFrame:
    """Peak memory of a process that measures the recorded ReLU model on more and more random tokens, streamed."""
    rows = []
    for tokens in MEMORY_TOKENS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own, so that peaks do not add up
            rows.append({"tokens": tokens, "peak_mb": round(pool.apply(_peak, (tokens,)))})
    return pd.DataFrame(rows)


def _peak(tokens: int) -> float:
    """Megabytes at most resident while measuring `tokens` random tokens, calibrated on as many others."""
    torch.set_num_threads(1)
    model = load_weights(paths.RECORDED_MODELS / "relu")

    def stream(seed: int):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(tokens // 8192):
            yield {"input_ids": torch.randint(model.config.vocab_size, (32, 256), generator=generator)}

    measure_sparsity(model, stream(0), calibration=stream(1), p=1.0)
    return _peak_memory()


def _peak_memory() -> float:
    """Megabytes this process held at most. Linux starts ru_maxrss at the parent's, hence its own file there."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
