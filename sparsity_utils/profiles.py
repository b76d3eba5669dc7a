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
from sparsity_utils.errors import InputError

ACTIVATIONS = {"relu": "ReLU", "silu": "SiLU", "gelu": "GELU", "relu2": "ReLU²"}  # as configured -> as written
LAST_CHECKPOINTS = 5  # stable ones solved together by the stabilised protocol (arXiv 2411.02335, appendix E)
SOURCES = ("python-source", "path", "hub")
WHOLE = 1e-6  # how far rounding may take d_model x (d_ff / d_model) from the whole number d_ff


def _check(condition: bool, sentence: str) -> None:
    if not condition:
        raise InputError(sentence)


@dataclass(frozen=True)
class CorpusConfig:
    """Text source and tokenizer."""

    source: str = "python-source"
    path: str | None = None  # source "path": a file or folder; source "hub": the data set's name
    revision: str | None = None  # source "hub": a pinned revision (commit hash)
    text_field: str = "text"  # key of the text in .jsonl, .parquet and hub rows
    max_megabytes: float = 48.0  # 1e6 bytes of text kept, after duplicates are removed
    vocabulary: int = 1024  # byte-level BPE entries, the end-of-text token included
    validation_share: float = 0.02  # share of the kept text

    def __post_init__(self) -> None:
        _check(self.source in SOURCES, f"corpus.source is {self.source!r}; choose one of {', '.join(SOURCES)}.")
        if self.source != "python-source":
            _check(bool(self.path), f"corpus.path is empty; source {self.source!r} needs one.")
        if self.source == "hub":
            _check(bool(self.revision), "corpus.revision is empty; a hub data set needs a pinned revision.")
        _check(257 <= self.vocabulary <= 65536, f"corpus.vocabulary is {self.vocabulary}; choose 257 to 65536.")
        _check(self.max_megabytes > 0, f"corpus.max_megabytes is {self.max_megabytes}; it must be positive.")
        _check(
            0 < self.validation_share <= 0.5, f"corpus.validation_share is {self.validation_share}; choose 0 to 0.5."
        )


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a muP decoder (arXiv 2411.02335, section 4 and appendix; muP as in MiniCPM)."""

    d_model: int
    n_layers: int
    activation: str = "relu"
    vocabulary: int = 1024
    context: int = 256  # tokens
    head_size: int = 12  # wanted head size; the nearest even divisor of d_model is taken
    base_width: int = 64  # d_base: the width at which muP's multipliers are one
    ffn_ratio: float = 2.5  # d_ff / d_model

    def __post_init__(self) -> None:
        _check(
            self.activation in ACTIVATIONS,
            f"model.activation is {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}.",
        )
        for name in ("d_model", "n_layers", "vocabulary", "context", "head_size", "base_width"):
            _check(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive.")
        _check(
            self.d_model % 2 == 0,
            f"model.d_model is {self.d_model}; it must be even, so that heads of an even size divide it.",
        )
        _check(self.head_size % 2 == 0, f"model.head_size is {self.head_size}; rotary attention needs an even one.")
        _check(self.ffn_ratio > 0, f"model.ffn_ratio is {self.ffn_ratio}; it must be positive.")
        neurons = self.d_model * self.ffn_ratio
        _check(
            round(neurons) > 0 and abs(neurons - round(neurons)) < WHOLE,
            f"model.ffn_ratio {self.ffn_ratio:g} gives {neurons:g} neurons at d_model {self.d_model}; d_ff must be a "
            "whole number.",
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run: AdamW under a warm-up, stable, decay schedule."""

    tokens: int  # tokens of the warm-up and stable stages; the decay comes on top
    batch_tokens: int = 8192
    learning_rate: float = 0.01  # peak, before muP's per-group scale
    warmup_share: float = 0.05  # of `tokens`
    decay_share: float = 0.1  # of `tokens`, added after the stable stage
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    checkpoints: int = 16  # log-spaced over the stable stage, the last five evenly spaced
    validation_tokens: int = 49152  # the validation loss at each checkpoint is their mean
    seed: int = 0

    def __post_init__(self) -> None:
        _check(
            self.tokens >= 6 * self.batch_tokens > 0,
            f"train.tokens is {self.tokens}, less than six batches of {self.batch_tokens}.",
        )
        _check(self.learning_rate > 0, f"train.learning_rate is {self.learning_rate}; it must be positive.")
        _check(0 <= self.warmup_share < 0.5, f"train.warmup_share is {self.warmup_share}; choose 0 to 0.5.")
        _check(0 < self.decay_share <= 1, f"train.decay_share is {self.decay_share}; choose above 0, at most 1.")
        _check(self.weight_decay >= 0, f"train.weight_decay is {self.weight_decay}; it may not be negative.")
        _check(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "train.beta1 and beta2 must be at least 0 and below 1.")
        _check(self.clip_norm > 0, f"train.clip_norm is {self.clip_norm}; it must be positive.")
        _check(self.seed >= 0, f"a seed is {self.seed}; seeds are 0, 1, 2 and so on.")
        _check(
            self.checkpoints >= 6,
            f"train.checkpoints is {self.checkpoints}; at least 6 are needed (the last five are solved together).",
        )


@dataclass(frozen=True)
class MeasureConfig:
    """How activation sparsity is measured on a checkpoint."""

    p: float = 1.0  # CETT-PPL-p%: the accepted rise of perplexity, in percent
    protocol: str = "stabilised"  # or "per-checkpoint"
    calibration_tokens: int = 16384  # thresholds and target are solved on these
    evaluation_tokens: int = 49152  # and reported on these, disjoint from them
    domain_calibration_tokens: int | None = None  # of each kind of text (notebook 05); None: half of calibration_tokens

    def __post_init__(self) -> None:
        _check(0 < self.p <= 100, f"measure.p is {self.p}; choose a rise of perplexity between 0 and 100 percent.")
        _check(
            self.protocol in ("stabilised", "per-checkpoint"),
            f"measure.protocol is {self.protocol!r}; choose stabilised or per-checkpoint.",
        )
        _check(
            self.calibration_tokens > 0 < self.evaluation_tokens,
            "measure.calibration_tokens and evaluation_tokens must be positive.",
        )
        domain = self.domain_calibration_tokens
        _check(domain is None or domain > 0, f"measure.domain_calibration_tokens is {domain}; it must be positive.")


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
            _check(shape in SHAPES, f"speed.shapes has {shape!r}; choose from {', '.join(SHAPES)}.")
        _check(len(self.shapes) > 0, "speed.shapes is empty; name at least one shape.")
        _check(self.megabytes is None or self.megabytes >= 1, f"speed.megabytes is {self.megabytes}; 1 or more.")
        _check(self.rounds >= 1, f"speed.rounds is {self.rounds}; at least 1 is needed.")
        _check(self.new_tokens >= 2, f"speed.new_tokens is {self.new_tokens}; at least 2 are needed.")


@dataclass(frozen=True)
class Size:
    """One shape of a line, written as d_model x n_layers: how long it is trained, and with which seeds."""

    shape: str
    tokens: int
    seeds: tuple[int, ...]
    d_ff: int | None = None  # neurons of an FFN; None: model.ffn_ratio times d_model

    def __post_init__(self) -> None:
        self.d_model_and_layers()
        _check(self.tokens > 0, f"Size {self.shape} has {self.tokens} tokens; it needs a positive number.")
        _check(len(self.seeds) > 0, f"Size {self.shape} has no seeds; it needs at least one.")
        _check(len(set(self.seeds)) == len(self.seeds), f"Size {self.shape} names a seed twice: {list(self.seeds)}.")
        _check(self.d_ff is None or self.d_ff > 0, f"Size {self.shape} has d_ff {self.d_ff}; it must be positive.")

    def d_model_and_layers(self) -> tuple[int, int]:
        """`"48x4"` -> (48, 4)."""
        parts = self.shape.split("x")
        _check(
            len(parts) == 2 and all(part.isdigit() for part in parts),
            f"Size {self.shape!r} is not of the form 48x4 (d_model x n_layers).",
        )
        return int(parts[0]), int(parts[1])


@dataclass(frozen=True)
class StudyConfig:
    """Which runs answer the questions of the notebooks."""

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
        _check(len(self.sizes) > 0, "study.sizes is empty; name at least one shape.")
        _check("relu" in self.activations, "study.activations lacks relu, which every question is about; add it.")
        for name in ("activations", "other_activations"):
            for activation in getattr(self, name):
                _check(
                    activation in ACTIVATIONS,
                    f"study.{name} has {activation!r}; choose from {', '.join(ACTIVATIONS)}.",
                )
        both = set(self.activations) & set(self.other_activations)
        _check(not both, f"study.other_activations repeats {', '.join(sorted(both))} of study.activations; drop it.")
        _check(not self.ratios or len(self.ratio_seeds) > 0, "study.ratio_seeds needs at least one seed.")
        for parts in (("other_sizes", "other_activations"), ("tuning_sizes", "tuning_rates", "tuning_batches")):
            given = [name for name in parts if getattr(self, name)]
            missing = " and ".join(f"study.{name}" for name in parts if name not in given)
            _check(not given or not missing, f"study.{given[0] if given else ''} needs {missing} beside it.")

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
    workers: int = 2  # runs side by side
    threads: int = 1  # torch threads of each

    def __post_init__(self) -> None:
        for name in ("workers", "threads"):
            _check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; at least 1 is needed.")

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


def profile_names() -> list[str]:
    """The shipped profiles."""
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
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path.name} is not valid YAML ({str(error).splitlines()[0]}); correct it.") from error
    try:
        content = _as_mapping(content, "the profile")
        _check("name" not in content, "the key name is not for the file: a profile is named by its file.")
        return _checked(_read(Profile, {"name": path.stem, **content}, ""), path.resolve().parent)
    except InputError as error:
        raise InputError(f"Profile {path.name}: {error}") from error


def _checked(profile: Profile, folder: Path) -> Profile:
    """`profile`, every model and training configuration built once; a relative corpus.path starts at its `folder`."""
    study = profile.study
    for size in study.named_sizes():
        model = profile.size_config(size, study.activations[0])
        _check(
            not study.equal_heads or model.d_model % model.head_size == 0,
            f"Size {size.shape} has no heads of {model.head_size}, which do not divide {model.d_model}; choose a width "
            "that they divide, or drop study.equal_heads.",
        )
        for seed in size.seeds:
            profile.train_config(size.tokens, seed)
    for seed in study.ratio_seeds if study.ratios else ():
        profile.train_config(study.ratio_tokens, seed)
    for size, rate, batch in itertools.product(study.tuning_sizes, study.tuning_rates, study.tuning_batches):
        profile.train_config(size.tokens, size.seeds[0], learning_rate=rate, batch_tokens=batch)
    corpus = profile.corpus
    if corpus.path and (corpus.source == "path" or (folder / corpus.path).is_dir()):
        corpus = dataclasses.replace(corpus, path=str(folder / Path(corpus.path).expanduser()))
    return dataclasses.replace(profile, corpus=corpus)


def _as_mapping(content: Any, where: str) -> dict:
    _check(isinstance(content, dict), f"{where} should hold 'key: value' lines, not {content!r}.")
    return content


def _read(cls: type, content: dict, where: str) -> Any:
    """`content` as the dataclass `cls`, keys and types checked; `where` is the dotted place for messages."""
    hints = typing.get_type_hints(cls)
    for key in content:
        _check(key in hints, f"unknown key {where}{key}; known are {', '.join(hints)}.")
    for each in dataclasses.fields(cls):
        required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        _check(not required or each.name in content, f"the key {where}{each.name} is missing.")
    values = {key: _value(value, hints[key], where + key) for key, value in content.items()}
    if cls is Profile:
        _check_shared(
            values.get("model", {}), ModelConfig, {"d_model", "n_layers", "activation", "vocabulary"}, "model"
        )
        _check_shared(values.get("train", {}), TrainConfig, {"tokens", "seed"}, "train")
    return cls(**values)


def _check_shared(content: dict, cls: type, from_study: set[str], where: str) -> None:
    """Shared settings are those of `cls` but for the ones the study itself varies."""
    hints = {key: hint for key, hint in typing.get_type_hints(cls).items() if key not in from_study}
    for key, value in content.items():
        _check(key in hints, f"unknown key {where}.{key}; known are {', '.join(hints)}.")
        _value(value, hints[key], f"{where}.{key}")


def _value(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`: a dataclass, tuple, dict, int, float, str or None."""
    if dataclasses.is_dataclass(hint):
        return _read(hint, _as_mapping(value, where), where + ".")
    if typing.get_origin(hint) is tuple:
        _check(isinstance(value, list), f"{where} is {value!r}; it should be a list.")
        return tuple(_value(item, typing.get_args(hint)[0], f"{where}[{i}]") for i, item in enumerate(value))
    if typing.get_origin(hint) is dict:
        return _as_mapping(value, where)
    allowed = tuple(t for t in (typing.get_args(hint) or (hint,)))
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    good = isinstance(value, allowed) and not (isinstance(value, bool) and bool not in allowed)
    _check(good, f"{where} is {value!r}; it should be of type {' or '.join(t.__name__ for t in allowed)}.")
    return value
