"""The tables and the figure of speeds, on planted rows whose answers are known."""

import math

import numpy as np
import pandas as pd
import pytest

from sparsity_utils.console import InputError
from sparsity_utils.findings import input_speeds


def row(engine, rule, setting, weights, head, skipped, speed, **changes):
    names = ("tokens_per_second", "prompt_tokens_per_second")
    ranges = {
        f"{low}{name}": factor * speed for name in names for low, factor in (("", 1), ("low_", 0.9), ("high_", 1.1))
    }
    return {
        **{"model": "smollm2", "engine": engine, "rule": rule, "setting": setting, "weights": weights, "head": head},
        **{"read_share": 1 - skipped, "ppl_ratio": 1.0, "megabytes": 500 * (1 - skipped) + 100, **ranges},
        **{"speedup": speed / 20, "strict_speedup": speed / 40, "memory_share": 0.5, "differing": 0, "wrong": 0},
        **{"read_gb_per_s": 30.0, "rounds": 5, "device": "CPU", "threads": 2, "date": "2026-01-01"},
        **changes,
    }


@pytest.fixture
def table(monkeypatch):
    other = {"model": "smollm2", "engine": "llama.cpp", "weights": "4 bits", "megabytes": 98.0}
    other |= {f"{low}tokens_per_second": 100.0 for low in ("", "low_", "high_", "prompt_")}
    monkeypatch.setattr(input_speeds, "others", lambda: pd.DataFrame([other]))
    dense = [
        row("transformers", "nothing skipped", np.nan, "float32", "full", 0.0, 20.0),
        row("transformers", "nothing skipped", np.nan, "bfloat16", "full", 0.0, 50.0),
        row("kernels", "nothing skipped", np.nan, "float32", "certified", 0.0, 40.0),
        row("kernels", "nothing skipped", np.nan, "8 bits", "certified", 0.0, 90.0),
    ]
    teal = [row("kernels", "teal", f"{100 * s:g}%", "float32", "certified", s, 40 * 4**s) for s in (0.25, 0.5)]
    cats = [row("kernels", "cats", "50%", "float32", "certified", 0.25, math.nan, wrong=2)]
    return pd.DataFrame(dense + teal + cats)


def test_break_even_is_where_the_lines_cross(table):
    points = input_speeds.break_even(table).loc[("TEAL", "float32", "certified")]
    assert points["transformers, float32, full head"] == 0
    assert points["transformers, bfloat16, full head"] == round(100 * math.log(50 / 40) / math.log(4), 1)
    assert math.isnan(points["kernels, 8 bits, certified head"]) and math.isnan(points["llama.cpp, 4 bits"])


def test_the_table_to_read_has_every_row_and_what_a_user_would_pick_instead(table):
    read = input_speeds.speeds(table)
    assert len(read) == len(table) + 1 and read["way"].iloc[-1] == "llama.cpp"
    half = read[(read["way"] == "TEAL") & (read["at"] == "50%")].iloc[0]
    assert half["tokens/s"] == "80.0 (72.0 to 88.0)" and half["x bfloat16"] == 1.6 and half["x nothing skipped"] == 2.0
    assert read.loc[read["way"] == "CATS", "tokens/s"].iloc[0] == ""


def test_a_table_without_its_columns_is_refused(table):
    with pytest.raises(InputError, match="megabytes"):
        input_speeds.speeds(table.drop(columns="megabytes"))


def test_the_figure_has_a_line_for_each_rule_and_each_rival(table):
    left, right = input_speeds.figure(table).axes
    lines = {line.get_label() for line in left.get_lines()} | {bars.get_label() for bars in left.containers}
    assert {"TEAL", "CATS"} <= lines
    names = {text.get_text().replace("\n", " ") for text in right.texts}
    assert names == {"transformers, float32", "transformers, bfloat16", "llama.cpp, 4 bits"} and not left.texts
