"""Notebook 05, dead neurons: how many there are while a ReLU model trains, and what of its sparsity they explain."""

import math

import pandas as pd

from sparsity_utils.findings.claims import Claim, Verdict, Verdicts
from sparsity_utils.findings.style import AXIS, Look, ShownFigure, captioned, seeds_name, styled, token_axis
from sparsity_utils.laws.limits import require
from sparsity_utils.laws.similarity import SIZE, size_name
from sparsity_utils.laws.trends import mean_over_runs, run_slopes

LITTLE = 0.25  # share of the decrease of the activation ratio below which dead neurons explain little of it
RUN = ["run", "activation", *SIZE, "seed"]
DEAD = {"dead_share": "at the CETT", "dead_share_zero": "zero threshold"}
ACTIVE = {"activation_ratio": "all neurons", "dying_ratio": "dead at the end"}
SHARES = [*DEAD, *ACTIVE]  # of a layer's neurons

INCREASE = Claim(
    "dead_increase",
    "activation_patterns",
    "The share of dead ReLU neurons rises with training",
    "0.35% dead at the end (0.1B)",
    "points more per decade of tokens",
    "t interval over runs of each run's slope on log tokens, warm-up dropped",
)
EXPLAIN_LITTLE = Claim(
    "dead_explain_little",
    "activation_patterns",
    "Dead neurons explain little of the fall of the ReLU activation ratio",
    "0.35% dead, 3.4 points fall",
    "% of the fall",
    "t interval over ReLU runs of the share of the fall, from the first fitted to the last stable checkpoint, that "
    "lies in neurons dead at the end; inconclusive if the ratio of a run did not fall",
    f"90% interval below {100 * LITTLE:.0f}%",
    region=(-math.inf, LITTLE),
)
CLAIMS = (INCREASE, EXPLAIN_LITTLE)


def curves_of(layers: pd.DataFrame) -> pd.DataFrame:
    """SHARES of all neurons of each ReLU run, sum(share * neurons) / sum(neurons) over layers; a row per checkpoint.

    layers: the table of the question dead_neurons. Raises InputError for missing columns, duplicates and NaN.
    """
    numbers = ["neurons", "tokens", "fit", "dead_share", "activation_ratio", "dying_ratio"]
    columns = [*RUN, "step", "layer", "dead_share_zero", *numbers]
    require(layers, columns, ["run", "step", "layer"], numbers, "dead neurons")
    relu = layers[layers["activation"] == "relu"]
    totals = relu[SHARES].mul(relu["neurons"], axis=0).assign(neurons=relu["neurons"])
    sums = totals.groupby([relu[name] for name in (*RUN, "step", "tokens", "fit")], sort=True).sum()
    return sums[SHARES].div(sums["neurons"], axis=0).reset_index()


def ends_of(curves: pd.DataFrame) -> pd.DataFrame:
    """Shares in percent at the first and the last checkpoint of `curves_of`, mean over the seeds of each size."""
    runs = curves.groupby("run")
    ends = pd.concat({"first": runs.head(1), "last": runs.tail(1)}, names=["at", None])
    return 100 * ends.pivot_table(["dead_share", "dead_share_zero", "activation_ratio"], SIZE, "at")


def verdicts(curves: pd.DataFrame) -> Verdicts:
    """One verdict per claim.

    curves: `curves_of`.
    """
    return Verdicts([_increase(curves), _explain_little(curves)])


def _increase(curves: pd.DataFrame) -> Verdict:
    fitted, end = curves[curves["fit"].astype(bool)], curves.groupby("run")["dead_share"].last()
    slopes = mean_over_runs(list(run_slopes(fitted["tokens"], fitted["dead_share"], fitted["run"]).values()))
    at_end = f"{100 * end.mean():.2f}% dead at the end, {100 * end.min():.2f} to {100 * end.max():.2f}"
    return INCREASE.counted(slopes, "runs", at_end)


def _explain_little(curves: pd.DataFrame) -> Verdict:
    ends = curves[curves["fit"].astype(bool)].groupby("run")[["activation_ratio", "dying_ratio"]]
    fall = ends.first() - ends.last()
    about = f"the ratio fell by {100 * fall['activation_ratio'].mean():.1f} points"
    if increasing := int((fall["activation_ratio"] <= 0).sum()):
        return EXPLAIN_LITTLE.undecided(f"the activation ratio of {increasing} runs did not fall; {about}")
    return EXPLAIN_LITTLE.counted(mean_over_runs(fall["dying_ratio"] / fall["activation_ratio"]), "runs", about)


@styled
def figure(curves: pd.DataFrame) -> ShownFigure:
    """Dead ReLU neurons against training tokens, and the activation ratio of all neurons and of those dead at the end.

    curves: `curves_of`.
    """
    means = 100 * curves.groupby([*SIZE, "tokens"], sort=True)[SHARES].mean()
    sizes = list(means.groupby(level=SIZE, sort=True))
    shown = ShownFigure(figsize=(max(2.1 * len(sizes), 5), 4.4), layout="constrained")
    panels = shown.subplots(2, len(sizes) or 1, sharex="col", sharey="row", squeeze=False)
    for (upper, lower), (size, curve) in zip(panels.T, sizes, strict=False):
        x = curve.index.get_level_values("tokens") / 1e6
        for axes, names in ((upper, DEAD), (lower, ACTIVE)):
            for number, (name, label) in enumerate(names.items()):
                look = Look(number)
                style = {"color": look.colour, "marker": look.marker, "fillstyle": "none" if number else "full"}
                axes.plot(x, curve[name], look.line, label=label, markersize=3 + 2 * number, linewidth=1, **style)
        upper.set_title(size_name(size))
        token_axis(lower)
        lower.set_xlabel("Tokens (millions)")
    for axes, name in zip(panels[:, 0], ("Dead neurons (%)", AXIS), strict=True):
        axes.set(ylim=(-0.04 * axes.get_ylim()[1], None), ylabel=name)  # points at zero are seen whole
    for axes in panels[:, -1]:
        axes.legend(fontsize=7)
    about = f"ReLU, mean over {seeds_name(curves)} a size; dead: active on less than 0.1% of the evaluation tokens."
    return captioned(shown, about)
