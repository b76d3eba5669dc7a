"""The claims under test, with test, threshold and margin stated before any result.

Thirteen claims are primary: the study's sizes and seeds are planned for them. At each of two width-depth ratios they
are that ReLU reaches the loss of SiLU, that the ReLU activation ratio falls with data, that the SiLU activation ratio
rises, that ReLU ends sparser, and that the limits of either do not depend on scale; at one size, that the limit rises
with the width-depth ratio. Each is judged at its own 90% interval, without correction for their number, by a test whose
unit is a size. All other claims are secondary; most of their tests are means over runs or regressions with seeds as
blocks. Where the seeds of a size share what the size has of its own, such an interval is too narrow: a secondary
verdict says where to look, not what holds.
"""

from dataclasses import replace

import pandas as pd

from sparsity_utils.findings.judgement import Claim
from sparsity_utils.findings.one_dimension import ONE_DIMENSION
from sparsity_utils.findings.speed_claims import SPEED_CLAIMS
from sparsity_utils.laws.trends import DISTINCT
from sparsity_utils.models.config import ACTIVATIONS

# "Comparable" loss: 1% is what about 14% more parameters buy, at loss ~ N^-0.076 (arXiv 2001.08361, eq. 1.1).
LOSS_MARGIN = 0.01
# Activation ratio per decade of parameters (3 points): just above both published slopes, +1.6 and -2.6 points.
SLOPE_MARGIN = 0.03
BREAKPOINT = (114.0, 114.0)  # d_model / n_layers (arXiv 2411.02335, Fig. 5)
OPTIMUM = (74.0, 282.0)  # d_model / n_layers of the lowest loss (Fig. 6)
USEFUL_PPL_RATIO = 2.0  # metrics are compared where CETT at most doubles perplexity, the largest p that is measured
OFTEN = 20  # occurrences in the measured text from which a token's mean activation ratio is compared
ALIKE = 0.5  # rank correlation of two token patterns: at least this much counts as alike
LITTLE = 0.25  # of the fall of the activation ratio: dead neurons explain little of it below this
SECOND_LINE = ", at a second width-depth ratio"
# How every test over sizes counts: t intervals of `pooled.pooled_means` and `pooled.pooled_slopes`.
MEANS = "mean over the sizes of a line, each size the mean over its seeds; t interval, the variance of sizes pooled "
MEANS += "over the lines of sizes (degrees of freedom: sizes less lines)"
SLOPES = "the means over the seeds of each size; own level and slope for each line of sizes, residual variance pooled "
SLOPES += "over the lines (degrees of freedom: sizes less twice the lines)"
DETERMINED = 0.01  # width of the 90% interval of a limit (1 point of activation ratio) up to which it counts as known
PRINTED_ERROR = 0.005  # activation ratio (half a point): root mean square error of a law printed for its own curve
COVERED = 0.8  # of held-out runs: 90% intervals that hold at least so many are called honest
PREDICTED_LOSS_MARGIN = 0.05  # what a factor of two in parameters buys, at the exponent of LOSS_MARGIN
TRANSFER_FACTOR = 2.0  # thresholds that cost p% on their own domain may cost this many times p% on another


def form_claim(activation: str, form: str, question: str = "relu_vs_silu") -> Claim:
    """Does the published form describe an activation's curves better than its rivals: ours, or the published ones?"""
    ours = question == "relu_vs_silu"
    name, unit = (ACTIVATIONS[activation], "runs") if ours else (f"its {ACTIVATIONS[activation]} curves", "curves")
    return Claim(
        question,
        f"The published {form} law describes {name} best",
        "fits best",
        "AICc below the closest form",
        f"t interval over {unit} of the AICc difference to each of constant, log, exponential, plain power and sigmoid",
        "90% interval above 0 for every form; not supported if a form has smaller residuals, parameters not counted",
        scale=1.0,
    )


def scale_claim(what: str, published: str = "none", where: str = "", primary: bool = False) -> Claim:
    """Is a quantity insensitive to scale? `where` names a line of runs other than the main one."""
    return Claim(
        "scale_insensitivity",
        f"{what} does not depend on scale{where}",
        published,
        "points per decade",
        f"equivalence (two one-sided t tests) of the slope, on log parameters, of {SLOPES}",
        f"90% interval inside +-{100 * SLOPE_MARGIN:.0f} points per decade",
        primary=primary,
    )


def line_claims(where: str = "") -> tuple[Claim, ...]:
    """The claims on one line of sizes at one width-depth ratio, in the order of their verdicts."""
    metric = scale_claim("The gap between CETT-PPL and the share of non-zero ReLU neurons", "none", where)
    return (
        scale_claim("The ReLU limit", "+1.6 points per decade", where, primary=True),
        scale_claim("The SiLU limit", "-2.6 points per decade", where, primary=True),
        scale_claim("The ReLU share of non-zero neurons", "sparser (2210.06313)", where),
        replace(
            metric,
            test=f"{metric.test}; of the activation ratio at CETT-PPL less the non-zero share, paired by run "
            "(last-five means): do both metrics see the same dependence on scale?",
        ),
    )


def at_second_line(claim: Claim) -> Claim:
    """The same claim on the sizes at the other width-depth ratio."""
    return replace(claim, claim=claim.claim + SECOND_LINE)


def price_claim(p: float = 1.0) -> Claim:
    """Does a price of p percent, met on calibration documents, hold on others?"""
    return Claim(
        "quickstart",
        "Thresholds solved on some documents cost what they promise on others",
        f"{p:g}%",
        "% rise of perplexity",
        "bootstrap over documents of the rise of perplexity, on documents that had no part in the thresholds",
        f"90% interval inside 0 to {2 * p:g}%; not supported if wholly outside",
    )


def cover_claim(quantity: str) -> Claim:
    """Do the intervals of the predicted `quantity` hold on shapes that were not fitted?"""
    return Claim(
        "design",
        f"The 90% intervals of the predicted {quantity} hold on shapes that were not fitted",
        "none",
        "% of the runs inside",
        "exact binomial interval of the share of runs inside, every shape left out in turn",
        f"90% interval above {100 * COVERED:.0f}%; not supported if wholly below 90%",
    )


def size_claim(quantity: str) -> Claim:
    """Is a size beyond the fit predicted within the margin of a quantity?"""
    loss = quantity == "loss"
    margin = f"{100 * PREDICTED_LOSS_MARGIN:.0f}%" if loss else f"{100 * SLOPE_MARGIN:.0f} points"
    return Claim(
        "design",
        f"The {quantity} of a size beyond the fit is predicted within {margin}",
        "none",
        "% above the measured" if loss else "points above the measured",
        "equivalence (two one-sided t tests) of predicted less measured, one value per shape and activation function, "
        "fitted to runs of at most half the size",
        f"90% interval inside +-{margin}",
        scale=1.0,
    )


CETT_LOWEST = Claim(
    "metrics",
    "At equal activation ratio CETT has the lowest perplexity",
    "lowest of four",
    "nats per token below the closest metric",
    "t interval over runs of the mean loss gap to Top-k and to FAT (plain ReLU is one point, see the next claim)",
    "90% interval above 0 for both",
    scale=1.0,
)
CETT_CUT = Claim(
    "metrics",
    "CETT-PPL-1% keeps fewer neurons active than the zero threshold of ReLU",
    "61% fewer (0.8B)",
    "% fewer",
    "t interval over ReLU runs of the relative cut",
)
LOSS_EQUAL = Claim(
    "relu_vs_silu",
    "ReLU reaches the loss of SiLU",
    "comparable",
    "% of the SiLU loss",
    "equivalence (two one-sided t tests) of the relative difference of pairs of runs of equal size, seed and tokens: "
    f"{MEANS}",
    f"90% interval inside +-{100 * LOSS_MARGIN:.0f}%",
    primary=True,
)
RELU_FALLS = Claim(
    "relu_vs_silu",
    "The ReLU activation ratio falls with data",
    "falls",
    "points fewer per decade of tokens",
    f"slope of each run on log tokens, warm-up dropped: {MEANS}",
    primary=True,
)
SILU_RISES = Claim(
    "relu_vs_silu",
    "The SiLU activation ratio rises with data",
    "rises",
    "points more per decade of tokens",
    f"slope of each run on log tokens, warm-up dropped: {MEANS}",
    primary=True,
)
RELU_SPARSER = Claim(
    "relu_vs_silu",
    "ReLU ends sparser than SiLU",
    "7.1% against 39.2% active (0.1B)",
    "points fewer active",
    f"difference of the last-five means of pairs of runs of equal size and seed: {MEANS}",
    primary=True,
)
PAIRED = (LOSS_EQUAL, RELU_FALLS, SILU_RISES, RELU_SPARSER)  # the claims on ReLU beside SiLU that each line decides
RUNS_FORECAST = Claim(
    "relu_vs_silu",
    "Fitted to the first half of a run, the published law forecasts the second better than the last value",
    "none",
    "log of the last value's error over the law's",
    "t interval over runs of the log ratio of two root mean square errors beyond half of a run's tokens: of the "
    "forecast that nothing changes any more, and of the published form of the run's activation function",
    scale=1.0,
)
RATIO_RISES = Claim(
    "width_depth_ratio",
    "The limit rises with the width-depth ratio below the breakpoint",
    "rises",
    "points per 100 of d_model / n_layers",
    "t interval of the slope of a line through the means over the seeds of each shape, shapes up to the breakpoint "
    "where there is one (degrees of freedom: shapes less 2)",
    scale=1e4,
    primary=True,
)
RATIO_BREAKS = Claim(
    "width_depth_ratio",
    "Beyond a width-depth ratio of about 114 the limit is flat",
    "114",
    "d_model / n_layers",
    f"profile F interval of the breakpoint, once two segments are {DISTINCT:g} AICc below both a straight line and a "
    "smooth saturating curve",
    "114 inside the 90% interval, the interval inside the sampled ratios",
    scale=1.0,
)
RATIO_OPTIMUM = Claim(
    "width_depth_ratio",
    "The loss is lowest at a width-depth ratio of 74 to 282",
    "74 to 282",
    "d_model / n_layers",
    "profile F interval of the minimum of a parabola in log ratio",
    "90% interval inside 74 to 282 and inside the sampled ratios",
    scale=1.0,
)
SMALL_CONVERGE_FASTER = Claim(
    "scale_insensitivity",
    "Small models converge faster, counted in tokens per parameter",
    "faster (Fig. 8)",
    "decades of tokens per parameter, per decade of parameters",
    "t interval of the slope, on log parameters, of the log tokens per parameter at which a run's fitted curve has "
    "done half of its change over the window of tokens per parameter that all runs share; seeds and activation "
    "functions as blocks, runs without a trend left out",
    scale=1.0,
)
TOKENS_ALIKE = Claim(
    "activation_patterns",
    "The same vocabulary tokens activate many neurons at every size",
    "alike (Fig. 10)",
    "rank correlation",
    f"bootstrap over vocabulary tokens (seen {OFTEN} times or more) of the Spearman correlation of their activation "
    "ratios, mean over layers and seeds, for each pair of sizes and activation function; the lowest decides",
    f"90% interval above {ALIKE:g} for every pair",
    scale=1.0,
)
NEURONS_ALIKE = Claim(
    "activation_patterns",
    "Neuron frequencies are distributed more alike across sizes than across activation functions",
    "alike across sizes (Fig. 9)",
    "less KS distance",
    "t interval over seeds, at the sizes that all of them have, of the KS distance of relative frequencies between "
    "ReLU and SiLU at one size, less that between sizes at one activation function; means over domains",
    scale=1.0,
)
MIDDLE_ALIKE = Claim(
    "activation_patterns",
    "First and last layers differ more across sizes than the middle layer",
    "differ more (Fig. 16)",
    "more rank correlation in the middle",
    "bootstrap over vocabulary tokens of the Spearman correlation between sizes in the middle layer, less that in the "
    "first and in the last; mean over activation functions and pairs of sizes of three layers or more",
    "90% interval above 0 for both",
    scale=1.0,
)
DEAD_RISES = Claim(
    "activation_patterns",
    "The share of dead ReLU neurons rises with training",
    "0.35% dead at the end (0.1B)",
    "points more per decade of tokens",
    "t interval over runs of each run's slope on log tokens, warm-up dropped",
)
DEAD_EXPLAIN_LITTLE = Claim(
    "activation_patterns",
    "Dead neurons explain little of the fall of the ReLU activation ratio",
    "0.35% dead, 3.4 points fall",
    "% of the fall",
    "t interval over ReLU runs of the share of the fall, from the first fitted to the last stable checkpoint, that "
    "lies in neurons dead at the end",
    f"90% interval below {100 * LITTLE:.0f}%",
)
THRESHOLDS_TRANSFER = Claim(
    "activation_patterns",
    "Thresholds solved on one domain hold on others",
    "none",
    "% rise of perplexity",
    "t interval over runs of the mean rise on foreign domains, for each activation function; the highest decides",
    f"90% interval below {TRANSFER_FACTOR:g} times the p% solved for",
)
BETTER_THAN_MEAN = Claim(
    "design",
    "The recipe predicts the activation ratio better than the mean of the other runs",
    "none",
    "points nearer",
    "t interval over shapes and activation functions, each left out in turn, of the error of the mean less that of the "
    "recipe (sizes of errors, mean over seeds)",
    scale=1.0,
)


def refit_claim(activation: str) -> Claim:
    """Does a refit of the published curves give the published limits?"""
    return Claim(
        "published_curves",
        f"The published {ACTIVATIONS[activation]} limits are reproduced by a refit",
        "as printed (Fig. 4)",
        "points, printed less refitted",
        "block bootstrap of each curve's limit (residuals of the refit in blocks); the curve furthest off decides",
        f"printed limit inside the 90% interval on every curve, no interval wider than {100 * DETERMINED:g} point",
    )


PRINTED_LAWS = Claim(
    "published_curves",
    "The printed laws pass through the published points",
    "fitted to them (Fig. 4)",
    "points of root mean square error",
    "printed coefficients against the points of their own curve; the worst curve decides",
    f"at or below {100 * PRINTED_ERROR:g} points",
)
SPARSITY_KNOWN = Claim(
    "published_curves",
    "The limit behind the published 93.52% sparsity is determined by its curve",
    "93.52% (2.4B)",
    "% sparsity in the limit",
    "block bootstrap of the refitted 2.4B limit, and the same fit to the first 75% of its tokens",
    f"sound fit, 90% interval at most {100 * DETERMINED:g} point wide, the limit of the first 75% inside it",
)
LAW_FORECASTS = Claim(
    "published_curves",
    "The law forecasts the second half of its curve better than the last value does",
    "a law",
    "ln of the last value's error over the law's",
    "fitted up to half of the tokens; t interval over curves of the log ratio of the root mean square errors beyond it",
    scale=1.0,
)
CLAIMS = (
    price_claim(),
    *(CETT_LOWEST, CETT_CUT),
    *(*PAIRED, form_claim("relu", "logspace"), form_claim("silu", "power"), RUNS_FORECAST),
    *(at_second_line(claim) for claim in PAIRED),
    *(RATIO_RISES, RATIO_BREAKS, RATIO_OPTIMUM),
    *(*line_claims(), SMALL_CONVERGE_FASTER, *line_claims(SECOND_LINE)),
    *ONE_DIMENSION,
    *(TOKENS_ALIKE, NEURONS_ALIKE, MIDDLE_ALIKE, DEAD_RISES, DEAD_EXPLAIN_LITTLE, THRESHOLDS_TRANSFER),
    *SPEED_CLAIMS,
    *(PRINTED_LAWS, refit_claim("relu"), refit_claim("silu"), SPARSITY_KNOWN),
    form_claim("relu", "logspace", "published_curves"),
    form_claim("silu", "power", "published_curves"),
    LAW_FORECASTS,
    *(cover_claim("activation ratio"), BETTER_THAN_MEAN, size_claim("activation ratio")),
    *(cover_claim("loss"), size_claim("loss")),
)


def claims_table(question: str) -> pd.DataFrame:
    """What a notebook states before its results: question, published, test, threshold, rank."""
    chosen = [claim for claim in CLAIMS if claim.question == question]
    rows = [(claim.claim, claim.published, claim.test, claim.threshold, claim.rank) for claim in chosen]
    return pd.DataFrame(rows, columns=["question", "published", "test", "threshold", "rank"])
