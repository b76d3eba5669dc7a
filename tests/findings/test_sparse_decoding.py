"""Verdicts and summaries of notebook 06 on made-up speeds whose answer is known."""

import numpy as np
import pandas as pd
import pytest

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.findings import sparse_decoding
from sparsity_utils.laws.cost import decoding_limit
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED


def ffns(strict=0.95, at_zero=1.3, certified=4.4, shape="2.4B"):
    rows = []
    for sparsity in (0.0, 0.5, 0.9, 0.935, 0.97):
        for way in ("dense", "sparse", "certified"):
            ideal = {"dense": 1.0, "sparse": 3 / (1 + 2 * (1 - sparsity)), "certified": 3 / (0.4 + 3 * (1 - sparsity))}
            gain = {"dense": 0.7, "sparse": strict * ideal["sparse"], "certified": certified}[way]
            torch_gain = at_zero if sparsity == 0 and way == "sparse" else gain * 1.4
            rows.append(
                {"shape": shape, "d_model": 2304, "dtype": "float32", "tokens": 1, "pattern": "random",
                 "activation": "relu", "rule": "gate", "sparsity": sparsity, "way": way, "ideal_speedup": ideal[way],
                 "speedup": torch_gain, "low_speedup": torch_gain * 0.99, "high_speedup": torch_gain * 1.01,
                 "strict_speedup": gain, "low_strict_speedup": gain * 0.99, "high_strict_speedup": gain * 1.01}
            )  # fmt: skip
    return pd.DataFrame(rows)


def decoding(trained=0.8, shape=1.4, same=True):
    rows = []
    for model, activation, gain in (
        ("trained", "relu", trained),
        ("trained", "silu", 1.2),
        ("random weights", "relu", shape),
    ):
        for way, sparsity in (("dense", 0.0), ("sparse", 0.9)):
            value = 1.0 if way == "dense" else gain if same else np.nan
            rows.append(
                {"model": model, "activation": activation, "shape": "48x4", "sequences": 1, "rule": "cett",
                 "setting": 90, "way": way,
                 "sparsity": sparsity, "speedup": value, "low_speedup": value * 0.99, "high_speedup": value * 1.01,
                 "strict_speedup": value, "low_strict_speedup": value * 0.99, "high_strict_speedup": value * 1.01,
                 "same_tokens": same}
            )  # fmt: skip
    return pd.DataFrame(rows)


def verdicts(**changes):
    tables = {"ffns": ffns(), "decoding": decoding(), **changes}
    return sparse_decoding.verdicts(tables["ffns"], tables["decoding"])


def test_verdicts_follow_the_stated_thresholds():
    near, slower, wall, published, gains, trained = verdicts()
    assert [row.verdict for row in (near, slower, wall)] == [SUPPORTED] * 3
    assert near.here == pytest.approx(0.95) and slower.here == 1.3 and wall.here == 4.4
    assert published.verdict == NOT_SUPPORTED and published.here == pytest.approx(2.875)
    assert gains.verdict == SUPPORTED and trained.verdict == NOT_SUPPORTED and "ReLU" in trained.reason


@pytest.mark.parametrize(("strict", "expected"), [(0.88, NOT_SUPPORTED), (0.9, INCONCLUSIVE), (0.92, SUPPORTED)])
def test_near_the_ideal_is_judged_by_the_interval(strict, expected):
    assert verdicts(ffns=ffns(strict=strict))[0].verdict == expected


def test_a_wall_just_passed_or_a_kernel_just_slower_is_no_support():
    assert verdicts(ffns=ffns(certified=3.4))[2].verdict == NOT_SUPPORTED
    assert verdicts(ffns=ffns(at_zero=0.97))[1].verdict == NOT_SUPPORTED


def test_what_was_not_measured_is_inconclusive():
    rows = verdicts(ffns=ffns(shape="0.1B"), decoding=decoding().query("model == 'trained'"))
    assert [row.verdict for row in rows] == [INCONCLUSIVE] * 3 + [NOT_SUPPORTED, INCONCLUSIVE, NOT_SUPPORTED]
    assert rows[0].reason == "it was not measured"


def test_other_tokens_are_inconclusive():
    rows = verdicts(decoding=decoding(same=False))
    assert [row.verdict for row in rows[-2:]] == [INCONCLUSIVE] * 2 and "other tokens" in rows[-1].reason


def test_too_few_rounds_are_inconclusive():
    rows = verdicts(ffns=ffns().assign(low_strict_speedup=np.nan, high_strict_speedup=np.nan))
    assert rows[0].verdict == INCONCLUSIVE and rows[0].reason == "too few rounds for an interval"


def test_tables_that_cannot_be_used_are_refused():
    with pytest.raises(InputError, match="strict_speedup"):
        verdicts(ffns=ffns().drop(columns="strict_speedup"))
    with pytest.raises(InputError):
        verdicts(ffns=pd.concat([ffns(), ffns()]))


def test_break_even_lies_where_the_log_speed_up_crosses_zero():
    table = ffns().query("way == 'sparse'").assign(speedup=[0.5, 2.0, 3.0, 3.0, 3.0])
    assert sparse_decoding.break_even(table)["sparse"].tolist() == pytest.approx([25.0])
    assert sparse_decoding.break_even(table.assign(speedup=2.0))["sparse"].tolist() == [0.0]
    assert np.isnan(sparse_decoding.break_even(table.assign(speedup=0.5))["sparse"]).all()


def test_shares_of_the_ideal_stand_side_by_side():
    table = sparse_decoding.shares_of_ideal(ffns(), "2.4B")
    assert list(table.index) == [0.0, 50.0, 90.0, 93.5, 97.0]
    assert table["of_ideal", "sparse"].tolist() == pytest.approx([0.95] * 5)


def test_the_speeds_of_the_gpu_are_those_of_the_recorded_table():
    rows = pd.read_csv(paths.RESULTS / "sparse_ffn_gpu.csv").query("way == 'sparse' and shape == '7B'")
    shown = sparse_decoding.on_a_gpu().loc[("7B", "bfloat16", 1)]
    for percent, row in zip((0, 50, 90), rows.sort_values("sparsity").itertuples(), strict=True):
        assert shown[percent, "speed-up"] == row.strict_speedup
        assert shown[percent, "ideal"] == row.ideal_speedup == pytest.approx(3 / (3 - 2 * row.sparsity), rel=1e-3)


def test_decoding_limits_are_bytes_over_bytes():
    d = 100
    attention, ffn = 4 * d * d, 3 * 2.5 * d * d
    assert decoding_limit(0.25) == pytest.approx((attention + ffn) / (attention + 0.25 * ffn))
    table = sparse_decoding.decoding_limits(0.9352)
    assert table.loc["nothing", "whole model, no head"] == pytest.approx(2.875)
    assert table.loc["gate in full, then active rows", "FFN alone"] == pytest.approx(3 / (1 + 2 * 0.0648))


def bars(figure):
    """The widths of each part's bars, of all panels one after the other, and the names in the legend."""
    widths = {}
    for axes in figure.axes:
        for part in axes.containers:
            widths.setdefault(part.get_label(), []).append([bar.get_width() for bar in part])
    return widths, [text.get_text() for text in figure.legends[0].get_texts()]


def steps():
    """The recorded decoding steps of one model, one sequence, all parts timed: a layer may have run as one call."""
    rows = pd.read_csv(paths.RESULTS / "sparse_decoding.csv")
    rows = rows.query("sequences == 1 and activation == 'relu' and model == 'trained'")
    return rows.assign(ffn_time=0.2, attention_time=[0.3, 0.32, 0.34, 0.36], head_time=0.1)


def test_a_decoding_step_is_divided_where_its_parts_were_timed():
    rows = steps()
    figure = sparse_decoding.decoding_figure(rows)
    widths, names = bars(figure)
    assert names == list(widths) == ["FFN", "attention", "output head", "all else"]
    total, shares = 1e3 / rows["tokens_per_second"], rows[["ffn_time", "attention_time", "head_time"]]
    assert widths["FFN"] == [pytest.approx(rows["ffn_time"] * total)]
    assert widths["all else"] == [pytest.approx((1 - shares.sum(axis=1)) * total)]
    assert "Undivided" not in figure.get_supxlabel()


def test_layers_that_ran_as_one_call_are_not_divided_and_the_figure_says_so():
    rows = steps()
    rows.loc[rows["way"] != "dense", ["ffn_time", "attention_time"]] = np.nan
    figure = sparse_decoding.decoding_figure(rows)
    widths, names = bars(figure)
    dense, kernels = rows.iloc[0], rows.iloc[1:]
    head = 1e3 / kernels["tokens_per_second"] * kernels["head_time"]
    assert names[-1] == "layers, undivided, and all else" and len(names) == 5
    assert widths["FFN"] == [pytest.approx([dense["ffn_time"] * 1e3 / dense["tokens_per_second"], 0, 0, 0])]
    assert widths["output head"][0][1:] == pytest.approx(head.tolist())
    assert widths[names[-1]] == [pytest.approx([0, *(1e3 / kernels["tokens_per_second"] - head)])]
    assert widths["all else"][0][0] > 0 and widths["all else"][0][1:] == [0, 0, 0]
    assert "Undivided: each layer ran as one call" in figure.get_supxlabel()
