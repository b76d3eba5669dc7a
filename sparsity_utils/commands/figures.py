"""Redraw the figures of a study from its tables, those of every notebook. Importing this loads no torch."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path

import pandas as pd

from sparsity_utils.console import check, progress
from sparsity_utils.findings import at_a_glance
from sparsity_utils.paths import collection
from sparsity_utils.study.tables import Tables


def draw_all(tables: Path, folder: Path) -> Iterator[Path]:
    """Draw every figure that the study in `tables` has the tables for into `folder`, PNG and SVG; yield the files.

    Notebooks are drawn side by side, a process per core: fitting their laws is most of the work. The last figure is the
    picture of all verdicts. Raises InputError for a folder that holds no tables.
    """
    check(
        any(tables.glob("*.csv")), f"{tables} holds no tables; name the folder that has results/, as build/laptop has."
    )
    names = [notebook.stem.partition("_")[2] for notebook in collection()]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for files in progress(pool.map(partial(_draw_stored, tables, folder), names), "notebooks", len(names)):
            yield from files
    judged = (tables / "verdicts.csv", tables.parent / "verdicts.csv")  # of the recorded study; of a run of one's own
    for table in [table for table in judged if table.exists()][:1]:
        yield from draw_verdicts(table, folder)


def draw_verdicts(table: Path, folder: Path) -> list[Path]:
    """Draw all verdicts of a study in one picture. Raises InputError for a table of an earlier version."""
    verdicts = pd.read_csv(table, dtype=str, keep_default_na=False)
    check("notebook" in verdicts, f"{table} does not name notebooks; run make reproduce again, which does.")
    return at_a_glance.figure(verdicts).save(folder / "verdicts")


def draw(finding: str, study: Tables, folder: Path) -> list[Path]:
    """Draw the figures of one notebook, `NN_finding`, which the module `findings.finding` makes."""
    figures = import_module(f"sparsity_utils.findings.{finding}").figures(study)
    return [file for name, figure in figures for file in figure.save(folder / name)]


def _draw_stored(tables: Path, folder: Path, finding: str) -> list[Path]:
    return draw(finding, Tables.recorded(tables), folder)
