"""Redraw the figures of a study from its tables, those of every notebook."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from sparsity_utils.commands.notebooks import collection
from sparsity_utils.study.study import Study


def draw_all(study: Study, folder: Path) -> Iterator[Path]:
    """Draw every figure that a study has the tables for into `folder`, PNG and SVG; yield the files.

    A notebook `NN_name` finds its figures in the module `findings.name`.
    """
    for notebook in collection():
        finding = import_module(f"sparsity_utils.findings.{notebook.stem.partition('_')[2]}")
        for name, figure in finding.figures(study):
            yield from figure.save(folder / name)
