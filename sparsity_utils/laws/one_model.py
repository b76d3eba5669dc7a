"""What can be said of one measured model: quantities made of sums over documents, with intervals over documents.

Documents of equal rank have equal weights in every bootstrap here, so that estimates on the same documents are paired.
Tables are pretrained_prices (one row per setting and document) and pretrained_positions (per document, layer and class
of position); results/columns.csv describes them.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from sparsity_utils.laws.trends import Estimate, no_estimate
from sparsity_utils.neurons.rules import METRICS

REPLICATES = 2000
COVERAGE = (5, 95)  # percentiles: a 90% interval
SETTING = ["text", "dtype", "metric", "price", "solved_on"]  # names what a row of prices is of, beside the document
SUMS = ["tokens", "loss_dense", "loss", "right_dense", "right", "agreed"]  # over a document
KINDS = ("first", "first delimiter")  # classes of positions that may be sparse
OTHER = "other"  # the class that they are compared with
POSITIONS = (*KINDS, "delimiter", "early", OTHER)

Statistic = Callable[[pd.DataFrame], pd.Series]


def over_documents(sums: pd.DataFrame, statistic: Statistic, coverage: tuple[float, float] = COVERAGE) -> Estimate:
    """`statistic` of the sums of all documents, with the percentile interval of a Poisson bootstrap over documents.

    In each replicate a document counts a Poisson(1) number of times, as in `sparsity.evaluation`.

    Args:
        sums: one row per document, one column per summed quantity.
        statistic: makes a number of each row of such sums.
        coverage: percentiles that the interval goes from and to.
    """
    if len(sums) < 2:
        return no_estimate(f"only {len(sums)} documents; at least 2 are needed", len(sums))
    weights = np.random.default_rng(0).poisson(1.0, (REPLICATES, len(sums)))
    replicates = pd.DataFrame(weights @ sums.to_numpy(dtype=float), columns=sums.columns)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(replicates).to_numpy(dtype=float)
    low, high = np.percentile(values[np.isfinite(values)], coverage)
    return Estimate(float(statistic(sums.sum().to_frame().T).iloc[0]), float(low), float(high), len(sums))


# Prices


def rise(sums: pd.DataFrame) -> pd.Series:
    """Rise of perplexity, exp(loss - dense loss) - 1."""
    return np.expm1((sums["loss"] - sums["loss_dense"]) / sums["tokens"])


def accuracy_lost(sums: pd.DataFrame) -> pd.Series:
    """Next-token accuracy of the dense model less that of the sparse one."""
    return (sums["right_dense"] - sums["right"]) / sums["tokens"]


def agreement(sums: pd.DataFrame) -> pd.Series:
    """Share of tokens for which the sparse model finds the same token likeliest as the dense one."""
    return sums["agreed"] / sums["tokens"]


def costs(prices: pd.DataFrame) -> pd.DataFrame:
    """One row per setting: SETTING, value, activation_ratio, tokens, documents, and three costs with low_ and high_.

    The costs are rise, accuracy_lost and agreement.
    """
    rows = []
    for name, group in prices.groupby(SETTING, sort=False):
        ratio = (group["activation_ratio"] * group["tokens"]).sum() / group["tokens"].sum()
        row = {**dict(zip(SETTING, name, strict=True)), "value": group["value"].iloc[0], "activation_ratio": ratio}
        for statistic in (rise, accuracy_lost, agreement):
            found = over_documents(group[SUMS], statistic)
            what = statistic.__name__
            row |= {what: found.value, f"low_{what}": found.low, f"high_{what}": found.high}
        rows.append({**row, "tokens": group["tokens"].sum(), "documents": len(group)})
    return pd.DataFrame(rows)


def gaps(prices: pd.DataFrame, metric: str, rivals: Iterable[str], column: str = "loss") -> dict[str, Estimate]:
    """By how much a metric is better than its rivals per token, at each activation ratio they share, on each text.

    column: "loss", the rival's less that of the metric; or "agreed", the metric's less that of the rival.
    """
    estimates, own = {}, prices[prices["text"] == prices["solved_on"]]
    for (text, price), rows in own.groupby(["text", "price"]):
        wide = rows.pivot(index="document", columns="metric", values=column)
        tokens = rows.groupby("document")["tokens"].first()
        for rival in rivals:
            if {metric, rival} <= set(wide):
                better = wide[rival] - wide[metric] if column == "loss" else wide[metric] - wide[rival]
                sums = pd.DataFrame({"better": better, "tokens": tokens})
                name = f"{METRICS[rival].label} at the ratio of {price:g}%, {text}"
                estimates[name] = over_documents(sums, lambda sums: sums["better"] / sums["tokens"])
    return estimates


def dtype_difference(prices: pd.DataFrame, price: float) -> Estimate:
    """Activation ratio at CETT-PPL-p% in bfloat16 less that in float32, a mean over the same documents."""
    text = prices.loc[prices["dtype"] == "bfloat16", "text"].iloc[0]
    rows = prices[(prices["text"] == text) & (prices["solved_on"] == text) & (prices["metric"] == "cett-ppl")]
    wide = rows[rows["price"] == price].pivot(index="document", columns="dtype", values="activation_ratio")
    sums = pd.DataFrame({"difference": wide["bfloat16"] - wide["float32"], "documents": 1})
    return over_documents(sums, lambda sums: sums["difference"] / sums["documents"])


# Layers and positions


def layer_sums(positions: pd.DataFrame, text: str) -> pd.DataFrame:
    """Sum over the tokens of each document (rows) of the activation ratio in each layer (columns), and `tokens`."""
    rows = positions[positions["text"] == text]
    active = (rows["tokens"] * rows["activation_ratio"]).groupby([rows["document"], rows["layer"]]).sum().unstack()
    return active.assign(tokens=rows[rows["layer"] == 0].groupby("document")["tokens"].sum())


def layer_ends(positions: pd.DataFrame) -> dict[str, Estimate]:
    """Activation ratio of the first and of the last layer, less the mean of the middle half, for each text."""
    estimates = {}
    for text in dict.fromkeys(positions["text"]):
        sums = layer_sums(positions, text)
        layers = len(sums.columns) - 1
        middle = list(range(layers // 4, layers - layers // 4))
        for name, end in (("first", 0), ("last", layers - 1)):

            def difference(sums: pd.DataFrame, end: int = end, middle: list[int] = middle) -> pd.Series:
                return (sums[end] - sums[middle].mean(axis=1)) / sums["tokens"]

            estimates[f"{name} layer, {text}"] = over_documents(sums, difference)
    return estimates


def sparse_band(positions: pd.DataFrame, text: str, kind: str, sparse: float) -> tuple[range, Estimate]:
    """The band of layers in which a class of positions is sparse, and how sparse it is there.

    The band is chosen on every second document: the longest run of layers, the first of equals, in which the class
    `kind` has less than `sparse` times the activation ratio of the class "other". The estimate is the quotient of the
    two ratios in that band on the remaining documents that have such a position; without a band it holds a reason.
    """
    rows = positions[(positions["text"] == text) & positions["position"].isin([kind, OTHER])]
    rows = rows.assign(active=rows["tokens"] * rows["activation_ratio"])
    chosen = rows["document"].rank(method="dense") % 2 == 1
    sums = rows[chosen].groupby(["layer", "position"])[["active", "tokens"]].sum()
    ratios = (sums["active"] / sums["tokens"]).unstack().reindex(columns=[kind, OTHER])
    band = longest_run(ratios[kind] < sparse * ratios[OTHER])
    tested = rows[~chosen & rows["document"].isin(rows.loc[rows["position"] == kind, "document"])]
    if not band:
        return band, no_estimate("no such band of layers", tested["document"].nunique())
    inside = tested[tested["layer"].isin(band)].pivot_table(["active", "tokens"], "document", "position", "sum")
    wide = inside.set_axis([f"{what} {position}" for what, position in inside], axis=1)

    def quotient(sums: pd.DataFrame) -> pd.Series:
        mine, others = (sums[f"active {name}"] / sums[f"tokens {name}"] for name in (kind, OTHER))
        return mine / others

    return band, over_documents(wide, quotient)


def longest_run(holds: Iterable[bool]) -> range:
    """The first of the longest runs of places at which `holds` is true; empty where it never is."""
    best, start = range(0), 0
    for place, inside in enumerate([*holds, False]):
        if not inside:
            best, start = max(best, range(start, place), key=len), place + 1
    return best
