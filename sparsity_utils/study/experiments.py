"""Experiments: runs that differ in how they are trained, arm by arm. A profile writes them down, this reads them."""

import dataclasses
import itertools
import typing
from dataclasses import dataclass
from typing import Any

from sparsity_utils.console import check
from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.study.sections import as_mapping, typed

EXPERIMENTS = ("lazy_neuron", "q_sparse", "q_sparse_sizes", "equal_active")  # the questions that they answer
MODEL = {field.name for field in dataclasses.fields(ModelConfig)} - {"d_model", "n_layers", "vocabulary"}
TRAIN = {field.name for field in dataclasses.fields(TrainConfig)} - {"seed", "learning_rate"}
OWN = {"shape", "d_ff", "rates"}


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared. Every arm is trained with each of its learning rates and, with each, every seed.

    Which rate counts is decided by the validation loss alone, per arm, once all are trained.
    """

    common: dict[str, Any]  # settings of every arm: shape, d_ff, rates, and fields of ModelConfig and TrainConfig
    arms: dict[str, dict]  # by name: what an arm has in place of `common`
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        check(len(self.seeds) > 0 and len(set(self.seeds)) == len(self.seeds), "seeds need one or more, each once.")
        check(len(self.arms) > 0, "arms are empty; name at least one.")
        for name in self.arms:
            self.settings(name)

    def settings(self, arm: str) -> dict[str, Any]:
        """All settings of an arm, checked. Raises InputError for one that is unknown, missing or of a wrong type."""
        changes = as_mapping({} if self.arms[arm] is None else self.arms[arm], f"arms.{arm}")
        settings = {**self.common, **changes}
        for key in settings:
            check(key in MODEL | TRAIN | OWN, f"arms.{arm} has {key!r}; known are fields of model and train and {OWN}.")
        for key in ("shape", "tokens", "rates"):
            check(key in settings, f"arms.{arm} lacks {key}; give it there or in common.")
        hints = {**typing.get_type_hints(ModelConfig), **typing.get_type_hints(TrainConfig)}
        hints |= {"shape": str, "d_ff": int | None, "rates": tuple[float, ...]}
        settings = {key: typed(value, hints[key], f"arms.{arm}.{key}") for key, value in settings.items()}
        check(len(settings["rates"]) > 0, f"arms.{arm}.rates are empty; give at least one learning rate.")
        return settings

    def runs(self, shared_model: dict[str, Any], shared_train: dict[str, Any], vocabulary: int) -> list["ArmRun"]:
        """Its runs, arm by arm; `shared_model` and `shared_train` are the settings of all runs of the profile."""
        found = []
        for arm in self.arms:
            settings = self.settings(arm)
            d_model, n_layers = map(int, settings["shape"].split("x"))
            model = {**shared_model, **{key: settings[key] for key in settings if key in MODEL}}
            if settings.get("d_ff"):
                model["ffn_ratio"] = settings["d_ff"] / d_model
            train = {**shared_train, **{key: settings[key] for key in settings if key in TRAIN}}
            for rate, seed in itertools.product(settings["rates"], self.seeds):
                train_config = TrainConfig(**{**train, "seed": seed, "learning_rate": rate})
                found.append(ArmRun(arm, ModelConfig(d_model, n_layers, vocabulary=vocabulary, **model), train_config))
        same = {(run.model, run.train): run.arm for run in found}
        check(len(same) == len(found), "Two arms have the same settings; let them differ, or drop one.")
        return found


@dataclass(frozen=True)
class ArmRun:
    """A run of an arm."""

    arm: str
    model: ModelConfig
    train: TrainConfig
