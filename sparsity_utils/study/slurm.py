"""The jobs of a study as arrays of tasks on a Slurm cluster, by submitit; the store says what is done.

    build/slurm/<profile>/tasks.json          which jobs each task of the queue was given
    build/slurm/<profile>/<task>_0_log.err    what a task said
    build/slurm/<profile>/*.pkl               the tasks as submitit hands them to the nodes

A task that is preempted, runs over its time limit or is requeued goes on from the last state of its run. Nothing here
asks for a task's result: a job is done when the run store says so, and lost when neither the store nor the queue has
it. Other clusters do the same jobs by `study --share`.
"""

import getpass
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
import torch
from submitit.core.utils import DelayedSubmission, FailedSubmissionError, JobPaths, UncompletedJobError

from sparsity_utils import paths
from sparsity_utils.console import InputError, check, share_bar
from sparsity_utils.study.jobs import Job, OutOfTime
from sparsity_utils.study.profiles import ClusterConfig, Profile

WORTH_A_TASK = 60.0  # expected seconds of a core that short jobs are grouped to: a task imports for 5 to 7 s
POLL = 15.0  # seconds between two looks at queue and store: controllers limit how often they are asked
LAG = 60.0  # seconds that a shared file system may take to show what a node that has ended has written
SILENT = 40  # looks in a row that the queue may leave unanswered
FRUITLESS = 5  # starts in a row of one task without a new state of its runs
MAX_ARRAY = 1001  # Slurm's default MaxArraySize
FOREVER = 1_000_000  # times that a task may meet its time limit


def do_on_cluster(jobs: list[Job], profile: Profile, deadline: float, on_done: Callable[[], None]) -> None:
    """Submit what the queue does not have yet, then wait until every job is in the store.

    Raises InputError without Slurm, for options that it refuses, and for jobs that were lost, once all others are done.
    OutOfTime and Ctrl-C leave the tasks in the queue: the same command waits for them again.
    """
    if shutil.which("sbatch") is None or shutil.which("squeue") is None:
        raise InputError(
            "There is no sbatch on the path; call this where Slurm jobs are submitted from, drop the section cluster "
            "(or add --engine local) to use this machine, or use --share on a cluster without Slurm."
        )
    folder = paths.cluster_tasks(profile.name)
    with paths.locked(folder, wait=False):  # a store without locks says so here
        queue = _queue()
        if queue is None:
            raise InputError("squeue does not answer; call this again when the cluster does.")
        given = {task: wanted for task, wanted in _read_tasks(folder).items() if task in queue}
        waiting = {wanted for task in given.values() for wanted in task}
        fresh = [job for job in jobs if _name(job) not in waiting]
        given |= _submit(grouped(fresh, profile.side_by_side), profile, folder)
        _write_tasks(folder, given)
    try:
        _watch(jobs, given, folder, deadline, on_done)
    except (KeyboardInterrupt, OutOfTime):
        numbers = " ".join(sorted({task.partition("_")[0] for task in given}))
        print(f"The cluster goes on: the same command waits for it again, `scancel {numbers}` stops it.", flush=True)
        raise


@dataclass
class Task:
    """A few jobs that a node does one after the other; submitit calls it again after every requeue."""

    jobs: tuple[Job, ...]
    threads: int
    made_with: dict[str, str]  # versions where it was submitted
    fruitless: int = 0  # starts before this one that brought no run further
    begun_at: float = -1.0  # share that was done when it was started last
    ending: bool = False  # a signal has come

    def __call__(self) -> None:
        here = versions()
        differing = [name for name, version in self.made_with.items() if here[name] != version]
        if differing:
            name = differing[0]
            raise InputError(
                f"The node {platform.node()} has {name} {here[name]}, the study was submitted with "
                f"{self.made_with[name]}; give the nodes the same environment, or exclude this one "
                "(cluster.options: {exclude: ...})."
            )
        torch.set_num_threads(self.threads)
        self.begun_at = self.done_share()
        failures = []
        for job in self.jobs:
            try:
                job.do()
            except Exception as error:
                if self.ending:  # raised by submitit, which could not requeue the task
                    raise
                traceback.print_exc()  # the others are done all the same
                failures.append(error)
        if failures:
            raise failures[0]

    def done_share(self) -> float:
        """Of the task's jobs, each counted once."""
        return sum(job.share() for job in self.jobs)

    def checkpoint(self) -> DelayedSubmission | None:
        """What submitit requeues: the same jobs, or nothing where start after start has brought no run further.

        Nothing is saved here: a signal may fall between two halves of a step. Runs save themselves as they go.
        """
        self.ending = True
        fruitless = self.fruitless + 1 if self.done_share() == self.begun_at else 0
        if fruitless > FRUITLESS:
            print(f"{fruitless} starts saved nothing new; raise cluster.minutes.", file=sys.stderr)
            return None
        return DelayedSubmission(Task(self.jobs, self.threads, self.made_with, fruitless))


def versions() -> dict[str, str]:
    """What must be the same on all nodes for runs to end in the same bits."""
    lock = paths.LOCK.read_bytes() if paths.LOCK.exists() else b""
    digest = hashlib.sha256(lock).hexdigest()[:12]
    return {"Python": platform.python_version(), "torch": torch.__version__, "the lock file": digest}


def grouped(jobs: Iterable[Job], parallel: int) -> list[tuple[Job, ...]]:
    """Jobs in tasks, order kept: WORTH_A_TASK each, less where fewer than `parallel` tasks would come of it."""
    jobs = list(jobs)
    enough = min(WORTH_A_TASK, sum(job.cost() for job in jobs) / parallel)
    tasks: list[list[Job]] = []
    cost = enough
    for job in jobs:
        if cost >= enough:
            tasks.append([])
            cost = 0.0
        tasks[-1].append(job)
        cost += job.cost()
    return [tuple(task) for task in tasks]


def _submit(tasks: list[tuple[Job, ...]], profile: Profile, folder: Path) -> dict[str, list[str]]:
    """Put tasks into the queue, in as few arrays as it allows; return the names of the jobs of each."""
    folder.mkdir(parents=True, exist_ok=True)
    executor = submitit.SlurmExecutor(folder, max_num_timeout=FOREVER)
    given: dict[str, list[str]] = {}
    size = _max_array() if len(tasks) > 1 else 1
    for start in range(0, len(tasks), size):
        part = tasks[start : start + size]
        try:
            executor.update_parameters(**_options(profile))
            submitted = executor.submit_array([Task(jobs, profile.threads, versions()) for jobs in part])
        except (FailedSubmissionError, UncompletedJobError) as error:
            reason = " ".join(str(error).split()).removeprefix("sbatch: error: ")
            raise InputError(
                f"sbatch refused the tasks ({reason}); correct the section cluster of profile {profile.name}."
            ) from error
        given |= {job.job_id: [_name(one) for one in jobs] for job, jobs in zip(submitted, part, strict=True)}
        _write_tasks(folder, _read_tasks(folder) | given)
    return given


def _options(profile: Profile) -> dict[str, Any]:
    """Options of sbatch, as submitit names them."""
    cluster: ClusterConfig = profile.cluster
    devices = profile.train.get("devices", 1)
    wanted = {
        "job_name": f"study-{profile.name}",
        "time": cluster.minutes,
        # Slurm sends the signal up to a minute early, which must leave a short limit some time to work in.
        "signal_delay_s": min(90, 5 * cluster.minutes),
        "partition": cluster.partition,
        "account": cluster.account,
        "gpus_per_node": cluster.gpus or None,
        "cpus_per_task": cluster.cpus or profile.threads * devices,
        "mem": f"{round(1000 * cluster.memory_gb)}M" if cluster.memory_gb else None,
        "array_parallelism": cluster.parallel,
        "additional_parameters": {"requeue": True, **cluster.options},
    }
    return {name: value for name, value in wanted.items() if value is not None}


def _watch(
    jobs: list[Job], given: dict[str, list[str]], folder: Path, deadline: float, on_done: Callable[[], None]
) -> None:
    """Show progress until every job is done or lost, then raise InputError for lost ones."""
    task_of = {name: task for task, names in given.items() for name in names}
    costs = {_name(job): max(job.cost(), 1e-9) for job in jobs}
    left, gone, silent = {_name(job): job for job in jobs}, dict[str, float](), 0
    with share_bar(f"{len(jobs)} runs", leave=True) as bar:
        while True:
            queue = _queue()  # before the store: a task that ends in between is in the store
            silent = 0 if queue is not None else silent + 1
            check(silent < SILENT, "squeue does not answer; the cluster goes on, the same command waits for it again.")
            shares = {name: job.share() for name, job in left.items()}
            finished = [name for name, share in shares.items() if share == 1.0 and left[name].done()]
            for name in finished:
                del left[name]
            if finished:
                on_done()
            shown = sum(costs.values()) - sum(costs[name] * (1 - shares[name]) for name in left)
            bar.update(100 * shown / sum(costs.values()) - bar.n)
            bar.set_postfix_str(_states(queue, given))
            now = time.monotonic()
            for name in left if queue is not None else ():
                if task_of[name] in queue:
                    gone.pop(name, None)
                else:
                    gone.setdefault(name, now)
            if all(name in gone and now - gone[name] >= LAG for name in left):
                break
            if now > deadline:
                raise OutOfTime(f"{len(jobs) - len(left)} of {len(jobs)} runs done")
            time.sleep(min(POLL, max(0.0, deadline - now)))
    if left:
        told = "\n".join(f"  {job.config.title}: {_last_words(folder, task_of[name])}" for name, job in left.items())
        raise InputError(
            f"{len(left)} of {len(jobs)} runs were lost; what they had saved is kept, and the same command submits "
            f"them again:\n{told}"
        )


def _name(job: Job) -> str:
    """A job as the list of tasks names it: its run and its measurements."""
    return " ".join((job.config.key, *job.what))


def _queue() -> dict[str, str] | None:
    """The state of every task of this user in the queue, by its number (`17_3`); None without an answer."""
    command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i|%T|%r"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.split("|", 2) for line in answer.stdout.splitlines()]
    return {task: state.lower() + (f" ({reason})" if state == "PENDING" else "") for task, state, reason in lines}


def _states(queue: dict[str, str] | None, given: dict[str, list[str]]) -> str:
    """`12 running, 30 pending (Resources)`, of the study's own tasks."""
    counts = Counter(state for task, state in (queue or {}).items() if task in given)
    return ", ".join(f"{count} {state}" for state, count in counts.most_common())


def _max_array() -> int:
    """How many tasks one array may have on this cluster."""
    answer = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False)
    sizes = [line.split("=")[1].strip() for line in answer.stdout.splitlines() if line.startswith("MaxArraySize")]
    return int(sizes[0]) if sizes and sizes[0].isdecimal() else MAX_ARRAY


def _last_words(folder: Path, task: str) -> str:
    """The last line of a task's log and where that is."""
    log = JobPaths(folder, task).stderr
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return (
            f"task {task} left no {log}; do the nodes see that folder? If not, point SPARSITY_BUILD at a shared file "
            "system"
        )
    said = [line for line in lines if "Error: " in line] or lines or ["nothing"]
    return f"task {task} said last: {said[-1]} ({log})"


def _read_tasks(folder: Path) -> dict[str, list[str]]:
    try:
        return json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write_tasks(folder: Path, given: dict[str, list[str]]) -> None:
    with paths.written_aside(folder / "tasks.json") as aside:
        aside.write_text(json.dumps(given, indent=1), encoding="utf-8")
