"""The rules that every notebook of the collection keeps, each a function: notebook in, problems out."""

import ast
import copy
import re
from collections.abc import Iterator

from nbformat import NotebookNode

from docs.book import latex2mathml
from sparsity_utils.commands.notebooks import output_problems, strip
from sparsity_utils.findings.tables import TERMS

MAX_LINES = 10


def code_cells(content: NotebookNode) -> list[NotebookNode]:
    """The code cells, in order."""
    return [cell for cell in content.cells if cell.cell_type == "code"]


def tagged(content: NotebookNode, tag: str) -> list[NotebookNode]:
    """The code cells with `tag`."""
    return [cell for cell in code_cells(content) if tag in cell.metadata.get("tags", [])]


def parameters(content: NotebookNode) -> Iterator[str]:
    """One cell tagged `parameters`: each line a typed name, a literal default and a comment."""
    cells = tagged(content, "parameters")
    if len(cells) != 1:
        yield f"{len(cells)} cells are tagged 'parameters', not one"
    if tagged(content, "injected-parameters"):
        yield "it is an executed copy: a cell is tagged 'injected-parameters'"
    declared = set()
    for cell in cells:
        for line in filter(str.strip, cell.source.splitlines()):
            yield from _parameter_line(line)
            declared.add(line.split(":")[0].strip())
    if not {"source", "profile"} <= declared:
        yield "the parameters 'source' and 'profile' are not both declared"


def _parameter_line(line: str) -> Iterator[str]:
    statement = (ast.parse(line).body or [None])[0]
    if not isinstance(statement, ast.AnnAssign) or statement.value is None:
        yield f"not of the form 'name: type = default  # what it is': {line}"
        return
    try:
        ast.literal_eval(statement.value)
    except ValueError:
        yield f"the default is not a literal: {line}"
    if not line[statement.end_col_offset :].strip().startswith("#"):
        yield f"no comment says what it is: {line}"


def short_cells(content: NotebookNode) -> Iterator[str]:
    """Code cells of at most ten lines."""
    for number, cell in enumerate(code_cells(content), start=1):
        if (lines := len(cell.source.splitlines())) > MAX_LINES:
            yield f"code cell {number} has {lines} lines, more than {MAX_LINES}"


def checked_cells(content: NotebookNode) -> Iterator[str]:
    """At least one cell that nbval compares: tagged, executed and with outputs (nbval skips it silently otherwise)."""
    cells = tagged(content, "nbval-check-output")
    if not cells:
        yield "no cell is tagged 'nbval-check-output'"
    for cell in cells:
        if cell.execution_count is None or not cell.outputs:
            yield f"tagged 'nbval-check-output' but without count or outputs, so not compared: {cell.source[:40]!r}"


def kernel(content: NotebookNode) -> Iterator[str]:
    """Kernelspec `python3` with its language, which papermill needs."""
    spec = content.metadata.get("kernelspec", {})
    if (spec.get("name"), spec.get("language")) != ("python3", "python"):
        yield f"the kernelspec is not python3 with language python: {dict(spec)}"


def executed_in_order(content: NotebookNode) -> Iterator[str]:
    """Execution counts 1 to n, as one execution from top to bottom leaves them."""
    counts = [cell.execution_count for cell in code_cells(content)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"the execution counts are {counts}; run `make notebooks`"


def refreshed(content: NotebookNode) -> Iterator[str]:
    """As `make notebooks` left it: no code cell, output or metadata was changed since."""
    again = copy.deepcopy(content)
    strip(again)
    if again != content:
        yield "a code cell, an output or metadata was changed after the last refresh; run `make notebooks`"


def figures_in_words(content: NotebookNode) -> Iterator[str]:
    """Alternative text for every figure, as `ShownFigure` gives it."""
    for cell in code_cells(content):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}) and not output.metadata.get("image/png", {}).get("alt"):
                yield f"cell [{cell.execution_count}] stores a figure without alternative text; run `make notebooks`"


def headings_in_words(content: NotebookNode) -> Iterator[str]:
    """Tables as `findings.tables.as_html` shows them: no name of a column in their heads."""
    for cell in code_cells(content):
        for output in cell.outputs:
            html = output.get("data", {}).get("text/html", "")
            for head in re.findall(r"<thead>.*?</thead>", "".join(html), re.DOTALL):
                for name in sorted(set(re.findall(r">(\w+_\w+)<", head)) - set(TERMS)):
                    yield f"cell [{cell.execution_count}] stores a table with the heading {name}; run `make notebooks`"


def anatomy(content: NotebookNode) -> Iterator[str]:
    """A title first, and a verdict near the end."""
    first, last = content.cells[0], content.cells[len(content.cells) * 2 // 3 :]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "the first cell is not a title"
    if not any("verdict" in cell.source.lower() for cell in last):
        yield "the last third does not mention the verdict"


def finished_prose(content: NotebookNode) -> Iterator[str]:
    """No placeholder that somebody meant to fill in."""
    for cell in content.cells:
        if "@@" in cell.source:
            yield f"a placeholder is left: {cell.source[:40]!r}"


FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$([^$\n]+?)\$", re.DOTALL)


def shown_formulas(content: NotebookNode) -> Iterator[str]:
    """Formulas in the LaTeX that the book turns into MathML; it stops at a command that it does not know."""
    for cell in content.cells:
        for found in FORMULA.finditer(cell.source) if cell.cell_type == "markdown" else ():
            formula = found[1] or found[2]
            try:
                latex2mathml.tex2mathml(formula)
            except latex2mathml.MathError as error:
                yield f"the book cannot show the formula {formula!r}: {error}"


ALL = (
    *(parameters, short_cells, checked_cells, kernel, executed_in_order, refreshed, anatomy, finished_prose),
    *(figures_in_words, headings_in_words, shown_formulas, output_problems),
)
