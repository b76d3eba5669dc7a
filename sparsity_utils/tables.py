"""Tables that a study need not have."""

import pandas as pd

from sparsity_utils.errors import InputError
from sparsity_utils.study import Study


def table_or_none(study: Study, question: str) -> pd.DataFrame | None:
    """The table of a question, or None, with a printed line, for a study that has none."""
    try:
        return study.table(question)
    except InputError:
        print(f"The {study.name} study has no table for {question}.")
        return None
