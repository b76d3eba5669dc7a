"""Training-free rules compared with each other: on the documents of one model, and over seeds of trained decoders.

Excess is the loss with weights left out less the dense loss, in nats per token. All intervals here are of 95%.
Documents of equal rank have equal weights in every bootstrap, so that estimates on the same documents are paired.
Tables are training_free (one row per model, seed and setting) and training_free_documents; results/columns.csv
describes them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from statsmodels.stats.weightstats import DescrStatsW

from sparsity_utils.laws.one_model import over_documents
from sparsity_utils.laws.trends import Estimate, no_estimate

LEVEL, COVERAGE = 0.95, (2.5, 97.5)  # of intervals, and their percentiles
SETTING = ["method", "allocation", "rotated", "by", "level"]
SUMS = ["tokens", "loss_dense", "loss"]  # over a document
TOLERANCE = 0.005  # of the share that is skipped, or read: settings that differ by more are not compared

Choice = Mapping[str, Any]  # columns of a setting and their values


def choice(method: str, allocation: str = "uniform", level: float = 0.5, by: str = "sparsity", rotated: bool = False):
    """The columns that name one setting."""
    return {"method": method, "allocation": allocation, "by": by, "level": level, "rotated": rotated}


def chosen(table: pd.DataFrame, setting: Choice) -> pd.DataFrame:
    """The rows of a setting."""
    same = [
        np.isclose(table[name], value) if name == "level" else table[name] == value for name, value in setting.items()
    ]
    return table[np.logical_and.reduce(same)]


def excess(sums: pd.DataFrame) -> pd.Series:
    """(loss - dense loss) / tokens."""
    return (sums["loss"] - sums["loss_dense"]) / sums["tokens"]


def perplexity_ratio(documents: pd.DataFrame, setting: Choice) -> Estimate:
    """exp(excess) of a setting, over documents."""
    rows = chosen(documents, setting)
    if rows.empty:
        return no_estimate("not measured")
    return over_documents(rows[SUMS], lambda sums: np.exp(excess(sums)), COVERAGE)


def against(
    table: pd.DataFrame, documents: pd.DataFrame, ours: Choice, rival: Choice, same: str = "skipped"
) -> Estimate:
    """Excess of a setting over that of its rival, less 1, on the same documents of one model.

    same: the column of `table` in which both must agree to TOLERANCE. There is no estimate where they do not, and where
    either was not measured.
    """
    rows = [chosen(table, setting) for setting in (ours, rival)]
    if any(row.empty for row in rows):
        return no_estimate("not measured")
    apart = abs(float(rows[0][same].iloc[0] - rows[1][same].iloc[0]))
    if apart > TOLERANCE:
        return no_estimate(f"{same} differs by {100 * apart:.1f} points, more than {100 * TOLERANCE:g}")
    one, other = (chosen(documents, setting).set_index("document")[SUMS] for setting in (ours, rival))
    both = one.join(other["loss"].rename("rival"))

    def relative(sums: pd.DataFrame) -> pd.Series:
        return (sums["loss"] - sums["loss_dense"]) / (sums["rival"] - sums["loss_dense"]) - 1

    return over_documents(both, relative, COVERAGE)


def against_over_seeds(table: pd.DataFrame, ours: Choice, rival: Choice) -> Estimate:
    """Excess of a setting over that of its rival, less 1, mean over seeds; none where what is skipped differs."""
    one, other = (chosen(table, setting).set_index("seed") for setting in (ours, rival))
    if one.empty or other.empty:
        return no_estimate("not measured")
    apart = (one["skipped"] - other["skipped"]).abs().max()
    if apart > TOLERANCE:
        return no_estimate(f"skipped differs by {100 * apart:.1f} points, more than {100 * TOLERANCE:g}", len(one))
    return over_units(one["excess"] / other["excess"] - 1)


def over_units(values: Iterable[float], least: int = 2) -> Estimate:
    """Mean of one value per unit, such as a seed or a block, with its t interval."""
    values = np.asarray(list(values), dtype=float)
    if len(values) < least:
        return no_estimate(f"only {len(values)}; at least {least} are needed", len(values))
    described = DescrStatsW(values)
    low, high = described.tconfint_mean(0.05)
    return Estimate(float(described.mean), float(low), float(high), len(values))


def block_errors(blocks: pd.DataFrame) -> pd.Series:
    """Error of the greedy allocation over that of the uniform one, of each block; indexed like `blocks`."""
    return blocks["greedy"] / blocks["uniform"]


def shares(table: pd.DataFrame, level: float) -> pd.Series | None:
    """How much of CETT's advantage over Top-k is of its score, and how much of its allocation, at one sparsity.

    The advantage is log(excess of Top-k / excess of CETT). The score's share is taken at allocation top-k and with
    allocation cett, and the mean of the two counted, so that score and allocation add up to 1. None where excesses are
    missing or not positive.
    """
    found = {}
    for score in ("gate", "n"):
        for allocation in ("top-k", "cett"):
            rows = chosen(table, choice(score, allocation, level))["excess"]
            if rows.empty or rows.mean() <= 0:
                return None
            found[score, allocation] = np.log(rows.mean())
    whole = found["gate", "top-k"] - found["n", "cett"]
    by_score = found["gate", "top-k"] - found["n", "top-k"] + found["gate", "cett"] - found["n", "cett"]
    score = by_score / 2 / whole
    return pd.Series({"advantage": np.expm1(-whole), "score": score, "allocation": 1 - score})
