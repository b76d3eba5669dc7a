"""Notebook 13, Sirius: sparse drafts of SmolLM2 that the full model corrects, on English and on Python source.

Every test here is of one model. Its unit is a document: a document enters each bootstrap replicate a Poisson(1)
number of times, with all its tokens. How much other models would differ no test can say.
"""

import math

from sparsity_utils.findings.claims import Claim, stated

QUESTION = "correction"
SHARE = 0.5  # of the neurons, kept by FSparse and by CSparse
LEAST_DOCUMENTS = 12  # of each text; fewer decide no claim
FEW_CORRECTIONS, MANY_CORRECTIONS = (0.05, 0.20), 0.30  # share of tokens that are not the full model's
RECOVERED, NOT_RECOVERED = 0.6, 0.3  # of the log-likelihood that sparsity costs
FRESH_FACTOR = 2.0  # times the rise of perplexity on repeated text

_UNIT = f"; inconclusive below {LEAST_DOCUMENTS} documents of a text"
_BOOTSTRAP = "bootstrap over documents of "
_TEXT = "greedy continuations of documents, each text"

FEW = Claim(
    "few_corrections",
    QUESTION,
    "Few tokens need correcting: FSparse's likeliest word is seldom another than the full model's",
    "11% of tokens (arXiv 2409.03856, Fig. 1c)",
    "% of tokens",
    "the full model's greedy continuation of a document is fed to the sparse model; " + _BOOTSTRAP + "the share of its "
    "tokens that the sparse model does not find likeliest; each text",
    "90% interval inside 5 to 20% for both texts; one wholly above 30% refutes" + _UNIT,
    region=FEW_CORRECTIONS,
)
ADVANCE = Claim(
    "advance",
    QUESTION,
    "Corrected drafts read less than the full model: the average advance exceeds its break-even",
    "15.4 and 15.2 of 16 tokens, densities 0.81 and 0.71 (FSparse and CSparse, GSM8K, Llama-3-8B-Instruct)",
    "times the full model's reads",
    "period 16, threshold 0.1, no tree; " + _TEXT + "; " + _BOOTSTRAP + "(15 d + 1) / AAL, with d the share of the "
    "weights that a sparse step reads; FSparse and CSparse",
    "90% interval below 1 for both rules and texts (at an AAL above 15 d + 1); one wholly above refutes" + _UNIT,
    region=(-math.inf, 1.0),
    scale=1.0,
)
RECOVERY = Claim(
    "recovery",
    QUESTION,
    "Correction gives back most of what sparsity cost",
    "84 to 87% of the lost accuracy (GSM8K, Llama-3-8B-Instruct)",
    "% of the gap",
    "log-likelihood of continuations under the full model: what correction adds to the sparse model's text, by what "
    "the full model's own text has above it; threshold 0.1; "
    + _BOOTSTRAP
    + "that quotient; FSparse and CSparse, each text",
    "90% interval above 60% for both rules and texts; one wholly below 30% refutes" + _UNIT,
    region=(RECOVERED, math.inf),
)
TRADE = Claim(
    "trade",
    QUESTION,
    "The threshold trades advance for quality, monotonically",
    "thresholds 0.05 and 0.1, chosen per task",
    "tokens, or nats per token",
    "FSparse, each text; from each threshold to the next higher one " + _BOOTSTRAP + "the fall of AAL (tokens) and of "
    "the rise of log-likelihood (nats per token), on the same documents",
    "90% interval above 0 for every step of both; one wholly below 0 refutes" + _UNIT,
    scale=1.0,
)
PARTS = Claim(
    "parts",
    QUESTION,
    "Each part helps: rewriting keys and values, interleaving the full model's token, taking rejected drafts back",
    "each adds accuracy",
    "nats per token above the method without the part",
    "FSparse, threshold 0.1, each text; " + _BOOTSTRAP + "the log-likelihood of the corrected text less that of the "
    "text corrected without one part, on the same documents",
    "90% interval above 0 for every part and text; one wholly below 0 refutes" + _UNIT,
    scale=1.0,
)
FRESH = Claim(
    "fresh",
    QUESTION,
    "Neurons chosen from the prompt (CSparse) fail on fresh text and not on repeated text",
    "summaries keep their score, GSM8K falls from .754 to .384",
    "times the rise on repeated text",
    "Python source; the neurons are chosen on the first half of a window, and the loss is that of the second half, or "
    "of the first half once more; " + _BOOTSTRAP + "the rise of perplexity on the former by that on the latter",
    "90% interval above 2; wholly below 2 refutes" + _UNIT,
    region=(FRESH_FACTOR, math.inf),
    scale=1.0,
)
CLAIMS = (FEW, ADVANCE, RECOVERY, TRADE, PARTS, FRESH)


def claims():
    """The claims, tests and thresholds, as the notebook states them before its results."""
    return stated(CLAIMS)
