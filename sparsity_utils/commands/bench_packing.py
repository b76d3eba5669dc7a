"""What running several small runs side by side gains: tokens per second of all of them against one run alone.

On a GPU a small model leaves most of the device idle while its next kernel is launched; on a CPU every run has its
own core.
"""

import multiprocessing
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd
import torch

from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.models.training import train
from sparsity_utils.study.study import Study
from sparsity_utils.text.batches import measurement_batches
from sparsity_utils.text.corpus import open_corpus

ROUNDS = 3
STEPS = 120  # optimizer steps of each run: long enough that all run at once for most of them


def packing(study: Study) -> pd.DataFrame:
    """Tokens per second at the smallest and the largest size: one run alone, then `profile.workers` at once.

    Rounds of both alternate; medians over rounds. Columns: shape, runs, tokens_per_second (sum over the runs), lowest,
    highest, gain (over one run alone).
    """
    sizes, rows = study.profile.study.sizes, []
    for size in (sizes[0], sizes[-1]):
        model = study.profile.size_config(size, "relu")
        steps = STEPS * study.profile.train["batch_tokens"]
        settings = study.profile.train_config(steps, 0, warmup_share=0.0, checkpoints=6)
        speeds: dict[int, list[float]] = {1: [], study.profile.workers: []}
        for _ in range(ROUNDS):
            for runs, found in speeds.items():
                found.append(_side_by_side(runs, study, model, settings))
        alone = statistics.median(speeds[1])
        for runs, found in speeds.items():
            middle = statistics.median(found)
            about = {"shape": size.shape, "runs": runs, "tokens_per_second": round(middle)}
            rows.append({**about, "lowest": round(min(found)), "highest": round(max(found)), "gain": middle / alone})
    return pd.DataFrame(rows)


def _side_by_side(runs: int, study: Study, model: ModelConfig, settings: TrainConfig) -> float:
    """Sum of the training throughputs of `runs` equal runs that begin together, tokens per second."""
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(runs)
    with ProcessPoolExecutor(runs, context, _prepare, (together, study.profile.threads)) as pool:
        jobs = [pool.submit(_throughput, study.corpus.folder, model, settings) for _ in range(runs)]
        return sum(job.result() for job in jobs)


_together: threading.Barrier  # of a worker process


def _prepare(together: threading.Barrier, threads: int) -> None:
    global _together
    _together = together
    torch.set_num_threads(threads)


def _throughput(corpus: Path, model: ModelConfig, settings: TrainConfig) -> float:
    text = open_corpus(corpus)
    validation = measurement_batches(text.tokens("validation"), model.context, "evaluation", model.context)
    _together.wait()
    started = time.perf_counter()  # runs that wait for one another must show it
    with tempfile.TemporaryDirectory() as folder:
        tokens = train(model, settings, text.tokens("train"), validation, Path(folder))[-1]["tokens"]
    return tokens / (time.perf_counter() - started)
