"""README.md and the pages of docs/: every command is one that works, and blocks marked for it are executed."""

import ast
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import readme
from make import targets, variables

from sparsity_utils import paths
from sparsity_utils.__main__ import command_parser

README = paths.ROOT / "README.md"
BLOCKS = readme.read(README)
PAGES = sorted((paths.ROOT / "docs").glob("*.md"))
RUN = [block for file in (README, *PAGES) for block in readme.read(file) if block.run]
CONDA = {"conda env create -f environment.yml", "conda activate activation-sparsity"}


def check_command(command: str) -> None:
    """Raise AssertionError or SystemExit for a command that this project does not have."""
    words = shlex.split(command)
    if words[0] == "make":
        names = [word for word in words[1:] if "=" not in word]
        assert set(names) <= targets(), command
        assert {word.split("=")[0] for word in words[1:] if "=" in word} <= variables(), command
    elif words[:3] == ["python", "-m", "sparsity_utils"]:
        command_parser().parse_args(words[3:])
    else:
        assert words[0] in ("cd", "git") or command in CONDA, f"no check knows this command: {command}"


def test_the_readme_names_the_two_commands():
    commands = [command for block in BLOCKS if block.language == "bash" for command in block.commands()]
    assert {"make reproduce", "make test"} <= set(commands)


def test_the_first_screen_says_what_one_gets_what_it_costs_and_shows_it():
    text = README.read_text(encoding="utf-8")
    first = "\n".join(text.splitlines()[:15])
    assert "minutes" in first and "](figures/verdicts.png)" in first and "make reproduce" in first
    assert text.count("\n") < 150


def test_no_placeholder_is_left():
    assert "@@" not in README.read_text(encoding="utf-8")


def first_line(block: readme.Block) -> str:
    return block.code.splitlines()[0][:40]


@pytest.mark.parametrize("block", BLOCKS, ids=first_line)
def test_block_names_what_exists(block: readme.Block):
    if block.language == "bash":
        for command in block.commands():
            check_command(command)
    elif block.language == "python":
        check_imports(block.code)
    else:
        assert not block.run, f"a block of {block.language or 'no language'} cannot be executed"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_exist(page: Path):
    """Those of this project; a page may show what a shell or a cluster needs around them."""
    blocks = readme.read(page)
    for code in (block.code for block in blocks if block.language == "python"):
        check_imports(code)
    lines = [line.strip() for block in blocks for line in block.code.splitlines()]
    commands = [line.partition(" &")[0] for line in lines if line.startswith(("python -m sparsity_utils", "make "))]
    for command in commands:
        check_command(command)


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN, ids=first_line)
def test_block_runs(block: readme.Block, tmp_path: Path):
    if "build/smoke" in block.code and not (paths.ROOT / "build" / "smoke" / "results").exists():
        pytest.skip("there is no build/smoke; make test, which comes before make test-slow, runs the smoke profile")
    shell = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": here, "SPARSITY_BUILD": str(tmp_path)}
    command = [*shell, block.code]
    done = subprocess.run(command, cwd=paths.ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def check_imports(code: str) -> None:
    """Raise for Python that does not parse, or that takes a name from this project which it does not have."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "sparsity_utils":
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                found = hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}") is not None
                assert found, f"{node.module} has no {name}"


# The checks themselves

TEXT = f"""Text.

```bash
make reproduce PROFILE=laptop   # forty minutes
python -m sparsity_utils corpus \\
  --profile smoke
```

{readme.RUN}
```python
1 + 1
```
"""


def test_blocks_are_read_with_their_marks():
    shell, python = readme.blocks(TEXT)
    assert (shell.language, shell.run) == ("bash", False)
    assert shell.commands() == ["make reproduce PROFILE=laptop", "python -m sparsity_utils corpus --profile smoke"]
    assert (python.language, python.code, python.run) == ("python", "1 + 1\n", True)
    for command in shell.commands():
        check_command(command)


@pytest.mark.parametrize(
    "command",
    ["make nothing", "make reproduce PROFIL=x", "python -m sparsity_utils nothing", "rm -rf x", "conda activate other"],
)
def test_an_unknown_command_is_refused(command):
    with pytest.raises((AssertionError, SystemExit)):
        check_command(command)


@pytest.mark.parametrize("code", ["from sparsity_utils import nothing_of_the_kind", "1 +"])
def test_python_that_cannot_work_is_refused(code):
    with pytest.raises((AssertionError, SyntaxError)):
        check_imports(code)


def test_the_commands_of_contributing_exist():
    blocks = readme.read(paths.ROOT / "CONTRIBUTING.md")
    commands = [command for block in blocks if block.language == "bash" for command in block.commands()]
    assert commands
    for command in commands:
        check_command(command)


def test_contributing_maps_the_rooms():
    text = (paths.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {folder.parent.name for folder in (paths.ROOT / "sparsity_utils").glob("*/__init__.py")}
    assert rooms == {room for room in rooms if f"| `{room}` |" in text}
