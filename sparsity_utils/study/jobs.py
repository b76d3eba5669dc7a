"""Runs side by side: train and measure what is missing in worker processes, behind one progress bar."""

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from sparsity_utils import paths
from sparsity_utils.console import InputError, share_bar
from sparsity_utils.study.measurements import EFFORT, decided_by, measurement
from sparsity_utils.study.profiles import MeasureConfig, Profile
from sparsity_utils.study.runs import RunConfig, find_run, train_run
from sparsity_utils.text.corpus import open_corpus


@dataclass(frozen=True)
class Job:
    """A run to train, if need be, and to measure."""

    config: RunConfig
    corpus: Path
    measure: MeasureConfig
    what: tuple[str, ...]  # keys of MEASUREMENTS; none: nothing but the losses of training

    def measuring(self) -> float:
        """Expected seconds on one CPU core to measure all of `what`."""
        calibration, evaluation = map(sum, zip((0.0, 0.0), *(EFFORT[what] for what in self.what), strict=True))
        tokens = calibration * self.measure.calibration_tokens + evaluation * self.measure.evaluation_tokens
        return tokens * self.config.token_cost()

    def cost(self) -> float:
        """Expected seconds on one CPU core of what is left, as far as the run's folder shows it."""
        return self.measuring() + (0.0 if self.trained() else self.config.cost())

    def trained(self) -> bool:
        """Whether the checkpoints that are to be measured are here."""
        return (paths.runs() / self.config.key / "checkpoints").exists()

    def done(self) -> bool:
        """Whether nothing is left to compute."""
        run = find_run(self.config)
        if run is None or run.diverged:
            return run is not None
        return all(run.has_measured(what, decided_by(self.measure)) for what in self.what)


class OutOfTime(RuntimeError):
    """The deadline has passed; finished runs are kept, runs under way resume from their last state."""


def longest_first(jobs: Iterable[Job]) -> list[Job]:
    """The order in which the last worker is alone for the shortest time."""
    return sorted(jobs, key=Job.cost, reverse=True)


def outlook(jobs: Iterable[Job], workers: int) -> str:
    """One sentence: how many runs are not done, how many of them are to train, how long `workers` should take."""
    todo = [job for job in jobs if not job.done()]
    if not todo:
        return "No run is left to train or to measure."
    costs, untrained = [job.cost() for job in todo], sum(not job.trained() for job in todo)
    minutes = max(sum(costs) / workers, *costs) / 60
    return f"{len(todo)} runs to do, {untrained} of them to train: about {minutes:.0f} min with {workers} workers."


def do_jobs(
    jobs: Iterable[Job],
    profile: Profile,
    deadline: float = math.inf,
    on_done: Callable[[], None] = lambda: None,
) -> None:
    """Do in the order given what is not done yet, `profile.workers` jobs side by side, behind one progress bar.

    On a GPU the workers share it: several small runs are packed on one device. on_done is called after every finished
    job. Raises OutOfTime when `time.monotonic()` passes `deadline` with jobs left.
    """
    todo = [job for job in jobs if not job.done()]
    if not todo:
        return
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    shares = context.Array("d", len(todo))
    costs = [job.cost() for job in todo]
    with ProcessPoolExecutor(profile.workers, context, _start_worker, (shares, profile.threads, os.getpid())) as pool:
        futures = [pool.submit(_do_job, job, place) for place, job in enumerate(todo)]
        try:
            _watch(futures, shares, costs, deadline, on_done)
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


def _watch(futures: list[Future], shares, costs: list[float], deadline: float, on_done: Callable[[], None]) -> None:
    """Show the progress of all jobs until they end, one fails or the time is over."""
    with share_bar(f"{len(futures)} runs", leave=True) as bar:
        pending = set(futures)
        while pending and not any(future.done() and future.exception() for future in futures):
            done, pending = wait(pending, timeout=1.0)
            if done and not any(future.exception() for future in done):
                on_done()
            share = sum(cost * share for cost, share in zip(costs, shares, strict=True)) / (sum(costs) or 1.0)
            bar.update(100 * share - bar.n)
            if pending and time.monotonic() > deadline:
                raise OutOfTime(f"{len(futures) - len(pending)} of {len(futures)} runs done")


_shares: Any  # of a worker process: the finished share of every job, seen by the parent


def _start_worker(shares, threads: int, parent: int) -> None:
    """Set up a worker process; a worker whose parent was killed ends at once, its run resumes later."""
    global _shares
    _shares = shares
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # the default lock is a semaphore, which a terminated worker would leave behind

    def follow_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _do_job(job: Job, place: int) -> None:
    training = 1 - job.measuring() / max(job.cost(), 1e-9)  # as a share of what is left

    def report(share: float) -> None:
        _shares[place] = training * share

    corpus = open_corpus(job.corpus)
    run = train_run(job.config, corpus, report)
    for number, what in enumerate(job.what if not run.diverged else (), start=1):
        measurement(run, corpus, job.measure, what)
        _shares[place] = training + (1 - training) * number / len(job.what)
    _shares[place] = 1.0
