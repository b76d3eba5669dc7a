"""The stored tables of a study. Importing this loads neither torch nor transformers."""

import json
from pathlib import Path
from typing import Self

import pandas as pd

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.study.plan import PUBLISHED_TABLES, QUESTIONS, SCHEMA


def read_table(file: Path) -> pd.DataFrame:
    """A stored table. Only an empty field is a missing number: a token may be spelt None or NA."""
    return pd.read_csv(file, keep_default_na=False, na_values=[""])


def write_table(table: pd.DataFrame, file: Path) -> None:
    """Store a table, compressed if `file` ends in .gz: the same table always as the same bytes."""
    timeless = {"method": "gzip", "mtime": 0} if file.suffix == ".gz" else None
    with paths.written_aside(file) as aside:
        table.to_csv(aside, index=False, float_format="%.8g", compression=timeless)


class Tables:
    """The tables that a study left in a folder."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder

    @classmethod
    def recorded(cls, folder: Path = paths.RESULTS) -> Self:
        """The tables stored in `folder`; nothing is trained.

        Raises InputError when their manifest names another schema than this version reads.
        """
        manifest = folder / "manifest.json"  # a profile's own tables have none
        schema = json.loads(manifest.read_text(encoding="utf-8")).get("schema") if manifest.exists() else SCHEMA
        if schema != SCHEMA:
            raise InputError(
                f"The tables in {folder} have schema {schema!r}, this version reads {SCHEMA}; use the version of the "
                "project that recorded them, or record them again."
            )
        return cls("recorded", folder)

    def file(self, question: str) -> Path:
        """Where the table of a question is kept. Raises InputError for an unknown question."""
        if question in PUBLISHED_TABLES:
            return paths.PUBLISHED / f"{question}.csv"
        return self.folder / QUESTIONS[known(question)].file

    def answers(self, question: str) -> bool:
        """Whether there is a table of a question."""
        return question in PUBLISHED_TABLES or self.file(question).exists()

    def table(self, question: str) -> pd.DataFrame:
        """The table of a question: one row per checkpoint, or per measured thing (such as a neuron) of each run.

        Columns are described in results/columns.csv. Raises InputError for an unknown question, and for a table that is
        not there.
        """
        file = self.file(question)
        if not file.exists():
            advice = "name a folder that holds a study's results, or train one with make reproduce"
            if question in PUBLISHED_TABLES:
                advice = "make it with python -m sparsity_utils refit"
            raise InputError(f"There is no {file.name} in {file.parent}; {advice}.")
        return read_table(file)

    def table_or_none(self, question: str) -> pd.DataFrame | None:
        """`table`, or None and a printed line where this study leaves the question out."""
        if self.answers(question):
            return self.table(question)
        print(self.lacking(question))
        return None

    def kept(self, question: str) -> pd.DataFrame | None:
        """The table of a question where it lies already, else None: nothing is trained or measured for it."""
        file = self.file(question)
        return read_table(file) if file.exists() else None

    def lacking(self, question: str) -> str:
        """The line on a question that this study leaves out."""
        return f"The {self.name} study has no table for {question}."


def known(question: str) -> str:
    """The question itself. Raises InputError for one that the plan does not have."""
    if question not in QUESTIONS:
        every = ", ".join([*QUESTIONS, *PUBLISHED_TABLES])
        raise InputError(f"There is no question {question!r}; choose one of {every}.")
    return question
