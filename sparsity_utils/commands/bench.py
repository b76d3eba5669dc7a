"""`make bench`: sparse FFNs and decoding, training beside transformers.Trainer and side by side, and the price of a
measurement.

Each comparison alternates the two sides in one process and quotes medians over rounds with their range, beside the
measured rate of a large matrix product. Before a speed of training is printed, both sides must reach the same loss;
before one of a sparse FFN, its output must agree with the same rule run densely.
"""

import os
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

import pandas as pd
import torch
import transformers

from sparsity_utils import paths
from sparsity_utils.commands.bench_packing import packing
from sparsity_utils.commands.bench_search import memory, search
from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.models.decoder import build_model, parameter_groups, training_flops_per_token
from sparsity_utils.models.training import Schedule, clock, matmul_rate, train, validation_loss
from sparsity_utils.study.profiles import Profile
from sparsity_utils.study.study import Study
from sparsity_utils.text.batches import TrainingBatches, measurement_batches

ROUNDS = 5
STEPS = 30  # optimizer steps of one round, before the decay
WIDE = ((512, 10), 65536)  # shape and batch: products large enough to fill a GPU; minutes per step on a CPU core
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
LOSS_TOLERANCE = 0.02  # nats: float32 sums in another order drift apart by less in STEPS steps


def main() -> int:
    """Measure with the settings of the laptop profile, print the tables and keep them under build/bench."""
    study = Study.from_profile("laptop")
    about = (
        f"{date.today()}, torch {torch.__version__}, transformers {transformers.__version__}, {os.cpu_count()} cores"
    )
    for name, shown in SPEED_COLUMNS.items():  # on all cores
        _keep(name, study.speeds(name), about, shown)
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


def training(study: Study) -> pd.DataFrame:
    """Tokens per second of this project's loop and of transformers.Trainer: same model, batches, optimizer, threads."""
    sizes, batch = study.profile.study.sizes, study.profile.train["batch_tokens"]
    shapes = [(sizes[place].d_model_and_layers(), batch) for place in (0, -1)]
    shapes += [WIDE] if torch.cuda.is_available() else []
    return pd.concat([_training(study, *shape, batch) for shape, batch in shapes])


def _training(study: Study, d_model: int, n_layers: int, batch: int) -> pd.DataFrame:
    config = study.profile.model_config(d_model, n_layers, "relu")
    settings = study.profile.train_config(STEPS * batch, 0, warmup_share=0.0, checkpoints=6, batch_tokens=batch)
    sides = {"here": _our_loop, "transformers.Trainer": _their_loop}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        losses = {}
        for name, loop in sides.items():
            speed, losses[name] = loop(config, settings, study)
            speeds[name].append(speed)
        if abs(losses["here"] - losses["transformers.Trainer"]) > LOSS_TOLERANCE:
            raise SystemExit(f"No speed is reported: after {STEPS} steps the losses differ, {losses}.")
    ratios = [ours / theirs for ours, theirs in zip(*speeds.values(), strict=True)]
    peak = matmul_rate("cuda" if torch.cuda.is_available() else "cpu", torch.cuda.is_available())
    return pd.DataFrame(
        {
            "shape": f"{d_model}x{n_layers}",
            "loop": name,
            "tokens_per_second": round(statistics.median(values)),
            "lowest": round(min(values)),
            "highest": round(max(values)),
            "flops_utilisation": round(statistics.median(values) * training_flops_per_token(config) / peak, 3),
            "ratio_here_to_trainer": round(statistics.median(ratios), 2),
        }
        for name, values in speeds.items()
    )


def _our_loop(config: ModelConfig, settings: TrainConfig, study: Study) -> tuple[float, float]:
    validation = _validation(study.profile, study)
    with tempfile.TemporaryDirectory() as folder:
        rows = train(config, settings, study.corpus.tokens("train"), validation, Path(folder))
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
    return speed, validation_loss(model.eval(), _validation(study.profile, study))


class _StepTimes(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.times.append(clock(args.device.type))


def _validation(profile: Profile, study: Study) -> list:
    return measurement_batches(study.corpus.tokens("validation"), profile.model["context"], "evaluation", 8192)


if __name__ == "__main__":
    sys.exit(main())
