"""Tokens per second from bytes against literal counts, and the table of shapes for a budget."""

import numpy as np
import pandas as pd
import pytest
from planted_design import LINE, study

from sparsity_utils.console import InputError
from sparsity_utils.findings.budget import decoding_check, machine, plan_budget, readable
from sparsity_utils.laws.design import fit_design

RATES = {"dense": 0.4, "all rows": 0.8, "sparse": 0.7, "certified": 0.5}
MEMORY = 40.0  # GB/s


def ffns(dtypes=("float32",), widths=(64, 1024)):
    """Single FFNs that reach RATES of the memory's rate, half of that at the first width."""
    rows = []
    for d_model in widths:
        for dtype in dtypes:
            for way, rate in RATES.items():
                reached = MEMORY * rate * (0.5 if d_model == widths[0] else 1)
                rows.append(
                    {"shape": str(d_model), "d_model": d_model, "dtype": dtype, "tokens": 1, "pattern": "random",
                     "activation": "relu", "rule": "gate", "sparsity": 0.9, "way": way, "gb_per_s": reached,
                     "read_gb_per_s": MEMORY}
                )  # fmt: skip
    return pd.DataFrame(rows)


def decoding(layer_seconds=2e-4, whole=False):
    """A trained model that reads no FFN, and a published shape with random weights that takes what its bytes take.

    whole: in all ways but "dense" a layer is one call, attention included.
    """
    rows = []
    for way in RATES:
        undivided = whole and way != "dense"
        attention_rate = 1e9 * MEMORY * RATES["all rows" if undivided else "dense"]  # bytes per second
        about = {"activation": "relu", "setting": 1, "sequences": 1, "way": way, "sparsity": 0.9, "rule": "cett"}
        about["ffn_time"] = np.nan if undivided else 0.5
        read = 4 * 4 * 2 * 64**2
        seconds = read / (attention_rate / 2) + 2 * layer_seconds  # kernels of the first width reach half the rate
        small = {"model": "trained", "shape": "64x2", "ffn_megabytes": 0.0, "megabytes": read / 1e6}
        rows.append(about | small | {"tokens_per_second": 1 / seconds, "strict_speedup": 1.0})
        ffn, maps, head = 200.0 if way in ("dense", "all rows") else 80.0, 4 * 4 * 10 * 1024**2, 0.1
        seconds = ffn / 1e3 / (MEMORY * RATES[way]) + maps / attention_rate + head / (MEMORY * RATES["dense"])
        seconds += 10 * layer_seconds
        read = ffn + maps / 1e6 + 100
        large = {"model": "random weights", "shape": "1024x10", "ffn_megabytes": ffn, "megabytes": read}
        rows.append(about | large | {"tokens_per_second": 1 / seconds, "strict_speedup": np.nan, "setting": 90})
    return pd.DataFrame(rows)


def literal_seconds(d_model, n_layers, vocabulary, bandwidth, width, *, way, gate, up, down, attention="dense"):
    """Count every matrix of a decoder, float32; `attention`: the way whose rate its maps have."""
    rate = {name: 1e9 * bandwidth * RATES[name] * (0.5 if width == 64 else 1) for name in RATES}
    seconds = vocabulary * d_model * 4 / rate["dense"]
    for _ in range(n_layers):
        for _ in ("query", "key", "value", "output"):
            seconds += d_model * d_model * 4 / rate[attention]
        neurons = int(2.5 * d_model)
        for share in (gate, up, down):
            seconds += neurons * d_model * share * 4 / rate[way]
        seconds += 2e-4
    return seconds


@pytest.fixture(scope="module")
def design():
    return fit_design(study(noise=0.1))


def test_a_step_takes_its_bytes_and_its_layers():
    on = machine(ffns(), decoding(), 20.0)
    found = on.speeds(96, 3, 500, {"dense": 1.0, "sparse": (1 + 0.4 + 0.1) / 3})
    whole = {"gate": 1, "up": 1, "down": 1}
    assert 1 / found["dense"] == pytest.approx(literal_seconds(96, 3, 500, 20.0, 64, way="dense", **whole))
    part = {"gate": 1, "up": 0.4, "down": 0.1}
    assert 1 / found["sparse"] == pytest.approx(literal_seconds(96, 3, 500, 20.0, 64, way="sparse", **part))


def test_where_a_layer_is_one_call_attention_has_the_rate_of_the_kernels():
    on = machine(ffns(), decoding(whole=True), 20.0)
    found = on.speeds(96, 3, 500, {"dense": 1.0, "sparse": (1 + 0.4 + 0.1) / 3})
    part = {"gate": 1, "up": 0.4, "down": 0.1, "attention": "all rows"}
    assert 1 / found["sparse"] == pytest.approx(literal_seconds(96, 3, 500, 20.0, 64, way="sparse", **part))
    whole = {"gate": 1, "up": 1, "down": 1, "attention": "dense"}
    assert 1 / found["dense"] == pytest.approx(literal_seconds(96, 3, 500, 20.0, 64, way="dense", **whole))


def test_the_rates_are_those_of_the_nearest_width():
    on = machine(ffns(), decoding(), 20.0)
    whole = {"gate": 1, "up": 1, "down": 1}
    for d_model, width in ((200, 64), (300, 1024), (4096, 1024)):  # their geometric mean is 256
        found = on.speeds(d_model, 1, 8, {"all rows": 1.0})["all rows"]
        assert 1 / found == pytest.approx(literal_seconds(d_model, 1, 8, 20.0, width, way="all rows", **whole))


def test_half_the_bytes_take_half_the_time_beyond_the_layers():
    tables = ffns(("float32", "bfloat16")), decoding()
    long, short = (
        1 / machine(*tables, 20.0, dtype).speeds(1024, 4, 0, {"dense": 1.0})["dense"] - 4 * 2e-4
        for dtype in ("float32", "bfloat16")
    )
    assert long == pytest.approx(2 * short)


@pytest.mark.parametrize("whole", [False, True])
def test_decoding_that_takes_its_bytes_is_predicted_exactly(whole):
    table = decoding_check(ffns(), decoding(whole=whole)).set_index("way")
    assert table["predicted"].to_numpy() == pytest.approx(table["tokens_per_second"].to_numpy())
    speedup = table["tokens_per_second"] / table.loc["all rows", "tokens_per_second"]
    assert table["predicted_speedup"].to_numpy() == pytest.approx(speedup.to_numpy())
    trained = decoding().query("model == 'trained'")
    assert decoding_check(ffns(), trained).empty


def test_a_plan_is_one_row_per_function_and_integer_shape(design):
    on = machine(ffns(), decoding(), 20.0)
    table = plan_budget(design, on, 100_000, 1e7, 1024, ratios=(8, 16, 17, 1000))
    assert list(zip(table["activation"], table["shape"], strict=True)) == [
        ("relu", "40x5"), ("relu", "52x3"), ("silu", "40x5"), ("silu", "52x3"),
    ]  # fmt: skip
    row = table.iloc[0]
    expected = design.predict(11.5 * 5 * 40**2, 1e7, 8, "relu")
    assert row["activation_ratio"] == expected.activation_ratio.value
    assert (row["low_loss"], row["high_loss"]) == (expected.loss.low, expected.loss.high)
    parts = {"gate": 1, "up": expected.nonzero_share.value, "down": expected.activation_ratio.value}
    assert 1 / row["sparse"] == pytest.approx(literal_seconds(40, 5, 1024, 20.0, 64, way="sparse", **parts))
    whole = {"gate": 1, "up": 1, "down": 1}
    assert 1 / row["dense"] == pytest.approx(literal_seconds(40, 5, 1024, 20.0, 64, way="all rows", **whole))
    copied = {"gate": 1 / 4 + parts["up"], "up": parts["up"], "down": parts["down"]}
    assert 1 / row["certified"] == pytest.approx(literal_seconds(40, 5, 1024, 20.0, 64, way="certified", **copied))
    assert (table["low_sparse"] < table["sparse"]).all() and (table["sparse"] < table["high_sparse"]).all()


def test_a_readable_plan_has_the_same_numbers(design):
    table = plan_budget(design, machine(ffns(), decoding(), 20.0), 100_000, 1e7, 1024, ratios=(16,))
    text, row = readable(table).iloc[1], table.iloc[1]
    shares = [100 * row[f"{end}activation_ratio"] for end in ("", "low_", "high_")]
    assert text["active %"] == "{:.1f} [{:.1f}, {:.1f}]".format(*shares)
    unknown = readable(table.assign(low_sparse=np.nan))
    assert set(unknown["sparse"]) == {"none"}
    assert text["activation"] == "SiLU" and text["sparse / dense"] == round(row["sparse"] / row["dense"], 2)


def test_smooth_functions_read_the_up_projection_in_full(design):
    on = machine(ffns(), decoding(), 20.0)
    row = plan_budget(design, on, 100_000, 1e7, 1024, ratios=(16,)).set_index("activation").loc["silu"]
    parts = {"gate": 1, "up": 1, "down": row["activation_ratio"]}
    assert 1 / row["sparse"] == pytest.approx(literal_seconds(52, 3, 1024, 20.0, 64, way="sparse", **parts))
    assert np.isnan(row["certified"])


def test_narrower_than_the_measured_kernels_is_an_extrapolation(design):
    on = machine(ffns(), decoding(), 20.0)
    words = plan_budget(design, on, 100_000, 1e7, 1024, ratios=(8, 16))["extrapolates"].iloc[:2]
    assert "rates of kernels measured from d_model 64 on" in words.iloc[0]
    wide = machine(ffns(widths=(32, 64)), decoding(), 20.0)
    assert plan_budget(design, wide, 100_000, 1e7, 1024, ratios=(16,))["extrapolates"].iloc[0] == ""


def test_a_study_too_small_gives_no_rows():
    fitted = fit_design(study(seeds=(0,), relu=LINE, silu=LINE))
    table = plan_budget(fitted, machine(ffns(), decoding(), 20.0), 100_000, 1e7, 1024)
    assert table.empty and readable(table).empty


def test_a_way_that_was_not_measured_has_no_speed(design):
    few = decoding().query("way != 'certified'"), ffns().query("way != 'certified'")
    table = plan_budget(design, machine(few[1], few[0], 20.0), 100_000, 1e7, 1024, ratios=(16,))
    assert table["certified"].isna().all() and table["sparse"].notna().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: machine(ffns(), decoding(), 0.0), "bandwidth is 0.0"),
        (lambda d: machine(ffns(), decoding(), float("nan")), "bandwidth is nan"),
        (lambda d: machine(ffns(), decoding(), 20.0, "int8"), "no speeds of FFNs with 'int8' weights; .* float32"),
        (lambda d: machine(ffns(), decoding(), 20.0, "float16"), "'float16' weights; choose one of float32"),
        (lambda d: machine(ffns().drop(columns="gb_per_s"), decoding(), 20.0), "lacks the columns gb_per_s"),
        (lambda d: machine(ffns(), decoding().head(0), 20.0), "decoding speeds table has no rows"),
        (lambda d: machine(ffns(), pd.concat([decoding()] * 2), 20.0), "two rows"),
        (lambda d: plan_budget(d, machine(ffns(), decoding(), 20.0), -5, 1e7, 1024), "parameters is -5"),
        (lambda d: plan_budget(d, machine(ffns(), decoding(), 20.0), 100_000, 0, 1024), "tokens is 0"),
        (lambda d: plan_budget(d, machine(ffns(), decoding(), 20.0), 100_000, 1e7, 0), "vocabulary is 0"),
    ],
)
def test_what_cannot_be_computed_is_an_input_error(design, call, message):
    with pytest.raises(InputError, match=message):
        call(design)
