"""The run store: one folder per training run, named by what decides its weights, never trained twice.

    build/runs/<key>/             a finished run
        manifest.json             configuration, versions, device, status, SHA-256 of every file of a checkpoint
        checkpoints/step-<step>/  config.json and model.safetensors, as transformers opens it; the last, tokenizer.json
        <measurement>-<key>.csv   what was measured on it
    build/runs/<key>/             likewise, of a run brought from an archive: manifest and measurements, and for a few
                                  runs config.json and model.safetensors of the last checkpoint
    build/runs/.<key>.working/    a run under way: it resumes from its last saved state
    build/runs/.<key>.lock        held by the process that trains it

The key is a hash of the configuration, the corpus, the tokenizer, the recipe version and the thread count.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import transformers

from sparsity_utils import paths
from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.models.decoder import default_device
from sparsity_utils.models.devices import trained_by
from sparsity_utils.models.pretrained import load_weights
from sparsity_utils.models.shapes import d_ff, head_count, non_embedding_parameters, training_flops_per_token
from sparsity_utils.models.training import Diverged, checkpoint_folder, clear, random_data, train
from sparsity_utils.study.tables import read_table
from sparsity_utils.text.corpus import Corpus
from sparsity_utils.text.windows import measurement_batches, random_batches

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # as transformers names the files of a checkpoint
OLD_NAMES = {"ratio": "activation_ratio"}  # of columns of measurements that runs of the second study keep
FORWARD = 0.3  # of the time of training on a token: that of its validation loss
# Settings that joined later: not hashed at their default, so that runs keep the keys that they had.
LATER = {
    "model": (ModelConfig, ("ffn", "keep", "block", "straight_through", "rescale", "quantised")),
    "train": (
        TrainConfig,
        ("devices", "micro_tokens", "recompute", "l1", "text", "targets", "distinct_tokens"),
    ),
}
RECIPE = 1  # raise it when the same configuration would train to other weights


@dataclass(frozen=True)
class RunConfig:
    """All that decides the weights of a run."""

    model: ModelConfig
    train: TrainConfig
    corpus: str  # hash of the tokens
    tokenizer: str  # hash of the tokenizer
    threads: int  # torch threads: they decide the order of sums
    recipe: int = RECIPE

    @property
    def key(self) -> str:
        """The name of the run's folder."""
        return digest(self.identity())

    def identity(self) -> dict:
        """All settings but those that joined later and are at their default, so that keys stay what they were."""
        content = dataclasses.asdict(self)
        for part, (settings, later) in LATER.items():
            for setting in dataclasses.fields(settings):
                if setting.name in later and content[part][setting.name] == setting.default:
                    del content[part][setting.name]
        return content

    @classmethod
    def from_identity(cls, content: dict) -> "RunConfig":
        """The settings that `identity` gave."""
        return cls(**content | {"model": ModelConfig(**content["model"]), "train": TrainConfig(**content["train"])})

    @property
    def title(self) -> str:
        """The run in a few words, for progress and messages."""
        return f"{self.model.d_model}x{self.model.n_layers} {self.model.activation} seed {self.train.seed}"

    @property
    def parameters(self) -> int:
        """Non-embedding parameters."""
        return non_embedding_parameters(self.model.d_model, self.model.n_layers, self.model.ffn_ratio, self.model.ffn)

    @property
    def tokens(self) -> float:
        """Training tokens, those of the decay included."""
        return self.train.tokens * (1 + self.train.decay_share)

    def token_cost(self) -> float:
        """Expected seconds on one CPU core to train on one token.

        Operations, attention heads, overhead. Within 16% of fourteen shapes measured from 16x2 (5.6 microseconds) to
        24x7 (25), 48x4 (24), 64x4 (36), 120x1 (27) and 32x14 (54); an AMD EPYC of 2024.
        """
        heads = head_count(self.model) * self.model.n_layers
        return 7.7e-6 * 1e-6 * training_flops_per_token(self.model) + 1.27e-6 * heads + 1.4e-6

    def cost(self) -> float:
        """Expected seconds on one CPU core of the run, its validation losses included."""
        return self.token_cost() * self.work()

    def work(self) -> float:
        """Its training tokens, and what the validation losses cost as such."""
        return self.tokens + FORWARD * self.train.checkpoints * self.train.validation_tokens


def digest(content: dict) -> str:
    """Sixteen hex digits of the SHA-256 of `content` as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    manifest: dict

    @property
    def diverged(self) -> str:
        """Why training stopped early, or an empty string."""
        return self.manifest["diverged"]

    @property
    def has_weights(self) -> bool:
        """Whether its checkpoints are here; a run brought from an archive has its tables, and at most the last one."""
        return (self.folder / "checkpoints").exists()

    @property
    def last_step(self) -> int:
        """The steps of the whole training; 0 for a diverged run, which has no checkpoint."""
        return max((row["step"] for row in self.manifest["checkpoints"]), default=0)

    @property
    def last_weights(self) -> Path:
        """The weights after the decay, which may not be there."""
        return Path(*self.checkpoint(self.last_step))

    def checkpoint(self, step: int) -> tuple[Path, str]:
        """The folder with config.json of the checkpoint after `step` steps, and the file of its weights in there."""
        flat = f"checkpoints/{step:06d}.safetensors"
        if (self.folder / flat).exists():  # trained before a checkpoint was a folder: one config.json for all
            return self.folder, flat
        brought = not self.has_weights and step == self.last_step
        return self.folder if brought else checkpoint_folder(self.folder, step), WEIGHTS

    @property
    def checkpoints(self) -> pd.DataFrame:
        """One row per checkpoint: what it is, its losses and the throughput until then."""
        model, training = ModelConfig(**self.manifest["config"]["model"]), self.manifest["config"]["train"]
        table = pd.DataFrame(self.manifest["checkpoints"])
        about = {
            "run": self.folder.name,
            "activation": model.activation,
            "d_model": model.d_model,
            "n_layers": model.n_layers,
            "d_ff": d_ff(model.d_model, model.ffn_ratio),
            "head_size": model.d_model // head_count(model),
            "parameters": non_embedding_parameters(model.d_model, model.n_layers, model.ffn_ratio, model.ffn),
            "width_depth_ratio": model.d_model / model.n_layers,
            "seed": training["seed"],
        }
        for place, (name, value) in enumerate(about.items()):
            table.insert(place, name, value)
        # Twice the warm-up: before that the learning rate, not the amount of data, moves the ratio.
        table["fit"] = (table["role"] == "stable") & (
            table["tokens"] >= 2 * training["warmup_share"] * training["tokens"]
        )
        return table

    def load(self, step: int, as_trained: bool = True) -> transformers.GraniteForCausalLM:
        """The model after `step` steps, in evaluation mode, on the GPU where there is one; see `load_weights`."""
        return load_weights(*self.checkpoint(step), as_trained=as_trained).to(default_device())

    def has_measured(self, name: str, settings: dict) -> bool:
        """Whether `measured` would only read."""
        return self._measurement_file(name, settings).exists()

    def _measurement_file(self, name: str, settings: dict) -> Path:
        return self.folder / f"{name}-{digest(settings)}.csv"

    def measured(self, name: str, settings: dict, measure: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table `measure()` gives, computed once per (name, settings) and kept with the run."""
        file = self._measurement_file(name, settings)
        if not file.exists():
            with paths.written_aside(file) as aside:
                measure().to_csv(aside, index=False)
        return read_table(file).rename(columns=OLD_NAMES)


def find_run(config: RunConfig) -> Run | None:
    """The finished run of `config`; None where there is none, or where files were altered (a warning says so)."""
    folder = paths.runs() / config.key
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        damaged = _damaged(Run(folder, manifest))
    except FileNotFoundError as error:
        if not folder.exists():
            return None
        damaged = [str(Path(error.filename).relative_to(folder))]
    except (json.JSONDecodeError, KeyError):
        damaged = ["manifest.json"]
    if damaged:
        warnings.warn(
            f"The stored run {config.title} ({folder.name}) is damaged: {damaged[0]} is not what was written; "
            f"it is trained again.",
            stacklevel=2,
        )
        return None
    return Run(folder, manifest)


def _damaged(run: Run) -> list[str]:
    """The files of a run that are not what was written; FileNotFoundError for a checkpoint that is gone."""
    written = run.manifest["files"]  # name -> SHA-256
    if run.has_weights:
        return [name for name, sha in written.items() if _sha256(run.folder / name) != sha]
    brought = [run.last_weights] if run.last_weights.exists() else []
    last = max((name for name in written if name.endswith(".safetensors")), default=None)  # names are in order of steps
    return [file.name for file in brought if _sha256(file) != written[last]]


def train_run(config: RunConfig, corpus: Corpus, on_progress: Callable[[float], None] = lambda share: None) -> Run:
    """The run of `config` with its weights, trained if the store lacks it; another process doing so is waited for.

    A run that was brought without its weights keeps what was measured on it, the losses of its training included:
    findings rest on that already. Trained on another kind of machine, its weights may differ from those that were
    measured.

    on_progress is called with the share of steps done. Raises InputError for a corpus that is too small.
    """
    with paths.locked(paths.runs() / config.key):
        run = find_run(config)
        return run if run and (run.has_weights or run.diverged) else _train(config, corpus, on_progress, run)


def working_folder(config: RunConfig) -> Path:
    """Where a run under way is kept."""
    return paths.runs() / f".{config.key}.working"


def validation_batches(config: RunConfig, corpus: Corpus) -> list:
    """The windows whose loss is told at every checkpoint: of text that training does not read.

    Targets that can only be learnt by heart are those of training.
    """
    return run_batches(config, corpus, config.train.validation_tokens)


def run_batches(config: RunConfig, corpus: Corpus, wanted: int) -> list:
    """About `wanted` tokens on which a run is evaluated, see `validation_batches`."""
    if config.train.targets != "next":
        data = random_data(config.model, config.train)
        drawn = data.held_out(corpus.tokens("train"), corpus.tokens("validation"))
        return random_batches(*drawn, config.model.context, wanted)
    return measurement_batches(corpus.tokens("validation"), config.model.context, "evaluation", wanted)


def _rows(config: RunConfig, corpus: Corpus, working: Path, on_progress: Callable[[float], None]) -> list[dict]:
    """Train in `working`, by this process or by one for each device."""
    if config.train.devices > 1:
        from sparsity_utils.study.torchrun import train_on_devices  # it imports this module

        return train_on_devices(config, corpus, working, on_progress)
    validation = validation_batches(config, corpus)
    return train(config.model, config.train, corpus.tokens("train"), validation, working, on_progress)


def _train(config: RunConfig, corpus: Corpus, on_progress: Callable[[float], None], brought: Run | None) -> Run:
    folder, working = paths.runs() / config.key, working_folder(config)
    try:
        diverged, rows = "", _rows(config, corpus, working, on_progress)
    except Diverged as error:
        diverged, rows = f"{config.title}: {error}", []
    if rows:  # so that the trained model opens with its tokenizer
        with paths.written_aside(checkpoint_folder(working, rows[-1]["step"]) / "tokenizer.json") as aside:
            shutil.copyfile(corpus.folder / "tokenizer.json", aside)
    kept = ("checkpoints/step-*/*", "checkpoints/*.safetensors", CONFIG)  # the latter of a run begun before
    stored = sorted(file for pattern in kept for file in working.glob(pattern))
    manifest = {
        "config": config.identity(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": commit(),
        "diverged": diverged,
        "checkpoints": brought.manifest["checkpoints"] if brought and rows else rows,
        "files": {str(file.relative_to(working)): _sha256(file) for file in stored},
    }
    if config.train.devices > 1 and rows:
        manifest["devices"] = trained_by(working)
    for table in brought.folder.glob("*.csv") if brought else ():
        shutil.copyfile(table, working / table.name)
    with paths.written_aside(working / "manifest.json") as aside:
        aside.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    os.replace(working, folder)
    clear(folder)  # last: a run killed before this line is not lost
    return Run(folder, manifest)


def commit() -> str:
    """The commit that runs, with a mark where files were changed since; `unknown` outside a git checkout."""
    command = ["git", "-C", str(paths.ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
