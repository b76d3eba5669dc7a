"""A study in several sessions: what is left and what it costs, in which order it is done, and when it stops."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pandas as pd

from sparsity_utils.console import InputError
from sparsity_utils.study.archive import archived
from sparsity_utils.study.cost import tell_device_costs
from sparsity_utils.study.engines import do_jobs
from sparsity_utils.study.jobs import Job, OutOfTime
from sparsity_utils.study.plan import COVERING, PRIMARY, QUESTIONS
from sparsity_utils.study.study import Study

SHORT = 600  # seconds of a core that a run may be expected to take to be done before all longer ones
ABOUT_HOURS = "Hours are those of CPU cores, by a cost model of small models; what a GPU needs is not known yet."
WHOLE = (1, 1)  # the share of a machine that does all of a study


def run_session(
    study: Study,
    minutes: float,
    tables: Sequence[Path] = (),
    questions: Iterable[str] = QUESTIONS,
    share: tuple[int, int] = WHOLE,
) -> str:
    """Train and measure for at most `minutes` what the study lacks; return what was left to do, or an empty string.

    tables: folders of finished runs (see `archive`), read first; the first is written after every finished run.
    share: which of how many machines this one is, (2, 8): it does every eighth job, from the second on.
    Raises InputError for a folder that another process writes, or that holds other runs than this study's.
    """
    deadline, left = time.monotonic() + 60 * minutes, ""
    with _tables(study, tables, questions) as keep:
        print(_told(study), flush=True)
        try:
            do_jobs(shared(in_order(study, questions), share), study.profile, deadline, keep)
        except OutOfTime as time_over:
            left = str(time_over)
        finally:
            keep()  # a run that finished beside one that failed
    return left


def shared(jobs: list[Job], share: tuple[int, int]) -> list[Job]:
    """Share 2 of 8: jobs 2, 10, 18 and so on. The order is the same on every machine, whatever its store holds."""
    number, machines = share
    return jobs[number - 1 :: machines]


def read_share(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8). Raises InputError for anything else than a number of 1 to n, a stroke and n."""
    number, _, machines = text.partition("/")
    if not (number.isdecimal() and machines.isdecimal() and 1 <= int(number) <= int(machines)):
        raise InputError(
            f"--share is {text!r}; write i/n with i from 1 to n, such as 2/8 for the second of 8 machines."
        )
    return int(number), int(machines)


def tell_costs(study: Study, tables: Sequence[Path] = ()) -> str:
    """`costs` as text, once the runs of the folders `tables` have been brought.

    For a profile with a section `device` it is the table of `cost`, which needs neither text nor runs.
    """
    if study.profile.device:
        return tell_device_costs(study.profile)
    with _tables(study, tables, QUESTIONS):
        return _told(study)


def _told(study: Study) -> str:
    if study.profile.device:
        return tell_device_costs(study.profile)
    return f"{costs(study).to_string(index=False)}\n{ABOUT_HOURS}"


def _tables(
    study: Study, folders: Sequence[Path], questions: Iterable[str]
) -> AbstractContextManager[Callable[[], None]]:
    return archived(study, folders, questions) if folders else nullcontext(lambda: None)


def in_order(study: Study, questions: Iterable[str]) -> list[Job]:
    """The runs of some questions: those that choose the settings, short ones of all lines, those of primary claims.

    Within each, cheap before dear.
    """
    tuning = {config.key for config in study.configs("tuning")}
    primary = {config.key for question in PRIMARY for config in study.configs(question)}

    def place(job: Job) -> tuple[bool, bool, bool, float]:
        key, cost = job.config.key, job.config.cost()
        return key not in tuning, cost > SHORT, cost > SHORT and key not in primary, cost

    return sorted(study.jobs(*questions), key=place)


def costs(study: Study) -> pd.DataFrame:
    """What each line of runs adds to those before it: one row per line, by the question it answers, and one for all.

    Columns: question, runs, finished (trained and measured), million_tokens, core_hours (of training and measuring, by
    the cost model), hours_left (of `profile.side_by_side`). The 22 runs of the laptop profile took the 28
    minutes that the model gave them on the two cores that it was made on.
    """
    rows, seen, jobs = [], set(), {job.config.key: job for job in study.jobs(*QUESTIONS)}
    for question in COVERING:
        keys = [config.key for config in study.configs(question) if config.key not in seen]
        seen |= set(keys)
        if not keys:
            continue
        hours = {key: (jobs[key].config.cost() + jobs[key].measuring()) / 3600 for key in keys}
        finished = {key for key in keys if jobs[key].done()}
        rows.append(
            {
                "question": question,
                "runs": len(keys),
                "finished": len(finished),
                "million_tokens": sum(jobs[key].config.tokens for key in keys) / 1e6,
                "core_hours": sum(hours.values()),
                "hours_left": sum(hours[key] for key in keys if key not in finished),
            }
        )
    table = pd.DataFrame(rows)
    table["hours_left"] /= study.profile.side_by_side
    total = table.drop(columns="question").sum().to_frame().T.assign(question="all")
    table = pd.concat([table, total], ignore_index=True).astype({"runs": int, "finished": int})
    return table.round({"million_tokens": 0, "core_hours": 1, "hours_left": 1})
