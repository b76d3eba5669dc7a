"""The picture of all verdicts: every word of the table is in it, nothing runs into another, shapes tell verdicts."""

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sparsity_utils import paths
from sparsity_utils.findings import at_a_glance
from sparsity_utils.findings.at_a_glance import FAILED, MARKS, STRIP

RECORDED = pd.read_csv(paths.RESULTS / "verdicts.csv", dtype=str, keep_default_na=False)
MORE = pd.concat([RECORDED, RECORDED.tail(20).assign(notebook="10_more")], ignore_index=True)
STOPPED = {"question": "01_a", "published": "", "here": "", "interval": "", "verdict": "failed", "notebook": "01_a"}


def drawn(table: pd.DataFrame):
    figure = at_a_glance.figure(table)
    return figure, figure.axes[0]


@pytest.mark.parametrize("table", [RECORDED, MORE, RECORDED.head(1)], ids=["recorded", "20 more claims", "one claim"])
def test_every_text_stands_in_the_picture_and_none_runs_into_another(table):
    figure, axes = drawn(table)
    renderer = FigureCanvasAgg(figure).get_renderer()  # one: left to itself every text makes its own, of 43 MB
    boxes = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]
    assert not overlaps
    shown = " ".join(text.get_text() for text in axes.texts).split()
    words = {
        word
        for column in ("question", "published", "here", "interval")
        for cell in table[column]
        for word in cell.split()
    }
    assert words <= set(shown)


def marks(axes) -> list[tuple[str, str]]:
    """Shape and colour of the mark before each claim."""
    return [
        (line.get_marker(), line.get_color()) for line in axes.lines if list(line.get_xdata()) == [at_a_glance.MARK]
    ]


def test_a_verdict_is_told_by_shape_and_by_colour():
    table = pd.concat([RECORDED, pd.DataFrame([STOPPED])])
    looks = [MARKS.get(word, FAILED) for word in table["verdict"]]
    assert marks(drawn(table)[1])[-len(table) :] == [(look["marker"], look["color"]) for look in looks]
    every = [*MARKS.values(), FAILED]
    assert len({look["marker"] for look in every}) == len({look["color"] for look in every}) == len(every)


def test_an_interval_is_drawn_on_its_own_scale_around_zero():
    row = {"question": "q", "published": "none", "verdict": "inconclusive", "notebook": "01_a"}
    table = pd.DataFrame(
        [row | {"here": "2 points", "interval": "-1 to 4 (95%)"}, row | {"here": "none", "interval": "none"}]
    )
    axes = drawn(table)[1]
    bars = [line for line in axes.lines if line.get_linewidth() == at_a_glance.BAR and len(line.get_xdata()) == 2]
    (bar,) = (list(line.get_xdata()) for line in bars)
    assert bar == pytest.approx([STRIP - at_a_glance.HALF / 4, STRIP + at_a_glance.HALF])
