"""The closing table: every word of the recorded verdicts, the verdict first, within the width of a terminal."""

import io

import pandas as pd
import pytest
from rich.console import Console

from sparsity_utils import paths
from sparsity_utils.commands.verdicts import STYLES, show

RECORDED = pd.read_csv(paths.RESULTS / "verdicts.csv", dtype=str, keep_default_na=False)


def shown(table: pd.DataFrame, width: int, **how) -> list[str]:
    file = io.StringIO()
    show(table, Console(file=file, width=width, **how))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 300])
def test_no_line_is_wider_than_the_terminal_or_a_hundred_columns(width):
    lines = shown(RECORDED, width)
    assert max(map(len, lines)) <= min(width, 100)
    rows = [line.split("  ")[0].strip() for line in lines]
    assert [row for row in rows if row in STYLES] == RECORDED["verdict"].tolist()


def test_every_word_is_shown():
    printed = " ".join(word for line in shown(RECORDED, 100) for word in line.split())
    for column in ("question", "here", "published"):
        for word in {word for cell in RECORDED[column] for word in cell.split()}:
            assert word in printed


def test_colour_is_for_terminals():
    assert not any("\x1b" in line for line in shown(RECORDED, 100))
    assert any(
        "\x1b[32msupported" in line for line in shown(RECORDED, 100, force_terminal=True, color_system="standard")
    )
