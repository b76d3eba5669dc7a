"""Notebook 09, a pretrained language model: its sparsity on two kinds of text, by layer, position, metric and dtype.

Every test here is of one model. Its unit is a document: a document enters each bootstrap replicate a Poisson(1)
number of times, with all its windows. How much other models would differ no test can say.
"""

import math

import pandas as pd

from sparsity_utils.findings.claims import Claim, stated

QUESTION = "pretrained_model"
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
