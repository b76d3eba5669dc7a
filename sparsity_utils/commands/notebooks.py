"""The notebooks as programs: the runs they need, their execution with parameters, their verdicts, stored outputs."""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError

from sparsity_utils import paths
from sparsity_utils.commands import verdicts
from sparsity_utils.commands.expected import Expected, expect, keep_minutes
from sparsity_utils.commands.report import write_report
from sparsity_utils.console import UNATTENDED, InputError, check, progress
from sparsity_utils.findings import at_a_glance
from sparsity_utils.study.engines import do_jobs
from sparsity_utils.study.jobs import Job, longest_first
from sparsity_utils.study.plan import QUESTIONS
from sparsity_utils.study.study import Study

START_TIMEOUT = 120  # seconds that a kernel may take to come up
CELL_TIMEOUT = 6 * 3600  # seconds of one cell: longer than any profile for one machine trains
VERDICT_COLUMNS = ["question", "published", "here", "interval", "verdict"]
NOISE = ("execution", "papermill", "ExecuteTime")  # cell metadata that changes from one execution to the next


class NotebookFailed(RuntimeError):
    """A notebook stopped at an error: its name, the cell and the last line of the exception."""


class OwnKernel(AsyncKernelManager):
    """Kernels of the Python that runs this, whatever the machine has registered under the name python3.

    They are told that no person looks on, so that no interactive panel is shown or stored.
    """

    transport_encryption = "auto"

    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])

    async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
        environment = options.pop("env", None) or os.environ
        await super().start_kernel(env={**environment, UNATTENDED: "1"}, **options)


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Raise an `InputError` for a parameter that no cell of `notebook` declares (papermill only warns)."""
    declared = papermill.inspect_notebook(notebook)
    for name in parameters:
        if name not in declared:
            known = ", ".join(declared) or "none at all"
            raise InputError(
                f"{notebook.name} has no parameter {name!r}: its cell tagged 'parameters' declares {known}; "
                f"declare it there with a default, or do not pass it."
            )


def execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> float:
    """Execute `notebook` with `parameters`, store it as `output` cell by cell, and return the minutes it took.

    The progress bars of the notebook show on the terminal, except in CI. A killed execution leaves the cells that
    it finished. Raises `InputError` for an undeclared parameter and `NotebookFailed` when a cell fails.
    """
    check_parameters(notebook, parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    try:
        papermill.execute_notebook(
            notebook.resolve(),
            output.resolve(),
            parameters,
            kernel_name="python3",
            kernel_manager_class=OwnKernel,
            progress_bar=False,
            stderr_file=None if os.environ.get("CI") else sys.stderr,
            start_timeout=START_TIMEOUT,
            execution_timeout=CELL_TIMEOUT,
            cwd=notebook.resolve().parent,
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":  # Ctrl-C reached the kernel first
            raise KeyboardInterrupt from error
        reason = _last_line(f"{error.ename}: {error.evalue}")
        raise NotebookFailed(f"{notebook.name} failed in cell [{error.exec_count}]: {reason}") from error
    except (CellControlSignal, DeadKernelError) as error:  # a cell over its time, or a kernel that died
        raise NotebookFailed(f"{notebook.name} stopped: {_last_line(str(error))}") from error
    return (time.perf_counter() - start) / 60


def chosen(numbers: Iterable[str]) -> list[Path]:
    """The notebooks with these numbers, such as 02, in reading order; all of them if none is given.

    Raises `InputError` for a number that no notebook has.
    """
    notebooks = {notebook.name.partition("_")[0]: notebook for notebook in paths.collection()}
    if not notebooks:
        raise InputError(f"There is no notebook in {paths.NOTEBOOKS}; restore the folder from git.")
    wanted = {number.zfill(2) for number in numbers} or set(notebooks)
    if unknown := sorted(wanted - set(notebooks)):
        raise InputError(f"There is no notebook {unknown[0]}; choose from {', '.join(notebooks)}.")
    return [notebook for number, notebook in notebooks.items() if number in wanted]


def jobs_of(notebooks: Iterable[Path], study: Study) -> list[Job]:
    """The runs that notebooks read, each once, with all that is measured on it for any of them.

    Read from their code: a cell that calls `study.table` or `study.table_or_none` writes out the names of the questions
    that it asks (a name alone in brackets is a column), and `study.trained_model` that of the activation function.
    """
    asked, models = dict[str, None](), dict[str, None]()  # as ordered sets
    for notebook in notebooks:
        for cell in nbformat.read(notebook, as_version=4).cells:
            if cell.cell_type == "code" and "study.table" in cell.source:
                names = re.findall(r'(?<!\[)"(\w+)"(?!\])', cell.source)
                asked |= dict.fromkeys(name for name in names if name in QUESTIONS)
            if cell.cell_type == "code":
                models |= dict.fromkeys(re.findall(r'study\.trained_model\("(\w+)"\)', cell.source))
    return study.jobs(*asked, models=models)


def reproduce(profile: str, numbers: Iterable[str] = (), without: Iterable[str] = ()) -> int:
    """Train and measure what notebooks need, then run them with `source="run"`; return 1 if a notebook failed, else 0.

    `profile` is the name of a shipped profile or the path of a YAML file; `numbers` choose notebooks, as in `chosen`,
    less those of `without`. After the text the plan is printed (`expected`). All runs are done in one pool before the
    first notebook opens; speeds are left to the notebooks, since nothing else may run meanwhile. A failed run or
    notebook does not stop the notebooks that do not need it.

    At the end, and where Ctrl-C ends it after a notebook, one table is printed (question, published, here, interval,
    verdict, minutes of its notebook) and the paths of the figures and of the page on all of it,
    `build/<profile>/report.html`. The table is also stored as `build/<profile>/verdicts.csv`, and drawn as
    `figures/verdicts`.
    """
    study = Study.from_profile(profile)
    name, folder = study.name, study.folder.parent
    if profile.endswith((".yaml", ".yml")):
        profile = str(Path(profile).resolve())  # the notebooks run in their own folder
    parameters = {"source": "run", "profile": profile}
    left_out = chosen(without) if (without := list(without)) else []
    notebooks = [notebook for notebook in chosen(numbers) if notebook not in left_out]
    check(len(notebooks) > 0, "Every notebook is left out; name fewer of them.")
    for notebook in notebooks:  # all of them before the first minute is spent
        check_parameters(notebook, parameters)
    taken: dict[str, float] = {}  # minutes of each step
    plan, failures = _train(study, notebooks, taken), dict[str, str]()
    tables, ended = [], "It was interrupted before the last notebook."
    try:
        for number, notebook in enumerate(notebooks, start=1):
            share = plan.notebook_minutes[notebook.stem] if plan else None
            about = "" if share is None else f", about {share:.1f} min"
            print(f"[{number}/{len(notebooks)}] {notebook.name}, profile {name}{about}", flush=True)
            try:
                tables.append(_verdicts(notebook, folder, parameters, taken))
                keep_minutes(study, notebook.stem, taken[notebook.stem])
            except NotebookFailed as failure:
                print(failure, file=sys.stderr, flush=True)
                failures[notebook.stem] = str(failure)
                tables.append(_one_row(notebook, "failed", minutes=""))
        ended = ""
    finally:
        if tables:
            _report(folder, pd.concat(tables, ignore_index=True))
            print(write_report(study, plan, taken, failures, ended), flush=True)
    for failed in failures.values():
        print(failed, file=sys.stderr)
    return 1 if failures else 0


def _train(study: Study, notebooks: list[Path], taken: dict[str, float]) -> Expected | None:
    """Do the runs of all `notebooks`, after the plan; return it. The first error, if any, is printed."""
    names = ", ".join(notebook.stem for notebook in notebooks)
    print(f"Profile {study.name}: {names}.\nFirst the text is put together, then the plan follows.", flush=True)
    plan, start = None, time.perf_counter()
    try:
        jobs = jobs_of(notebooks, study)
        taken["text"] = (time.perf_counter() - start) / 60
        plan, start = expect(study, notebooks, jobs), time.perf_counter()
        print(plan.told(), flush=True)
        do_jobs(longest_first(jobs), study.profile)
    except Exception as error:  # whatever it is, the notebooks that need the run come upon it
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    taken["runs"] = (time.perf_counter() - start) / 60
    return plan


def refresh() -> None:
    """Execute every notebook in place at its stored defaults, so that its outputs are those of today's code.

    Raises `NotebookFailed` for a failing cell and `InputError` for outputs that do not belong in git; that
    notebook then stays as it was.
    """
    for notebook in progress(paths.collection(), "notebooks"):
        refresh_one(notebook)


def refresh_one(notebook: Path) -> None:
    """`refresh` for a single notebook. Two calls in a row write the same bytes."""
    content = nbformat.read(notebook, as_version=4)
    client = NotebookClient(
        content,
        kernel_name="python3",
        kernel_manager_class=OwnKernel,
        startup_timeout=START_TIMEOUT,
        timeout=CELL_TIMEOUT,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(notebook.resolve().parent)}},
    )
    try:
        client.execute(env=os.environ | {"CI": "1"})  # no progress bars in stored outputs
    except (CellControlSignal, DeadKernelError) as error:
        raise NotebookFailed(f"{notebook.name} was left as it was: {_last_line(str(error))}") from error
    strip(content)
    problems = list(output_problems(content))
    if problems:
        raise InputError(f"{notebook.name} was left as it was: {'; '.join(problems)}; change the cell and run again.")
    with paths.written_aside(notebook) as aside:
        nbformat.write(content, aside)


def strip(content: nbformat.NotebookNode) -> None:
    """Reduce metadata in place to what every machine would write: no timings, versions or random cell ids.

    `refreshed` there is a digest of the code cells with their outputs: it tells a later change of either.
    """
    code = [[cell.source, cell.outputs] for cell in content.cells if cell.cell_type == "code"]
    content.nbformat_minor = 5
    content.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
            "refreshed": hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest(),
        }
    )
    for number, cell in enumerate(content.cells, start=1):
        cell.id = f"cell-{number:02d}"
        for key in NOISE:
            cell.metadata.pop(key, None)


def output_problems(content: nbformat.NotebookNode) -> Iterator[str]:
    """One phrase for each stored output that does not belong in git.

    Errors, widgets (they break static viewers), addresses in memory and absolute paths (they differ between machines).
    """
    if "widgets" in content.metadata:
        yield "the notebook holds the state of widgets"
    for cell in content.cells:
        for output in cell.get("outputs", []):
            where = f"cell [{cell.execution_count}] stores"
            if output.output_type == "error":
                yield f"{where} an error ({output.ename})"
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                yield f"{where} a widget"
            text = _text(output)
            if address := re.search(r"\bat 0x[0-9a-f]{6,}", text):
                yield f"{where} an address in memory ({address[0]})"
            if path := _machine_path().search(text):
                yield f"{where} an absolute path ({path[0]})"


def _text(output: nbformat.NotebookNode) -> str:
    """What a reader sees of an output as text, images left out."""
    data = output.get("data", {})
    return "\n".join([output.get("text", "")] + [str(value) for kind, value in data.items() if kind != "image/png"])


def _machine_path() -> re.Pattern[str]:
    """Paths that exist on one machine only: under the repository, the home folder or this Python, or any home."""
    folders = {str(folder) for folder in (paths.ROOT, Path.home(), Path(sys.prefix)) if len(folder.parts) > 1}
    known = "|".join(re.escape(folder) for folder in sorted(folders))
    return re.compile(rf"(?<![\w.])(?:(?:{known})(?!\w)|/(?:home|Users)/\w)[^\s'\"<>]*")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def _verdicts(notebook: Path, folder: Path, parameters: dict[str, Any], taken: dict[str, float]) -> pd.DataFrame:
    """Execute `notebook` and read the table of verdicts that it wrote; note the minutes that it took."""
    written = folder / "verdicts" / f"{notebook.stem}.csv"
    before = _last_written(written)
    try:
        taken[notebook.stem] = execute(notebook, folder / "notebooks" / notebook.name, parameters)
        if _last_written(written) == before:
            raise NotebookFailed(
                f"{notebook.name} stored no table of verdicts; call study.keep_verdicts in its last cells"
            )
    except NotebookFailed:  # an earlier verdict must not stand for it
        written.unlink(missing_ok=True)
        raise
    table = pd.read_csv(written, dtype=str, keep_default_na=False)[VERDICT_COLUMNS]
    return table.assign(minutes=f"{taken[notebook.stem]:.1f}", notebook=notebook.stem)


def _last_written(file: Path) -> int:
    """When a file was written; 0 where there is none."""
    return file.stat().st_mtime_ns if file.exists() else 0


def _one_row(notebook: Path, verdict: str, minutes: str) -> pd.DataFrame:
    """The row of a notebook that gave no table of verdicts."""
    about = {"question": notebook.stem, "verdict": verdict, "minutes": minutes, "notebook": notebook.stem}
    return pd.DataFrame([dict.fromkeys(VERDICT_COLUMNS, "") | about])


def _report(folder: Path, table: pd.DataFrame) -> None:
    """Print the table of verdicts and the paths of the figures; store the table, and draw it."""
    with paths.written_aside(folder / "verdicts.csv") as aside:
        table.to_csv(aside, index=False)
    at_a_glance.figure(table).save(folder / "figures" / "verdicts")
    print()
    verdicts.show(table)
    for figure in sorted((folder / "figures").glob("*.png")):
        print(figure)
