"""How a notebook shows its tables: headings in words, sentences left-aligned and wrapping, numbers right-aligned."""

import re
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

TERMS = ("d_model", "n_layers", "d_ff")  # are words of the field
WORDS = {"rmse": "RMS error", "aicc": "AICc", "cett": "CETT", "ppl": "perplexity", "flops": "FLOPs", "us": "µs"}
ROWS = 80  # of a table; from a longer one pandas leaves out the middle
SENTENCE = 40  # letters from which on a text is given room
LEFT, ROOM = "text-align: left; white-space: normal;", " min-width: 12em;"


def show_in_words() -> None:
    """Have IPython, where it runs, show every table by `as_html`."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        shell.display_formatter.formatters["text/html"].for_type(pd.DataFrame, as_html)


def as_html(table: pd.DataFrame) -> str:
    """What pandas shows, texts uncut, with words for headings and with texts left-aligned.

    Alignment stands in each cell: viewers drop style sheets from notebooks that are not trusted.
    """
    with pd.option_context("display.max_colwidth", None, "display.max_rows", ROWS):
        html = table.rename(columns=in_words).rename_axis(index=in_words, columns=in_words)._repr_html_()
    before, found, after = re.split(r"(<table.*</table>)", html, flags=re.DOTALL)
    root = ElementTree.fromstring(found)
    styles = [_style(table.iloc[:, number]) for number in range(table.shape[1])]
    for row in root.iter("tr"):
        cells = row.findall("td") or row.findall("th")[table.index.nlevels :]
        if len(cells) == len(styles):  # not where pandas leaves columns out, or joins their heads
            for cell, style in zip(cells, styles, strict=True):
                cell.attrib |= {"style": style} if style else {}
    for label in root.findall("tbody/tr/th"):
        label.set("style", LEFT)
    return before + ElementTree.tostring(root, encoding="unicode", method="html") + after


def in_words(label: Any) -> Any:
    """`activation ratio` for `activation_ratio`; what is no text, and a term of the field, stays as it is."""
    if not isinstance(label, str) or label in TERMS:
        return label
    return " ".join(WORDS.get(word, word) for word in label.split("_"))


def _style(column: pd.Series) -> str:
    """Of the cells of a column: nothing for numbers."""
    if is_numeric_dtype(column):
        return ""
    return LEFT + ROOM * bool(column.astype(str).str.len().max() > SENTENCE)
