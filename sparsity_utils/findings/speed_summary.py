"""What the speed tables say in a few numbers: break-even points, shares of the ideal, undecided gates, caps."""

import numpy as np
import pandas as pd

from sparsity_utils.laws.cost import decoding_limit

NOWHERE = float("nan")


def break_even(ffns: pd.DataFrame, column: str = "speedup") -> pd.DataFrame:
    """Sparsity in percent from which on a sparse way is faster than dense, random patterns.

    One row per shape, dtype and tokens, one column per way: 0 where it is faster with nothing to skip, NaN where it
    never is. Between two measured sparsities the log of the speed-up is taken as straight.

    Args:
        column: "speedup" over torch, or "strict_speedup" over the fastest way that reads all weights.
    """
    rows = ffns[(ffns["pattern"] == "random") & ffns["way"].isin(["sparse", "certified"])]
    points = {
        key: _crossing(curve.sort_values("sparsity"), column)
        for key, curve in rows.groupby(["d_model", "shape", "dtype", "tokens", "way"])
    }
    return (100 * pd.Series(points)).rename_axis(["d_model", "shape", "dtype", "tokens", "way"]).unstack("way")


def _crossing(curve: pd.DataFrame, column: str) -> float:
    sparsity, gain = curve["sparsity"].to_numpy(), np.log(curve[column].to_numpy())
    slower = np.flatnonzero(gain < 0)
    if len(slower) == 0:
        return 0.0
    last = slower[-1]  # from here on it is faster
    if last == len(gain) - 1:
        return NOWHERE
    return float(np.interp(0, gain[last : last + 2], sparsity[last : last + 2]))


def shares_of_ideal(ffns: pd.DataFrame, shape: str, dtype: str = "float32") -> pd.DataFrame:
    """Speed-ups of one shape, one token, random patterns: over torch, strict, ideal, and strict over ideal."""
    rows = ffns.query("shape == @shape and dtype == @dtype and tokens == 1 and pattern == 'random'")
    rows = rows[rows["way"].isin(["sparse", "certified"])]
    chosen = rows.assign(of_ideal=rows["strict_speedup"] / rows["ideal_speedup"], percent=100 * rows["sparsity"])
    columns = ["speedup", "strict_speedup", "ideal_speedup", "of_ideal"]
    return chosen.assign(percent=chosen["percent"].round(1)).pivot(index="percent", columns="way", values=columns)


def undecided(decoding: pd.DataFrame) -> pd.DataFrame:
    """Percent of the gate rows that an 8-bit copy leaves undecided, beside the truly needed ones, one sequence."""
    rows = decoding[(decoding["way"] == "certified") & (decoding["sequences"] == 1)]
    table = rows[["model", "shape", "activation", "sparsity", "up_share", "gate_share"]].copy()
    table[["sparsity", "up_share", "gate_share"]] *= 100
    names = {"sparsity": "inactive %", "up_share": "rows needed %", "gate_share": "rows undecided %"}
    return table.rename(columns=names).reset_index(drop=True)


def decoding_limits(sparsity: float) -> pd.DataFrame:
    """Largest speed-up of decoding a study shape at that sparsity of a ReLU model, rule "gate", by what FFNs read.

    The certified gate is counted at its best, with nothing undecided but the needed rows, for weights of 4 and 2 bytes.
    """
    active = 1 - sparsity
    read = {
        "gate in full, then active rows": (1 + 2 * active) / 3,
        "8-bit gate beside float32": (1 / 4 + 3 * active) / 3,
        "8-bit gate beside 16-bit weights": (1 / 2 + 3 * active) / 3,
        "a perfect predictor: active rows alone": active,
        "nothing": 0.0,
    }
    limits = {name: (1 / share if share else np.inf, decoding_limit(share)) for name, share in read.items()}
    return pd.DataFrame(limits, index=["FFN alone", "whole model, no head"]).T.rename_axis("what the FFNs read")
