"""Notebook 06: tables of speeds in, verdicts on the claims of speed_claims.py out.

A test whose conditions are not met is inconclusive and says why; only an unusable table is an error.
"""

import math

import numpy as np
import pandas as pd

from sparsity_utils.findings import speed_claims
from sparsity_utils.findings.judgement import Claim, Verdict
from sparsity_utils.laws.cost import decoding_limit
from sparsity_utils.laws.data_law import LEVEL
from sparsity_utils.laws.limits import require
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Estimate
from sparsity_utils.models.config import ACTIVATIONS

SHAPE = "2.4B"
PUBLISHED = 4.1  # times: 41.79 against 10.23 tokens per second (arXiv 2411.02335, section 5)
CASE = ["shape", "dtype", "tokens", "pattern", "activation", "rule", "sparsity", "way"]
INTERVALS = ["speedup", "low_speedup", "high_speedup", "strict_speedup", "low_strict_speedup", "high_strict_speedup"]
MODEL = ["model", "activation", "shape", "rule", "setting", "sequences", "way"]


def sparse_decoding(ffns: pd.DataFrame, decoding: pd.DataFrame) -> list[Verdict]:
    """Single FFNs against their ideal, and whole decoding steps: one verdict per claim.

    The tables of the questions sparse_ffn and sparse_decoding, as results/columns.csv describes them. Raises
    InputError for missing columns, duplicates and NaN.
    """
    numbers = ["sparsity", "ideal_speedup", "speedup", "strict_speedup"]
    require(ffns, [*CASE, *INTERVALS, "ideal_speedup"], CASE, numbers, "FFN speeds")
    require(decoding, [*MODEL, *INTERVALS, "sparsity"], MODEL, ["sparsity"], "decoding speeds")
    one = ffns.query("shape == @SHAPE and dtype == 'float32' and tokens == 1 and pattern == 'random'")
    shape, trained = (decoding[decoding["model"] == name] for name in ("random weights", "trained"))
    return [
        _nearly_ideal(one[(one["way"] == "sparse") & one["sparsity"].between(0.499, 0.971)]),
        _above(speed_claims.NEVER_SLOWER, one[(one["way"] == "sparse") & (one["sparsity"] < 0.001)], "speedup", 1.0),
        _above(
            speed_claims.GATE_WALL,
            one[(one["way"] == "certified") & ((one["sparsity"] - 0.935).abs() < 0.001)],
            "strict_speedup",
            speed_claims.BEYOND_WALL,
        ),
        _published_speed(),
        _above(speed_claims.SHAPE_GAINS, _decoded(shape[shape["setting"] == 90]), "strict_speedup", 1.0),
        _above(speed_claims.TRAINED_GAIN, _decoded(trained), "strict_speedup", 1.0),
    ]


def _decoded(rows: pd.DataFrame) -> pd.DataFrame:
    """The sparse kernel, one sequence at a time."""
    return rows[(rows["way"] == "sparse") & (rows["sequences"] == 1)]


def _nearly_ideal(rows: pd.DataFrame) -> Verdict:
    ideal = rows["ideal_speedup"]
    strict = ["strict_speedup", "low_strict_speedup", "high_strict_speedup"]
    shares = rows.assign(**{column: rows[column] / ideal for column in strict})
    return _above(speed_claims.NEARLY_IDEAL, shares, "strict_speedup", speed_claims.NEAR_IDEAL)


def _above(claim: Claim, rows: pd.DataFrame, column: str, bound: float) -> Verdict:
    """The row with the lowest interval decides; rows without a speed gave other tokens than the masked model."""
    nothing, reason = Estimate(math.nan, math.nan, math.nan, LEVEL, 0), ""
    if rows.empty:
        reason = "it was not measured"
    elif rows[column].isna().any():
        reason = "the kernels gave other tokens than the masked model"
    elif rows[f"low_{column}"].isna().any():
        reason = "too few rounds for an interval"
    if reason:
        return claim.judged(nothing, INCONCLUSIVE, reason)
    lowest = rows.loc[rows[f"low_{column}"].idxmin()]
    estimate = Estimate(lowest[column], lowest[f"low_{column}"], lowest[f"high_{column}"], LEVEL, len(rows))
    verdict = SUPPORTED if estimate.low >= bound else NOT_SUPPORTED if estimate.high < bound else INCONCLUSIVE
    name = ACTIVATIONS.get(lowest["activation"], lowest["activation"])
    where = f"lowest of {len(rows)}: {name}, {100 * lowest['sparsity']:.1f}% sparse, on {_machine(lowest)}"
    return claim.judged(estimate, verdict, where)


def _machine(row: pd.Series) -> str:
    return f"{row['device']}, {row['threads']} threads" if {"device", "threads"} <= set(row.index) else "this machine"


def _published_speed() -> Verdict:
    limit = decoding_limit(ffn_share_read=0.0)
    verdict = SUPPORTED if limit >= PUBLISHED else NOT_SUPPORTED
    estimate = Estimate(limit, limit, limit, LEVEL, 1)
    exact = np.round(decoding_limit(ffn_share_read=(1 + 2 * 0.0648) / 3), 2)
    return speed_claims.PUBLISHED_SPEED.judged(
        estimate, verdict, f"with the gate read in full and 93.52% sparsity {exact}x"
    )
