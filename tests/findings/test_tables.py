"""Tables as a notebook shows them: words for headings, texts to the left, numbers as they were."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest

from sparsity_utils.findings.tables import ROOM, as_html, in_words

SENTENCE = "a < b & the words of a whole sentence that must wrap somewhere"
TABLE = pd.DataFrame(
    {"claim_made": [SENTENCE, "no"], "verdict": ["yes", None], "rmse": [0.5, np.nan], "d_model": [16, 32]},
    index=pd.Index(["relu", "silu"], name="activation_function"),
)


def table_of(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(html[html.index("<table") : html.index("</table>") + len("</table>")])


def texts(html: str) -> list[list[str]]:
    return [[cell.text or "" for cell in row] for row in table_of(html).iter("tr")]


def test_headings_are_words_and_terms_of_the_field_stay():
    heads = texts(as_html(TABLE))[:2]
    assert heads == [["", "claim made", "verdict", "RMS error", "d_model"], ["activation function", "", "", "", ""]]
    assert in_words("delta_aicc") == "delta AICc" and in_words(3) == 3 and in_words(None) is None


def test_texts_stand_left_with_room_for_sentences_and_numbers_as_pandas_has_them():
    first = table_of(as_html(TABLE)).findall("tbody/tr")[0]
    claim, verdict, *numbers = first.findall("td")
    assert claim.text == SENTENCE and ROOM in claim.get("style")
    assert "text-align: left" in verdict.get("style") and ROOM not in verdict.get("style")
    assert [cell.get("style") for cell in numbers] == [None, None]


@pytest.mark.parametrize(
    "table",
    [
        TABLE,
        TABLE.reset_index(),
        TABLE.head(0),
        pd.DataFrame(np.arange(400).reshape(100, 4), columns=list("abcd")),
        pd.DataFrame(np.arange(60).reshape(2, 30)),
        TABLE.assign(more="x").pivot_table("rmse", "verdict", ["more", "claim_made"]),
        TABLE.set_index("d_model", append=True),
    ],
    ids=["index", "columns", "empty", "long", "wide", "two heads", "two indices"],
)
def test_every_cell_is_the_one_that_pandas_shows(table):
    with pd.option_context("display.max_colwidth", None):
        plain = texts(table._repr_html_())
    assert texts(as_html(table)) == [
        [in_words(cell) if number < 3 else cell for cell in row] for number, row in enumerate(plain)
    ]


def printed(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_a_notebook_shows_tables_so_and_a_terminal_loads_nothing():
    shell = "from IPython.core.interactiveshell import InteractiveShell; shell = InteractiveShell.instance()"
    load = "import sys, pandas, sparsity_utils.findings"
    shown = "shell.display_formatter.format(pandas.DataFrame({'a_b': ['x']}))[0]['text/html']"
    html = printed(f"{shell}; {load}; print({shown})")
    assert "text-align: left" in html and "a b" in html
    assert printed(f"{load}; print('IPython' in sys.modules)") == "False\n"
