"""Every verdict of a study in one picture: what was claimed, published and found, a row each."""

import math
import textwrap
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from sparsity_utils.findings.claims import INTERVAL
from sparsity_utils.findings.style import COLOURS, ShownFigure, styled
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED

MARKS: dict[str, dict[str, Any]] = {  # in colour; full, crossed and hollow in grey
    SUPPORTED: {"marker": "o", "color": COLOURS[0], "markersize": 6},
    NOT_SUPPORTED: {"marker": "X", "color": COLOURS[2], "markersize": 7},
    INCONCLUSIVE: {"marker": "D", "color": COLOURS[4], "markersize": 5, "markerfacecolor": "white"},
}
SIGNS = {SUPPORTED: "●", NOT_SUPPORTED: "✖", INCONCLUSIVE: "◇"}  # the same marks where a verdict is written
FAILED: dict[str, Any] = {"marker": "s", "color": "black", "markersize": 6}  # any other word: a notebook that stopped
WIDTH, LINE, GAP = 11.7, 0.135, 0.06  # inches: of the figure, of a line of text, between rows
COLUMNS = {  # heading: inches from the left, letters that fit a line
    "Claim": (0.3, 75),
    "Published": (4.95, 32),
    "Here": (7.05, 40),
    INTERVAL: (9.45, 20),
}
STRIP, HALF = 11.12, 0.52  # inches: the middle of the drawn intervals, half their width
MARK = 0.15  # inches from the left: the sign of the verdict
SIZE, BAR = 7.8, 1.5  # points: of letters, of an interval's line


@styled
def figure(verdicts: pd.DataFrame) -> ShownFigure:
    """One row per claim, under the name of its notebook.

    Units differ, so every interval is drawn on a scale of its own, from zero in the middle to its farther end: it shows
    the side of zero and the relative width, not the threshold.

    verdicts: question, published, here, interval, verdict and notebook, all of text, as in results/verdicts.csv.
    """
    shown = ShownFigure()
    counts = ", ".join(f"{count} {word}" for word, count in verdicts["verdict"].value_counts().items())
    shown.about = (
        f"{len(verdicts)} claims, each with its published value, the value found here and its interval: {counts}."
    )
    axes = shown.add_axes((0, 0, 1, 1))
    y = _header(axes, verdicts["verdict"])
    for notebook, rows in verdicts.groupby("notebook", sort=False):
        axes.text(0.05, y + LINE, notebook.replace("_", " "), fontsize=SIZE + 1, weight="bold")
        axes.plot([0.05, WIDTH - 0.05], [y + 1.4 * LINE] * 2, color="lightgrey", linewidth=0.6)
        y += 1.4 * LINE + GAP
        for row in rows.itertuples(index=False):
            y = _row(axes, row, y)
        y += LINE
    axes.set(xlim=(0, WIDTH), ylim=(y, 0))
    axes.axis("off")
    shown.set_size_inches(WIDTH, y)
    return shown


def _header(axes: Axes, words: pd.Series) -> float:
    """How often each verdict was reached, and what the columns hold; returns where the rows begin."""
    counts, x = words.value_counts(), MARK
    for word in [*MARKS, *sorted(set(words) - set(MARKS))]:
        axes.plot([x], [1.1 * LINE], **MARKS.get(word, FAILED))
        axes.text(x + 0.15, 1.5 * LINE, f"{word}: {counts.get(word, 0)}", fontsize=SIZE + 2)
        x += 1.6
    for name, (x, _) in COLUMNS.items():
        axes.text(x, 3 * LINE, name, fontsize=SIZE, color="dimgrey")
    axes.text(STRIP, 3 * LINE, "line: zero; scales differ", fontsize=SIZE - 1, color="dimgrey", ha="center")
    return 3.8 * LINE


def _row(axes: Axes, row: Any, y: float) -> float:
    """Draw one claim; returns where the next begins."""
    most = 1
    for text, (x, letters) in zip((row.question, row.published, row.here, row.interval), COLUMNS.values(), strict=True):
        lines = textwrap.wrap(text, letters)
        axes.text(x, y, "\n".join(lines), fontsize=SIZE, va="top", linespacing=1.2)
        most = max(most, len(lines))
    below, middle = y + LINE * most, y + LINE / 2
    look = MARKS.get(row.verdict, FAILED)
    axes.plot([MARK], [middle], **look)
    axes.plot([STRIP] * 2, [y - GAP / 2, below + GAP / 2], color="grey", linewidth=0.6)
    value, low, high = _numbers(row)
    reach = max(map(abs, (value, low, high))) / HALF
    if reach > 0:
        axes.plot([STRIP + low / reach, STRIP + high / reach], [middle] * 2, color=look["color"], linewidth=BAR)
        axes.plot([STRIP + value / reach], [middle], **look | {"markersize": 4.5})
    return below + GAP


def _numbers(row: Any) -> tuple[float, float, float]:
    """Estimate and interval; NaN where a row has none."""
    try:
        low, high = map(float, row.interval.split(" (")[0].split(" to "))
        return float(row.here.split()[0]), low, high
    except ValueError:
        return math.nan, math.nan, math.nan
