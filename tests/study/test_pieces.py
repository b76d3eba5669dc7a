"""Pieces of a long measurement: kept once, told once."""

from functools import partial

import pandas as pd
from torch import nn

from sparsity_utils.study.makers.pieces import Pieces


def table(value: int) -> dict[str, pd.DataFrame]:
    return {"numbers": pd.DataFrame({"n": [value]})}


def test_a_piece_is_measured_once_and_then_read(tmp_path, capsys):
    for turn in range(2):
        pieces = Pieces(tmp_path, "a model", seconds=60.0)
        with pieces.shown(nn.Identity(), 5):
            found = [pieces.kept(name, cost, partial(table, turn)) for name, cost in (("one", 2), ("two", 3))]
        assert [frames["numbers"]["n"].item() for frames in found] == [0, 0]
    assert capsys.readouterr().out == "Measuring a model: about 5 min on two quiet cores; finished pieces are kept.\n"


def test_words_stay_words_and_only_an_empty_field_is_missing(tmp_path):
    words = pd.DataFrame({"word": ["None", "NA", "null", "nan"], "value": [1.0, None, float("inf"), 2.5]})
    for _ in range(2):
        found = Pieces(tmp_path, "a model", seconds=1.0).kept("one", 1, lambda: {"words": words})
        pd.testing.assert_frame_equal(found["words"], words)


def test_without_a_bar_no_time_is_told(tmp_path, capsys):
    Pieces(tmp_path, "a model", seconds=60.0).kept("one", 2, lambda: table(0))
    pieces = Pieces(tmp_path, "a model", seconds=60.0)
    for name in ("one", "two"):  # the first is found
        pieces.kept(name, 2, lambda: table(1))
    assert capsys.readouterr().out == 2 * "Measuring a model: finished pieces are kept.\n"
