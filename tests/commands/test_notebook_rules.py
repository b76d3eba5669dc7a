"""The rules of the collection on every notebook, and each rule on a notebook that breaks it."""

import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import notebook_checks
import pytest
from nbformat.v4 import new_output
from small_notebook import PARAMETERS, a_notebook

from sparsity_utils import paths
from sparsity_utils.commands import notebooks


def test_the_collection_is_numbered_without_gaps():
    stems = [path.stem for path in paths.collection()]
    assert stems, "no notebook found"
    assert [stem[:2] for stem in sorted(stems)] == [f"{number:02d}" for number in range(len(stems))]
    assert {path.name for path in paths.NOTEBOOKS.glob("*.ipynb")} == {f"{stem}.ipynb" for stem in stems}


@pytest.mark.parametrize("check", notebook_checks.ALL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", paths.collection(), ids=lambda path: path.stem)
def test_notebook_keeps_the_rule(path: Path, check: Callable):
    assert list(check(nbformat.read(path, as_version=4))) == []


def executed() -> nbformat.NotebookNode:
    """The small notebook with the outputs that an execution leaves."""
    content = a_notebook("x = 1")
    for count, cell in enumerate(notebook_checks.code_cells(content), start=1):
        cell.execution_count = count
    content.cells[-1].outputs = [new_output("stream", text="verdict: supported\n")]
    notebooks.strip(content)
    return content


# The rules themselves: a good notebook passes them all, and each bad one fails the one it should


@pytest.mark.parametrize("check", notebook_checks.ALL, ids=lambda check: check.__name__)
def test_a_good_notebook_passes(check: Callable):
    assert list(check(executed())) == []


def last_output(**data: str) -> Callable:
    return lambda content: content.cells[-1].outputs.append(new_output("display_data", data=data))


def first_code(source: str) -> Callable:
    return lambda content: content.cells[1].update(source=source)


BAD = {
    "no parameters cell": (lambda content: content.cells[1].metadata.clear(), "0 cells are tagged 'parameters'"),
    "executed copy": (
        lambda content: content.cells[2].metadata.update(tags=["injected-parameters"]),
        "it is an executed copy",
    ),
    "untyped": (first_code(PARAMETERS + "\nn = 3  # count"), "not of the form"),
    "derived": (first_code(PARAMETERS + "\nn: int = len(source)  # count"), "the default is not a literal"),
    "silent": (first_code(PARAMETERS + "\nn: int = 3"), "no comment says what it is"),
    "no profile": (first_code('source: str = "recorded"  # or "run"'), "'source' and 'profile' are not both declared"),
    "long cell": (lambda content: content.cells[2].update(source="x = 1\n" * 11), "code cell 2 has 11 lines"),
    "nothing checked": (lambda content: content.cells[-1].metadata.clear(), "no cell is tagged 'nbval-check-output'"),
    "checked but empty": (lambda content: content.cells[-1].update(outputs=[]), "without count or outputs"),
    "checked but not run": (lambda content: content.cells[-1].update(execution_count=None), "without count or outputs"),
    "other kernel": (lambda content: content.metadata.kernelspec.update(name="mine"), "the kernelspec is not python3"),
    "no language": (lambda content: content.metadata.kernelspec.pop("language"), "the kernelspec is not python3"),
    "out of order": (lambda content: content.cells[2].update(execution_count=7), "the execution counts are [1, 7, 3]"),
    "source changed": (lambda content: content.cells[2].update(source="x = 2"), "changed after the last refresh"),
    "output changed": (
        lambda content: content.cells[-1].outputs[0].update(text="verdict: not supported\n"),
        "changed after the last refresh",
    ),
    "timings": (lambda content: content.cells[2].metadata.update(execution={}), "changed after the last refresh"),
    "never refreshed": (lambda content: content.metadata.pop("refreshed"), "changed after the last refresh"),
    "no title": (lambda content: content.cells.pop(0), "the first cell is not a title"),
    "formula": (
        lambda content: content.cells[0].update(source="# Title\n\n$\\Big[x]$"),
        "cannot show the formula",
    ),
    "no verdict": (lambda content: content.cells[-1].update(source="1"), "does not mention the verdict"),
    "error": (
        lambda content: content.cells[2].update(
            outputs=[new_output("error", ename="KeyError", evalue="", traceback=[])]
        ),
        "cell [2] stores an error (KeyError)",
    ),
    "figure without words": (last_output(**{"image/png": "aGk="}), "a figure without alternative text"),
    "name for a heading": (
        last_output(**{"text/html": "<thead><tr><th>d_model</th><th>a_ratio</th></tr></thead>"}),
        "the heading a_ratio",
    ),
    "widget": (last_output(**{"application/vnd.jupyter.widget-view+json": "{}"}), "stores a widget"),
    "widget state": (lambda content: content.metadata.update(widgets={}), "state of widgets"),
    "address": (last_output(**{"text/plain": "<Axes at 0x7f00deadbeef>"}), "an address in memory"),
    "this checkout": (last_output(**{"text/plain": f"'{paths.ROOT}/x.csv'"}), "an absolute path"),
    "this Python": (last_output(**{"text/html": f"<p>{sys.prefix}/lib</p>"}), "an absolute path"),
    "another home": (last_output(**{"text/plain": "/home/ada/x.csv"}), "an absolute path (/home/ada/x.csv)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_notebook_fails(name: str):
    break_it, problem = BAD[name]
    content = executed()
    break_it(content)
    found = [found for check in notebook_checks.ALL for found in check(content)]
    assert any(problem in phrase for phrase in found), found


def test_a_ratio_or_an_address_on_the_web_is_no_path():
    content = executed()
    last_output(**{"text/plain": "d/home/2, https://example.org/home/ada, build/home/x"})(content)
    assert list(notebooks.output_problems(content)) == []
