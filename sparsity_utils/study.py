"""A study: which runs a question needs, which exist, do the rest side by side, return one table.

`Study.from_profile("laptop").table("relu_vs_silu")` trains what is missing; `Study.recorded()` reads the stored tables.
"""

import multiprocessing
import os
import platform
import threading
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kernels import MAX_TOKENS
from sparsity_utils import paths
from sparsity_utils.batches import measurement_batches
from sparsity_utils.checkpoints import open_checkpoint
from sparsity_utils.corpus import Corpus, build_corpus, open_corpus
from sparsity_utils.curves import decided_by, kept, metric_comparison, sparsity_curve
from sparsity_utils.errors import InputError
from sparsity_utils.model import default_device, head_count, solve_shape
from sparsity_utils.portraits import dead_curve, domain_transfer, neuron_frequencies, token_ratios
from sparsity_utils.profiles import MeasureConfig, Profile, read_profile
from sparsity_utils.runs import Run, RunConfig, find_run, train_run
from sparsity_utils.speed_tables import decoding_table, ffn_table

MEASUREMENTS = {
    "curve": sparsity_curve,
    "metrics": metric_comparison,
    "neurons": neuron_frequencies,
    "vocabulary": token_ratios,
    "dead": dead_curve,
    "transfer": domain_transfer,
}
SPEEDS = {"sparse_ffn": ffn_table, "sparse_decoding": decoding_table}  # of this machine, not of a run
IDENTITY = ("run", "activation", "d_model", "n_layers", "seed")


class Question(NamedTuple):
    """What answers a question: a table, and what is measured on each of its runs."""

    file: str
    measurement: str | None  # a key of MEASUREMENTS or SPEEDS; None: validation losses alone
    about: tuple[str, ...] | None = None  # columns of `Run.checkpoints` beside each measured row; None: all of them


# Several questions read the same runs; large tables say no more of a checkpoint than they need.
QUESTIONS = {
    "metrics": Question("metrics.csv", "metrics"),
    "relu_vs_silu": Question("relu_vs_silu.csv", "curve"),
    "width_depth_ratio": Question("width_depth_ratio.csv", "curve"),
    "scale_insensitivity": Question("relu_vs_silu.csv", "curve"),
    "activation_patterns": Question("patterns_neurons.csv", "neurons", IDENTITY),
    "token_patterns": Question("patterns_vocabulary.csv", "vocabulary", IDENTITY),
    "dead_neurons": Question("dead_neurons.csv", "dead", (*IDENTITY, "step", "tokens", "fit")),
    "transfer": Question("transfer.csv", "transfer", IDENTITY),
    "tuning": Question("tuning.csv", None),
    "sparse_ffn": Question("sparse_ffn.csv", "sparse_ffn"),
    "sparse_decoding": Question("sparse_decoding.csv", "sparse_decoding"),
}
# What `python -m sparsity_utils refit` makes of the published curves: recorded once, read by every study.
PUBLISHED = ("published_refit", "published_forms", "published_forecasts", "published_stability")


class Study:
    """The tables of one study, trained on demand or read from a folder."""

    def __init__(self, name: str, folder: Path, profile: Profile | None):
        self.name, self.folder, self.profile = name, folder, profile
        self._corpus: Corpus | None = None

    @classmethod
    def from_profile(cls, name: str) -> "Study":
        """A study that trains and measures what its profile asks for and the run store lacks.

        Runs are trained in worker processes, so a script that calls `table` needs the usual
        `if __name__ == "__main__":`. Raises InputError for a profile that cannot be used, its shapes included.
        """
        profile = read_profile(name)
        shapes = [size.d_model_and_layers() for size in profile.study.sizes] + ratio_shapes(profile)
        for shape in shapes:
            head_count(profile.model_config(*shape, "relu"))
        return cls(profile.name, paths.profile_output(profile.name) / "results", profile)

    @classmethod
    def recorded(cls, folder: Path = paths.RESULTS) -> "Study":
        """The tables stored in `folder`; nothing is trained."""
        return cls("recorded", folder, None)

    @classmethod
    def open(cls, source: str, profile: str) -> "Study":
        """What a notebook opens: `source` "recorded" reads the stored tables, "run" follows `profile`."""
        if source not in ("recorded", "run"):
            raise InputError(
                f"source is {source!r}; choose recorded (the stored tables) or run (train what is missing)."
            )
        return cls.recorded() if source == "recorded" else cls.from_profile(profile)

    @property
    def corpus(self) -> Corpus:
        """The text of the profile, built when first asked for."""
        if self._corpus is None:
            self._corpus = build_corpus(self.profile.corpus)
        return self._corpus

    def table(self, question: str) -> pd.DataFrame:
        """The table of a question: one row per checkpoint, or per measured thing (such as a neuron) of each run.

        Columns are described in results/columns.csv. Speeds are measured on this machine, once: delete the file to
        measure them again. Raises InputError for an unknown question or, in a recorded study, a table that is not
        there.
        """
        if question in PUBLISHED:
            return _stored(paths.PUBLISHED / f"{question}.csv", "make it with python -m sparsity_utils refit")
        if question not in QUESTIONS:
            known = ", ".join([*QUESTIONS, *PUBLISHED])
            raise InputError(f"There is no question {question!r}; choose one of {known}.")
        file = self.folder / QUESTIONS[question].file
        if self.profile is not None and not (question in SPEEDS and file.exists()):
            table = self.speeds(question) if question in SPEEDS else self._measured(question)
            with paths.written_aside(file) as aside:
                table.to_csv(aside, index=False, float_format="%.8g")
        return _stored(file, "name a folder that holds a study's results, or train one with make reproduce")

    def largest_run(self, activation: str) -> Run:
        """The run that stands for an activation function: the largest size and, of its seeds, the first.

        Raises InputError when the study has no run of that activation.
        """
        runs = self.table("relu_vs_silu").query("activation == @activation").sort_values(["parameters", "seed"])
        if runs.empty:
            raise InputError(f"Profile {self.name} has no {activation} run; name one of its study.activations.")
        key = runs.loc[runs["parameters"] == runs["parameters"].max(), "run"].iloc[0]
        return find_run(next(config for config in self.configs("relu_vs_silu") if config.key == key))

    def trained_model(self, activation: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The study's own model of an activation function, of `largest_run` after the decay, and its tokenizer.

        A recorded study has it in results/models; a profile's own trains what is missing. Raises InputError when the
        study has no run of that activation.
        """
        if self.profile is None:
            return open_checkpoint(paths.RECORDED_MODELS / activation)
        run = self.largest_run(activation)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=self.corpus.tokenizer())
        return run.load(run.checkpoints["step"].max()), tokenizer

    def environment(self) -> str:
        """One line: what computes here, and where the numbers come from."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
        versions = (
            f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
        )
        origin = "the recorded study" if self.profile is None else f"profile {self.name}: {self.profile.about}"
        return f"{versions}, {device}. Numbers from {origin}."

    def keep_verdicts(self, notebook: str, verdicts: pd.DataFrame) -> None:
        """Store a notebook's verdict table for the closing table of `make reproduce`; a recorded study keeps none."""
        if self.profile is not None:
            with paths.written_aside(self.folder.parent / "verdicts" / f"{notebook}.csv") as aside:
                verdicts.to_csv(aside, index=False)

    def speeds(self, question: str) -> pd.DataFrame:
        """The table of a question of SPEEDS, measured now, on a GPU where there is one, with `trained_model`s."""
        models = {
            activation: self.trained_model(activation)[0].eval().to(default_device())
            for activation in self.profile.study.activations
        }
        tokens, settings = self.corpus.tokens("validation"), self.profile.measure
        context = next(iter(models.values())).config.max_position_embeddings
        calibration = measurement_batches(tokens, context, "calibration", settings.calibration_tokens)
        windows = measurement_batches(tokens, context, "evaluation", MAX_TOKENS * context)[0]["input_ids"]
        return SPEEDS[question](models, calibration, windows.to(default_device()), settings.p, self.profile.speed)

    def configs(self, question: str) -> list[RunConfig]:
        """The runs that a question needs."""
        study, sizes, seeds = self.profile.study, self.profile.study.sizes, self.profile.study.seeds
        activations = ["relu"] if question == "dead_neurons" else study.activations
        if question == "width_depth_ratio":
            plan = product(
                [(shape, study.ratio_tokens) for shape in ratio_shapes(self.profile)], ["relu"], study.ratio_seeds, [{}]
            )
        elif question == "tuning":
            tried = product(study.tuning_rates, study.tuning_batches)
            changes = [{"learning_rate": rate, "batch_tokens": batch} for rate, batch in tried]
            first = (sizes[0].d_model_and_layers(), sizes[0].tokens)
            plan = product([first], study.activations, seeds[:1], changes)
        else:
            plan = product([(size.d_model_and_layers(), size.tokens) for size in sizes], activations, seeds, [{}])
        configs = [
            RunConfig(
                self.profile.model_config(*shape, activation),
                self.profile.train_config(tokens, seed, **changes),
                self.corpus.hash,
                self.corpus.tokenizer_hash,
                self.profile.threads,
            )
            for (shape, tokens), activation, seed, changes in plan
        ]
        return list(dict.fromkeys(configs))  # two ratios may lead to one shape

    def _measured(self, question: str) -> pd.DataFrame:
        (_, what, about), configs = QUESTIONS[question], self.configs(question)
        do_jobs([Job(config, self.corpus.folder, self.profile.measure, what) for config in configs], self.profile)
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
                beside = list(about or run.checkpoints.columns)
                table = run.checkpoints[list(dict.fromkeys([*beside, "step"]))].merge(measured, on="step")
                tables.append(table if "step" in beside else table.drop(columns="step"))
        if not tables:
            raise InputError(f"Every run of {question} diverged; lower train.learning_rate in profile {self.name}.")
        return pd.concat(tables, ignore_index=True)


def _stored(file: Path, advice: str) -> pd.DataFrame:
    if not file.exists():
        raise InputError(f"There is no {file.name} in {file.parent}; {advice}.")
    return pd.read_csv(file)


def ratio_shapes(profile: Profile) -> list[tuple[int, int]]:
    """(d_model, n_layers) of the width-depth line."""
    study, config = profile.study, profile.model_config(2, 1, "relu")
    shapes = [solve_shape(study.ratio_parameters, ratio, config.ffn_ratio) for ratio in study.ratios]
    return [(shape.d_model, shape.n_layers) for shape in shapes]


def measurement(run: Run, corpus: Corpus, settings: MeasureConfig, what: str) -> pd.DataFrame:
    """A measurement of a run, computed once and kept with it."""
    return kept(what, MEASUREMENTS[what], run, corpus, settings)


@dataclass(frozen=True)
class Job:
    """A run to train, if need be, and to measure."""

    config: RunConfig
    corpus: Path
    measure: MeasureConfig
    what: str | None  # a key of MEASUREMENTS, or nothing but the losses of training

    def cost(self) -> float:
        """Expected work, in units of the run's own; measuring takes about a tenth of training."""
        return self.config.cost() * (0.1 if (paths.runs() / self.config.key).exists() else 1.0)

    def done(self) -> bool:
        """Whether nothing is left to compute."""
        run = find_run(self.config)
        if run is None or run.diverged or self.what is None:
            return run is not None
        return run.has_measured(self.what, decided_by(self.measure))


def do_jobs(jobs: Iterable[Job], profile: Profile) -> None:
    """Do what is not done yet, `profile.workers` jobs side by side, behind one progress bar over expected cost."""
    todo = [job for job in jobs if not job.done()]
    if not todo:
        return
    todo.sort(key=Job.cost, reverse=True)  # the longest first, so that no worker is left alone at the end
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    shares = context.Array("d", len(todo))
    costs = [job.cost() for job in todo]
    with ProcessPoolExecutor(profile.workers, context, _start_worker, (shares, profile.threads, os.getpid())) as pool:
        futures = [pool.submit(_do_job, job, place) for place, job in enumerate(todo)]
        try:
            _watch(futures, shares, costs)
            for future in futures:
                future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - set(others):
                worker.terminate()
            if isinstance(error, BrokenProcessPool):
                raise InputError(
                    "A worker process ended: killed for want of memory (lower workers in the profile), or started by a "
                    "script without `if __name__ == '__main__':`; finished runs are kept, others resume: run it again."
                ) from error
            raise


def _watch(futures: list[Future], shares, costs: list[float]) -> None:
    """Show the progress of all jobs until they end or one fails."""
    names = f"{len(futures)} runs"
    with tqdm(
        total=100,
        desc=names,
        smoothing=0,  # an estimate from the mean speed: runs report in bursts
        unit="%",
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}",
        disable=bool(os.environ.get("CI")),
    ) as bar:
        pending = set(futures)
        while pending and not any(future.done() and future.exception() for future in futures):
            _, pending = wait(pending, timeout=1.0)
            done = sum(cost * share for cost, share in zip(costs, shares, strict=True)) / sum(costs)
            bar.update(100 * done - bar.n)


def _start_worker(shares, threads: int, parent: int) -> None:
    """Set up a worker process; a worker whose parent was killed ends at once, its run resumes later."""
    global _shares
    _shares = shares
    torch.set_num_threads(threads)

    def follow_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _do_job(job: Job, place: int) -> None:
    def report(share: float) -> None:
        _shares[place] = 0.9 * share  # measuring takes about a tenth

    corpus = open_corpus(job.corpus)
    run = train_run(job.config, corpus, report)
    if not run.diverged and job.what is not None:
        measurement(run, corpus, job.measure, job.what)
    _shares[place] = 1.0
