"""A study in several sittings: what is left and what it costs, in which order it is done, and when it stops."""

import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import pandas as pd

from sparsity_utils.archive import archived
from sparsity_utils.jobs import Job, OutOfTime, do_jobs
from sparsity_utils.plan import LINES, PRIMARY, QUESTIONS
from sparsity_utils.study import Study

SHORT = 600  # seconds of a core that a run may be expected to take to be done before all longer ones
OVERRUN = 1.4  # the first recorded study took so many times the core hours that the cost model gave


def sit(study: Study, minutes: float, tables: Path | None = None, questions: Iterable[str] = QUESTIONS) -> str:
    """Train and measure for at most `minutes` what the study lacks; return what was left to do, or an empty string.

    tables: a folder of finished runs (see `archive`), read first and written after every finished run.
    Raises InputError for a folder that another process writes, or that holds other runs than this study's.
    """
    deadline = time.monotonic() + 60 * minutes
    with archived(study, tables) if tables is not None else nullcontext(lambda: None) as keep:
        try:
            do_jobs(in_order(study, questions), study.profile, deadline, keep)
        except OutOfTime as left:
            return str(left)
    return ""


def in_order(study: Study, questions: Iterable[str]) -> list[Job]:
    """The runs of some questions, short ones of all lines first, then those of primary claims, cheap before dear."""
    primary = {config.key for question in PRIMARY for config in study.configs(question)}

    def place(job: Job) -> tuple[bool, bool, float]:
        cost = job.config.cost()
        return cost > SHORT, cost > SHORT and job.config.key not in primary, cost

    return sorted(study.jobs(*questions), key=place)


def costs(study: Study) -> pd.DataFrame:
    """What each line of runs adds to those before it: one row per line, by the question it answers, and one for all.

    Columns: question, runs, finished (trained and measured), million_tokens, core_hours (of training and measuring, by
    the cost model), likely_core_hours (OVERRUN times that), likely_hours_left (of `profile.workers` side by side).
    """
    rows, seen, jobs = [], set(), {job.config.key: job for job in study.jobs(*QUESTIONS)}
    for question in LINES:
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
                "likely_core_hours": OVERRUN * sum(hours.values()),
                "likely_hours_left": OVERRUN * sum(hours[key] for key in keys if key not in finished),
            }
        )
    table = pd.DataFrame(rows)
    table["likely_hours_left"] /= study.profile.workers
    total = table.drop(columns="question").sum().to_frame().T.assign(question="all")
    table = pd.concat([table, total], ignore_index=True).astype({"runs": int, "finished": int})
    return table.round({"million_tokens": 0, "core_hours": 1, "likely_core_hours": 1, "likely_hours_left": 1})
