"""A study: which runs a question needs, which exist, do the rest side by side, return one table.

`Study.from_profile("laptop").table("relu_vs_silu")` trains what is missing; `Study.recorded()` reads the stored tables.
"""

import os
import platform
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparsity_utils import paths
from sparsity_utils.console import InputError, check
from sparsity_utils.models.pretrained import open_checkpoint
from sparsity_utils.models.shapes import head_count
from sparsity_utils.study.engines import do_jobs
from sparsity_utils.study.jobs import Job, longest_first
from sparsity_utils.study.makers import (
    correction,
    digits,
    gradient_flow,
    input_speeds,
    pretrained,
    speeds,
    trained_decoding,
    training_free,
)
from sparsity_utils.study.makers.pieces import Frames
from sparsity_utils.study.measurements import measurement
from sparsity_utils.study.plan import PUBLISHED_TABLES, QUESTIONS, SPEEDS, Settings, planned
from sparsity_utils.study.profiles import Profile, read_profile
from sparsity_utils.study.runs import Run, RunConfig, find_run
from sparsity_utils.study.tables import Tables, known, write_table
from sparsity_utils.text.corpus import Corpus, build_corpus
from sparsity_utils.text.packed_text import unpack_text

MAKERS = {
    question: maker
    for module in (
        *(speeds, pretrained, training_free, input_speeds, correction),
        *(digits, gradient_flow, trained_decoding),
    )
    for maker in module.MAKERS
    for question in maker.questions
}
IN_MEMORY = 2  # times its bytes that a text takes while it is built


class Study(Tables):
    """The tables of one study, trained on demand or read from a folder."""

    def __init__(self, name: str, folder: Path, profile: Profile | None = None, text: Path | None = None):
        super().__init__(name, folder)
        self.profile, self.text = profile, text
        self._corpus: Corpus | None = None
        self._made: Frames = {}

    @classmethod
    def from_profile(cls, name: str, text: Path | None = None) -> "Study":
        """A study that trains and measures what its profile asks for and the run store lacks.

        text: a file made by `packed_text.pack_text`, in place of the source that the profile names.
        Runs are trained in worker processes, so a script that calls `table` needs the usual
        `if __name__ == "__main__":`. Raises InputError for a profile that cannot be used, its shapes included.
        """
        profile = read_profile(name)
        for question in QUESTIONS:
            for model, _ in planned(profile, question):
                head_count(model)
        return cls(profile.name, paths.profile_output(profile.name) / "results", profile, text)

    @classmethod
    def open(cls, source: str, profile: str, section: str = "pretrained", **settings: Any) -> "Study":
        """What a notebook opens: `source` "recorded" reads the stored tables, "run" follows `profile`.

        settings: in place of those of a section of the profile; an empty text leaves one as it is.
        """
        if source not in ("recorded", "run"):
            raise InputError(
                f"source is {source!r}; choose recorded (the stored tables) or run (train what is missing)."
            )
        if source == "recorded":
            return cls.recorded()
        study, given = cls.from_profile(profile), {name: value for name, value in settings.items() if value != ""}
        study.profile = replace(study.profile, **{section: replace(getattr(study.profile, section), **given)})
        return study

    @property
    def output(self) -> Path:
        """The folder of the profile: its tables, figures and verdicts, and the pieces of long measurements."""
        return self.folder.parent

    @property
    def corpus(self) -> Corpus:
        """The text of the profile, built when first asked for."""
        if self._corpus is None:
            config = self.profile.corpus
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            check(
                IN_MEMORY * config.max_megabytes * 1e6 < memory,
                f"Profile {self.name} asks for {config.max_megabytes:,.0f} MB of text, which is held in memory while "
                f"it is built, about {IN_MEMORY} times; this machine has {memory / 1e6:,.0f} MB: lower "
                "corpus.max_megabytes.",
            )
            self._corpus = unpack_text(config, self.text) if self.text else build_corpus(config)
        return self._corpus

    def answers(self, question: str) -> bool:
        """Whether this study has, or would make, the table of a question: profiles may leave some out."""
        if self.profile is None or question in PUBLISHED_TABLES:
            return super().answers(question)
        if (maker := MAKERS.get(known(question))) is not None:
            return not maker.missing(self.profile)
        return bool(planned(self.profile, question))

    def lacking(self, question: str) -> str:
        maker = MAKERS.get(question) if self.profile is not None else None
        return maker.missing(self.profile) if maker else super().lacking(question)

    def table(self, question: str) -> pd.DataFrame:
        """The table of a question, measured where the run store lacks it.

        Speeds are measured on this machine, once: delete the file to measure them again. While another process makes
        tables that are not of runs one by one, this one waits; then it uses what that one kept. Raises InputError as
        `Tables.table` does, and for a profile that leaves the question out.
        """
        file, maker = self.file(question), MAKERS.get(question)
        if self.profile is not None and question not in PUBLISHED_TABLES:
            # Runs have locks of their own, so that two studies share them.
            with paths.locked(self.file(maker.questions[0])) if maker else nullcontext():
                if not (maker and maker.of_machine and file.exists()):
                    write_table(self.made(question), file)
        return super().table(question)

    def made(self, question: str) -> pd.DataFrame:
        """The table of a question, measured now and not written. What a maker made is asked for once; speeds, anew."""
        maker = MAKERS.get(question)
        if maker is None:
            return self._measured(question)
        if question not in self._made or maker.of_machine:
            check(not (why := maker.missing(self.profile)), why)
            self._made |= maker.make(self)
        return self._made[question]

    def largest_config(self, activation: str) -> RunConfig:
        """The run that stands for an activation function: the largest size and, of its seeds, the first.

        A diverged run does not stand for anything: the next one does.

        Raises InputError when the study has no run of that activation.
        """
        configs = [config for config in self.configs("relu_vs_silu") if config.model.activation == activation]
        if not configs:
            raise InputError(f"Profile {self.name} has no {activation} run; name one of its study.activations.")
        configs.sort(key=lambda config: config.parameters, reverse=True)  # stable: seeds in their order
        runs = {config: find_run(config) for config in configs}
        return next((config for config, run in runs.items() if run is None or not run.diverged), configs[0])

    def trained_model(self, activation: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The study's own model of an activation function, of `largest_config` after the decay, and its tokenizer.

        A recorded study has it in results/models; a profile's own trains what is missing. Raises InputError when the
        study has no run of that activation.
        """
        if self.profile is None:
            return open_checkpoint(paths.RECORDED_MODELS / activation)
        (run,) = self.trained_runs([self.largest_config(activation)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=self.corpus.tokenizer())
        return run.load(run.last_step), tokenizer

    def trained_runs(self, configs: Iterable[RunConfig]) -> list[Run]:
        """Runs with their weights after the decay, trained in worker processes where the store lacks those.

        A diverged run has none.
        """
        about, configs = (self.corpus.folder, self.profile.measure, ()), list(configs)
        do_jobs(longest_first(Job(config, *about, weights=True) for config in configs), self.profile)
        return list(map(find_run, configs))

    def environment(self) -> str:
        """One line: what computes here, and where the numbers come from."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
        versions = (
            f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
        )
        origin = "the recorded study" if self.profile is None else f"profile {self.name}: {self.profile.about}"
        return f"{versions}, {device}. Numbers from {origin}."

    def keep_figure(self, name: str, figure) -> None:
        """Store a notebook's figure beside the tables; those of the recorded study are drawn by `make figures`."""
        if self.profile is not None:
            figure.save(self.output / "figures" / name)

    def keep_verdicts(self, notebook: str, verdicts: pd.DataFrame) -> None:
        """Store a notebook's verdicts and their reasons for what `make reproduce` tells; a recorded study does not."""
        if self.profile is not None:
            reasons = verdicts.attrs.get("reasons", "")
            with paths.written_aside(self.output / "verdicts" / f"{notebook}.csv") as aside:
                verdicts.assign(reason=reasons).to_csv(aside, index=False)

    def configs(self, question: str) -> list[RunConfig]:
        """The runs that a question needs: of a speed those whose models are timed, none for bare shapes."""
        if SPEEDS.get(question) == "relu_vs_silu":
            return [self.largest_config(activation) for activation in self.profile.study.activations]
        return self.configs_of(planned(self.profile, question))

    def configs_of(self, settings: list[Settings]) -> list[RunConfig]:
        """Runs on this study's text with the given settings."""
        return [
            RunConfig(model, train, self.corpus.hash, self.corpus.tokenizer_hash, self.profile.threads)
            for model, train in settings
        ]

    def jobs(self, *questions: str, models: Iterable[str] = ()) -> list[Job]:
        """What is to be trained and measured for some questions, whether done or not: one job per run.

        models: activation functions whose `trained_model` is wanted as well.
        """
        wanted: dict[RunConfig, dict[str, None]] = {}  # measurements in order, each once
        loaded = [self.largest_config(activation) for activation in models]
        for question in questions:
            what = QUESTIONS[question].measurement
            for config in self.configs(question):
                wanted.setdefault(config, {}).update({what: None} if what else {})
        for config in loaded:
            wanted.setdefault(config, {})
        measure = self.profile.measure
        return [  # without runs no text is asked for
            Job(config, self.corpus.folder, measure, tuple(what), config in loaded) for config, what in wanted.items()
        ]

    def complete(self, *questions: str) -> None:
        """Train and measure what some questions lack, in one pool of workers."""
        do_jobs(longest_first(self.jobs(*questions)), self.profile)

    def _measured(self, question: str) -> pd.DataFrame:
        _, what, about = QUESTIONS[question]
        configs = self.configs(question)
        if not configs:
            raise InputError(f"Profile {self.name} trains no runs for {question}; its section study leaves them out.")
        self.complete(question)
        arms = [run.arm for run in self.profile.arm_runs(question)]
        named = dict(zip(configs, arms, strict=True)) if arms else {}
        tables = []
        for config in configs:
            run = find_run(config)
            if run.diverged:
                warnings.warn(f"{run.diverged} The study goes on without it.", stacklevel=3)
            elif what is None:
                tried = {"learning_rate": config.train.learning_rate, "batch_tokens": config.train.batch_tokens}
                tables.append(run.checkpoints.assign(**tried))
            else:
                measured = measurement(run, self.corpus, self.profile.measure, what)
                for note in measured["note"].dropna().unique() if "note" in measured else ():
                    warnings.warn(f"{config.title}: {note}.", stacklevel=3)
                rows = run.checkpoints
                if config in named:
                    rows = rows.assign(arm=named[config], learning_rate=config.train.learning_rate)
                beside = list(about or rows.columns)
                table = rows[list(dict.fromkeys([*beside, "step"]))].merge(measured, on="step")
                tables.append(table if "step" in beside else table.drop(columns="step"))
        if not tables:
            raise InputError(f"Every run of {question} diverged; lower train.learning_rate in profile {self.name}.")
        return pd.concat(tables, ignore_index=True)
