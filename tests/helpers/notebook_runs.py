"""Execute a notebook of the collection with source "run"."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pandas as pd
from small import write_profile

from sparsity_utils import paths
from sparsity_utils.commands.notebooks import execute


def run_notebook(stem: str, folder: Path, monkeypatch, profile: dict[str, Any], **parameters: str) -> SimpleNamespace:
    """What the notebook `stem` printed, the verdicts and the names of the figures that it stored.

    folder: where the content of `profile`, outputs and runs are written. parameters: of the notebook.
    """
    monkeypatch.setenv("SPARSITY_BUILD", str(folder / "build"))
    settings = {"source": "run", "profile": write_profile(folder, profile), **parameters}
    execute(paths.NOTEBOOKS / f"{stem}.ipynb", folder / "out.ipynb", settings)
    cells = nbformat.read(folder / "out.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    text = "\n".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    stored = paths.profile_output("tiny")
    verdicts = pd.read_csv(stored / "verdicts" / f"{stem}.csv")
    return SimpleNamespace(text=text, verdicts=verdicts, figures={f.stem for f in (stored / "figures").glob("*.png")})
