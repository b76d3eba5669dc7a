"""`make lab` serves the notebooks, and a cell of one runs in its kernel."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Server, running_lab

from sparsity_utils import paths


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running_lab(tmp_path) as lab:
        yield lab


@pytest.mark.slow
def test_lab_serves_the_notebooks_and_runs_a_cell_in_its_kernel(server: Server):
    served = {item["name"] for item in server.ask("GET", "contents")["content"]}
    assert {path.name for path in paths.collection()} <= served

    name = paths.collection()[0].name
    cells = server.ask("GET", f"contents/{name}")["content"]["cells"]
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    kernel = server.ask("POST", "kernels", name="python3")["id"]

    assert server.execute(kernel, code[0])[0] == "ok"
    probe = "import sys, sparsity_utils\nprint(sys.prefix, source, sparsity_utils.__file__)"
    status, printed = server.execute(kernel, probe)
    assert (status, printed) == ("ok", f"{sys.prefix} recorded {paths.ROOT / 'sparsity_utils' / '__init__.py'}\n")
    assert server.execute(kernel, "1 / 0")[0] == "error"
