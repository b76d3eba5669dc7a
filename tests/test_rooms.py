"""The rooms of the package: each imports only from those before it, so that a reader can follow the street one way."""

import ast
from pathlib import Path

import pytest

import sparsity_utils
from sparsity_utils import paths

PACKAGE = Path(sparsity_utils.__file__).parent
ROOMS = ["neurons", "text", "models", "sparsity", "decoding", "study", "laws", "findings", "commands"]
TOP = {"paths", "console"}  # what everybody needs


def imported(file: Path) -> set[str]:
    """The rooms, or modules of the top, that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, *rest = node.module.split(".")
            if package == "sparsity_utils":
                found |= {rest[0]} if rest else {alias.name for alias in node.names}
    return found


def test_every_module_stands_in_a_room():
    assert {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()} == set(ROOMS)
    assert {file.stem for file in PACKAGE.glob("*.py")} == TOP | {"__init__", "__main__"}
    assert {folder.name for folder in (paths.ROOT / "tests").iterdir() if folder.is_dir()} - {"__pycache__"} == {
        *(*ROOMS, "kernels", "helpers")
    }


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_those_before_it(room):
    allowed = TOP | set(ROOMS[: ROOMS.index(room) + 1])
    if room == "laws":
        allowed -= {"study"}  # a law knows tables, not runs
    for file in sorted((PACKAGE / room).rglob("*.py")):
        assert imported(file) <= allowed, file.name


def test_the_top_imports_no_room_and_kernels_nothing_of_the_package():
    for name in TOP:
        assert imported(PACKAGE / f"{name}.py") <= TOP, name
    for file in (paths.ROOT / "kernels").glob("*.py"):
        assert not imported(file), file.name
