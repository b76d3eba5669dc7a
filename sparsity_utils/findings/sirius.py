"""Notebook 13, Sirius: sparse drafts of SmolLM2 that the full model corrects, on English and on Python source.

Every test here is of one model. Its unit is a document: a document enters each bootstrap replicate a Poisson(1)
number of times, with all its tokens. How much other models would differ no test can say.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd

from sparsity_utils.findings.claims import Claim, Verdict, Verdicts, stated
from sparsity_utils.findings.sirius_figures import text_figure, trade_figure
from sparsity_utils.findings.style import ShownFigure
from sparsity_utils.laws.corrections import (
    WAY,
    Estimates,
    disagreements,
    effective_densities,
    fresh_excess,
    parts,
    recoveries,
    summed_ways,
    trades,
)
from sparsity_utils.laws.limits import require
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Estimate
from sparsity_utils.study.makers.correction import PARTS as LEFT_OUT
from sparsity_utils.study.makers.correction_speed import PERIOD, THRESHOLD
from sparsity_utils.study.tables import Tables

QUESTION = "correction"
OWN = "relu"  # names our own model in the tables; claims are on the other one
TEXTS = ("english", "python")  # of the claims; sums are shown beside them
CLAIMED = ("full", "fsparse", "csparse")  # rules of the claims, the published ones; others are shown beside them
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
    "11% of tokens (Sirius, Fig. 1c)",
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
    "90% interval above 60% for both rules and texts; one wholly below 30% refutes; inconclusive where the interval of "
    "the gap itself is not above 0" + _UNIT,
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
    "% rise above twice that on repeated text",
    "Python source; the neurons are chosen on the first half of a window, and the loss is that of the second half, or "
    "of the first half once more; " + _BOOTSTRAP + "the rise of perplexity on the former less twice that on the latter",
    "90% interval above 0; wholly below 0 refutes" + _UNIT,
)
CLAIMS = (FEW, ADVANCE, RECOVERY, TRADE, PARTS, FRESH)


def claims() -> pd.DataFrame:
    """The claims, tests and thresholds, as the notebook states them before its results."""
    return stated(CLAIMS)


@dataclass(frozen=True, eq=False)
class Found:
    """What verdicts, tables and figures rest on."""

    table: pd.DataFrame  # as stored: every way of decoding on every document, of all models
    prefixes: pd.DataFrame  # as stored: every rule on every document
    speeds: pd.DataFrame  # as stored
    text: pd.DataFrame  # as stored: a text of each rule, word by word
    ways: pd.DataFrame  # of every way of decoding, means over its documents


def analyse(study: Tables, table: pd.DataFrame | None) -> Found | None:
    """What follows from the tables of a study, `table` its "correction"; None where it has none.

    Raises InputError for missing columns, duplicates and NaN.
    """
    if table is None:
        return None
    names = ("correction_prefixes", "correction_speeds", "correction_text")
    prefixes, speeds, text = (study.table(name) for name in names)
    sums = ["tokens", "density", "log_likelihood", "agreed", "repeated"]
    require(table, [*WAY, "document", "rounds", "advance", *sums], [*WAY, "document"], sums, "correction")
    key, losses = ["model", "text", "rule", "document"], ["disagreed", "fresh_sparse", "repeated_sparse"]
    require(prefixes, [*key, *losses], key, losses, "correction_prefixes")
    return Found(table, prefixes, speeds, text, summed_ways(table, PERIOD))


def judged_model(found: Found) -> str:
    """The name of the model that claims are on; our own where the pretrained one is missing."""
    return next((name for name in found.table["model"] if name != OWN), OWN)


def verdicts(found: Found | None) -> Verdicts:
    """The verdict on every claim, in the order of `claims`; all inconclusive where the pretrained model is missing."""
    if found is None or judged_model(found) == OWN:
        return Verdicts(claim.undecided("not measured: the pretrained model is not here") for claim in CLAIMS)
    table, prefixes = _of_claims(found.table), _of_claims(found.prefixes)
    return Verdicts(
        [
            _judged(FEW, disagreements(prefixes, "fsparse"), refuted=lambda one: one.low > MANY_CORRECTIONS),
            _judged(ADVANCE, effective_densities(table, THRESHOLD, PERIOD)),
            _judged(RECOVERY, recoveries(table, THRESHOLD), refuted=lambda one: one.high < NOT_RECOVERED),
            _judged(TRADE, trades(table, "fsparse")),
            _judged(PARTS, parts(table, THRESHOLD, list(LEFT_OUT))),
            _judged(FRESH, fresh_excess(prefixes, "csparse", "python", FRESH_FACTOR)),
        ]
    )


def _of_claims(table: pd.DataFrame) -> pd.DataFrame:
    """Of the pretrained model, on the texts and with the rules of the claims."""
    return table[(table["model"] != OWN) & table["text"].isin(TEXTS) & table["rule"].isin(CLAIMED)]


def _judged(claim: Claim, estimates: Estimates, refuted: Callable[[Estimate], bool] | None = None) -> Verdict:
    """The verdict that all estimates lie in the region.

    refuted: tells which estimates count against the claim, where those outside the region do not all.
    """
    few = min(estimate.n for estimate in estimates.values()) < LEAST_DOCUMENTS

    def word(estimate: Estimate) -> str:
        if few or estimate.reason:
            return INCONCLUSIVE
        found = claim.decide(estimate)
        if refuted is None or found == SUPPORTED:
            return found
        return NOT_SUPPORTED if refuted(estimate) else INCONCLUSIVE

    note = f"fewer than {LEAST_DOCUMENTS} documents" if few else ""
    words = {name: word(estimate) for name, estimate in estimates.items()}
    return claim.judged_all(estimates, "documents", note, words=words)


def figures(study: Tables) -> Iterator[tuple[str, ShownFigure]]:
    """Every figure that a study has the tables for, with its name."""
    if study.answers("correction"):
        found = analyse(study, study.table("correction"))
        yield "13_trade", trade_figure(found.ways)
        yield "13_text", text_figure(found.text)
