"""A small notebook that keeps every rule of the collection."""

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from sparsity_utils.commands import notebooks

TITLE = "# Does it?\nThe claim."
PARAMETERS = 'source: str = "recorded"  # or "run"\nprofile: str = "laptop"  # what to train'
VERDICT = "print('verdict: supported')"


def a_notebook(*sources: str) -> nbformat.NotebookNode:
    """A notebook that keeps every rule, before its execution: `sources` between parameters and verdict."""
    cells = [new_code_cell(source) for source in (PARAMETERS, *sources, VERDICT)]
    cells[0].metadata["tags"] = ["parameters"]
    cells[-1].metadata["tags"] = ["nbval-check-output"]
    content = new_notebook(cells=[new_markdown_cell(TITLE), *cells])
    notebooks.strip(content)
    return content
