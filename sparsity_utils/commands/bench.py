"""`make bench`: speeds of sparse FFNs and linear maps, of decoding, of training (beside transformers.Trainer, and
several runs at once), and what a measurement of sparsity costs.

Each comparison alternates its sides in one process and quotes medians over rounds with their range. Training is also
compared with the measured rate of a large matrix product. Before a speed of training is printed, both sides must reach
the same loss; before one of a sparse FFN, its output must agree with the same rule run densely.
"""

import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from torch import nn

from kernels.linear_bench import linear_speeds
from kernels.timing import alternate, timed
from sparsity_utils import paths
from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.models.decoder import build_model, default_device, parameter_groups
from sparsity_utils.models.pretrained import load_weights
from sparsity_utils.models.shapes import training_flops_per_token
from sparsity_utils.models.training import Schedule, clock, matmul_rate, train, validation_loss
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.sparsity.literal import bisect_cett_ppl
from sparsity_utils.sparsity.metrics import measure_sparsity
from sparsity_utils.sparsity.passes import checked, mean_losses
from sparsity_utils.study.runs import train_run
from sparsity_utils.study.study import Study
from sparsity_utils.text.corpus import open_corpus
from sparsity_utils.text.windows import TrainingBatches, measurement_batches

SPEED_COLUMNS = {
    "sparse_ffn": [
        *("shape", "dtype", "tokens", "pattern", "sparsity", "way", "milliseconds", "gb_per_s", "read_gb_per_s"),
        *("ideal_speedup", "speedup", "strict_speedup"),
    ],
    "sparse_decoding": [
        *("model", "activation", "shape", "sequences", "way", "same_tokens", "sparsity", "tokens_per_second"),
        *("speedup", "ffn_time", "attention_time", "head_time", "megabytes"),
    ],
}  # what is printed of the wide tables
LINEAR_COLUMNS = [
    *("maps", "d", "outputs", "weights", "sparsity", "milliseconds", "dense_milliseconds", "all_rows_milliseconds"),
    *("ideal_speedup", "strict_speedup", "of_ideal"),
]
ROUNDS = 3  # of what takes minutes
LOOP_ROUNDS, LOOP_STEPS = 5, 30  # of the two training loops: optimizer steps of one round, before the decay
WIDE = ((512, 10), 65536)  # shape and batch: products large enough to fill a GPU; minutes per step on a CPU core
LOSS_TOLERANCE = 0.02  # nats: float32 sums in another order drift apart by less in LOOP_STEPS steps
PACKED_STEPS = 120  # optimizer steps of runs side by side: long enough that all run at once for most of them
TOKENS, SUBSAMPLE = 32_768, 2_048  # that a search evaluates on, and that it may calibrate on instead
TRAINED_HERE = (((96, 4), 600_000), ((192, 6), 400_000))  # shape, tokens: minutes of training, kept in the run store
MEMORY_TOKENS = (8_192, 65_536, 524_288)


def main() -> int:
    """Measure with the settings of the laptop profile, print the tables and keep them under build/bench."""
    study = Study.from_profile("laptop")
    about = (
        f"{date.today()}, torch {torch.__version__}, transformers {transformers.__version__}, {os.cpu_count()} cores"
    )
    for name, shown in SPEED_COLUMNS.items():  # on all cores
        _keep(name, study.made(name), about, shown)
    speed, device = study.profile.speed, default_device().type
    linear = linear_speeds(rounds=speed.rounds, megabytes=speed.megabytes, device=device)
    _keep("sparse_linear", linear, about, LINEAR_COLUMNS)
    torch.set_num_threads(study.profile.threads)
    for name, measured in (("training", training), ("packing", packing), ("search", search), ("memory", memory)):
        _keep(name, measured(study), about)
    return 0


def _keep(name: str, table: pd.DataFrame, about: str, shown: list[str] | None = None) -> None:
    """Write a table as CSV and print it, or its columns `shown`."""
    with paths.written_aside(paths.build() / "bench" / f"{name}.csv") as aside:
        table.assign(machine=about).to_csv(aside, index=False)
    printed = table if shown is None else table[shown]
    print(
        f"\n{name}, {torch.get_num_threads()} thread(s), {about}\n{printed.round(3).to_string(index=False)}", flush=True
    )


def _throughput(speeds: np.ndarray) -> dict[str, int]:
    """Columns of tokens per second over rounds."""
    return {
        "tokens_per_second": round(np.median(speeds)),
        "lowest": round(speeds.min()),
        "highest": round(speeds.max()),
    }


# Training: this project's loop and that of transformers


def training(study: Study) -> pd.DataFrame:
    """Tokens per second of this project's loop and of transformers.Trainer: same model, batches, optimizer, threads.

    Raises SystemExit when the two end at different losses.
    """
    sizes, batch = study.profile.study.sizes, study.profile.train["batch_tokens"]
    shapes = [(sizes[place].d_model_and_layers(), batch) for place in (0, -1)]
    shapes += [WIDE] if torch.cuda.is_available() else []
    return pd.concat([_training(study, *shape, batch) for shape, batch in shapes])


def _training(study: Study, d_model: int, n_layers: int, batch: int) -> pd.DataFrame:
    config = study.profile.model_config(d_model, n_layers, "relu")
    settings = study.profile.train_config(LOOP_STEPS * batch, 0, warmup_share=0.0, checkpoints=6, batch_tokens=batch)
    losses: dict[str, float] = {}

    def speed(name: str, loop: Callable[..., tuple[float, float]]) -> float:
        tokens_per_second, losses[name] = loop(config, settings, study)
        if max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE:
            raise SystemExit(f"No speed is reported: after {LOOP_STEPS} steps the losses differ, {losses}.")
        return tokens_per_second

    loops = {"here": _our_loop, "transformers.Trainer": _their_loop}
    speeds = alternate({name: partial(speed, name, loop) for name, loop in loops.items()}, LOOP_ROUNDS)
    ratio = np.median(speeds["here"] / speeds["transformers.Trainer"])
    peak = matmul_rate(default_device().type, torch.cuda.is_available())
    return pd.DataFrame(
        {
            "shape": f"{d_model}x{n_layers}",
            "loop": name,
            **_throughput(values),
            "flops_utilisation": round(np.median(values) * training_flops_per_token(config) / peak, 3),
            "ratio_here_to_trainer": round(ratio, 2),
        }
        for name, values in speeds.items()
    )


def _our_loop(config: ModelConfig, settings: TrainConfig, study: Study) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        rows = train(config, settings, study.corpus.tokens("train"), _validation(study), Path(folder))
    return rows[-1]["tokens_per_second"], rows[-1]["validation_loss"]


def _their_loop(config: ModelConfig, settings: TrainConfig, study: Study) -> tuple[float, float]:
    batches = TrainingBatches(study.corpus.tokens("train"), config.context, settings.batch_tokens, settings.seed)
    schedule, model = Schedule(settings), build_model(config, settings.seed)
    windows = [pair for step in range(schedule.steps) for pair in zip(*batches(step), strict=True)]
    groups = parameter_groups(model, config, settings.learning_rate, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), fused=True)
    steps = _StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=schedule.steps,
            per_device_train_batch_size=batches.batch_windows,
            train_sampling_strategy="sequential",
            max_grad_norm=settings.clip_norm,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
        # shift_labels: every token of a window is predicted, the last one's successor included, as in our loop
        data = [{"input_ids": ids, "labels": ids, "shift_labels": targets} for ids, targets in windows]
        transformers.Trainer(
            model, arguments, train_dataset=data, optimizers=(optimizer, rate), callbacks=[steps]
        ).train()
    seconds = steps.times[-1] - steps.times[0]
    speed = (schedule.steps - 1) * settings.batch_tokens / seconds
    return speed, validation_loss(model.eval(), _validation(study))


class _StepTimes(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.times.append(clock(args.device.type))


def _validation(study: Study) -> list:
    return measurement_batches(study.corpus.tokens("validation"), study.profile.model["context"], "evaluation", 8192)


# Packing: small runs side by side. On a GPU a small model leaves most of the device idle while its next kernel is
# launched; on a CPU every run has its own core.


def packing(study: Study) -> pd.DataFrame:
    """Tokens per second at the smallest and the largest size: one run alone, then `profile.workers` at once.

    Columns: shape, runs, tokens_per_second (sum over the runs), lowest, highest, gain (over one run alone).
    """
    sizes, rows = study.profile.study.sizes, []
    settings = study.profile.train_config(
        PACKED_STEPS * study.profile.train["batch_tokens"], 0, warmup_share=0.0, checkpoints=6
    )
    with multiprocessing.get_context("spawn").Manager() as manager:
        for size in (sizes[0], sizes[-1]):
            run = (study.profile.threads, study.corpus.folder, study.profile.size_config(size, "relu"), settings)
            ways = {
                runs: partial(_side_by_side, runs, manager.Barrier(runs), *run) for runs in (1, study.profile.workers)
            }
            speeds = alternate(ways, ROUNDS)
            for runs, found in speeds.items():
                gain = np.median(found) / np.median(speeds[1])
                rows.append({"shape": size.shape, "runs": runs, **_throughput(found), "gain": gain})
    return pd.DataFrame(rows)


def _side_by_side(runs: int, together: threading.Barrier, *run: Any) -> float:
    """Sum of the training throughputs of `runs` equal runs that begin together, tokens per second."""
    with ProcessPoolExecutor(runs, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_one_of_them, together, *run) for _ in range(runs)]
        return sum(job.result() for job in jobs)


def _one_of_them(
    together: threading.Barrier, threads: int, corpus: Path, model: ModelConfig, settings: TrainConfig
) -> float:
    torch.set_num_threads(threads)
    text = open_corpus(corpus)
    validation = measurement_batches(text.tokens("validation"), model.context, "evaluation", model.context)
    together.wait()
    started = time.perf_counter()  # runs that wait for one another must show it
    with tempfile.TemporaryDirectory() as folder:
        tokens = train(model, settings, text.tokens("train"), validation, Path(folder))[-1]["tokens"]
    return tokens / (time.perf_counter() - started)


# What one CETT-PPL-1% measurement costs beside a plain forward pass and the literal algorithm, which takes minutes and
# runs once


def search(study: Study) -> pd.DataFrame:
    """One row per model and way of measuring: seconds, and speed and result compared with the literal algorithm."""
    text = study.corpus.tokens("validation")
    batches = measurement_batches(text, 256, "evaluation", TOKENS)
    subsample = measurement_batches(text, 256, "calibration", SUBSAMPLE)
    return pd.concat([_search(*named, batches, subsample) for named in _models(study)], ignore_index=True)


def _search(name: str, model: nn.Module, batches: list, subsample: list) -> pd.DataFrame:
    reports: dict[str, Any] = {}

    def seconds(way: str, measure: Callable[..., Any], **options: Any) -> float:
        return timed(lambda: reports.update({way: measure(model, batches, **options)}))

    ways = {
        "forward": partial(seconds, "forward", _forward),
        "all tokens": partial(seconds, "all tokens", measure_sparsity),
        "subsample": partial(seconds, "subsample", measure_sparsity, calibration=subsample),
    }
    medians = {way: np.median(values) for way, values in alternate(ways, ROUNDS).items()}
    medians["literal"] = seconds("literal", bisect_cett_ppl)
    exact = reports["literal"].activation_ratio
    return pd.DataFrame(
        {
            "model": name,
            "way": way,
            "tokens": TOKENS,
            "seconds": round(medians[way], 2),
            "forward_passes": round(medians[way] / medians["forward"], 1),
            "times_literal": round(medians["literal"] / medians[way], 1),
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
        settings = (study.profile.model_config(*shape, "relu"), study.profile.train_config(tokens, 0))
        (config,) = study.configs_of([settings])
        run = train_run(config, study.corpus)
        models.append((f"{shape[0]}x{shape[1]} relu", run.load(run.checkpoints["step"].max())))
    return models


def _forward(model: nn.Module, batches: list) -> None:
    with evaluating(model):
        mean_losses(model, checked(model, batches, "evaluation"))


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


if __name__ == "__main__":
    sys.exit(main())
