"""Experiments: runs that differ in how they are trained, arm by arm. A profile writes them down, this reads them."""

import dataclasses
import itertools
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsity_utils.console import check
from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.study.sections import as_mapping, placed, typed

EXPERIMENTS = ("lazy_neuron", "q_sparse", "q_sparse_sizes", "equal_active")  # the questions that they answer
MODEL = {field.name for field in dataclasses.fields(ModelConfig)} - {"d_model", "n_layers", "vocabulary"}
TRAIN = {field.name for field in dataclasses.fields(TrainConfig)} - {"seed", "learning_rate"}
OWN: dict[str, Any] = {"shape": str, "d_ff": int | None, "rates": tuple[float, ...]}


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared. Every arm is trained with each of its learning rates and, with each, every seed.

    Which rate counts is decided by the validation loss alone, per arm, once all are trained.
    """

    common: dict[str, Any]  # settings of every arm: shape, d_ff, rates, and fields of ModelConfig and TrainConfig
    arms: dict[str, dict]  # by name: what an arm has in place of `common`
    seeds: tuple[int, ...]

    def settings(self, arm: str) -> dict[str, Any]:
        """All settings of an arm, checked. Raises InputError for one that is unknown, missing or of a wrong type."""
        changes = as_mapping({} if self.arms[arm] is None else self.arms[arm], "its value")
        settings = {**self.common, **changes}
        hints = {**typing.get_type_hints(ModelConfig), **typing.get_type_hints(TrainConfig), **OWN}
        known = MODEL | TRAIN | set(OWN)
        for key in settings:
            check(key in known, f"unknown key {key}; known are {', '.join(sorted(known))}.")
        for key in ("shape", "tokens", "rates"):
            check(key in settings, f"{key} is missing; give it there or in common.")
        settings = {key: typed(value, hints[key], key) for key, value in settings.items()}
        shape, neurons, rates = settings["shape"], settings.get("d_ff"), settings["rates"]
        check(
            re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape) is not None,
            f"shape is {shape!r}, not of the form 48x4 (d_model x n_layers).",
        )
        check(neurons is None or neurons > 0, f"d_ff is {neurons}; it must be positive.")
        check(len(rates) > 0, "rates are empty; give at least one learning rate.")
        check(len(set(rates)) == len(rates), f"rates are {list(rates)}; name each learning rate once.")
        return settings

    def runs(self, shared_model: dict[str, Any], shared_train: dict[str, Any], vocabulary: int) -> list["ArmRun"]:
        """Its runs, arm by arm; `shared_model` and `shared_train` are the settings of all runs of the profile.

        Raises InputError for settings that no run can have, and for two arms that are the same.
        """
        check(len(self.seeds) > 0 and len(set(self.seeds)) == len(self.seeds), "seeds need one or more, each once.")
        check(len(self.arms) > 0, "arms are empty; name at least one.")
        found: dict[tuple[ModelConfig, TrainConfig], str] = {}
        for arm in self.arms:
            with placed(f"arms.{arm}"):
                for settings in self._arm(arm, shared_model, shared_train, vocabulary):
                    check(settings not in found, f"it is trained as {found.get(settings)} is; drop one of them.")
                    found[settings] = arm
        return [ArmRun(arm, *settings) for settings, arm in found.items()]

    def _arm(
        self, arm: str, shared_model: dict[str, Any], shared_train: dict[str, Any], vocabulary: int
    ) -> Iterator[tuple[ModelConfig, TrainConfig]]:
        settings = self.settings(arm)
        d_model, n_layers = map(int, settings["shape"].split("x"))
        own = {key: settings[key] for key in settings if key in MODEL}
        if neurons := settings.get("d_ff"):
            own["ffn_ratio"] = neurons / d_model
        model = ModelConfig(d_model, n_layers, vocabulary=vocabulary, **{**shared_model, **own})
        train = {**shared_train, **{key: settings[key] for key in settings if key in TRAIN}}
        for rate, seed in itertools.product(settings["rates"], self.seeds):
            training = TrainConfig(**{**train, "seed": seed, "learning_rate": rate})
            training.check_windows(model.context)
            yield model, training


@dataclass(frozen=True)
class ArmRun:
    """A run of an arm."""

    arm: str
    model: ModelConfig
    train: TrainConfig
