"""How tables come about that are not measured on a study's runs one by one, and what a study gives for it.

Each module that measures such tables ends with its MAKERS. `study.MAKERS` holds them all by question.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsity_utils.study.makers.pieces import Frames
from sparsity_utils.study.plan import Settings
from sparsity_utils.study.profiles import Profile
from sparsity_utils.study.runs import Run, RunConfig
from sparsity_utils.text.corpus import Corpus


class Asked(Protocol):
    """The study for which tables are made."""

    profile: Profile

    @property
    def corpus(self) -> Corpus:
        """The text of the profile."""

    @property
    def output(self) -> Path:
        """The folder of the profile, which keeps the pieces of long measurements."""

    def configs(self, question: str) -> list[RunConfig]:
        """The runs that a question needs."""

    def configs_of(self, settings: list[Settings]) -> list[RunConfig]:
        """Runs on the study's text with the given settings."""

    def trained_runs(self, configs: Iterable[RunConfig]) -> list[Run]:
        """Runs with their weights after the decay, trained where the study lacks those; a diverged one has none."""

    def trained_model(self, activation: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The study's own model of an activation function, and its tokenizer."""


@dataclass(frozen=True)
class Maker:
    """Tables that are made together."""

    questions: tuple[str, ...]  # that they answer, one table each
    make: Callable[[Asked], Frames]  # the tables by question
    missing: Callable[[Profile], str]  # why a profile leaves them out, a sentence; empty where it does not
    of_machine: bool = False  # they hold speeds: a file is kept as it is until somebody deletes it
