"""What each run comes to: one row of measured numbers per run, nothing fitted but its direction."""

import numpy as np
import pandas as pd

from sparsity_utils.laws.limits import SHAPE, check_checkpoints, fit_points, last_means, require
from sparsity_utils.laws.trends import run_slopes


def run_table(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """One row per run, by activation, size and seed.

    Columns: run, activation, d_model, n_layers, parameters, width_depth_ratio, seed, final_loss (validation loss of the
    last checkpoint, nats per token), last_five_mean and last_five_nonzero (activation ratio and non-zero share, mean
    over the last five stable checkpoints), slope (of the activation ratio per decade of tokens, warm-up dropped; NaN
    with fewer than three fitted points), checkpoints (fitted ones). Raises InputError for missing columns, duplicates
    and NaN.
    """
    check_checkpoints(checkpoints)
    require(checkpoints, ["nonzero_share"], ["run", "step"], ["nonzero_share"], "checkpoints")
    points = fit_points(checkpoints)
    slopes = run_slopes(points["tokens"], points["activation_ratio"], points["run"])
    loss = checkpoints.sort_values("tokens").groupby("run")["validation_loss"].last()
    nonzero = last_means(checkpoints, "nonzero_share").set_index("run")["last_five_mean"]
    table = last_means(checkpoints).sort_values([*SHAPE, "seed"], ignore_index=True)
    runs = table["run"]
    table.insert(table.columns.get_loc("seed") + 1, "final_loss", runs.map(loss))
    return table.assign(
        last_five_nonzero=runs.map(nonzero),
        slope=runs.map(lambda run: slopes.get(run, np.nan)),
        checkpoints=runs.map(points["run"].value_counts()).fillna(0).astype(int),
    )
