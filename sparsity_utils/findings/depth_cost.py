"""What depth costs, in operations and in time, beside the sparsity that it buys."""

import numpy as np
import pandas as pd

from sparsity_utils.console import InputError
from sparsity_utils.laws.limits import require
from sparsity_utils.laws.run_table import run_table
from sparsity_utils.study.step_times import PASSES

SIZE = ["d_model", "n_layers"]


def cost_beside_sparsity(checkpoints: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """What each shape buys and what it costs, widest first; costs are relative to the widest shape.

    Columns: d_model, n_layers, width_depth_ratio, seeds, activation_ratio and spread (last-five means over seeds, and
    largest minus smallest), loss and loss_spread (final validation loss, nats per token), flops, training,
    training_low, training_high, forward (of the widest shape's median), training_us (microseconds per token). Raises
    InputError for unusable tables and for a shape without costs.
    """
    numbers = [f"{name}_us" for name in PASSES]
    columns = [*SIZE, "width_depth_ratio", "flops_per_token", *numbers, "training_low", "training_high"]
    require(costs, columns, SIZE, numbers, "depth_cost")
    shapes = (
        run_table(checkpoints)
        .groupby([*SIZE, "width_depth_ratio"], as_index=False)
        .agg(
            seeds=("seed", "nunique"),
            activation_ratio=("last_five_mean", "mean"),
            spread=("last_five_mean", np.ptp),
            loss=("final_loss", "mean"),
            loss_spread=("final_loss", np.ptp),
        )
        .merge(costs.drop(columns="width_depth_ratio"), on=SIZE, how="left")
    )
    unknown = shapes[shapes["training_us"].isna()]
    if len(unknown):
        first = "x".join(str(number) for number in unknown.iloc[0][SIZE].astype(int))
        raise InputError(f"The depth_cost table has no row for {first}; delete it and measure again.")
    shapes = shapes.sort_values("width_depth_ratio", ascending=False, ignore_index=True)
    widest = shapes.iloc[0]
    return shapes[
        [*SIZE, "width_depth_ratio", "seeds", "activation_ratio", "spread", "loss", "loss_spread", "training_us"]
    ].assign(
        flops=shapes["flops_per_token"] / widest["flops_per_token"],
        training=shapes["training_us"] / widest["training_us"],
        training_low=shapes["training_low"] / widest["training_us"],
        training_high=shapes["training_high"] / widest["training_us"],
        forward=shapes["forward_us"] / widest["forward_us"],
    )
