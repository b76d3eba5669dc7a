"""Profiles: every number that decides what a study does, read from one YAML file and checked.

A profile is a file `notebooks/profiles/<name>.yaml` with one section per dataclass below. An unknown key,
a wrong type or an impossible value is an `InputError` that names the file and the key.
"""

import dataclasses
import itertools
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kernels.shapes import SHAPES
from sparsity_utils import paths
from sparsity_utils.console import InputError, check
from sparsity_utils.models.config import ACTIVATIONS, PARTS, ModelConfig, TrainConfig
from sparsity_utils.models.fetched import SOURCES
from sparsity_utils.study.digits_config import DigitsConfig
from sparsity_utils.study.experiments import EXPERIMENTS, ArmRun, Experiment, GradientFlowConfig, TrainedDecodingConfig
from sparsity_utils.study.opened_models import (
    CorrectionConfig,
    InputSpeedConfig,
    PretrainedConfig,
    TrainingFreeConfig,
)
from sparsity_utils.study.sections import as_mapping, check_known, parsed, placed, read_section, typed
from sparsity_utils.text.config import CorpusConfig

FEWEST_STEPS = 6  # that the settings of a training run have


@dataclass(frozen=True)
class MeasureConfig:
    """How activation sparsity is measured on a checkpoint."""

    p: float = 1.0  # CETT-PPL-p%: the accepted rise of perplexity, in percent
    protocol: str = "stabilised"  # or "per-checkpoint"
    calibration_tokens: int = 16384  # thresholds and target are solved on these
    evaluation_tokens: int = 49152  # and reported on these, disjoint from them
    domain_calibration_tokens: int | None = None  # of each kind of text (notebook 05); None: half of calibration_tokens

    def __post_init__(self) -> None:
        check(0 < self.p <= 100, f"measure.p is {self.p}; choose a rise of perplexity between 0 and 100 percent.")
        check(
            self.protocol in ("stabilised", "per-checkpoint"),
            f"measure.protocol is {self.protocol!r}; choose stabilised or per-checkpoint.",
        )
        check(
            self.calibration_tokens > 0 < self.evaluation_tokens,
            "measure.calibration_tokens and evaluation_tokens must be positive.",
        )
        domain = self.domain_calibration_tokens
        check(domain is None or domain > 0, f"measure.domain_calibration_tokens is {domain}; it must be positive.")


@dataclass(frozen=True)
class SpeedConfig:
    """How fast FFNs and decoding are measured: notebook 06."""

    shapes: tuple[str, ...] = tuple(SHAPES)  # of single FFNs, as kernels.shapes names them
    rounds: int = 15  # of each way of computing an FFN; medians are quoted
    megabytes: int | None = None  # of weights that calls alternate between; None: several times the largest cache
    compiled: bool = True  # also time torch.compile
    published_decoder: bool = True  # also decode with random weights of the published 0.1B shape
    new_tokens: int = 64

    def __post_init__(self) -> None:
        for shape in self.shapes:
            check(shape in SHAPES, f"speed.shapes has {shape!r}; choose from {', '.join(SHAPES)}.")
        check(len(self.shapes) > 0, "speed.shapes is empty; name at least one shape.")
        check(self.megabytes is None or self.megabytes >= 1, f"speed.megabytes is {self.megabytes}; 1 or more.")
        check(self.rounds >= 1, f"speed.rounds is {self.rounds}; at least 1 is needed.")
        check(self.new_tokens >= 2, f"speed.new_tokens is {self.new_tokens}; at least 2 are needed.")


@dataclass(frozen=True)
class ClusterConfig:
    """What a task on a Slurm cluster is given; a task does a few jobs of the study, one after the other."""

    partition: str | None = None  # None: the cluster's default one
    account: str | None = None
    minutes: int = 240  # time limit; a run that needs longer goes on where it was, as often as it takes
    gpus: int = 0
    cpus: int | None = None  # None: as many as a run has threads, for each of its devices
    memory_gb: float | None = None  # None: the cluster's default
    parallel: int = 64  # tasks at once, at most
    options: dict[str, Any] = field(default_factory=dict)  # further ones of sbatch, such as {qos: high}

    def __post_init__(self) -> None:
        for name, least in (("minutes", 1), ("gpus", 0), ("cpus", 1), ("memory_gb", 0.1), ("parallel", 1)):
            value = getattr(self, name)
            check(value is None or value >= least, f"cluster.{name} is {value}; at least {least} is needed.")


@dataclass(frozen=True)
class DeviceConfig:
    """The device that costs are told for: what its data sheet says, and which part of it training is assumed to use."""

    name: str
    teraflops: float  # 1e12 operations a second, dense, bfloat16
    memory_gb: float  # 1e9 bytes
    utilisation: float = 0.4  # of teraflops; an assumption

    def __post_init__(self) -> None:
        for name in ("teraflops", "memory_gb"):
            check(getattr(self, name) > 0, f"device.{name} is {getattr(self, name)}; it must be positive.")
        check(0 < self.utilisation <= 1, f"device.utilisation is {self.utilisation}; choose above 0, at most 1.")


@dataclass(frozen=True)
class Size:
    """One shape of a line, written as d_model x n_layers: how long it is trained, and with which seeds."""

    shape: str
    tokens: int
    seeds: tuple[int, ...]
    d_ff: int | None = None  # neurons of an FFN; None: model.ffn_ratio times d_model
    batch_tokens: int | None = None  # None: train.batch_tokens

    def __post_init__(self) -> None:
        self.d_model_and_layers()
        check(self.tokens > 0, f"Size {self.shape} has {self.tokens} tokens; it needs a positive number.")
        check(len(self.seeds) > 0, f"Size {self.shape} has no seeds; it needs at least one.")
        check(len(set(self.seeds)) == len(self.seeds), f"Size {self.shape} names a seed twice: {list(self.seeds)}.")
        check(self.d_ff is None or self.d_ff > 0, f"Size {self.shape} has d_ff {self.d_ff}; it must be positive.")

    def d_model_and_layers(self) -> tuple[int, int]:
        """`"48x4"` -> (48, 4)."""
        parts = self.shape.split("x")
        check(
            len(parts) == 2 and all(part.isdecimal() for part in parts),
            f"Size {self.shape!r} is not of the form 48x4 (d_model x n_layers).",
        )
        return int(parts[0]), int(parts[1])


@dataclass(frozen=True)
class StudyConfig:
    """The sizes, seeds and activation functions of the runs that answer the questions of the notebooks."""

    sizes: tuple[Size, ...]  # the main line, one width-depth ratio, rising size: notebooks 01, 02, 04 and 05
    activations: tuple[str, ...] = ("relu", "silu")
    second_sizes: tuple[Size, ...] = ()  # another width-depth ratio, rising size: notebooks 02 and 04
    equal_heads: bool = False  # whether model.head_size must divide every named width; if not, the nearest that does
    one_dimension: tuple[Size, ...] = ()  # ReLU; depth, width and d_ff changed one at a time from one centre
    data_limited: tuple[Size, ...] = ()  # larger models, fewer tokens per parameter than the main line: notebook 04
    other_sizes: tuple[Size, ...] = ()  # where other activation functions are tried: notebook 02
    other_activations: tuple[str, ...] = ()  # beside `activations`
    ratio_parameters: int = 45_000  # non-embedding parameters of the width-depth line: notebook 03
    ratios: tuple[float, ...] = ()  # d_model / n_layers
    ratio_tokens: int = 4_500_000
    ratio_seeds: tuple[int, ...] = (0, 1)
    tuning_sizes: tuple[Size, ...] = ()  # where training settings are tried; validation loss alone chooses
    tuning_rates: tuple[float, ...] = ()  # learning rates
    tuning_batches: tuple[int, ...] = ()  # batch sizes in tokens

    def __post_init__(self) -> None:
        check(len(self.sizes) > 0, "study.sizes is empty; name at least one shape.")
        check("relu" in self.activations, "study.activations lacks relu, which every question is about; add it.")
        for name in ("activations", "other_activations"):
            for activation in getattr(self, name):
                check(
                    activation in ACTIVATIONS,
                    f"study.{name} has {activation!r}; choose from {', '.join(ACTIVATIONS)}.",
                )
        both = set(self.activations) & set(self.other_activations)
        check(not both, f"study.other_activations repeats {', '.join(sorted(both))} of study.activations; drop it.")
        check(not self.ratios or len(self.ratio_seeds) > 0, "study.ratio_seeds needs at least one seed.")
        for parts in (("other_sizes", "other_activations"), ("tuning_sizes", "tuning_rates", "tuning_batches")):
            given = [name for name in parts if getattr(self, name)]
            missing = " and ".join(f"study.{name}" for name in parts if name not in given)
            check(not given or not missing, f"study.{given[0] if given else ''} needs {missing} beside it.")

    def named_sizes(self) -> tuple[Size, ...]:
        """Every size that is written out, of all lines."""
        return (
            *(*self.sizes, *self.second_sizes, *self.one_dimension),
            *(*self.data_limited, *self.other_sizes, *self.tuning_sizes),
        )


@dataclass(frozen=True)
class Profile:
    """Everything `make reproduce PROFILE=name` needs to know."""

    name: str
    about: str  # one sentence: for whom, and what it costs
    corpus: CorpusConfig
    study: StudyConfig
    model: dict[str, Any] = field(default_factory=dict)  # ModelConfig fields shared by all runs
    train: dict[str, Any] = field(default_factory=dict)  # TrainConfig fields shared by all runs
    measure: MeasureConfig = MeasureConfig()
    speed: SpeedConfig = SpeedConfig()
    pretrained: PretrainedConfig = field(default_factory=PretrainedConfig)
    training_free: TrainingFreeConfig = field(default_factory=TrainingFreeConfig)
    input_speeds: InputSpeedConfig = field(default_factory=InputSpeedConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    experiments: dict[str, Experiment] = field(default_factory=dict)  # by question: notebooks 11 and 12
    gradient_flow: GradientFlowConfig = field(default_factory=GradientFlowConfig)
    trained_decoding: TrainedDecodingConfig = field(default_factory=TrainedDecodingConfig)
    digits: DigitsConfig = field(default_factory=DigitsConfig)
    workers: int = 2  # runs side by side
    threads: int = 1  # torch threads of each
    cluster: ClusterConfig | None = None  # None: worker processes of this machine
    device: DeviceConfig | None = None  # None: costs are told in hours of CPU cores

    def __post_init__(self) -> None:
        _check_shared(self.model, ModelConfig, {"d_model", "n_layers", "activation", "vocabulary"}, "model.")
        _check_shared(self.train, TrainConfig, {"tokens", "seed"}, "train.")
        for name in ("workers", "threads"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; at least 1 is needed.")
        devices, gpus = self.train.get("devices", 1), self.cluster.gpus if self.cluster else 0
        check(not gpus or gpus >= devices, f"cluster.gpus is {gpus}, fewer than the {devices} of train.devices.")

    def model_config(self, d_model: int, n_layers: int, activation: str, d_ff: int | None = None) -> ModelConfig:
        """A shape of the study with the profile's shared settings; `d_ff` in place of the shared `ffn_ratio`."""
        shared = self.model if d_ff is None else {**self.model, "ffn_ratio": d_ff / d_model}
        return ModelConfig(d_model, n_layers, activation, vocabulary=self.corpus.vocabulary, **shared)

    def size_config(self, size: Size, activation: str) -> ModelConfig:
        """The model of a named size."""
        return self.model_config(*size.d_model_and_layers(), activation, size.d_ff)

    def train_config(self, tokens: int, seed: int, **changes: Any) -> TrainConfig:
        """A run's training settings: the profile's shared ones, then `changes`."""
        return TrainConfig(tokens=tokens, seed=seed, **{**self.train, **changes})

    def size_training(self, size: Size, seed: int, **changes: Any) -> TrainConfig:
        """The training settings of a named size: the shared ones, its own batch if it has one, then `changes`."""
        own = {} if size.batch_tokens is None else {"batch_tokens": size.batch_tokens}
        return self.train_config(size.tokens, seed, **{**own, **changes})

    def arm_runs(self, question: str) -> list[ArmRun]:
        """The runs of an experiment; none where the profile leaves it out."""
        experiment = self.experiments.get(question)
        if experiment is None:
            return []
        with placed(f"experiments.{question}"):
            return experiment.runs(self.model, self.train, self.corpus.vocabulary)

    def gradient_config(self, seed: int, **changes: Any) -> tuple[ModelConfig, TrainConfig]:
        """An untrained model whose gradients are compared, and the data of its first batch: no run is made of it."""
        own = self.gradient_flow
        shared = {**self.model, "head_size": own.head_size, "vocabulary": self.corpus.vocabulary}
        model = ModelConfig(own.d_model, own.n_layers, "relu2", **{**shared, **changes})
        return model, self.train_config(FEWEST_STEPS * own.batch_tokens, seed, batch_tokens=own.batch_tokens)

    def on(self, engine: str | None) -> "Profile":
        """The profile with its runs done by an engine, `local` or `slurm`; None: by the one that it names."""
        if engine == "slurm":
            return dataclasses.replace(self, cluster=self.cluster or ClusterConfig())
        return dataclasses.replace(self, cluster=None) if engine == "local" else self

    @property
    def side_by_side(self) -> int:
        """How many runs are done at once, at most."""
        return self.cluster.parallel if self.cluster else self.workers


def _check_beside(profile: Profile, runs: list[ArmRun]) -> None:
    """Raises InputError for sections that cannot be measured beside runs of q_sparse, before anything is trained."""
    wanted = profile.trained_decoding.prompt + profile.trained_decoding.new_tokens
    least = min(runs, key=lambda run: run.model.context)
    check(
        wanted <= least.model.context,
        f"trained_decoding.prompt and new_tokens are {wanted} tokens; the arm {least.arm} of experiments.q_sparse has "
        f"a context of {least.model.context}: lower them.",
    )
    with placed("gradient_flow"):
        for seed in profile.gradient_flow.seeds:
            model, training = profile.gradient_config(seed, keep=PARTS // 2)
            check(
                training.batch_tokens % model.context == 0,
                f"batch_tokens is {training.batch_tokens}, not a multiple of the context of {model.context}.",
            )


def _check_shared(content: dict[str, Any], cls: type, from_study: set[str], where: str) -> None:
    """Raises InputError for a shared setting that `cls` does not have, or that the study itself varies."""
    hints = {key: hint for key, hint in typing.get_type_hints(cls).items() if key not in from_study}
    check_known(content, hints, where)
    for key, value in content.items():
        typed(value, hints[key], where + key)


def profile_names() -> list[str]:
    """The names of the shipped profiles."""
    return sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))


def read_profile(name: str) -> Profile:
    """The profile `name`: a shipped one, or a path to a YAML file of one's own.

    Raises InputError for an unknown profile, an unknown or missing key, a wrong type or an impossible value.
    """
    path = paths.PROFILES / f"{name}.yaml" if not name.endswith((".yaml", ".yml")) else Path(name)
    if not path.is_file():
        raise InputError(
            f"There is no profile {name!r}; choose one of {', '.join(profile_names())}, or name a .yaml file."
        )
    try:
        content = parsed(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not text in UTF-8; save it as such.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path.name} is not valid YAML ({str(error).splitlines()[0]}); correct it.") from error
    with placed(f"Profile {path.name}"):
        content = as_mapping(content, "the profile")
        check("name" not in content, "the key name is not for the file: a profile is named by its file.")
        return _checked(read_section(Profile, {"name": path.stem, **content}), path.resolve().parent)


def _checked(profile: Profile, folder: Path) -> Profile:
    """The profile, after each of its model and training configurations was built once, which checks them.

    Relative paths start at `folder`, where the profile lies.
    """
    study = profile.study
    for size in study.named_sizes():
        model = profile.size_config(size, study.activations[0])
        check(
            not study.equal_heads or model.d_model % model.head_size == 0,
            f"Size {size.shape} has no heads of {model.head_size}, which do not divide {model.d_model}; choose a width "
            "that they divide, or drop study.equal_heads.",
        )
        for seed in size.seeds:
            profile.size_training(size, seed).check_windows(model.context)
    for seed in study.ratio_seeds if study.ratios else ():
        profile.train_config(study.ratio_tokens, seed)
    for size, rate, batch in itertools.product(study.tuning_sizes, study.tuning_rates, study.tuning_batches):
        profile.size_training(size, size.seeds[0], learning_rate=rate, batch_tokens=batch)
    for question in profile.experiments:
        check(question in EXPERIMENTS, f"experiments has {question!r}; known are {', '.join(EXPERIMENTS)}.")
        profile.arm_runs(question)
    if runs := profile.arm_runs("q_sparse"):
        _check_beside(profile, runs)
    corpus = profile.corpus
    if corpus.path and (corpus.source == "path" or (folder / corpus.path).is_dir()):
        corpus = dataclasses.replace(corpus, path=str(folder / Path(corpus.path).expanduser()))
    return dataclasses.replace(profile, corpus=corpus, **_opened(profile, folder))


def _opened(profile: Profile, folder: Path) -> dict[str, Any]:
    """The sections on models that are opened, each a folder beside the profile where there is one of that name."""

    def model(name: str) -> str:
        place = folder / Path(name).expanduser()
        return str(place) if place.is_dir() and name not in (*SOURCES, *ACTIVATIONS) else name

    pretrained, speeds = profile.pretrained, profile.input_speeds
    english = pretrained.english and str(folder / Path(pretrained.english).expanduser())
    check(
        not english or Path(english).exists(),
        f"pretrained.english is {pretrained.english!r}, which is not in {folder}; name a file or folder of documents.",
    )
    return {
        "pretrained": dataclasses.replace(pretrained, model=model(pretrained.model), english=english),
        "correction": dataclasses.replace(profile.correction, model=model(profile.correction.model)),
        "input_speeds": dataclasses.replace(speeds, models=tuple(map(model, speeds.models))),
    }
