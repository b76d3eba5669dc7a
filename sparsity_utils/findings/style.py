"""One style for every figure: colours and markers that stay apart in grey; the same table gives the same bytes."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from sparsity_utils import paths
from sparsity_utils.console import short_number

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
}
SCREEN_DPI, PRINT_DPI = 100, 150
# Apart for every eye: the six of arXiv 2107.02270, in matplotlib from 3.10 on as petroff6.
COLOURS = ("#5790fc", "#f89c20", "#e42536", "#964a8b", "#9c9ca1", "#7a21dd")
MARKERS = "osD^vPX*<"  # more than colours, so that a pair of the two returns only after 18 curves
LINES = ("-", "--", "-.", ":")
AXIS = "Active neurons (% of d_ff)"
SMOOTH = 0.99  # a share of non-zero neurons above it says nothing: the activation function is smooth
# What differs between processors in an SVG: the last digits of coordinates (PLACES, in the attributes PLACED), and the
# names that matplotlib hashes from them for markers, clips and images (NAMED).
PLACES = re.compile(r'(?<=[\s(">MLCQ])-?\d+\.\d{3,}(?=[\s)"<])')
PLACED = re.compile(r'(?:\s(?:d|x|y|width|height|points)="[^"]*"|translate\([^)]*\))')
NAMED = re.compile(r'(?<=[#"])\w*?[0-9a-f]{10}(?=[")])')


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
    """A figure that a notebook shows as PNG, with words for who cannot see it; no pyplot state keeps it alive."""

    about = ""  # those words, where axes do not tell what is drawn

    def __repr__(self) -> str:
        return self.words()

    def words(self) -> str:
        """Alternative text, from what is written in the figure: each panel's title, axes and series; the caption."""
        if self.about:
            return self.about
        panels = [axes for axes in self.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]
        named = [f"Panel {number}: {_words(axes)}" for number, axes in enumerate(panels, start=1)]
        parts = named if len(panels) > 1 else [_words(axes) for axes in panels]
        about = [f"Figure of {len(panels)} panel{'s' if len(panels) != 1 else ''}", *parts, self.get_supxlabel()]
        return " ".join(f"{' '.join(part.split()).rstrip('.')}." for part in about if part)

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        stream = io.BytesIO()
        self.savefig(stream, format="png", metadata={"Software": None}, dpi=SCREEN_DPI, bbox_inches="tight")
        return stream.getvalue(), {"alt": self.words()}

    def save(self, target: Path) -> list[Path]:
        """Write `target`.png and `target`.svg, free of dates and versions; return the files. Both hold the `words`."""
        about = {"Description": self.words()}
        files = [target.with_suffix(suffix) for suffix in (".png", ".svg")]
        with paths.written_aside(files[0]) as aside:
            self.savefig(aside, format="png", metadata=about | {"Software": None}, dpi=PRINT_DPI, bbox_inches="tight")
        stream = io.StringIO()
        self.savefig(stream, format="svg", metadata=about | {"Date": None, "Creator": None}, bbox_inches="tight")
        with paths.written_aside(files[1]) as aside:
            aside.write_text(_steady(stream.getvalue()), encoding="utf-8")
        return files


def _words(axes: Axes) -> str:
    """Such as `Loss: Nats per token against Tokens, log scale; ReLU; SiLU`: title, what is plotted, each series."""
    about = [axes.get_title("left") or axes.get_title()]
    scales = [(axis.get_label_text(), ", log scale" * (axis.get_scale() == "log")) for axis in (axes.yaxis, axes.xaxis)]
    about.append(" against ".join(name + scale for name, scale in scales if name))
    return "; ".join([": ".join(filter(None, about)), *axes.get_legend_handles_labels()[1]])


def _steady(svg: str) -> str:
    """An SVG with coordinates rounded to 0.01 points and names numbered in order, so that redrawing changes no byte."""
    names: dict[str, str] = {}
    for name in NAMED.findall(svg):
        names.setdefault(name, f"name{len(names)}")
    svg = NAMED.sub(lambda found: names[found[0]], svg)
    return PLACED.sub(lambda place: PLACES.sub(lambda number: f"{float(number[0]):.2f}", place[0]), svg)


def styled(draw: Callable[..., ShownFigure]) -> Callable[..., ShownFigure]:
    """Draw under STYLE, whatever style the caller's session has."""

    @wraps(draw)
    def drawn(*tables: Any, **options: Any) -> ShownFigure:
        with mpl.rc_context({**mpl.rcParamsDefault, **STYLE}):
            return draw(*tables, **options)

    return drawn


def side_by_side(count: int, share_y: bool = False) -> tuple[ShownFigure, list[Axes]]:
    """A figure of `count` panels side by side."""
    figure = ShownFigure(figsize=(3.7 * count, 3.4), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=share_y, squeeze=False)[0])


def token_axis(axes: Axes) -> None:
    """Make x an axis of training tokens in millions, on a log scale."""
    axes.set(xscale="log", xlabel="Training tokens (millions)")
    plain_log(axes.xaxis)


def plain_log(axis: Axis, steps: tuple[int, ...] = (1, 2, 5)) -> None:
    """Ticks at `steps` times the powers of ten of a log scale, as plain numbers: 20, not 2 x 10^1."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.minorticks_off()


def dodged(sizes: pd.Series, step: float = 1.08) -> pd.Series:
    """Where to draw runs on a log axis of sizes: those of one size beside each other, so that none hides another.

    step: from one to the next, as a factor.
    """
    same = sizes.groupby(sizes)
    return sizes * step ** (same.cumcount() - (same.transform("size") - 1) / 2)


def captioned(figure: ShownFigure, text: str) -> ShownFigure:
    """The figure with `text` below it."""
    figure.supxlabel(text, fontsize=8, x=0.01, ha="left", color="dimgrey")
    return figure


def price_name(checkpoints: pd.DataFrame) -> str:
    """`CETT-PPL-1%`."""
    return f"CETT-PPL-{checkpoints['p'].iloc[0]:g}%"


def shape_name(rows: pd.DataFrame) -> str:
    """`48x3`, of the first row."""
    first = rows.iloc[0]
    return f"{first['d_model']:g}x{first['n_layers']:g}"


def machine_name(rows: pd.DataFrame) -> str:
    """`Intel Xeon, 2 threads, 2026-01-31`, of the first row."""
    first = rows.iloc[0]
    return f"{first['device']}, {first['threads']} threads, {first['date']}"


def parameters_name(rows: pd.DataFrame) -> str:
    """`45k parameters`, or the mean where shapes differ a little."""
    return f"{short_number(rows.drop_duplicates(['d_model', 'n_layers'])['parameters'].mean())} parameters"


def seeds_name(rows: pd.DataFrame) -> str:
    """`2 seeds`, or `1 to 3 seeds` where shapes have unequally many."""
    counts = rows.groupby(["activation", "d_model", "n_layers"])["seed"].nunique()
    few, many = counts.min(), counts.max()
    return f"{few} to {many} seeds" if few < many else f"{many} seed{'s' if many > 1 else ''}"
