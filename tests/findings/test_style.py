"""Words on axes and in captions, files of figures, and tables that a study lacks."""

import re

import pandas as pd
import pytest
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
    pd.DataFrame({"run": ["a"]}).to_csv(tmp_path / "relu_vs_silu.csv", index=False)
    assert Study.recorded(tmp_path).table_or_none("relu_vs_silu")["run"].tolist() == ["a"]


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
    assert files[0][0].read_bytes()[:4] == b"\x89PNG"
