"""Arms of an experiment compared: the learning rate that counts, and differences over paired seeds.

An arm is trained with several learning rates and, with each, with the same seeds. The rate that counts is the one with
the lowest mean validation loss, arm by arm; a rate at which a seed is missing, because its run diverged, does not
count, since the seeds that survive are not a fair sample. Everything after that is a paired comparison: runs of one
seed share initialisation and data order.
"""

import pandas as pd

from sparsity_utils.laws.limits import require
from sparsity_utils.laws.trends import Estimate, mean_over_runs, no_estimate

RUN = ["run", "arm", "learning_rate", "seed"]
LAYERED = ["initial_share", "final_share", "initial_gradient", "final_gradient"]  # a number for each layer of a run


def at_chosen_rates(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the rate that counts of each arm; an arm without a rate of all seeds is left out.

    table: of an experiment, one row per run and layer. Raises InputError for missing columns, duplicates and NaN.
    """
    require(table, [*RUN, "layer", "validation_loss"], ["run", "layer"], ["validation_loss"], "experiment")
    runs = table.drop_duplicates("run")
    require(runs, [], ["arm", "learning_rate", "seed"], [], "experiment (one row per run)")
    rates = runs.groupby(["arm", "learning_rate"], sort=False)["validation_loss"].agg(["mean", "count"])
    whole = rates[rates["count"] == runs["seed"].nunique()].reset_index()
    best = whole.loc[whole.groupby("arm", sort=False)["mean"].idxmin(), ["arm", "learning_rate"]]
    return table.merge(best, on=["arm", "learning_rate"])


def chosen_rates(table: pd.DataFrame) -> pd.DataFrame:
    """Which rate counts: arm, learning_rate, tried (all rates, as text), at_edge (a wider grid might do better).

    A single rate, as of small profiles, is an edge.
    """
    runs = table.drop_duplicates("run")
    chosen = at_chosen_rates(table).drop_duplicates("arm").set_index("arm")["learning_rate"]
    rows = []
    for arm, rates in runs.groupby("arm", sort=False)["learning_rate"]:
        if arm in chosen:
            tried = sorted(rates.unique())
            edge = chosen[arm] in (tried[0], tried[-1])
            rows.append((arm, chosen[arm], ", ".join(f"{rate:g}" for rate in tried), edge))
    return pd.DataFrame(rows, columns=["arm", "learning_rate", "tried", "at_edge"])


def run_means(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per run: its numbers, those of layers as their mean over the layers.

    rows: one per run and layer, such as of `at_chosen_rates`.
    """
    layered = [name for name in LAYERED if name in rows]
    means = rows.groupby("run", sort=False)[layered].mean()
    return rows.drop_duplicates("run").drop(columns=["layer", *layered]).join(means, on="run").reset_index(drop=True)


def of_arm(runs: pd.DataFrame, arm: str, column: str) -> pd.Series:
    """`column` of the runs of an arm by seed, in the order of seeds; empty where the arm was not trained."""
    return runs[runs["arm"] == arm].set_index("seed")[column].sort_index().astype(float)


def mean_of_arm(runs: pd.DataFrame, arm: str, column: str) -> Estimate:
    """The mean over seeds with its t interval."""
    values = of_arm(runs, arm, column)
    return mean_over_runs(values) if len(values) else no_estimate(_missing([arm]))


def paired(runs: pd.DataFrame, arm: str, base: str, column: str, relative: bool = False) -> Estimate:
    """Mean over seeds of `column` of an arm less that of `base`, with its t interval; `relative`: over that of `base`.

    An arm that was not trained, or fewer than two seeds that both have, give an estimate with a reason.
    """
    values, of_base = of_arm(runs, arm, column), of_arm(runs, base, column)
    if missing := [name for name, found in ((arm, values), (base, of_base)) if found.empty]:
        return no_estimate(_missing(missing))
    gap = (values - of_base).dropna()
    return mean_over_runs(gap / of_base[gap.index] if relative else gap)


def _missing(arms: list[str]) -> str:
    return f"this study has no runs of {' and '.join(arms)} with every seed"
