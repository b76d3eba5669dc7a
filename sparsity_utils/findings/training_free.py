"""Notebook 10, training-free sparsity: TEAL, CATS, WINA, WAS and CETT in one protocol, on SmolLM2 and on our decoders.

Tests on the pretrained model have documents as their unit: a document enters each bootstrap replicate a Poisson(1)
number of times. How much other models would differ no test can say. Tests on trained decoders have seeds as their unit.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from sparsity_utils.findings import input_speeds
from sparsity_utils.findings.claims import Claim, Verdict, Verdicts, stated
from sparsity_utils.findings.style import ShownFigure
from sparsity_utils.findings.training_free_figures import down_figure, pareto_figure
from sparsity_utils.laws.limits import require
from sparsity_utils.laws.rules_compared import (
    LEVEL,
    SETTING,
    SUMS,
    against,
    against_over_seeds,
    block_errors,
    choice,
    over_units,
    perplexity_ratio,
)
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Estimate
from sparsity_utils.study.tables import Tables

QUESTION = "training_free"
LEAST_TOKENS = 100_000  # predicted on the pretrained model: fewer decide no claim on losses
LEAST_SEEDS = 5  # of trained decoders
IDENTITY = 1e-8  # relative: to this the lemma's sum is the error
LOWER_ERROR = 0.95  # of greedy over uniform allocation, mean over blocks
DECODER = "decoders"  # how trained decoders are called where a claim is on them too

_TOKENS = f"inconclusive below {LEAST_TOKENS:,} predicted tokens"
_SEEDS = f"inconclusive below {LEAST_SEEDS} seeds"
_SAME = "settings whose realised sparsity differs by more than 0.5 points are not compared"
_PAIRED = "SmolLM2, paired bootstrap over documents of "
_EXCESS = "the quotient of their excess losses (sparse less dense) less 1"


def _below(percent: float) -> str:
    return f"{LEVEL:.0%} interval below {percent:g}%; one wholly above refutes; {_TOKENS}; {_SAME}"


LEMMA = Claim(
    "lemma",
    QUESTION,
    "Where columns are orthogonal, WINA's mask errs least of all masks of its size",
    "Lemma 3.1 (arXiv 2505.19427v2): the squared error is the sum of the dropped squared scores",
    "relative difference, at most",
    "rotated k and gate of every block, SmolLM2 and decoders, 64 vectors each, half of the inputs kept, float64: the "
    "error against the sum; and 16 other masks of the same size for each vector",
    f"difference below {IDENTITY:g} everywhere and no mask that errs less",
    region=(-math.inf, IDENTITY),
    scale=1.0,
)
BOUND = Claim(
    "bound",
    QUESTION,
    "The error of a masked stack stays within the printed bound",
    "Theorem 3.2 (arXiv 2505.19427v2), its inequality",
    "% of vectors outside",
    "two-by-two example, and up with rotated down of every block of the decoders as a linear stack, half kept, "
    "float64, three values of alpha: vectors whose error exceeds the bound",
    "none",
    region=(-math.inf, 1e-12),
)
MINIMISED = Claim(
    "minimised",
    QUESTION,
    "WINA's masks minimise that bound",
    "Theorem 3.2, its second statement",
    "% of vectors where masks by |x| have a lower bound",
    "the same stacks: vectors on which masks by |x_j| alone, of the same size, have a lower bound (alpha = 1)",
    "none; a single one refutes, the counter-example included",
    region=(-math.inf, 1e-12),
)
NORM_50, NORM_65 = (
    Claim(
        f"norm_{level}",
        QUESTION,
        f"The norm of the column belongs into the score: WINA below TEAL at {level}% sparsity",
        published,
        "% of TEAL's excess loss",
        _PAIRED
        + f"{_EXCESS}; WINA as printed and TEAL's score, both top-k, unrotated, one sparsity for all seven maps",
        _below(margin),
        level=LEVEL,
        region=(-math.inf, margin / 100),
    )
    for level, published, margin in (
        (50, "+1.21 points of accuracy on Llama-2-7B (arXiv 2505.19427v2, Table 3)", -5),
        (65, "+4.07 points on Llama-2-7B; perplexity 42.15 to 19.21 at 75% (WAS, Table 3)", -10),
    )
)
ROTATION = Claim(
    "rotation",
    QUESTION,
    "Rotation helps at equal weights read, its own included",
    "rotations are not counted (arXiv 2505.19427, Table 5)",
    "% of the unrotated excess loss",
    _PAIRED
    + f"{_EXCESS}; WINA rotated and not, both reading half of the weights of the seven maps, two d x d matrices "
    "per block charged to the rotated one",
    f"{LEVEL:.0%} interval below -2%; inside -2 to 2% is a tie; one wholly above -2% refutes; " + _TOKENS,
    level=LEVEL,
    region=(-math.inf, -0.02),
)
GREEDY_ERROR = Claim(
    "greedy_error",
    QUESTION,
    "Greedy allocation lowers the error of blocks",
    "0.90 to 0.93 of the uniform error at 50% (from TEAL's shipped tables, mean of 32 blocks)",
    "% of the uniform error",
    "TEAL at 50%, error of each block's output on calibration text, greedy over uniform less 1: mean over blocks, t "
    "interval over blocks (SmolLM2) and over seeds (decoders)",
    f"{LEVEL:.0%} interval below {100 * LOWER_ERROR - 100:g}% for both; one wholly above refutes; {_SEEDS}",
    level=LEVEL,
    region=(-math.inf, LOWER_ERROR - 1),
)
GREEDY = Claim(
    "greedy",
    QUESTION,
    "Greedy allocation lowers the loss",
    "better than uniform (arXiv 2408.14690)",
    "% of the uniform excess loss",
    f"TEAL at 50%, {_EXCESS}, greedy and uniform: SmolLM2, paired bootstrap over documents; decoders, t interval over "
    "seeds",
    f"{LEVEL:.0%} interval below 0 for both; one wholly above refutes; {_TOKENS}; {_SEEDS}; {_SAME}",
    level=LEVEL,
    region=(-math.inf, 0.0),
)
NEAR_LOSSLESS, HALF_LOSS = (
    Claim(
        f"teal_{level}",
        QUESTION,
        f"TEAL at {level}% sparsity raises perplexity by {limit}% at most",
        published,
        "% rise of perplexity",
        "SmolLM2, uniform thresholds, bootstrap over documents of the rise of perplexity",
        f"{LEVEL:.0%} interval below {limit}%; one wholly above refutes; {_TOKENS}",
        level=LEVEL,
        region=(-math.inf, limit / 100),
    )
    for level, limit, published in (
        (25, 3, "25% near-lossless (TEAL's blog)"),
        (50, 7.1, "5.07 to 5.43 on Llama-2-7B, WikiText-2 (a note on TEAL v3)"),
    )
)
CATS = Claim(
    "cats",
    QUESTION,
    "TEAL loses less than CATS where both skip a quarter of the weights",
    "TEAL over CATS at 25 and 40% model-wide (arXiv 2408.14690)",
    "% of the excess loss of CATS",
    _PAIRED + f"{_EXCESS}; TEAL uniform at 25% of all inputs, CATS at 50% of the neurons",
    _below(-20),
    level=LEVEL,
    region=(-math.inf, -0.2),
)
CETT = Claim(
    "cett",
    QUESTION,
    "On the down projection CETT loses less than Top-k by gates",
    "lowest perplexity (arXiv 2411.02335, Fig. 2), score and allocation changed at once",
    "% of the excess loss of Top-k",
    f"down projection alone, 50 and 65% of its inputs skipped (62.5% in decoders), {_EXCESS}: SmolLM2, paired "
    "bootstrap over documents; decoders, t interval over seeds",
    f"{LEVEL:.0%} interval below -5% everywhere; one wholly above refutes; {_TOKENS}; {_SEEDS}; {_SAME}",
    level=LEVEL,
    region=(-math.inf, -0.05),
)
CLAIMS = (
    *(LEMMA, BOUND, MINIMISED, NORM_50, NORM_65, ROTATION),
    *(GREEDY_ERROR, GREEDY, NEAR_LOSSLESS, HALF_LOSS, CATS, CETT),
)


def claims() -> pd.DataFrame:
    """The claims, tests and thresholds, as the notebook states them before its results."""
    return stated(CLAIMS)


@dataclass(frozen=True, eq=False)
class Found:
    """What verdicts, tables and figures rest on."""

    table: pd.DataFrame  # as stored: every setting of every model and seed
    documents: pd.DataFrame  # as stored: every setting of the pretrained model on every document
    blocks: pd.DataFrame  # as stored: errors of blocks at 50%, uniform and greedy
    theory: pd.DataFrame  # as stored: checks of the printed theory

    def pretrained(self, table: pd.DataFrame) -> pd.Series:
        """Whether each row of a table is of the pretrained model: of it alone sums by document are stored."""
        return table["model"].isin(self.documents["model"].unique())

    @property
    def real(self) -> pd.DataFrame:
        """The rows of the pretrained model; none where it was not measured."""
        return self.table[self.pretrained(self.table)]

    @property
    def decoders(self) -> pd.DataFrame:
        """The rows of trained decoders."""
        return self.table[~self.pretrained(self.table)]


def analyse(study: Tables, table: pd.DataFrame | None) -> Found | None:
    """The tables of a study, checked, `table` being "training_free" itself; None where it has none.

    Raises InputError for missing columns, duplicates and NaN.
    """
    if table is None:
        return None
    documents, blocks, theory = (study.table(f"{QUESTION}_{name}") for name in ("documents", "blocks", "theory"))
    solved = table[table["note"].isna()]
    model, numbers = ["model", "seed"], ["excess", "skipped", "weights_read", "accuracy", "agreement"]
    require(solved, [*model, *SETTING, *numbers], [*model, *SETTING], numbers, QUESTION)
    key, errors = ["model", *SETTING, "document"], ["uniform", "greedy"]
    if len(documents):
        require(documents, [*key, *SUMS], key, SUMS, f"{QUESTION}_documents")
    require(blocks, [*model, "layer", *errors], [*model, "layer"], errors, f"{QUESTION}_blocks")
    return Found(solved, documents, blocks, theory)


def verdicts(found: Found | None) -> Verdicts:
    """The verdict on every claim, in the order of `claims`; all of them inconclusive where nothing was measured."""
    if found is None:
        return Verdicts(claim.undecided("not measured") for claim in CLAIMS)
    real, documents, decoders = found.real, found.documents, found.decoders
    few = _few_tokens(real)
    half, quarter = choice("teal", level=0.5), choice("teal", level=0.25)

    def paired(ours: Mapping, rival: Mapping, same: str = "skipped") -> Estimate:
        return against(real, documents, ours, rival, same)

    rotated, plain = choice("wina", level=0.5, by="weights", rotated=True), choice("wina", level=0.5)
    greedy = choice("teal", "greedy")
    cett = {
        f"SmolLM2 at {100 * level:g}%": paired(choice("n", "cett", level), choice("gate", "top-k", level))
        for level in (0.5, 0.65)
    } | {
        f"{DECODER} at {100 * level:g}%": against_over_seeds(
            decoders, choice("n", "cett", level), choice("gate", "top-k", level)
        )
        for level in (0.5, 0.625)
    }  # fmt: skip
    on_loss = {"SmolLM2": paired(greedy, half), DECODER: against_over_seeds(decoders, greedy, half)}
    return Verdicts(
        [
            _lemma(found.theory),
            *_stacks(found.theory),
            *(
                _judged(claim, {"SmolLM2": paired(choice("wina", level=level), choice("teal-top-k", level=level))}, few)
                for claim, level in ((NORM_50, 0.5), (NORM_65, 0.65))
            ),
            _judged(ROTATION, {"SmolLM2": paired(rotated, plain, "weights_read")}, few),
            _judged(GREEDY_ERROR, _error_estimates(found)),
            _judged(GREEDY, on_loss, few),
            *(
                _judged(claim, {"SmolLM2": _rise(documents, setting)}, few)
                for claim, setting in ((NEAR_LOSSLESS, quarter), (HALF_LOSS, half))
            ),
            _judged(CATS, {"SmolLM2": paired(quarter, choice("cats"), "weights_read")}, few),
            _judged(CETT, cett, few),
        ]
    )


def _rise(documents: pd.DataFrame, setting: Mapping) -> Estimate:
    """Rise of perplexity of a setting."""
    ratio = perplexity_ratio(documents, setting)
    return Estimate(ratio.value - 1, ratio.low - 1, ratio.high - 1, ratio.n, ratio.reason)


def _error_estimates(found: Found) -> dict[str, Estimate]:
    """Error of greedy allocation over that of uniform, less 1: over blocks of SmolLM2, and over seeds of decoders."""
    real, ratios = found.pretrained(found.blocks), block_errors(found.blocks) - 1
    by_seed = ratios[~real].groupby(found.blocks["seed"]).mean()
    return {"SmolLM2": over_units(ratios[real]), DECODER: over_units(by_seed)}


def _lemma(theory: pd.DataFrame) -> Verdict:
    rows = theory[theory["check"].str.startswith("lemma")]
    if rows.empty:
        return LEMMA.undecided("not measured")
    worst, draws, violations = rows["identity"].max(), int(rows["draws"].sum()), int(rows["violations"].sum())
    word = SUPPORTED if worst < IDENTITY and not violations else NOT_SUPPORTED
    reasons = (f"{len(rows)} maps", f"{violations} of {draws:,} other masks err less")
    return LEMMA.judged(Estimate(worst, worst, worst, len(rows)), *reasons, verdict=word)


def _stacks(theory: pd.DataFrame) -> Iterator[Verdict]:
    rows = theory[theory["check"] == "stack"]
    draws = int(rows["draws"].sum())
    for claim, column in ((BOUND, "violations"), (MINIMISED, "beaten")):
        share = rows[column].sum() / draws if draws else math.nan
        word = INCONCLUSIVE if not draws else NOT_SUPPORTED if share else SUPPORTED
        reason = f"{int(rows[column].sum())} of {draws:,} vectors in {len(rows)} stacks"
        yield claim.judged(Estimate(share, share, share, draws), reason, verdict=word)


def _judged(claim: Claim, estimates: dict[str, Estimate], few: str = "") -> Verdict:
    """The verdict that all estimates lie in the region; inconclusive where tokens or seeds are too few.

    few: why losses of the pretrained model decide nothing.
    """
    words, notes = {}, []
    for name, estimate in estimates.items():
        trained = name.startswith(DECODER)
        scarce = few if not trained else f"fewer than {LEAST_SEEDS} seeds" if estimate.n < LEAST_SEEDS else ""
        words[name] = INCONCLUSIVE if scarce or estimate.reason else claim.decide(estimate)
        notes.append(scarce)
    unit = "blocks" if claim is GREEDY_ERROR else "documents"
    unit += " or seeds" if any(name.startswith(DECODER) for name in estimates) else ""
    return claim.judged_all(estimates, unit, *dict.fromkeys(filter(None, notes)), words=words)


def _few_tokens(real: pd.DataFrame) -> str:
    """Why losses of the pretrained model decide nothing; empty where there are enough tokens."""
    if real.empty:
        return "the pretrained model was not measured"
    tokens = int(real["tokens"].min())
    return f"{tokens:,} tokens, fewer than {LEAST_TOKENS:,}" if tokens < LEAST_TOKENS else ""


def figures(study: Tables) -> Iterator[tuple[str, ShownFigure]]:
    """Every figure that a study has the tables for, with its name."""
    if study.answers(QUESTION):
        found = analyse(study, study.table(QUESTION))
        yield "10_pareto", pareto_figure(found)
        yield "10_down", down_figure(found)
    yield from input_speeds.figures(study)
