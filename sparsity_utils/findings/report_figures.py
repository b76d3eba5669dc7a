"""Figures of one measured model: bars per layer, a heatmap of layers and tokens, a text coloured by activation."""

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import Normalize, to_hex
from matplotlib.font_manager import FontProperties, findfont, get_font

from sparsity_utils.console import InputError
from sparsity_utils.findings.style import AXIS, COLOURS, SMOOTH, ShownFigure, captioned, styled

if TYPE_CHECKING:  # redrawing figures need not load torch
    from transformers import PreTrainedTokenizerBase

    from sparsity_utils.sparsity.metrics import SparsityReport

SHADES = "Blues"  # lightness alone tells the values apart, so that they stay apart in grey
ROBUST = (2.0, 98.0)  # percentiles that the shades span: one outlying token must not bleach the others
SHOWN = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}  # white space made visible
SPACES = re.compile(" {3,}")  # shown as a count
LONGEST_LABEL = 14  # characters of a token along an axis
LEGEND_STEPS = 5
DARKEST = 0.65  # of the shades behind text: black letters keep a contrast of 5
STRONG = 0.9  # quantile of the tokens above which coloured text is bold as well


@styled
def layer_bars(report: "SparsityReport") -> ShownFigure:
    """Activation ratio of each layer; the model's mean with its 90% interval; the non-zero share where there is one."""
    layers, mean = report.layers, 100 * report.activation_ratio
    figure = ShownFigure(figsize=(min(10.0, max(4.4, 1.8 + 0.3 * len(layers))), 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(layers["layer"], 100 * layers["activation_ratio"], color=COLOURS[0], width=0.7)
    axes.axhline(mean, color="black", linestyle="--", linewidth=1, label=f"mean {mean:.1f}%")
    low, high = (100 * end for end in report.interval)
    if np.isfinite([low, high]).all():
        label = f"its 90% interval, {low:.1f} to {high:.1f}%"
        axes.axhspan(low, high, color="grey", alpha=0.35, linewidth=0, label=label, zorder=2)
    if (layers["nonzero_share"] < SMOOTH).any():
        style = {"marker": "_", "s": 900 / len(layers), "color": "black", "label": "not zero", "zorder": 3}
        axes.scatter(layers["layer"], 100 * layers["nonzero_share"], **style)
    axes.set(xlabel="Layer", ylabel=AXIS)
    axes.set_ylim(0, max(1.0, 1.15 * axes.dataLim.ymax))
    _whole_ticks(axes.xaxis, len(layers))
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside upper left", ncols=3, fontsize=8)
    return captioned(figure, _basis(report))


@styled
def token_heatmap(per_token: pd.DataFrame, tokens: Sequence[str]) -> ShownFigure:
    """Share of active neurons, layers down and tokens along, as arXiv 2411.02335 shows it; above, the mean over layers.

    Args:
        per_token: consecutive rows of `SparsityReport.per_token`; 40 to 60 are readable.
        tokens: the text of each of these tokens, as `token_texts` gives it.

    Raises `InputError` when the two differ in length or are empty.
    """
    values = 100 * _layer_columns(per_token, tokens)  # (tokens, layers)
    count, layers = values.shape
    size = (1.6 + 0.17 * max(count, 16), 2.4 + min(6.0, 0.2 * layers))
    figure = ShownFigure(figsize=size, layout="constrained")
    heights = [0.6, min(6.0, max(0.8, 0.2 * layers))]
    figure.get_layout_engine().set(hspace=0)
    top, axes = figure.subplots(2, 1, sharex=True, height_ratios=heights)
    top.bar(range(count), values.mean(axis=1), color="dimgrey", width=0.8)
    top.set_ylabel("mean", rotation=0, ha="right", va="center")
    top.grid(visible=False, axis="x")
    top.tick_params(bottom=False)
    image = axes.imshow(values.T, aspect="auto", cmap=SHADES, norm=_shades(values), interpolation="nearest")
    axes.set_ylabel("Layer")
    axes.grid(visible=False)
    axes.set_xticks(range(count), [_label(token) for token in tokens], rotation=90, fontsize=7.5, parse_math=False)
    _whole_ticks(axes.yaxis, layers)
    thin = {"pad": 0.01, "aspect": 6 * size[1], "extendfrac": 0.03}
    figure.colorbar(image, ax=[top, axes], label=AXIS, extend="both", **thin)
    return captioned(figure, f"{count} consecutive tokens; · is a space, ↵ a line end. Shades span the middle 96%.")


@dataclass(frozen=True)
class ColouredText:
    """A text in which each token is shaded by its activation ratio, the highest in bold, should colours be lost."""

    pieces: tuple[str, ...]
    percent: tuple[float, ...]  # active neurons of each token, mean over layers, in percent of d_ff

    def _repr_html_(self) -> str:
        norm = _shades(np.array(self.percent))
        strong = float(np.quantile(self.percent, STRONG))
        shown = zip(self.pieces, self.percent, strict=True)
        body = "".join(_span(piece, value, norm, value > strong) for piece, value in shown)
        steps = np.linspace(norm.vmin, norm.vmax, LEGEND_STEPS)
        legend = " ".join(_span(f" {step:.1f}% ", step, norm, False) for step in steps)
        return (
            '<div style="background:#ffffff;color:#000000;padding:0.6em">'
            f'<pre style="white-space:pre-wrap;line-height:1.5;background:#ffffff;color:#000000">{body}</pre>'
            f"<p>Active neurons, mean over layers: {legend} (bold: the highest tenth)</p></div>"
        )

    def __repr__(self) -> str:
        """The text as it is, and a line that says what the colours would have shown."""
        order = np.argsort(self.percent, kind="stable")
        ends = [f"{self.percent[place]:.1f}% at {self.pieces[place]!r}" for place in (order[0], order[-1])]
        line = f"active neurons, mean over layers: {np.mean(self.percent):.1f}% on average, {ends[0]} to {ends[1]}"
        return f"{''.join(self.pieces)}\n[{line}]"


def coloured_text(per_token: pd.DataFrame, pieces: Sequence[str]) -> ColouredText:
    """The text of consecutive tokens, each shaded by its activation ratio (mean over layers); a notebook shows it.

    Arguments and errors as for `token_heatmap`. All text is escaped and its white space kept.
    """
    values = 100 * _layer_columns(per_token, pieces)  # (tokens, layers)
    return ColouredText(tuple(pieces), tuple(values.mean(axis=1).tolist()))


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int]) -> list[str]:
    """What each token adds to the text: the pieces joined are the decoded tokens.

    A character made of several tokens stands with the last of them; those before it are empty.
    """
    ids, pieces, done = [int(token) for token in ids], [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        pieces.append(text[len(done) :] if whole else "")
        done = text if whole else done
    return pieces


def _layer_columns(per_token: pd.DataFrame, tokens: Sequence[str]) -> np.ndarray:
    """The activation ratios alone, (tokens, layers)."""
    values = per_token.filter(regex=r"^layer_\d+$").to_numpy(dtype=float)
    if not len(tokens) == len(values) > 0:
        raise InputError(
            f"{len(values)} rows of per-token ratios were given for {len(tokens)} tokens: give one text per row."
        )
    return values


def _shades(percent: np.ndarray) -> Normalize:
    """The range that the shades span, from one percentile of ROBUST to the other."""
    low, high = np.nanpercentile(percent, ROBUST)
    return Normalize(float(low), float(max(high, low + 1e-3)), clip=True)


def _span(piece: str, percent: float, norm: Normalize, strong: bool) -> str:
    background = to_hex(mpl.colormaps[SHADES](DARKEST * norm(percent)))
    text = f"<b>{html.escape(piece)}</b>" if strong else html.escape(piece)
    return f'<span style="background:{background}" title="{percent:.1f}%">{text}</span>'


def _label(token: str) -> str:
    """A token as one line: white space visible, long ones cut, no character that the font lacks."""
    shown = SPACES.sub(lambda run: f" ×{len(run[0])}", token)
    shown = "".join(SHOWN.get(character, character) for character in shown)
    shown = shown if len(shown) <= LONGEST_LABEL else shown[: LONGEST_LABEL - 1] + "…"
    return "".join(character if ord(character) in _font() else "▯" for character in shown)


@cache
def _font() -> frozenset[int]:
    """The characters of the font that figures are drawn in."""
    return frozenset(get_font(findfont(FontProperties(family=mpl.rcParamsDefault["font.family"]))).get_charmap())


def _whole_ticks(axis: mpl.axis.Axis, count: int) -> None:
    """Put ticks at whole numbers, at most about twenty of them."""
    axis.set_ticks(range(0, count, -(-count // 20)))


def _basis(report: "SparsityReport") -> str:
    """Sample size and settings, for a caption."""
    documents = f"{report.documents} documents" if report.documents > 1 else "one document"
    return f"{report.tokens:,} tokens of {documents}; {report.metric}, perplexity × {report.ppl_ratio:.4f}."
