"""One style for every figure: colours and markers that stay apart in grey; the same table gives the same bytes."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from sparsity_utils import paths

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 4,
    "svg.hashsalt": "activation-sparsity",  # the same table gives the same bytes
}
SCREEN_DPI, PRINT_DPI = 100, 150
COLOURS = sns.color_palette("colorblind").as_hex()
MARKERS = "osD^vP"
LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Look:
    """How the number-th curve of a panel is told apart, in colour and in grey."""

    number: int

    @property
    def colour(self) -> str:
        return COLOURS[self.number % len(COLOURS)]

    @property
    def marker(self) -> str:
        return MARKERS[self.number % len(MARKERS)]

    @property
    def line(self) -> str:
        return LINES[self.number % len(LINES)]


class ShownFigure(Figure):
    """A figure that a notebook shows as PNG and that no pyplot state keeps alive."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png", metadata={"Software": None}, dpi=SCREEN_DPI, bbox_inches="tight")
        return stream.getvalue()


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw under STYLE, whatever style the caller's session has."""

    @wraps(draw)
    def drawn(*tables: Any, **options: Any) -> Figure:
        with mpl.rc_context({**mpl.rcParamsDefault, **STYLE}):
            return draw(*tables, **options)

    return drawn


def save_figure(figure: Figure, target: Path) -> list[Path]:
    """Write `target`.png and `target`.svg, free of dates and versions; return the files."""
    files = [target.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file, metadata in zip(files, ({"Software": None}, {"Date": None, "Creator": None}), strict=True):
        with paths.written_aside(file) as aside, mpl.rc_context({"svg.hashsalt": STYLE["svg.hashsalt"]}):
            figure.savefig(aside, format=file.suffix[1:], metadata=metadata, dpi=PRINT_DPI, bbox_inches="tight")
    return files


def side_by_side(count: int, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels side by side."""
    figure = ShownFigure(figsize=(3.7 * count, 3.4), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=share_y, squeeze=False)[0])


def token_axis(axes: Axes) -> None:
    """Training tokens in millions, on a log scale."""
    axes.set(xscale="log", xlabel="Training tokens (millions)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def captioned(figure: Figure, text: str) -> Figure:
    figure.supxlabel(text, fontsize=8, x=0.01, ha="left", color="dimgrey")
    return figure
