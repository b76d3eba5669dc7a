"""From a budget to a table of models: shapes, expected sparsity and loss, and tokens per second, dense and sparse.

Decoding one token reads every weight that it needs once, so its time is taken to be

    seconds = bytes of FFNs / rate of their kernels + bytes of attention / rate of its maps
              + bytes of the head / rate of torch + n_layers * fixed seconds of a layer.

Where a whole layer was one call of the kernels, attention's maps are read at the rate of the kernel that skips nothing,
elsewhere at torch's. Rates and fixed seconds are those of a measured machine. The cache of keys and values, which grows
with the text, is not counted.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from kernels.shapes import DENSE
from sparsity_utils.console import InputError
from sparsity_utils.laws.cost import DECODING_CASE, FFN_CASE
from sparsity_utils.laws.design import EXACT_ZEROS, NEAR, Design, Prediction
from sparsity_utils.laws.limits import require
from sparsity_utils.models.config import ACTIVATIONS
from sparsity_utils.models.shapes import d_ff, non_embedding_parameters, solve_shape
from sparsity_utils.neurons.rules import METRICS

RATIOS = (2, 4, 8, 16, 32, 64, 128)  # d_model / n_layers; those without an integer shape are skipped
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of a weight
ATTENTION = 4  # maps of a layer's attention, d_model x d_model each: query, key, value, output
WAYS = (*DENSE, "sparse", "certified")
COLUMNS = [
    *("activation", "shape", "d_model", "n_layers", "parameters", "width_depth_ratio"),
    *("activation_ratio", "low_activation_ratio", "high_activation_ratio", "loss", "low_loss", "high_loss"),
    *("dense", "sparse", "low_sparse", "high_sparse", "certified", "extrapolates"),
]


@dataclass(frozen=True)
class Machine:
    """How fast a machine of this memory bandwidth decodes, with kernels as efficient as the measured ones."""

    bandwidth: float  # GB/s, of reading memory
    dtype: str
    rates: pd.DataFrame  # rate of reading an FFN's weights over `bandwidth`: a row per d_model, a column per way
    layer_seconds: dict[str, float]  # per way: time per layer and token beyond that of reading bytes
    whole_layers: frozenset[str]  # the ways in which a layer is one call of the kernels, attention included

    def seconds(self, way: str, d_model: int, n_layers: int, ffn_bytes: float, head_bytes: float) -> float:
        """Time of one token whose FFNs read `ffn_bytes` and whose output head reads `head_bytes`.

        All of attention's weights are read too, by torch or, in whole layers, by the kernel that skips nothing. The
        head runs in torch whatever the way. The rates are those measured at the nearest d_model.
        """
        nearest = self.rates.index[np.abs(np.log(self.rates.index / d_model)).argmin()]
        rate = 1e9 * self.bandwidth * self.rates.loc[nearest]  # bytes per second
        attention = BYTES[self.dtype] * ATTENTION * n_layers * d_model**2
        attention_rate = rate["all rows" if way in self.whole_layers else "dense"]
        seconds = ffn_bytes / rate[way] + attention / attention_rate + head_bytes / rate["dense"]
        return seconds + n_layers * self.layer_seconds[way]

    def speeds(self, d_model: int, n_layers: int, vocabulary: int, shares: dict[str, float]) -> dict[str, float]:
        """{way: tokens per second of one sequence}; `shares` is {way: share of the FFN weights that it reads}."""
        ffn = n_layers * 3 * d_model * d_ff(d_model) * BYTES[self.dtype]
        head = vocabulary * d_model * BYTES[self.dtype]
        return {way: 1 / self.seconds(way, d_model, n_layers, share * ffn, head) for way, share in shares.items()}


def machine(ffns: pd.DataFrame, decoding: pd.DataFrame, bandwidth: float, dtype: str = "float32") -> Machine:
    """A machine of that bandwidth with kernels as efficient as in a study's speed tables.

    Rates are medians over single FFNs with one token and random patterns. The fixed time of a layer is the time of a
    decoding step of the trained models less that of reading their few bytes, per layer, mean over activation functions.
    A way ran in whole layers if its steps could not be divided into parts (ffn_time is NaN).

    Args:
        ffns, decoding: tables of the questions sparse_ffn and sparse_decoding (results/columns.csv).
        bandwidth: GB/s of reading memory, as `kernels.bench.measured_bandwidth` gives it.
        dtype: of the weights: float32, float16 or bfloat16.

    Raises InputError for an impossible bandwidth or dtype, and for tables that lack the rows that this takes.
    """
    if not 0 < bandwidth < math.inf:
        raise InputError(f"bandwidth is {bandwidth}; give the GB/s of reading memory, a positive number.")
    rates, sizes = ["gb_per_s", "read_gb_per_s"], ["ffn_megabytes", "megabytes"]
    require(ffns, [*FFN_CASE, "d_model", *rates], FFN_CASE, rates, "FFN speeds")
    columns = [*DECODING_CASE, "tokens_per_second", "ffn_time", *sizes]
    require(decoding, columns, DECODING_CASE, sizes, "decoding speeds")
    by_dtype = {name: _rates(ffns, name) for name in BYTES}
    if dtype not in BYTES or by_dtype[dtype].empty:
        known = ", ".join(name for name, rates in by_dtype.items() if len(rates))
        raise InputError(f"There are no speeds of FFNs with {dtype!r} weights; choose one of {known or 'none'}.")
    single = decoding[decoding["sequences"] == 1]
    whole = frozenset(single.loc[single["ffn_time"].isna(), "way"])
    reading = Machine(recorded_bandwidth(ffns), "float32", by_dtype["float32"], dict.fromkeys(WAYS, 0.0), whole)
    trained = single[single["model"] == "trained"]
    beyond = 1 / trained["tokens_per_second"] - _step_seconds(reading, trained)
    fixed = (beyond / _shapes(trained)["n_layers"]).clip(lower=0).groupby(trained["way"]).mean()
    return Machine(bandwidth, dtype, by_dtype[dtype], fixed.reindex(list(WAYS)).to_dict(), whole)


def recorded_bandwidth(ffns: pd.DataFrame) -> float:
    """GB/s of reading memory where a study's single FFNs were timed, median over its cases."""
    return float(ffns["read_gb_per_s"].median())


def plan_budget(
    design: Design,
    on: Machine,
    parameters: int,
    tokens: float,
    vocabulary: int,
    ratios: Iterable[float] = RATIOS,
) -> pd.DataFrame:
    """What to expect of every shape for a budget: one row per activation function and width-depth ratio.

    Columns: activation, shape, d_model, n_layers, parameters, width_depth_ratio; activation_ratio, loss and sparse
    (tokens per second, FFNs that skip what CETT calls inactive), each with low_ and high_ of its 90% interval; dense
    (tokens per second, the faster way that reads all weights); certified (tokens per second, where an 8-bit copy of the
    gate leaves only the needed rows undecided; functions with exact zeros only); extrapolates (in words; empty inside
    the fit). The interval of `sparse` is that of the activation ratio alone. The table is empty if the design has no
    predictions.

    Args:
        parameters: non-embedding. tokens: of the whole training. vocabulary: entries of the output head.
        ratios: width-depth ratios; one without an integer shape near it is skipped.

    Raises InputError for numbers that are not positive.
    """
    if vocabulary <= 0:
        raise InputError(f"vocabulary is {vocabulary}; an output head needs a positive number of entries.")
    if parameters <= 0:
        raise InputError(f"parameters is {parameters}; a budget is a positive number.")
    shapes = {}
    for ratio in ratios:
        try:
            shape = solve_shape(parameters, ratio)
        except InputError:  # no integer shape near it
            continue
        shapes[shape.d_model, shape.n_layers] = shape
    rows = []
    for activation in design.activations if not design.reason else ():
        for d_model, n_layers in shapes:
            about: dict[str, Any] = {"activation": activation, "shape": f"{d_model}x{n_layers}", "d_model": d_model}
            about |= {"n_layers": n_layers, "parameters": non_embedding_parameters(d_model, n_layers)}
            about |= {"width_depth_ratio": d_model / n_layers}
            expected = design.predict(about["parameters"], tokens, about["width_depth_ratio"], activation)
            rows.append(about | _outcomes(expected) | _speeds(on, expected, about, vocabulary))
    return pd.DataFrame(rows, columns=COLUMNS)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A plan as rounded text, intervals in brackets; speeds in tokens per second, active neurons in percent."""
    return pd.DataFrame(
        {
            "activation": table["activation"].map(ACTIVATIONS),
            "shape": table["shape"],
            "width_depth_ratio": table["width_depth_ratio"].map("{:.3g}".format),
            "active %": _with_interval(table, "activation_ratio", 100, 1),
            "loss": _with_interval(table, "loss", 1, 2),
            "dense": table["dense"].map("{:,.4g}".format),
            "sparse": _with_interval(table, "sparse", 1, 0 if table["dense"].max() > 100 else 2),
            "sparse / dense": (table["sparse"] / table["dense"]).round(2),
            "beyond the fit": table["extrapolates"],
        }
    )


def _with_interval(table: pd.DataFrame, column: str, unit: float, digits: int) -> list[str]:
    ends = unit * table[[column, f"low_{column}", f"high_{column}"]].astype(float)
    text = "{:,.{n}f} [{:,.{n}f}, {:,.{n}f}]"
    return [text.format(*row, n=digits) if np.isfinite(row).all() else "none" for row in ends.to_numpy()]


def decoding_check(ffns: pd.DataFrame, decoding: pd.DataFrame) -> pd.DataFrame:
    """Measured beside predicted decoding of the model of a published shape, which had no part in the rates.

    One row per sparsity and way: shape, inactive_percent, way, tokens_per_second and strict_speedup (over the faster
    way that reads all weights) as measured, predicted and predicted_speedup from the weights that were read. The table
    is empty if the study has no such model. Raises InputError as `machine` does.
    """
    on = machine(ffns, decoding, recorded_bandwidth(ffns))
    steps = decoding[(decoding["model"] == "random weights") & (decoding["sequences"] == 1)]
    speeds = 1 / _step_seconds(on, steps)
    fastest = speeds[steps["way"].isin(DENSE)].groupby(steps["setting"]).max()
    table = pd.DataFrame(
        {
            "shape": steps["shape"],
            "inactive_percent": steps["setting"],
            "way": steps["way"],
            "tokens_per_second": steps["tokens_per_second"],
            "predicted": speeds,
            "strict_speedup": steps["strict_speedup"],
            "predicted_speedup": speeds / steps["setting"].map(fastest),
        }
    )
    return table.reset_index(drop=True)


def _rates(ffns: pd.DataFrame, dtype: str) -> pd.DataFrame:
    """Median gb_per_s / read_gb_per_s: rate of the weights of one FFN over that of reading memory. (d_model, way)"""
    rows = ffns[(ffns["dtype"] == dtype) & (ffns["tokens"] == 1) & (ffns["pattern"] == "random")]
    shares = rows.assign(rate=rows["gb_per_s"] / rows["read_gb_per_s"])
    return shares.pivot_table("rate", "d_model", "way", aggfunc="median").reindex(columns=list(WAYS))


def _step_seconds(on: Machine, steps: pd.DataFrame) -> pd.Series:
    """Predicted time of each row of a table of decoding speeds, from the megabytes that it says were read."""
    shapes, ffn = _shapes(steps), 1e6 * steps["ffn_megabytes"]
    attention = BYTES["float32"] * ATTENTION * shapes["n_layers"] * shapes["d_model"] ** 2
    head = 1e6 * steps["megabytes"] - ffn - attention
    rows = zip(steps["way"], shapes["d_model"], shapes["n_layers"], ffn, head, strict=True)
    return pd.Series([on.seconds(*row) for row in rows], index=steps.index, dtype=float)


def _shapes(steps: pd.DataFrame) -> pd.DataFrame:
    """d_model and n_layers, which a table of decoding speeds has as text."""
    return steps["shape"].str.extract(r"(?P<d_model>\d+)x(?P<n_layers>\d+)").astype(int)


def _outcomes(expected: Prediction) -> dict[str, float]:
    columns: dict[str, float] = {}
    for name, estimate in (("activation_ratio", expected.activation_ratio), ("loss", expected.loss)):
        columns |= {name: estimate.value, f"low_{name}": estimate.low, f"high_{name}": estimate.high}
    return columns


def _speeds(on: Machine, expected: Prediction, about: dict, vocabulary: int) -> dict[str, float | str]:
    """Tokens per second of the ways, and in words where the prediction or the rates extrapolate."""
    shape = (about["d_model"], about["n_layers"], vocabulary)

    def sparse(end: str) -> float:
        active, nonzero = (getattr(estimate, end) for estimate in (expected.activation_ratio, expected.nonzero_share))
        share = METRICS["cett"].weights_read(active, nonzero)
        return on.speeds(*shape, {"sparse": share})["sparse"]

    active, needed = expected.activation_ratio.value, expected.nonzero_share.value
    copied = 1 / BYTES[on.dtype] + needed + needed + active  # gate's copy, undecided rows of the gate, up, down
    exact = about["activation"] in EXACT_ZEROS
    words = list(expected.extrapolates)
    if about["d_model"] < on.rates.index.min() / NEAR:
        words.append(f"rates of kernels measured from d_model {on.rates.index.min()} on")
    return {
        "dense": max(on.speeds(*shape, dict.fromkeys(DENSE, 1.0)).values()),
        "sparse": sparse("value"),
        "low_sparse": sparse("high"),
        "high_sparse": sparse("low"),
        "certified": on.speeds(*shape, {"certified": copied / 3})["certified"] if exact else math.nan,
        "extrapolates": "; ".join(words),
    }
