"""One training run: deterministic, resumable, with log-spaced checkpoints.

A run lives in one folder: checkpoints/step-<step>/, each of which transformers opens, and state.safetensors, which
holds weights, optimizer moments and the log so far. The state is written aside and renamed, so a run killed at any
instant continues from its last state and, on a CPU with the same thread count, ends in the same weights bit for bit.
Under torchrun the processes train it together (`devices`); their state is a folder, state-<step>/.
"""

import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import GraniteConfig, GraniteForCausalLM

from sparsity_utils import paths
from sparsity_utils.models.config import LAST_CHECKPOINTS, RANDOM_TARGETS, ModelConfig, TrainConfig
from sparsity_utils.models.decoder import build_model, default_device, parameter_groups
from sparsity_utils.models.devices import Group, load_sharded, save_sharded, shard, state_step, states, whole_tensors
from sparsity_utils.models.input_training import as_computed, prepare_to_train
from sparsity_utils.models.loss import linear_cross_entropy
from sparsity_utils.models.penalty import ActivationPenalty
from sparsity_utils.models.pretrained import load_weights
from sparsity_utils.models.quick import quicken
from sparsity_utils.models.shapes import training_flops_per_token
from sparsity_utils.text.random_data import RandomData
from sparsity_utils.text.windows import TrainingBatches

LOG_EVERY = 20  # steps
SAVE_EVERY = 30.0  # seconds
SAVE_SHARDED_EVERY = 300.0  # likewise, of a run on several devices: 2.4B parameters with their moments are 29 GB
EXPLODED = 2.0  # nats above the first loss
STATE = "state.safetensors"
LAUNCH = "torchrun"  # what the processes of a run on several devices are told, and what they say
FINAL_LR = 0.1  # share of the peak at the end of the decay


class Diverged(RuntimeError):
    """The loss became NaN or exploded; the message names step, learning rate and configuration."""


class Schedule:
    """The stages warm-up, stable and decay (WSD, arXiv 2404.06395) in steps, and when checkpoints are kept."""

    def __init__(self, config: TrainConfig):
        self.stable_end = round(config.tokens / config.batch_tokens)
        self.warmup = max(1, round(self.stable_end * config.warmup_share))
        self.steps = self.stable_end + max(1, round(self.stable_end * config.decay_share))
        self.wanted = config.checkpoints

    def factor(self, step: int) -> float:
        """Learning rate of 0-based `step` as a share of the peak.

        It rises as (step + 1) / warmup, stays at 1, and falls in a straight line to FINAL_LR at the last step.
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        if step < self.stable_end:
            return 1.0
        return 1.0 - (1.0 - FINAL_LR) * (step + 1 - self.stable_end) / (self.steps - self.stable_end)

    def checkpoints(self) -> list[int]:
        """The numbers of steps after which a checkpoint is kept.

        They are log-spaced from the end of the warm-up. Five more are evenly spaced over the last tenth of the stable
        stage, which the stabilised protocol solves together. The last is the end of the decay.
        """
        spacing = max(1, self.stable_end // 40)
        last_five = [self.stable_end - spacing * back for back in reversed(range(LAST_CHECKPOINTS))]
        early = self.wanted - LAST_CHECKPOINTS
        growth = (last_five[0] / self.warmup) ** (1 / early)
        spread = {round(self.warmup * growth**k) for k in range(early)}
        return sorted({s for s in spread if 0 < s < last_five[0]} | set(last_five) | {self.steps})


def train(
    model_config: ModelConfig,
    train_config: TrainConfig,
    tokens,
    validation: list,
    folder: Path,
    on_progress: Callable[[float], None] = lambda share: None,
) -> list[dict]:
    """Train in `folder`, continuing what is there; return the log, one row per checkpoint.

    tokens: the training tokens, one-dimensional. validation: batches of input_ids. on_progress is called with the
    share of steps done. Raises Diverged, and InputError when there is less text than one batch.
    """
    return Training(model_config, train_config, tokens, validation, folder, on_progress).finish()


class Training:
    """A run in progress, with the arguments of `train`. Nothing is written before `finish`."""

    def __init__(self, model_config, train_config, tokens, validation, folder, on_progress=lambda share: None):
        self.model_config, self.config, self.folder = model_config, train_config, folder
        self.validation, self.on_progress = validation, on_progress
        self.group = Group() if dist.is_initialized() else None  # None: this process trains alone
        self.device = default_device()
        self.half = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        data = random_data(model_config, train_config).training(tokens)
        self.batches = TrainingBatches(
            data[0], model_config.context, train_config.batch_tokens, train_config.seed, data[1]
        )
        self.schedule = Schedule(train_config)
        self.model = trainable(model_config, train_config.seed, self.device)
        if train_config.random:
            setattr(self.model.config, RANDOM_TARGETS, True)
        self.penalty = ActivationPenalty(self.model, train_config.l1) if train_config.l1 else None
        if train_config.recompute:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.objective = shard(self.model, self._loss, self.half) if self.group else self._loss
        groups = parameter_groups(self.model, model_config, train_config.learning_rate, train_config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(train_config.beta1, train_config.beta2), fused=True)
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        # On a CPU core compiling took 4 to 18 s and changed the speed little (24x2: 92,000 against 85,000 tokens/s,
        # 48x4: 31,000 against 32,000), less than it costs in runs of a minute, so it is left to GPUs.
        compiled = self.device.type == "cuda" and not self.group  # sharded layers are compiled one by one
        self.backbone = torch.compile(self.model.model) if compiled else self.model.model
        self.step, self.rows, self.losses = 0, [], []
        self.sizes: list[int] = []  # of the groups that have trained the run
        self.first_loss: float | None = None
        self.recent_loss: float | None = None
        self.seconds = 0.0  # of `clock`, spent in training steps, without checkpoints and validation

    def finish(self) -> list[dict]:
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._resume()
        keep, saved_at = set(self.schedule.checkpoints()), time.monotonic()
        while self.step < self.schedule.steps:
            started = self._clock()
            self.train_step()
            if self.step % LOG_EVERY == 0 or self.step in keep:
                self._check_losses()
                self.on_progress(self.step / self.schedule.steps)
            self.seconds += self._clock() - started
            if self.step in keep:
                self._keep_checkpoint()
            if self.step in keep or self._is_time(saved_at):
                self._check_losses()
                self._save_state()
                saved_at = time.monotonic()
        return self.rows

    def train_step(self) -> None:
        """One optimizer step on the next batch."""
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * self.schedule.factor(self.step)
        pieces, total = self._pieces(), torch.zeros((), device=self.device)
        for piece in pieces:
            inputs, targets = (part.to(self.device, non_blocking=True) for part in piece)
            loss = self.objective(inputs, targets) / len(pieces)
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(total)
        self.step += 1

    def _pieces(self) -> list[tuple[torch.Tensor, ...]]:
        """(inputs, targets) of the micro-batches of this step, as far as they are this process's."""
        batch: Iterable[torch.Tensor] = self.batches(self.step)
        if self.group:
            batch = [self.group.part(part) for part in batch]
        windows = (self.config.micro_tokens or self.config.batch_tokens) // self.model_config.context
        return list(zip(*(part.split(windows) for part in batch), strict=True))

    def _clock(self) -> float:
        """Seconds: of `clock`, or of the wall clock where processes wait for each other."""
        return time.perf_counter() if self.group else clock(self.device.type)

    def _is_time(self, saved_at: float) -> bool:
        """Whether the state was saved long enough ago; all processes of a group decide alike."""
        since = time.monotonic() - saved_at
        return self.group.told(since > SAVE_SHARDED_EVERY) if self.group else since > SAVE_EVERY

    def _loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        mixed = torch.autocast(self.device.type, torch.bfloat16) if self.half else nullcontext()
        with mixed:
            hidden = self.backbone(input_ids=inputs).last_hidden_state.flatten(0, 1)  # (tokens, d)
        hidden = hidden.to(torch.bfloat16) if self.half else hidden
        scale = 1.0 / self.model.config.logits_scaling
        loss = linear_cross_entropy(hidden, self.model.lm_head.weight, targets.flatten(), scale)
        return loss + self.penalty.taken() if self.penalty else loss

    def _check_losses(self) -> None:
        """Raise Diverged if a loss since the last check is NaN or too high. All are fetched in one synchronisation."""
        losses = [loss.item() for loss in self.losses]
        if self.group and losses:
            losses = self.group.mean(torch.tensor(losses, dtype=torch.float64, device=self.device)).tolist()
        self.first_loss = losses[0] if self.first_loss is None and losses else self.first_loss
        for back, loss in enumerate(losses):
            if not math.isfinite(loss) or loss > self.first_loss + EXPLODED:
                step = self.step - len(losses) + back + 1
                c, t = self.model_config, self.config
                raise Diverged(
                    f"Training stopped at step {step}: the loss is {loss:.3g} (it began at {self.first_loss:.3g}) with "
                    f"learning rate {t.learning_rate:g} x {self.schedule.factor(step - 1):.2g}, "
                    f"{c.d_model}x{c.n_layers} {c.activation}, seed {t.seed}; lower train.learning_rate."
                )
        self.recent_loss = losses[-1] if losses else self.recent_loss
        self.losses = []

    def _keep_checkpoint(self) -> None:
        validated = self._export(checkpoint_folder(self.folder, self.step))
        tokens_per_second = self.step * self.config.batch_tokens / self.seconds
        flops = training_flops_per_token(self.model_config) * tokens_per_second
        self.rows.append(
            {
                "step": self.step,
                "role": "final" if self.step > self.schedule.stable_end else "stable",
                "tokens": self.step * self.config.batch_tokens,
                "passes": self.batches.passes(self.step),
                "training_loss": self.recent_loss,
                "validation_loss": validated,
                "tokens_per_second": tokens_per_second,
                "flops_utilisation": flops / matmul_rate(self.device.type, self.half) / self.devices,
            }
        )

    @property
    def devices(self) -> int:
        """How many train the run now."""
        return self.group.size if self.group else 1

    def _export(self, target: Path) -> float:
        """Write the whole model to `target` and return its validation loss."""
        if self.group is None:
            with paths.written_aside(target) as aside:
                save_checkpoint(self.model, aside)
            return validation_loss(self.model, self.validation)
        tensors = whole_tensors(self.model, kept=self.group.leads)
        validated = None
        if self.group.leads:  # what it has written is measured, in float32 and by one process, as always
            with paths.written_aside(target) as aside:
                write_checkpoint(self.model.config, tensors, aside)
            validated = validation_loss(quicken(load_weights(target).to(self.device)), self.validation)
        return self.group.told(validated)

    def _save_state(self) -> None:
        log = {"step": self.step, "rows": self.rows, "seconds": self.seconds, "first_loss": self.first_loss}
        if self.group:
            log["devices"] = self.sizes = sorted({*self.sizes, self.group.size})
            return save_sharded(self.group, self.folder, self.model, self.optimizer, log)
        tensors = {f"model.{name}": tensor for name, tensor in model_tensors(self.model).items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors.update({f"{name}.{index}": tensor for name, tensor in moments.items()})
        with paths.written_aside(self.folder / STATE) as aside:
            save_file(tensors, aside, metadata={"log": json.dumps(log)})

    def _resume(self) -> None:
        if self.group:
            log = load_sharded(self.folder, self.model, self.optimizer)
            return self._go_on(log) if log else None
        state = self.folder / STATE
        if not state.exists():
            return
        try:
            with safe_open(state, framework="pt") as file:
                log = json.loads(file.metadata()["log"])
            tensors = load_file(state, device=str(self.device))
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError):
            warnings.warn(f"{state.name} of an unfinished run cannot be read; the run begins again.", stacklevel=2)
            return
        weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        self.model.load_state_dict(weights, strict=False)
        moments = self.optimizer.state_dict()
        count = sum(len(group["params"]) for group in moments["param_groups"])
        names = ("step", "exp_avg", "exp_avg_sq")
        moments["state"] = {i: {name: tensors[f"{name}.{i}"] for name in names} for i in range(count)}
        self.optimizer.load_state_dict(moments)
        self._go_on(log)

    def _go_on(self, log: dict) -> None:
        self.step, self.rows, self.seconds = log["step"], log["rows"], log["seconds"]
        self.first_loss, self.sizes = log["first_loss"], log.get("devices", [])


def trainable(config: ModelConfig, seed: int, device: torch.device) -> GraniteForCausalLM:
    """The fresh model of a run on `device`, in training mode, its maps reading what the configuration says."""
    return prepare_to_train(quicken(build_model(config, seed).to(device).train()))


def random_data(model: ModelConfig, training: TrainConfig) -> RandomData:
    """What a run reads and predicts."""
    return RandomData(training.text, training.targets, training.distinct_tokens, model.vocabulary, training.seed)


def saved_step(folder: Path) -> int:
    """The steps that an unfinished run in `folder` would not have to do again; 0 without a state that can be read."""
    if sharded := states(folder):
        return state_step(sharded[-1])
    try:
        with safe_open(folder / STATE, framework="pt") as file:
            return json.loads(file.metadata()["log"])["step"]
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError):
        return 0


def clear(folder: Path) -> None:
    """Delete what only an unfinished run needs, and what a killed process was writing aside."""
    for place in (*states(folder), folder / LAUNCH, *folder.glob("**/.*")):
        shutil.rmtree(place, ignore_errors=True)
    (folder / STATE).unlink(missing_ok=True)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return folder / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(model: GraniteForCausalLM, folder: Path) -> None:
    """Write config.json and model.safetensors, so that `folder` opens with transformers' from_pretrained."""
    write_checkpoint(model.config, model_tensors(model), folder)


def write_checkpoint(config: GraniteConfig, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """`save_checkpoint`, of weights at hand."""
    config.save_pretrained(folder)
    computed = as_computed(config, tensors)
    save_file(computed, folder / "model.safetensors", metadata={"format": "pt"})  # as transformers expects


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights to store. The output head is left out, since it is tied to the embedding."""
    return {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}


@torch.no_grad()
def validation_loss(model, batches: list) -> float:
    """Mean loss over batches of input_ids, in float32, nats per predicted token: the next one, or their targets."""
    device, scale = model.lm_head.weight.device, 1.0 / model.config.logits_scaling
    total = count = 0
    for batch in batches:
        ids = batch["input_ids"].to(device)  # (windows, context)
        targets = batch["targets"].to(device) if "targets" in batch else ids[:, 1:]
        hidden = model.model(input_ids=ids).last_hidden_state[:, : targets.shape[1]].flatten(0, 1)  # (tokens, d)
        targets = targets.flatten()
        total += linear_cross_entropy(hidden, model.lm_head.weight, targets, scale).item() * targets.numel()
        count += targets.numel()
    return total / count


def clock(device: str) -> float:
    """Seconds that training is charged: of the clock on a GPU, of the processor, per thread, on a CPU.

    A run on a CPU may be paused, or share its core with other work; neither makes its processor time longer.
    """
    return time.perf_counter() if device == "cuda" else time.process_time() / torch.get_num_threads()


@lru_cache
def matmul_rate(device: str, half: bool) -> float:
    """Floating-point operations per second of a large square product: 2 size^3 / seconds, the best of eight.

    Utilisation is measured against it.
    """
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if half else torch.float32)
    best = math.inf
    for _ in range(8):
        started = clock(device)
        (a @ a)[0, 0].item()
        best = min(best, clock(device) - started)
    return 2 * size**3 / best
