"""The closing table of `reproduce`: the verdict first, in colour on a terminal, a hundred columns wide at most."""

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED

WIDTH = 100  # columns
STYLES = {SUPPORTED: "green", NOT_SUPPORTED: "red", INCONCLUSIVE: "yellow"}  # any other word: a notebook that failed
FAILED = "bold red"
HEADINGS = ("Verdict", "Claim", "Published", "Here (interval)")
SHARES = (None, 8, 4, 6)  # of the columns in which words wrap


def show(verdicts: pd.DataFrame, console: Console | None = None) -> None:
    """Print a table of verdicts; sentences wrap, so that no line is longer than the terminal or WIDTH.

    verdicts: columns verdict, question, published, here and interval, all of text.
    """
    console = Console() if console is None else console
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading, share in zip(HEADINGS, SHARES, strict=True):
        table.add_column(heading, no_wrap=share is None, ratio=share)
    for row in verdicts.itertuples(index=False):
        here = f"{row.here} ({row.interval})" if row.interval not in ("", "none") else row.here
        table.add_row(Text(row.verdict, STYLES.get(row.verdict, FAILED)), row.question, row.published, here)
    console.print(table, width=min(WIDTH, console.width))
