"""Words on axes and in captions, colours, files of figures, and tables that a study lacks."""

import re
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from planted import study

from sparsity_utils.console import short_number
from sparsity_utils.findings import style
from sparsity_utils.study.study import Study


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (2944, "2.94k"),
        (188_416, "188k"),
        (1.04e6, "1.04M"),
        (1e7, "10M"),
        (2.44e9, "2.44B"),
        (2.4e9, "2.4B"),
        (512, "512"),
        (26.25, "26.2"),
        (999_900, "1M"),
        (999_400, "999k"),
    ],
)
def test_short_numbers(count, text):
    assert short_number(count) == text


def test_names_of_shapes_sizes_and_seeds():
    checkpoints = study(((40, 2), (48, 3)), ("relu",), seeds=(0, 1)).assign(p=1.0)
    assert style.shape_name(checkpoints) == "40x2" and style.price_name(checkpoints) == "CETT-PPL-1%"
    assert style.parameters_name(checkpoints) == "58.1k parameters"  # the mean of 36,800 and 79,488
    assert style.seeds_name(checkpoints) == "2 seeds"
    assert style.seeds_name(checkpoints.query("seed == 0 or d_model == 40")) == "1 to 2 seeds"
    assert style.seeds_name(checkpoints.query("seed == 0")) == "1 seed"


def test_a_table_that_a_study_lacks_is_none_and_says_so(tmp_path, capsys):
    assert Study.recorded(tmp_path).table_or_none("relu_vs_silu") is None
    assert capsys.readouterr().out == "The recorded study has no table for relu_vs_silu.\n"
    assert Study.recorded(tmp_path).kept("relu_vs_silu") is None and capsys.readouterr().out == ""
    pd.DataFrame({"run": ["a"]}).to_csv(tmp_path / "relu_vs_silu.csv", index=False)
    for read in (Study.recorded(tmp_path).table_or_none, Study.recorded(tmp_path).kept):
        assert read("relu_vs_silu")["run"].tolist() == ["a"]


def drawn(shift):
    figure, (axes,) = style.side_by_side(1)
    axes.plot([0, 1 + shift], [0, 3.14159265], "o-", label="0.123456")
    axes.legend()
    return figure


def test_a_saved_figure_does_not_show_the_last_digits_of_a_coordinate(tmp_path):
    """Another processor may round the sixth digit otherwise; what is text or a scale is kept as it is."""
    files = [drawn(shift).save(tmp_path / name) for shift, name in ((0, "a"), (1e-9, "b"))]
    first, second = (svg.read_text() for _, svg in files)
    assert first == second and [file.suffix for file in files[0]] == [".png", ".svg"]
    places = re.findall(r'd="(M[^"]*)"', first)
    assert places and not re.search(r"\d\.\d{3}", " ".join(places)) and "0.123456" in first
    assert re.search(r'xlink:href="#name\d+"', first) and not re.search(r'"#[a-z][0-9a-f]{10}"', first)
    words = drawn(0).words()
    assert Image.open(files[0][0]).info["Description"] == words and words in first


# Linear RGB as people with each deficiency see it: Machado, Oliveira and Fernandes 2009 (doi 10.1109/TVCG.2009.113),
# severity 1.
SEEN = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
APART = 20  # in CIE Lab; 2.3 is just noticeable


def lab(colour: str, seen=SEEN["all cones"]) -> np.ndarray:
    """CIE Lab (D65) of a colour, as it is seen."""
    rgb = np.array(to_rgb(colour))
    linear = np.clip(np.array(seen) @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
    x, y, z = (XYZ @ linear) / (XYZ @ np.ones(3))
    fx, fy, fz = (np.cbrt(t) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


def test_the_conversion_to_lab_is_the_published_one():
    assert lab("#ff0000") == pytest.approx([53.24, 80.09, 67.20], abs=0.02)
    assert lab("#0000ff") == pytest.approx([32.30, 79.19, -107.86], abs=0.02)
    red, green = (lab(colour, SEEN["deuteranopia"]) for colour in ("#b35900", "#6b7300"))
    assert np.linalg.norm(red - green) < APART < np.linalg.norm(lab("#b35900") - lab("#6b7300"))


@pytest.mark.parametrize("eyes", SEEN)
def test_colours_stay_apart_for_every_eye(eyes):
    for one, other in combinations(style.COLOURS, 2):
        distance = np.linalg.norm(lab(one, SEEN[eyes]) - lab(other, SEEN[eyes]))
        assert distance > APART, (one, other)


def test_the_first_looks_differ_in_colour_and_marker_and_in_grey_too():
    looks = [style.Look(number) for number in range(12)]
    assert len({(look.colour, look.marker) for look in looks}) == len(looks)
    assert len({(look.marker, look.line) for look in looks}) == len(looks)


def test_a_figure_is_shown_with_words_made_of_its_own():
    figure, (left, right) = style.side_by_side(2)
    left.plot([1, 2], [1, 2], label="ReLU")
    left.plot([1, 2], [2, 1], label="SiLU")
    left.set(title="Loss", xscale="log", xlabel="Tokens", ylabel="Nats per\ntoken")
    right.set(xlabel="Layer")
    style.captioned(figure, "Two seeds.")
    panels = "Panel 1: Loss: Nats per token against Tokens, log scale; ReLU; SiLU. Panel 2: Layer."
    words = f"Figure of 2 panels. {panels} Two seeds."
    assert repr(figure) == figure.words() == words
    png, about = figure._repr_png_()
    assert png.startswith(b"\x89PNG") and about == {"alt": words}


def test_runs_of_one_size_are_drawn_beside_each_other():
    sizes = pd.Series([100.0, 10.0, 100.0, 100.0], index=[3, 1, 7, 9])
    drawn_at = style.dodged(sizes, 2.0)
    assert drawn_at.tolist() == [50.0, 10.0, 100.0, 200.0] and list(drawn_at.index) == list(sizes.index)
