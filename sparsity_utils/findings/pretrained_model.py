"""Notebook 09, a pretrained language model: its sparsity on two kinds of text, by layer, position, metric and dtype.

Every test here is of one model. Its unit is a document: a document enters each bootstrap replicate a Poisson(1)
number of times, with all its windows. How much other models would differ no test can say.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from sparsity_utils.findings.claims import Claim, Verdict, Verdicts, stated
from sparsity_utils.findings.pretrained_figures import (
    beside,
    layers_figure,
    positions_figure,
    price_figure,
    ratio_figure,
)
from sparsity_utils.findings.style import ShownFigure
from sparsity_utils.laws.limits import require
from sparsity_utils.laws.one_model import (
    KINDS,
    SETTING,
    SUMS,
    Statistic,
    accuracy_lost,
    costs,
    dtype_difference,
    gaps,
    layer_ends,
    over_documents,
    rise,
    sparse_band,
)
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, Estimate
from sparsity_utils.study.opened_models import PRICE
from sparsity_utils.study.tables import Tables

QUESTION = "pretrained_model"
RIVALS = ("top-k", "fat")  # of CETT, as published
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
    costs: pd.DataFrame  # of every setting, with intervals
    bands: dict[str, dict[str, tuple[range, Estimate]]]  # by class of position and text: layers, tested quotient


def analyse(study: Tables) -> Found | None:
    """What follows from the tables of a study; None, and a printed line, where it has none.

    Raises InputError for missing columns, duplicates and NaN.
    """
    table = study.table_or_none("pretrained")
    if table is None:
        return None
    prices, positions = study.table("pretrained_prices"), study.table("pretrained_positions")
    require(table, ["text", "activation_ratio", "low", "high"], ["text"], ["activation_ratio"], "pretrained")
    require(prices, [*SETTING, *SUMS], [*SETTING, "document"], SUMS, "pretrained_prices")
    key = ["text", "document", "layer", "position"]
    require(positions, [*key, "tokens", "activation_ratio"], key, ["activation_ratio"], "pretrained_positions")
    bands = {kind: {text: sparse_band(positions, text, kind, SPARSE) for text in table["text"]} for kind in KINDS}
    return Found(table, prices, positions, costs(prices), bands)


def verdicts(found: Found | None) -> Verdicts:
    """The verdict on every claim, in the order of `claims`; all of them inconclusive where nothing was measured."""
    if found is None:
        return Verdicts(claim.undecided("not measured: there is no model here") for claim in CLAIMS)
    main = found.prices[found.prices["dtype"] == "float32"]
    own = main[(main["metric"] == "cett-ppl") & (main["price"] == PRICE)]
    solved_here = own["text"] == own["solved_on"]
    few = _few_tokens(main)
    return Verdicts(
        [
            _judged(LAYER_ENDS, layer_ends(found.positions)),
            *(_band_verdict(*pair, found) for pair in zip((FIRST_TOKEN, DELIMITER), KINDS, strict=True)),
            _judged(CETT_LOWEST, gaps(main, "cett-ppl", RIVALS), few),
            _judged(SCORE, gaps(main, "top-k-norm", ["top-k"]), few),
            _judged(ALLOCATION, gaps(main, "cett-ppl", ["top-k-norm"]), few),
            _judged(AGREEMENT, gaps(main, "cett-ppl", RIVALS, "agreed"), few),
            _judged(ACCURACY, _by_text(own[solved_here], accuracy_lost), few),
            _judged(PRICE_PAID, _by_text(own[solved_here], rise), few),
            _judged(TRANSFER, _by_text(own[~solved_here], rise), few),
            _judged(BFLOAT16, {"bfloat16": dtype_difference(found.prices, PRICE)}),
        ]
    )


def _by_text(rows: pd.DataFrame, statistic: Statistic) -> dict[str, Estimate]:
    return {f"on {text}": over_documents(group[SUMS], statistic) for text, group in rows.groupby("text")}


def _band_verdict(claim: Claim, kind: str, found: Found) -> Verdict:
    """The quotient in the chosen band, for each text; where there is no band, the claim is not supported."""
    estimates = {text: quotient for text, (_, quotient) in found.bands[kind].items()}
    return _judged(claim, estimates, without=NOT_SUPPORTED)


def _judged(claim: Claim, estimates: dict[str, Estimate], few: str = "", without: str = INCONCLUSIVE) -> Verdict:
    """The verdict that all estimates lie in the region; `without` where one has no number.

    It is inconclusive for a reason `few`, and for a claim on documents where they are too few.
    """
    if _FEW_DOCUMENTS in claim.threshold and min(estimate.n for estimate in estimates.values()) < LEAST_DOCUMENTS:
        few = f"fewer than {LEAST_DOCUMENTS} documents"
    words = {
        name: INCONCLUSIVE if few else without if estimate.reason else claim.decide(estimate)
        for name, estimate in estimates.items()
    }
    return claim.judged_all(estimates, "documents", few, words=words)


def _few_tokens(prices: pd.DataFrame) -> str:
    """Why losses and predictions decide nothing; empty where there are enough."""
    tokens = prices.groupby(SETTING)["tokens"].sum().min()
    return f"{tokens:,} tokens, fewer than {LEAST_TOKENS:,}" if tokens < LEAST_TOKENS else ""


def figures(study: Tables) -> Iterator[tuple[str, ShownFigure]]:
    """Every figure that a study has the tables for, with its name; small models are those of the recorded study."""
    if study.answers("pretrained"):
        found, recorded = analyse(study), Tables.recorded()
        yield "09_activation_ratio", ratio_figure(beside(found.table, recorded.table("relu_vs_silu")))
        yield "09_layers", layers_figure(found, recorded.table("activation_patterns"))
        yield "09_positions", positions_figure(found)
        yield "09_metrics", price_figure(found)
