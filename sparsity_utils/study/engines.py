"""Where jobs are done: in worker processes of this machine, or by a cluster (`slurm`); behind one progress bar."""

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from tqdm import tqdm

from sparsity_utils.console import InputError, share_bar
from sparsity_utils.study.jobs import Job, OutOfTime
from sparsity_utils.study.profiles import Profile


def do_jobs(
    jobs: Iterable[Job],
    profile: Profile,
    deadline: float = math.inf,
    on_done: Callable[[], None] = lambda: None,
) -> None:
    """Do in the order given what is not done yet, behind one progress bar, on the engine that the profile names.

    That is a Slurm cluster if it has a section `cluster`, and worker processes of this machine if it has none. on_done
    is called when jobs have finished. Raises OutOfTime when `time.monotonic()` passes `deadline` with jobs left.
    """
    todo = [job for job in jobs if not job.done()]
    if not todo:
        return
    if profile.cluster is None:
        _do_here(todo, profile, deadline, on_done)
    else:
        from sparsity_utils.study.slurm import do_on_cluster  # needs the extra `cluster`

        do_on_cluster(todo, profile, deadline, on_done)


def _do_here(todo: list[Job], profile: Profile, deadline: float, on_done: Callable[[], None]) -> None:
    """Do jobs in `profile.workers` processes. On a GPU they share it: several small runs are packed on one device."""
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
    def report(share: float) -> None:
        _shares[place] = share

    job.do(report)
