"""Pictures of one measured model: what they show, that they are reproducible, and what they refuse."""

import io
import re
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from planted import check_stated
from transformers import PreTrainedTokenizerFast

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.findings import quickstart, report_figures
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED

TOKENS = ["def", " f", "(x)", ":\n", "    ", "$a$", "<b>", "&amp;", "中", "\t"]
AWKWARD = "café 中文\n\tif x:\r\n    y = '☃' < \"&\"  # $a$  "


def report(layers: int = 4, nonzero: float = 0.4, interval=(0.18, 0.22), documents: int = 3) -> SimpleNamespace:
    """A report whose layer l has l+1 twentieths of its neurons active."""
    table = pd.DataFrame({"layer": range(layers), "activation_ratio": 0.05 * (np.arange(layers) + 1)})
    table["nonzero_share"] = nonzero
    ratio = float(table["activation_ratio"].mean())
    headline = {"activation_ratio": ratio, "interval": interval, "tokens": 1000, "documents": documents}
    return SimpleNamespace(layers=table, metric="cett-ppl", ppl_ratio=1.01, **headline)


def per_token(tokens: int = len(TOKENS), layers: int = 3) -> pd.DataFrame:
    """Token t in layer l has (t + l) hundredths of the neurons active."""
    ratios = 0.01 * (np.arange(tokens)[:, None] + np.arange(layers))
    table = pd.DataFrame(ratios, columns=[f"layer_{layer}" for layer in range(layers)])
    return pd.concat([pd.DataFrame({"document": 0, "position": range(tokens), "token_id": 7}), table], axis=1)


def png(figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# Bars


def test_bars_have_the_height_of_their_layers():
    axes = report_figures.layer_bars(report()).axes[0]
    assert [bar.get_height() for bar in axes.patches[:4]] == pytest.approx([5, 10, 15, 20])


def test_bars_name_the_mean_its_interval_and_the_share_that_is_not_zero():
    assert legend(report_figures.layer_bars(report())) == ["mean 12.5%", "its 90% interval, 18.0 to 22.0%", "not zero"]


def test_bars_leave_out_what_is_not_known_or_says_nothing():
    smooth_single = report(nonzero=1.0, interval=(np.nan, np.nan), documents=1)
    figure = report_figures.layer_bars(smooth_single)
    assert legend(figure) == ["mean 12.5%"]
    assert "1,000 tokens of one document; cett-ppl" in figure.get_supxlabel()


@pytest.mark.parametrize("layers", [1, 4, 90])
def test_bars_fit_any_depth(layers):
    figure = report_figures.layer_bars(report(layers))
    assert figure.get_figwidth() <= 10 and len(figure.axes[0].get_xticks()) <= 20


@pytest.mark.filterwarnings("error")
def test_nothing_active_is_drawn_too():
    silent = report(nonzero=1.0, interval=(0.0, 0.0))
    silent.layers["activation_ratio"] = silent.activation_ratio = 0.0
    assert report_figures.layer_bars(silent).axes[0].get_ylim() == (0, 1)
    nothing = per_token(5, 2).assign(layer_0=0.0, layer_1=0.0)
    assert report_figures.token_heatmap(nothing, ["x"] * 5)._repr_png_()


# Heatmap


def test_the_heatmap_has_layers_down_and_tokens_along():
    figure = report_figures.token_heatmap(per_token(), TOKENS)
    top, axes, bar = figure.axes
    np.testing.assert_allclose(axes.images[0].get_array(), [[t + layer for t in range(10)] for layer in range(3)])
    assert [mean.get_height() for mean in top.patches] == pytest.approx([t + 1 for t in range(10)])
    assert bar.get_ylabel() == "Active neurons (% of d_ff)"


def test_labels_show_white_space_and_no_formula():
    axes = report_figures.token_heatmap(per_token(), TOKENS).axes[1]
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown == ["def", "·f", "(x)", ":↵", "·×4", "$a$", "<b>", "&amp;", "▯", "⇥"]
    assert not any(label.get_parse_math() for label in axes.get_xticklabels())
    assert report_figures._label("abcdefghijklmnopq") == "abcdefghijklm…"


def test_shades_are_told_apart_in_grey():
    shades = plt.get_cmap(report_figures.SHADES)(np.linspace(0, 1, 64))[:, :3]
    grey = shades @ [0.299, 0.587, 0.114]
    assert (np.diff(grey) < 0).all()


def test_one_outlying_token_does_not_bleach_the_others():
    table = per_token(60)
    table.loc[0, "layer_0"] = 1.0
    assert report_figures.token_heatmap(table, ["x"] * 60).axes[1].images[0].norm.vmax < 62


@pytest.mark.parametrize("draw", [report_figures.token_heatmap, report_figures.coloured_text])
@pytest.mark.parametrize("tokens", [[], ["one"]])
def test_one_text_per_row_is_needed(draw, tokens):
    with pytest.raises(InputError, match=f"^3 rows .* for {len(tokens)} tokens: give one text per row"):
        draw(per_token(3), tokens)
    with pytest.raises(InputError, match=r"^0 rows"):
        draw(per_token(3).head(0), [])


@pytest.mark.parametrize(
    "draw",
    [lambda: report_figures.layer_bars(report()), lambda: report_figures.token_heatmap(per_token(), TOKENS)],
    ids=["bars", "heatmap"],
)
@pytest.mark.filterwarnings("error")  # a glyph that the font lacks is a warning
def test_the_same_numbers_give_the_same_bytes(draw):
    assert png(draw()) == png(draw())
    assert draw()._repr_png_()[0].startswith(b"\x89PNG")
    assert not plt.get_fignums()


# Coloured text


class Reader(HTMLParser):
    """What a browser without styles would show of the <pre>, and which of it in bold."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.text, self.bold = [], "", []

    def handle_starttag(self, tag, attrs):
        self.inside.append(tag)

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, data):
        if "pre" in self.inside:
            self.text += data
            self.bold += [data] if "b" in self.inside else []


def read(shown: report_figures.ColouredText) -> Reader:
    reader = Reader()
    reader.feed(shown._repr_html_())
    assert reader.inside == []
    return reader


def test_coloured_text_is_the_text_whatever_it_holds():
    reader = read(report_figures.coloured_text(per_token(), TOKENS))
    assert reader.text == "".join(TOKENS)
    assert reader.bold == ["\t"]  # the highest of ten


def test_coloured_text_is_plain_where_html_is_stripped():
    text = repr(report_figures.coloured_text(per_token(), TOKENS))
    assert text.startswith("".join(TOKENS) + "\n[")
    assert text.endswith("5.5% on average, 1.0% at 'def' to 10.0% at '\\t']")


def luminance(colour: str) -> float:
    """Relative luminance of a hex colour, as WCAG 2 defines it."""
    parts = np.array([int(colour[place : place + 2], 16) for place in (0, 2, 4)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_a_darker_shade_means_more_and_black_letters_stay_readable():
    html = report_figures.coloured_text(per_token(), TOKENS)._repr_html_()
    spans = re.findall(r'<span style="background:#(\w{6})" title="([\d.]+)%"', html)
    assert [float(value) for _, value in spans[: len(TOKENS)]] == pytest.approx([t + 1 for t in range(10)])
    shades = [luminance(colour) for colour, _ in spans]
    assert all(before >= after for before, after in pairwise(shades[: len(TOKENS)])) and shades[0] > shades[9]
    assert min(shades) + 0.05 > 4.5 * 0.05  # contrast to black


def test_coloured_text_is_the_same_every_time_and_names_no_place():
    html = [report_figures.coloured_text(per_token(), TOKENS)._repr_html_() for _ in range(2)]
    assert html[0] == html[1]
    assert " id=" not in html[0] and "0x" not in html[0] and str(paths.ROOT) not in html[0]


def test_equal_ratios_are_no_division_by_zero():
    even = per_token(5, 1).assign(layer_0=0.2)
    with np.errstate(all="raise"):
        assert read(report_figures.coloured_text(even, ["x"] * 5)).bold == []


# Tokens as text


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(paths.RECORDED_MODELS / "relu" / "tokenizer.json"))


def test_pieces_joined_are_the_text(tokenizer):
    ids = tokenizer.encode(AWKWARD)
    pieces = report_figures.token_texts(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == AWKWARD
    assert len(ids) > len(AWKWARD.split())


def test_a_character_of_several_tokens_stands_with_the_last(tokenizer):
    ids = tokenizer.encode("中")
    assert len(ids) > 1
    assert report_figures.token_texts(tokenizer, ids) == [""] * (len(ids) - 1) + ["中"]


def test_a_window_that_ends_inside_a_character_is_shown_as_decoded(tokenizer):
    ids = tokenizer.encode("x中")[:-1]
    assert "".join(report_figures.token_texts(tokenizer, ids)) == tokenizer.decode(ids)


def priced(rise=0.01, interval=(0.005, 0.018), **changes):
    """What verdicts need of a sparsity report."""
    ends = tuple(1 + end for end in interval)
    usual = {"metric": "cett-ppl", "calibrated_on": "calibration", "documents": 25, "note": ""}
    return SimpleNamespace(ppl_ratio=1 + rise, ppl_ratio_interval=ends, **usual | changes)


@pytest.mark.parametrize(
    ("interval", "p", "expected"),
    [
        ((0.005, 0.018), 1.0, SUPPORTED),
        ((0.0001, 0.0199), 1.0, SUPPORTED),
        ((-0.001, 0.018), 1.0, INCONCLUSIVE),
        ((0.005, 0.021), 1.0, INCONCLUSIVE),
        ((0.005, 0.021), 2.0, SUPPORTED),
        ((0.021, 0.03), 1.0, NOT_SUPPORTED),
        ((-0.01, -0.001), 1.0, NOT_SUPPORTED),
        ((np.nan, np.nan), 1.0, INCONCLUSIVE),
    ],
)
def test_a_promised_price_is_held_within_twice_of_it(interval, p, expected):
    (row,) = quickstart.verdicts(priced(interval=interval), p)
    assert (row.verdict, row.here) == (expected, pytest.approx(1.0))
    assert row.claim.threshold.startswith(f"90% interval inside 0 to {2 * p:g}%")
    assert row.reason == ("one document: no interval" if np.isnan(interval[0]) else "25 documents")


@pytest.mark.parametrize("changes", [{"metric": "cett"}, {"calibrated_on": "evaluation"}])
def test_a_price_is_promised_by_cett_ppl_on_other_documents_only(changes):
    with pytest.raises(InputError, match="about 'cett-ppl' with other documents"):
        quickstart.verdicts(priced(**changes))


def test_claims_are_stated_before_their_verdicts():
    check_stated(quickstart, quickstart.verdicts(priced()))
