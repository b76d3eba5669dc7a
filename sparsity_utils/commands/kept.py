"""Notebooks on a pretrained model that a record leaves as they are: their numbers take hours and rest on no new run."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from sparsity_utils import paths
from sparsity_utils.commands.notebooks import chosen
from sparsity_utils.console import InputError
from sparsity_utils.study.makers.training_free import EXAMPLE
from sparsity_utils.study.plan import PRETRAINED, TRAINING_FREE_TABLES
from sparsity_utils.study.study import Study

# Their verdicts rest on these tables alone. Notebook 13 also measures the study's largest ReLU model.
TABLES = {"09_pretrained_model": PRETRAINED, "10_training_free": TRAINING_FREE_TABLES}


def kept_notebooks(numbers: Iterable[str]) -> list[str]:
    """The names of the notebooks with these numbers, such as 09; none for none.

    Raises InputError for a number that no notebook has, and for a notebook that rests on runs of the study.
    """
    names = [notebook.stem for notebook in chosen(numbers)] if (numbers := list(numbers)) else []
    if others := [name for name in names if name not in TABLES]:
        raise InputError(f"{others[0]} rests on runs of the study and cannot be kept; only {', '.join(TABLES)} can.")
    return names


def kept_tables(study: Study, notebooks: Iterable[str]) -> set[str]:
    """The recorded tables that stay with these notebooks, by file name.

    They hold the pretrained model of the profile and perhaps decoders, whose shape, activation function and seed must
    be those of runs that the profile asks for. Raises InputError for any other model.
    """
    files = {study.file(question).name for notebook in notebooks for question in TABLES[notebook]}
    given = {Path(study.profile.pretrained.model).name, EXAMPLE}
    runs = {config.title for config in study.configs(TRAINING_FREE_TABLES[0])} if files else set()
    for file in filter(Path.exists, (paths.RESULTS / name for name in sorted(files))):
        table = pd.read_csv(file)
        rows = table[["model", "seed"]].drop_duplicates().itertuples() if {"model", "seed"} <= set(table) else ()
        own = (row for row in rows if row.model not in given)
        if others := sorted({f"{row.model} seed {row.seed:.0f}" for row in own} - runs):
            raise InputError(f"{file.name} holds {others[0]}, which is no run of this study; reproduce its notebook.")
    return files


def kept_verdicts(notebooks: list[str], columns: Iterable[str]) -> pd.DataFrame:
    """The recorded verdicts of these notebooks. Raises InputError for one that has none."""
    file = paths.RESULTS / "verdicts.csv"
    none = pd.DataFrame(columns=list(columns), dtype=str)
    before = pd.read_csv(file, dtype=str, keep_default_na=False) if notebooks and file.exists() else none
    if unknown := sorted(set(notebooks) - set(before["notebook"])):
        raise InputError(f"There are no recorded verdicts of {unknown[0]} to keep; reproduce it.")
    return before[before["notebook"].isin(notebooks)]
