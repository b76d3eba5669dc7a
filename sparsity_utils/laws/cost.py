"""What skipping neurons can save: the weights that must still be read for a token, of an FFN and of a whole model."""

import math

import numpy as np
import pandas as pd

from sparsity_utils.neurons.rules import METRICS

# What one row of the table of the speeds of single FFNs, and of that of decoding, is the speed of.
FFN_CASE = ["shape", "dtype", "tokens", "pattern", "activation", "rule", "sparsity", "way"]
DECODING_CASE = ["model", "activation", "shape", "rule", "setting", "sequences", "way"]


def decoding_limit(ffn_share_read: float, ffn_ratio: float = 2.5) -> float:
    """Largest speed-up of decoding one token, bound by reading weights, if FFNs read only a share of theirs.

    Per layer, attention has 4 d^2 weights and the gated FFN 3 `ffn_ratio` d^2 (study shapes: 11.5 d^2 together). The
    output head, which only lowers the limit, is left out.
    """
    attention, ffn = 4.0, 3 * ffn_ratio
    return (attention + ffn) / (attention + ffn * ffn_share_read)


def with_weights_read(table: pd.DataFrame) -> pd.DataFrame:
    """The table of question "metrics" with a column weights_read; a run's row "relu" holds its share of non-zeros."""
    nonzero = table[table["metric"] == "relu"].set_index("run")["activation_ratio"]
    read = [
        METRICS[row.metric].weights_read(row.activation_ratio, nonzero[row.run])
        for row in table[["run", "metric", "activation_ratio"]].itertuples(index=False)
    ]
    return table.assign(weights_read=read)


def weights_read_at(table: pd.DataFrame, p: float) -> pd.DataFrame:
    """Share of the FFN weights each metric must read where perplexity rises by `p` percent, mean over seeds.

    `table`: of the question "metrics". Between two measured settings the log of the PPL ratio is taken as straight;
    NaN where a metric was not measured on both sides of the rise. One row per activation, d_model and n_layers, one
    column per metric with a knob.
    """
    target, rows = math.log1p(p / 100), []
    knobs = with_weights_read(table[table["metric"] != "cett-ppl"]).query("metric != 'relu'")
    for key, curve in knobs.groupby(["activation", "d_model", "n_layers", "metric", "run"], sort=True):
        curve = curve.sort_values("weights_read", ascending=False)
        rise = np.maximum.accumulate(np.log(curve["ppl_ratio"].to_numpy()))
        inside = rise.min() <= target <= rise.max()
        read = float(np.interp(target, rise, curve["weights_read"])) if inside else math.nan
        rows.append((*key[:-1], read))
    found = pd.DataFrame(rows, columns=["activation", "d_model", "n_layers", "metric", "weights_read"])
    shape = ["activation", "d_model", "n_layers"]
    return found.groupby([*shape, "metric"])["weights_read"].mean().unstack("metric")
