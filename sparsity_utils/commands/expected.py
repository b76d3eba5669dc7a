"""What `make reproduce` is expected to take on this machine, told before it begins, and what it took before."""

import os
import resource
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from sparsity_utils import paths
from sparsity_utils.study.cost import checkpoint_bytes, state_bytes
from sparsity_utils.study.jobs import Job
from sparsity_utils.study.makers.speeds import step_times
from sparsity_utils.study.profiles import Profile
from sparsity_utils.study.study import Study

ROUNDS = 5  # optimizer steps that are timed
RECORD = paths.PROFILES / "minutes.csv"  # profile, notebook, minutes; of the two cores that the cost model was made on
LIKE = "laptop"  # the profile whose notebooks those of a profile without a record are taken for
OWN = "minutes.csv"  # likewise of a profile's own notebooks, beside its verdicts


@dataclass(frozen=True)
class Expected:
    """The plan of `make reproduce`."""

    profile: str
    workers: int
    runs: int  # that the notebooks read
    left: int  # of them: not finished yet
    untrained: int  # of these: to train, not only to measure
    pace: float  # how many times as long a training step takes as the cost model says
    shape: (
        str  # with which that was measured; empty where it was not, because runs are done elsewhere or there are none
    )
    run_minutes: float
    notebook_minutes: dict[str, float | None]  # by name; None: never recorded
    memory: float  # bytes
    disk: float  # bytes

    def told(self) -> str:
        """The plan in lines of a terminal."""
        own = sum(minutes or 0.0 for minutes in self.notebook_minutes.values())
        unknown = [name for name, minutes in self.notebook_minutes.items() if minutes is None]
        runs = f"none of {self.runs} is left to train or to measure"
        if self.left:
            runs = f"{self.left} of {self.runs} to do, {self.untrained} of them to train: about "
            runs += f"{_minutes(self.run_minutes)} with {self.workers} workers"
        about = f"about {_minutes(self.run_minutes + own)} in all, {_minutes(own)} of them for notebooks"
        about += f"; without {', '.join(unknown)}, whose time is not known yet" if unknown else ""
        pace = f"measured now: a training step of {self.shape} takes {self.pace:.2f} times what the cost model says"
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        build = next(folder for folder in (paths.build(), *paths.build().parents) if folder.exists())
        free = shutil.disk_usage(build).free
        lines = [
            ("runs", runs),
            ("time", about),
            *([("", pace)] if self.shape else []),
            ("memory", f"about {self.memory / 1e9:.1f} GB; this machine has {installed / 1e9:.0f} GB"),
            ("disk", f"about {self.disk / 1e6:,.0f} MB more in {paths.build()}; {free / 1e9:,.0f} GB are free"),
            ("stop", "Ctrl-C at any time: finished runs and notebooks are kept, a run under way goes on from its"),
            ("", "last saved state; the same command continues"),
        ]
        return "\n".join(f"  {name:<7} {line}" for name, line in lines)


def expect(study: Study, notebooks: Iterable[Path], jobs: Sequence[Job]) -> Expected:
    """The plan for some notebooks and the runs that they read, from a few training steps that are timed here.

    Minutes of runs are those of the cost model (`RunConfig.token_cost`) times the pace of this machine. Minutes of a
    notebook are those that it took here before, or else those of RECORD times the pace. Memory is what this process
    takes with the largest model in it, for each worker and once more.
    """
    profile = study.profile
    todo = [job for job in jobs if not job.done()]
    costs = [job.cost() for job in todo]
    timed = max(jobs, key=lambda job: job.config.cost(), default=None)
    here = timed is not None and profile.cluster is None
    pace = measured_pace(timed, profile) if here else 1.0
    seconds = max(sum(costs) / profile.side_by_side, *costs) if costs else 0.0
    configs = [job.config for job in todo if not job.trained()]
    states = sorted((state_bytes(config.model) for config in configs), reverse=True)[: profile.workers]
    return Expected(
        profile=study.name,
        workers=profile.side_by_side,
        runs=len(jobs),
        left=len(todo),
        untrained=len(configs),
        pace=pace,
        shape=f"{timed.config.model.d_model}x{timed.config.model.n_layers}" if here else "",
        run_minutes=pace * seconds / 60,
        notebook_minutes=recorded_minutes(study, [notebook.stem for notebook in notebooks], pace),
        memory=(1 + profile.workers) * peak_memory(resource.RUSAGE_SELF),
        disk=sum(map(checkpoint_bytes, configs)) + sum(states),
    )


def _minutes(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes >= 10 else f"{minutes:.1f} min"


def measured_pace(job: Job, profile: Profile) -> float:
    """How many times as long a training step of a run takes here as the cost model says, on a worker's threads.

    On a GPU the cost model, made of one CPU core, is only as good as the one shape that is measured.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(profile.threads)
    try:
        times = step_times([job.config.model], job.config.train.batch_tokens, ROUNDS)
    finally:
        torch.set_num_threads(threads)
    return times["training_us"].item() / (1e6 * job.config.token_cost())


def peak_memory(whose: int) -> float:
    """The most bytes that this process (RUSAGE_SELF), or any that it waited for (RUSAGE_CHILDREN), has held."""
    return resource.getrusage(whose).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def recorded_minutes(study: Study, names: Iterable[str], pace: float) -> dict[str, float | None]:
    """What notebooks took on this profile: here, or else where RECORD was made, times the pace of this machine."""
    record = pd.read_csv(RECORD)
    shipped = record[record["profile"] == (study.name if study.name in set(record["profile"]) else LIKE)]
    known = dict(zip(shipped["notebook"], pace * shipped["minutes"], strict=True)) | own_minutes(study)
    return {name: known.get(name) for name in names}


def own_minutes(study: Study) -> dict[str, float]:
    """What notebooks took when they were last executed on a profile."""
    file = study.folder.parent / OWN
    return dict(pd.read_csv(file).itertuples(index=False, name=None)) if file.exists() else {}


def keep_minutes(study: Study, notebook: str, minutes: float) -> None:
    """Add to `own_minutes`."""
    rows = own_minutes(study) | {notebook: round(minutes, 2)}
    with paths.written_aside(study.folder.parent / OWN) as aside:
        pd.DataFrame(sorted(rows.items()), columns=["notebook", "minutes"]).to_csv(aside, index=False)
