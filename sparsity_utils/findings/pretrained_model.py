"""Notebook 09, a pretrained language model: its sparsity on two kinds of text, by layer, position, metric and dtype.

Every test here is of one model. Its unit is a document: a document enters each bootstrap replicate a Poisson(1)
number of times, with all its windows. How much other models would differ no test can say.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sparsity_utils.findings.claims import Claim, Verdict, Verdicts, stated
from sparsity_utils.laws.documents import over_documents
from sparsity_utils.laws.limits import require
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, Estimate, no_estimate
from sparsity_utils.neurons.rules import METRICS

QUESTION = "pretrained_model"
SETTING = ["text", "dtype", "metric", "price", "solved_on"]  # names what a row of prices is of, beside the document
OTHER = ["text", "solved_on"]
SUMS = ["tokens", "loss_dense", "loss", "right_dense", "right", "agreed"]  # over a document
KINDS = ("first", "first delimiter")  # positions that may be sparse
PRICE = 1.0  # percent: CETT-PPL-1% is what is reported, unless said otherwise
LEAST_TOKENS = 16_384  # predicted on each text: fewer decide no claim on losses and predictions
LEAST_DOCUMENTS = 12  # fewer decide no claim
SPARSE = 0.5  # positions are sparse where they have less than this times the activation ratio of the others
TRANSFER_FACTOR = 2.0  # thresholds solved for p% may cost this many times p% on other documents, or another text
ACCURACY_MARGIN = 0.005  # of next-token accuracy: just above the published changes of task scores, 0.16 and 0.30 points
DTYPE_MARGIN = 0.01  # of the activation ratio

_FEW_TOKENS = f"; inconclusive below {LEAST_TOKENS:,} predicted tokens of each text"
_FEW_DOCUMENTS = f"; inconclusive below {LEAST_DOCUMENTS} documents"
_BOOTSTRAP = "bootstrap over documents of "
_PAIRED = _BOOTSTRAP + "the difference on the same documents, "
_MATCHED = "each text and each activation ratio that CETT-PPL-p% has; the smallest gap decides"

LAYER_ENDS = Claim(
    "layer_ends",
    QUESTION,
    "The first and the last layer are denser than those between",
    "denser ends (ReLU, T5 and ViT; arXiv 2210.06313, Fig. 2 and 3)",
    "points above the middle",
    _BOOTSTRAP + f"the activation ratio at CETT-PPL-{PRICE:g}% of the first and of the last layer, less the mean over "
    "the middle half of the layers; each end and text",
    "90% interval above 0 for both ends and both texts; one wholly below 0 refutes" + _FEW_DOCUMENTS,
)
FIRST_TOKEN = Claim(
    "first_token",
    QUESTION,
    "In a band of layers the first token activates less than half as many neurons as other tokens",
    "extreme activations and attention at the first token (arXiv 2402.17762, 2309.17453)",
    "times the others",
    "band: the longest run of layers in which the first tokens of windows have less than half the activation ratio of "
    "the class 'other', on every second document; then bootstrap over the other documents of the quotient of the two "
    "ratios, each a mean over the band; each text",
    f"90% interval below {SPARSE:g} for both texts; one wholly above, or no such band, refutes"
    + _FEW_DOCUMENTS
    + " on the tested half",
    region=(-math.inf, SPARSE),
    scale=1.0,
)
DELIMITER = Claim(
    "first_delimiter",
    QUESTION,
    "So does the first full stop or line break",
    "extreme activations at the first '.' or line break (arXiv 2402.17762)",
    "times the others",
    "as for the first token, with a band of its own; the first token of each window that is a full stop or a line "
    "break, and is not its very first",
    FIRST_TOKEN.threshold,
    region=(-math.inf, SPARSE),
    scale=1.0,
)
CETT_LOWEST = Claim(
    "cett_lowest",
    QUESTION,
    "At equal activation ratio CETT costs less perplexity than Top-k and FAT",
    "lowest of four (arXiv 2411.02335, Fig. 2)",
    "nats per token below the rival",
    _PAIRED + "loss of Top-k by |s| and of FAT less that of CETT; " + _MATCHED,
    "90% interval above 0 for both rivals, everywhere; one wholly below 0 refutes" + _FEW_TOKENS,
    scale=1.0,
)
SCORE = Claim(
    "score",
    QUESTION,
    "Top-k does better by what a neuron writes, ||n||, than by its gate, |s|",
    "the norm of the column belongs into the score (WINA, arXiv 2505.19427)",
    "nats per token below Top-k by |s|",
    _PAIRED + "loss of Top-k by |s| less that of Top-k by ||n||, the same k; " + _MATCHED,
    "90% interval above 0 everywhere; one wholly below 0 refutes" + _FEW_TOKENS,
    scale=1.0,
)
ALLOCATION = Claim(
    "allocation",
    QUESTION,
    "With the score ||n||, one relative error per layer (CETT) does better than k neurons per token (Top-k)",
    "none: CETT was compared with Top-k by |s|, which differs in both",
    "nats per token below Top-k by ||n||",
    _PAIRED + "loss of Top-k by ||n|| less that of CETT; " + _MATCHED,
    "90% interval above 0 everywhere; one wholly below 0 refutes" + _FEW_TOKENS,
    scale=1.0,
)
AGREEMENT = Claim(
    "agreement",
    QUESTION,
    "At equal activation ratio CETT agrees with the dense model's likeliest token more often than Top-k and FAT",
    "none: perplexity and task scores were reported",
    "points above the rival",
    _PAIRED + "share of tokens with the dense model's argmax, CETT less Top-k by |s| and less FAT; " + _MATCHED,
    "90% interval above 0 for both rivals, everywhere; one wholly below 0 refutes" + _FEW_TOKENS,
)
ACCURACY = Claim(
    "accuracy",
    QUESTION,
    f"CETT-PPL-{PRICE:g}% costs less than half a point of next-token accuracy",
    "0.16 and 0.30 points of task scores (arXiv 2411.02335, Table 1)",
    "points lost",
    _PAIRED + "share of tokens whose argmax is right, dense less sparse; each text",
    f"90% interval below {100 * ACCURACY_MARGIN:g} points for both texts; one wholly above refutes" + _FEW_TOKENS,
    region=(-math.inf, ACCURACY_MARGIN),
)
PRICE_PAID = Claim(
    "price_paid",
    QUESTION,
    f"Thresholds solved for {PRICE:g}% on some documents cost as much on others of the same kind",
    f"{PRICE:g}%",
    "% rise of perplexity",
    _BOOTSTRAP + "the rise of perplexity on documents that had no part in the thresholds; each text",
    f"90% interval inside 0 to {TRANSFER_FACTOR * PRICE:g}% for both texts; one wholly outside refutes" + _FEW_TOKENS,
    region=(0.0, TRANSFER_FACTOR * PRICE / 100),
)
TRANSFER = Claim(
    "transfer",
    QUESTION,
    "Thresholds of English hold on Python source, and the reverse",
    "none",
    "% rise of perplexity",
    _BOOTSTRAP + f"the rise of perplexity under thresholds of CETT-PPL-{PRICE:g}% solved on the other text; each text",
    f"90% interval below {TRANSFER_FACTOR:g} times the p% solved for, both ways; one wholly above refutes"
    + _FEW_TOKENS,
    region=(-math.inf, TRANSFER_FACTOR * PRICE / 100),
)
BFLOAT16 = Claim(
    "bfloat16",
    QUESTION,
    "The activation ratio is the same in bfloat16 as in float32",
    "none",
    "points above float32",
    f"CETT-PPL-{PRICE:g}% solved and measured in each on the same English documents; {_BOOTSTRAP}the difference of "
    "the activation ratios",
    f"90% interval inside {-100 * DTYPE_MARGIN:g} to {100 * DTYPE_MARGIN:g} points; one wholly outside refutes"
    + _FEW_DOCUMENTS,
    region=(-DTYPE_MARGIN, DTYPE_MARGIN),
)
CLAIMS = (
    *(LAYER_ENDS, FIRST_TOKEN, DELIMITER, CETT_LOWEST, SCORE, ALLOCATION),
    *(AGREEMENT, ACCURACY, PRICE_PAID, TRANSFER, BFLOAT16),
)


def claims() -> pd.DataFrame:
    """The claims, tests and thresholds, as the notebook states them before its results."""
    return stated(CLAIMS)


@dataclass(frozen=True, eq=False)
class Found:
    """What verdicts, tables and figures rest on."""

    table: pd.DataFrame  # as stored: CETT-PPL-1% on each text
    prices: pd.DataFrame  # as stored: every setting on every document
    positions: pd.DataFrame  # as stored: every class of position in every layer of every document
    settings: pd.DataFrame  # one row per setting and text: what it costs, with intervals
    bands: dict[tuple[str, str], tuple[range, Estimate]]  # by text and class of position: layers, tested quotient


def analyse(table: pd.DataFrame, prices: pd.DataFrame, positions: pd.DataFrame) -> Found:
    """Costs and bands of the tables pretrained, pretrained_prices and pretrained_positions.

    Raises InputError for missing columns, duplicates and NaN.
    """
    require(
        table, ["text", "activation_ratio", "low", "high", "ppl_ratio"], ["text"], ["activation_ratio"], "pretrained"
    )
    require(prices, [*SETTING, *SUMS], [*SETTING, "document"], SUMS, "pretrained prices")
    key = ["text", "document", "layer", "position"]
    require(positions, [*key, "tokens", "activation_ratio"], key, ["activation_ratio"], "pretrained positions")
    costs = [_cost(name, rows) for name, rows in prices.groupby(SETTING, sort=False)]
    bands = {(text, kind): _band(rows, kind) for text, rows in positions.groupby("text") for kind in KINDS}
    return Found(table, prices, positions, pd.DataFrame(costs), bands)


def _cost(name: tuple, rows: pd.DataFrame) -> dict[str, object]:
    """A row of `Found.settings`."""
    statistics = {"rise": _rise, "lost": _lost, "agreement": lambda sums: sums["agreed"] / sums["tokens"]}
    estimates = {what: over_documents(rows[SUMS], statistic) for what, statistic in statistics.items()}
    columns = {"activation_ratio": (rows["activation_ratio"] * rows["tokens"]).sum() / rows["tokens"].sum()}
    for what, estimate in estimates.items():
        columns |= {what: estimate.value, f"low_{what}": estimate.low, f"high_{what}": estimate.high}
    sizes = {"tokens": rows["tokens"].sum(), "documents": len(rows)}
    return {**dict(zip(SETTING, name, strict=True)), "value": rows["value"].iloc[0], **columns, **sizes}


def _rise(sums: pd.DataFrame) -> pd.Series:
    """Rise of perplexity, exp(loss - dense loss) - 1."""
    return np.expm1((sums["loss"] - sums["loss_dense"]) / sums["tokens"])


def _lost(sums: pd.DataFrame) -> pd.Series:
    """Next-token accuracy of the dense model less that of the sparse one."""
    return (sums["right_dense"] - sums["right"]) / sums["tokens"]


def layer_sums(positions: pd.DataFrame, text: str) -> pd.DataFrame:
    """Sum over the tokens of each document (rows) of the activation ratio in each layer (columns), and `tokens`."""
    rows = positions[positions["text"] == text]
    active = (rows["tokens"] * rows["activation_ratio"]).groupby([rows["document"], rows["layer"]]).sum().unstack()
    return active.assign(tokens=rows[rows["layer"] == 0].groupby("document")["tokens"].sum())


def _band(rows: pd.DataFrame, kind: str) -> tuple[range, Estimate]:
    """The band of layers in which a class of positions is sparse, chosen on half of the documents, tested on the rest.

    It is the longest run of layers, the first of equals, with less than SPARSE times the ratio of the class "other".
    """
    active = (rows["tokens"] * rows["activation_ratio"]).rename("active")
    sums = pd.concat([rows[["document", "layer", "position", "tokens"]], active], axis=1)
    sums = sums[sums["position"].isin([kind, "other"])]
    chosen = sums["document"].rank(method="dense") % 2 == 1
    ratios = sums[chosen].groupby(["layer", "position"])[["active", "tokens"]].sum()
    ratios = (ratios["active"] / ratios["tokens"]).unstack().reindex(columns=[kind, "other"])
    band = _longest_run(ratios[kind] < SPARSE * ratios["other"])
    tested = sums[~chosen]
    if not band:
        return band, no_estimate("no such band of layers", tested.loc[tested["position"] == kind, "document"].nunique())
    tested = tested[tested["layer"].isin(band)]
    wide = tested.pivot_table(["active", "tokens"], "document", "position", "sum", fill_value=0.0)
    wide = wide.set_axis([f"{what} {position}" for what, position in wide], axis=1)
    wide = wide[wide.get(f"tokens {kind}", 0.0) > 0]

    def quotient(sums: pd.DataFrame) -> pd.Series:
        mine, other = (sums[f"active {name}"] / sums[f"tokens {name}"] for name in (kind, "other"))
        return mine / other

    return band, over_documents(wide, quotient)


def _longest_run(holds: pd.Series) -> range:
    """The first of the longest runs of layers at which `holds` is true; empty where it never is."""
    best, start = range(0), 0
    for layer, inside in enumerate([*holds, False]):
        if not inside:
            best, start = max(best, range(start, layer), key=len), layer + 1
    return best


def verdicts(found: Found | None) -> Verdicts:
    """The verdict on every claim, in the order of `claims`; all of them inconclusive where nothing was measured."""
    if found is None:
        return Verdicts(claim.undecided("not measured: there is no model here") for claim in CLAIMS)
    main = found.prices[found.prices["dtype"] == "float32"]
    own = main[(main["metric"] == "cett-ppl") & (main["price"] == PRICE)]
    same = own["text"] == own["solved_on"]
    rises = {f"{on} on {text}": over_documents(rows[SUMS], _rise) for (text, on), rows in own.groupby(OTHER)}
    paid = {name: estimate for name, estimate in rises.items() if len(set(name.split(" on "))) == 1}
    crossed = {name: estimate for name, estimate in rises.items() if name not in paid}
    lost = {text: over_documents(rows[SUMS], _lost) for text, rows in own[same].groupby("text")}
    few = _few_tokens(main)
    return Verdicts(
        [
            _judged(LAYER_ENDS, layer_ends(found.positions)),
            *(
                _band_verdict(claim, found.bands, kind)
                for claim, kind in ((FIRST_TOKEN, "first"), (DELIMITER, KINDS[1]))
            ),
            _judged(CETT_LOWEST, gaps(main, "cett-ppl", ("top-k", "fat")), few),
            _judged(SCORE, gaps(main, "top-k-norm", ("top-k",)), few),
            _judged(ALLOCATION, gaps(main, "cett-ppl", ("top-k-norm",)), few),
            _judged(AGREEMENT, gaps(main, "cett-ppl", ("top-k", "fat"), "agreed"), few),
            _judged(ACCURACY, lost, few),
            _judged(PRICE_PAID, paid, few),
            _judged(TRANSFER, crossed, few),
            _judged(BFLOAT16, {"bfloat16": _dtype_difference(found.prices)}),
        ]
    )


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


def gaps(prices: pd.DataFrame, metric: str, rivals: tuple[str, ...], column: str = "loss") -> dict[str, Estimate]:
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


def _band_verdict(claim: Claim, bands: dict, kind: str) -> Verdict:
    """The quotient in the chosen band, for each text; where there is no band, the claim is not supported."""
    estimates = {text: quotient for (text, position), (_, quotient) in bands.items() if position == kind}
    words = {text: NOT_SUPPORTED if estimate.reason else "" for text, estimate in estimates.items()}
    return _judged(claim, estimates, words=words)


def _judged(
    claim: Claim, estimates: dict[str, Estimate], few: str = "", words: dict[str, str] | None = None
) -> Verdict:
    """The verdict that all estimates lie in the region; inconclusive where tokens or documents are too few."""
    if not estimates:
        return claim.undecided("not measured")
    least = min(estimate.n for estimate in estimates.values())
    if least < LEAST_DOCUMENTS and claim.threshold.find(_FEW_DOCUMENTS) >= 0:
        few = f"fewer than {LEAST_DOCUMENTS}"
    given = words or dict.fromkeys(estimates, "")
    verdict = {name: INCONCLUSIVE if few else given[name] or claim.decide(one) for name, one in estimates.items()}
    return claim.judged_all(estimates, "documents", few, words=verdict)


def _few_tokens(prices: pd.DataFrame) -> str:
    """Why the losses decide nothing; empty where there are enough."""
    tokens = prices.groupby(SETTING)["tokens"].sum().min()
    return f"{tokens:,} tokens, fewer than {LEAST_TOKENS:,}" if tokens < LEAST_TOKENS else ""


def _dtype_difference(prices: pd.DataFrame) -> Estimate:
    """Activation ratio in bfloat16 less that in float32, on the same documents."""
    text = prices.loc[prices["dtype"] == "bfloat16", "text"].iloc[0]
    rows = prices[(prices["text"] == text) & (prices["solved_on"] == text) & (prices["metric"] == "cett-ppl")]
    wide = rows[rows["price"] == PRICE].pivot(index="document", columns="dtype", values="activation_ratio")
    return over_documents(
        wide.assign(documents=1), lambda sums: (sums["bfloat16"] - sums["float32"]) / sums["documents"]
    )
