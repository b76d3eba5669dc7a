"""What skipping neurons can save: how many weights of an FFN, and of a whole model, one token must still read."""

import math

import numpy as np
import pandas as pd

from sparsity_utils.neurons.rules import METRICS

# The columns that say what a row is the speed of: a single FFN (question sparse_ffn), or decoding (sparse_decoding).
FFN_CASE = ["shape", "dtype", "tokens", "pattern", "activation", "rule", "sparsity", "way"]
DECODING_CASE = ["model", "activation", "shape", "rule", "setting", "sequences", "way"]


def decoding_limit(ffn_share_read: float) -> float:
    """Largest speed-up of decoding one token, if time goes to reading weights and FFNs read only a share of theirs.

        (4 + 7.5) / (4 + 7.5 ffn_share_read)

    With d = d_model, a layer of the study's shapes has 4 d^2 weights in attention and 7.5 d^2 in the gated FFN (three
    matrices, d_ff = 2.5 d). The output head is left out; it would only lower the limit.
    """
    attention, ffn = 4.0, 7.5
    return (attention + ffn) / (attention + ffn * ffn_share_read)


def with_weights_read(table: pd.DataFrame) -> pd.DataFrame:
    """The table of the question "metrics" with a column weights_read, which `Rule.weights_read` computes.

    The share of non-zero neurons that it takes is the activation ratio of the run's row "relu".
    """
    nonzero = table[table["metric"] == "relu"].set_index("run")["activation_ratio"]
    read = [
        METRICS[row.metric].weights_read(row.activation_ratio, nonzero[row.run])
        for row in table[["run", "metric", "activation_ratio"]].itertuples(index=False)
    ]
    return table.assign(weights_read=read)


def weights_read_at(table: pd.DataFrame, p: float) -> pd.DataFrame:
    """Share of the FFN weights that each metric must read where it raises perplexity by `p` percent; mean over seeds.

    `table`: that of the question "metrics". Between two measured settings the share is interpolated linearly in the log
    of the PPL ratio; NaN where a run was not measured on both sides of `p`, since a mean of the others would be one of
    the cheaper or the dearer runs. One row per activation, d_model and n_layers, one column per metric with a knob.
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
    of_runs = found.groupby([*shape, "metric"])["weights_read"]
    return of_runs.agg(lambda runs: runs.mean(skipna=False)).unstack("metric")
