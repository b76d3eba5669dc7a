"""What can be said of sparse drafts that a model corrects: quantities made of sums over documents, with intervals.

Tables are correction (one row per way of decoding and document) and correction_prefixes (one per rule and document) of
one model; results/columns.csv describes them. Documents of equal rank have equal weights in every bootstrap.
"""

from itertools import pairwise

import numpy as np
import pandas as pd

from sparsity_utils.decoding.accounting import break_even
from sparsity_utils.laws.one_model import over_documents
from sparsity_utils.laws.trends import Estimate, no_estimate

Estimates = dict[str, Estimate]
WAY = ["model", "text", "rule", "way", "threshold"]  # names what a row of the table is of, beside the document


def disagreements(prefixes: pd.DataFrame, rule: str) -> Estimates:
    """Share of the full model's own words that the sparse model does not find likeliest, on each text."""
    return {
        f"on {text}": over_documents(rows[["disagreed", "tokens"]], lambda sums: sums["disagreed"] / sums["tokens"])
        for text, rows in prefixes[prefixes["rule"] == rule].groupby("text")
    }


def effective_densities(table: pd.DataFrame, threshold: float, period: int) -> Estimates:
    """((P - 1) d + 1) / AAL of each rule on each text."""
    estimates = {}
    for (rule, text), rows in _corrected(table, threshold).groupby(["rule", "text"], sort=False):
        reads = break_even(rows["density"].iloc[0], period)

        def density(sums: pd.DataFrame, reads: float = reads) -> pd.Series:
            return reads * sums["rounds"] / sums["advance"]

        estimates[f"{rule} on {text}"] = over_documents(rows[["rounds", "advance"]], density)
    return estimates


def recoveries(table: pd.DataFrame, threshold: float) -> Estimates:
    """Of the log-likelihood that the sparse text lacks to the full model's, what correction adds; rules and texts.

    Without an estimate where the interval of what it lacks is not above 0: there may be nothing to give back.
    """
    estimates = {}
    for (rule, text), rows in _corrected(table, threshold).groupby(["rule", "text"], sort=False):
        own = table[table["text"] == text]
        parts = {"corrected": rows, "sparse": own[(own["rule"] == rule) & (own["way"] == "alone")]}
        parts["full"] = own[own["way"] == "full"]
        sums = pd.DataFrame({name: part.set_index("document")["log_likelihood"] for name, part in parts.items()})

        def recovered(sums: pd.DataFrame) -> pd.Series:
            return (sums["corrected"] - sums["sparse"]) / (sums["full"] - sums["sparse"])

        lacks = over_documents(sums, lambda sums: sums["full"] - sums["sparse"])
        found = over_documents(sums, recovered) if lacks.low > 0 else lacks
        if lacks.low <= 0:
            found = no_estimate("the sparse text is not clearly less likely than the full model's", len(sums))
        estimates[f"{rule} on {text}"] = found
    return estimates


def trades(table: pd.DataFrame, rule: str) -> Estimates:
    """From each threshold to the next: by how much AAL falls, and log-likelihood per token rises; each text."""
    estimates, rows = {}, _corrected(table[table["rule"] == rule])
    for text, own in rows.groupby("text"):
        values = sorted(own["threshold"].unique())
        for low, high in pairwise(values):
            sums = _beside(own[own["threshold"] == low], own[own["threshold"] == high])
            step = f"from {low:g} to {high:g} on {text}"
            estimates[f"advance, {step}"] = over_documents(sums, _advance_lost)
            estimates[f"log-likelihood, {step}"] = over_documents(sums, _likelihood_gained)
    return estimates


def parts(table: pd.DataFrame, threshold: float, names: list[str]) -> Estimates:
    """Log-likelihood per token of the whole method less that without each of the parts `names`, on each text."""
    estimates = {}
    for name in names:
        without = table[table["way"] == name]
        for (rule, text), rows in without.groupby(["rule", "text"]):
            whole = _corrected(table, threshold)
            own = whole[(whole["rule"] == rule) & (whole["text"] == text)]
            estimates[f"{name} on {text}"] = over_documents(_beside(rows, own), _likelihood_gained)
    return estimates


def fresh_excess(prefixes: pd.DataFrame, rule: str, text: str, factor: float) -> Estimates:
    """Rise of perplexity on fresh text less `factor` times that on repeated text."""
    rows = prefixes[(prefixes["rule"] == rule) & (prefixes["text"] == text)]
    losses = ["predicted", "fresh_full", "fresh_sparse", "repeated_full", "repeated_sparse"]
    excess = over_documents(rows[losses], lambda sums: _rise(sums, "fresh") - factor * _rise(sums, "repeated"))
    return {f"{rule} on {text}": excess}


def prefix_rises(prefixes: pd.DataFrame) -> pd.DataFrame:
    """Rise of perplexity under each rule on fresh and on repeated text: model, text, rule, fresh, repeated, disagreed.

    Means over all documents; disagreed is a share of the full model's own words.
    """
    rows = []
    for name, group in prefixes.groupby(["model", "text", "rule"], sort=False):
        sums = group.select_dtypes("number").sum().to_frame().T
        rises = {kind: float(_rise(sums, kind).iloc[0]) for kind in ("fresh", "repeated")}
        disagreed = float(sums["disagreed"].iloc[0] / sums["tokens"].iloc[0])
        rows.append({**dict(zip(("model", "text", "rule"), name, strict=True)), **rises, "disagreed": disagreed})
    return pd.DataFrame(rows)


def summed_ways(table: pd.DataFrame, period: int) -> pd.DataFrame:
    """One row per way of decoding: WAY, documents, and means over all its text.

    advance (AAL), break_even, effective_density, corrected (share of tokens), log_likelihood (per token), agreed,
    repeated (shares of tokens), right (share of answers).
    """
    columns = ["tokens", "rounds", "advance", "rejected", "log_likelihood", "agreed", "repeated"]
    groups = table.groupby(WAY, sort=False, dropna=False)
    sums = groups[columns].sum().join(groups["density"].first()).join(groups.size().rename("documents"))
    found = sums[["documents", "density"]].copy()
    found["advance"] = sums["advance"] / sums["rounds"]
    found["break_even"] = break_even(sums["density"], period)
    drafts = found["break_even"] / found["advance"]
    found["effective_density"] = drafts.fillna(sums["density"])  # never corrected: that of each step
    found["corrected"] = sums["rejected"] / sums["advance"]
    for name in ("log_likelihood", "agreed", "repeated"):
        found[name] = sums[name] / sums["tokens"]
    if "right" in table:
        answers = table.assign(right=table["right"].astype(float))
        found["right"] = answers.groupby(WAY, sort=False, dropna=False)["right"].mean()
    return found.reset_index()


def near_ties(table: pd.DataFrame) -> pd.DataFrame:
    """How lossless texts differ from the full model's: model, text, rule, documents, differ, near_ties.

    Near ties: of those that differ, they whose two words have logits no further apart than twice the rounding between
    passes of one token and of many. largest_rounding: over the texts that differ.
    """
    rows = table[table["way"] == "lossless"]
    differs = rows["place"] >= 0
    near = differs & (rows["gap"] <= 2 * rows["rounding"])
    counted = rows.assign(differ=differs, near_ties=near, largest_rounding=rows["rounding"].where(differs))
    groups = counted.groupby(["model", "text", "rule"], sort=False)
    found = groups.agg(documents=("document", "size"), differ=("differ", "sum"), near_ties=("near_ties", "sum"))
    return found.join(groups["largest_rounding"].max()).reset_index()


def _corrected(table: pd.DataFrame, threshold: float | None = None) -> pd.DataFrame:
    rows = table[table["way"] == "corrected"]
    return rows if threshold is None else rows[rows["threshold"] == threshold]


def _beside(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Two ways on the same documents: their columns, and those of the second with _2."""
    columns = ["document", "tokens", "rounds", "advance", "log_likelihood"]
    return first[columns].merge(second[columns], on="document", suffixes=("", "_2")).drop(columns="document")


def _advance_lost(sums: pd.DataFrame) -> pd.Series:
    return sums["advance"] / sums["rounds"] - sums["advance_2"] / sums["rounds_2"]


def _likelihood_gained(sums: pd.DataFrame) -> pd.Series:
    return (sums["log_likelihood_2"] - sums["log_likelihood"]) / sums["tokens"]


def _rise(sums: pd.DataFrame, kind: str) -> pd.Series:
    return np.expm1((sums[f"{kind}_sparse"] - sums[f"{kind}_full"]) / sums["predicted"])
