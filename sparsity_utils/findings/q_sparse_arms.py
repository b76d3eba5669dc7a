"""The arms of notebook 12: how they are called, what they leave out, and which are the same at several sizes."""

import pandas as pd

LEVELS = {"dense": 0.0, "keep_11": 5 / 16, "keep_8": 0.5, "keep_6": 10 / 16, "keep_3": 13 / 16}  # arm -> S
DENSE, KEPT = "_dense", "_keep_6"  # how the names of the arms of q_sparse_sizes end, such as 16x2_dense
NEAR_BEST = ("keep_10", "keep_7")  # of equal_active: S of 38% and 56%, on both sides of the printed optimum
# arm -> how it is called, and the arm that it is compared with
ARMS = {
    "dense": ("ReLU², reads all", ""),
    "keep_11": ("ReLU², reads 11 of 16", "dense"),
    "keep_8": ("ReLU², reads 8 of 16", "dense"),
    "keep_6": ("ReLU², reads 6 of 16", "dense"),
    "keep_3": ("ReLU², reads 3 of 16", "dense"),
    "no_straight_through": ("8 of 16, no straight-through", "keep_8"),
    "ratio": ("8 of 16, norm restored", "keep_8"),
    "unit": ("8 of 16, norm of √n", "keep_8"),
    "block": ("16 of every 32", "keep_8"),
    "ternary_dense": ("ternary, 8 bits, reads all", "dense"),
    "ternary": ("ternary, 8 bits, 8 of 16", "ternary_dense"),
    "relu": ("ReLU, reads all", "dense"),
    "relu_l1_weak": ("ReLU, L1 penalty 0.001", "relu"),
    "relu_l1_strong": ("ReLU, L1 penalty 0.01", "relu"),
}
ACTIVE = {"dense": 0.0, "keep_12": 0.25, "keep_10": 0.375, "keep_7": 0.5625, "keep_4": 0.75}  # of equal_active: S


def as_sizes(runs: pd.DataFrame) -> pd.DataFrame:
    """The dense arm and keep_6 of q_sparse under the names that q_sparse_sizes gives such arms."""
    shape = runs["d_model"].astype(str) + "x" + runs["n_layers"].astype(str)
    named = {"dense": DENSE, "keep_6": KEPT}
    chosen = runs["arm"].isin(named)
    return runs[chosen].assign(arm=shape[chosen] + runs.loc[chosen, "arm"].map(named))


def gaps_of_sizes(sizes: pd.DataFrame) -> pd.DataFrame:
    """Of each size and seed, the loss of keep_6 less that of the dense model: shape, seed, parameters, gap."""
    losses = sizes.assign(shape=sizes["arm"].str.split("_").str[0], kind=sizes["arm"].str.split("_", n=1).str[1])
    wide = losses.pivot_table("loss", ["shape", "seed", "parameters"], "kind")
    wide = wide.reindex(columns=["dense", "keep_6"]).dropna().reset_index()
    return wide.assign(gap=wide["keep_6"] - wide["dense"])[["shape", "seed", "parameters", "gap"]]
