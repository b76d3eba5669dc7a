"""Tables and figures of notebook 12, of what `q_sparse.analyse` found."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sparsity_utils.findings.q_sparse_arms import ACTIVE, ARMS, DENSE, LEVELS, gaps_of_sizes
from sparsity_utils.findings.style import Look, ShownFigure, captioned, plain_log, styled
from sparsity_utils.laws.arms import mean_of_arm, of_arm, paired
from sparsity_utils.laws.sparsity_law import PRINTED, PRINTED_BEST, exponential_fit
from sparsity_utils.laws.trends import Estimate

if TYPE_CHECKING:
    from sparsity_utils.findings.q_sparse import Found

WAYS = {"dense": "dense", "straight-through": "with the estimator", "no straight-through": "without"}


def arms_table(found: "Found") -> pd.DataFrame:
    """Every arm: loss, what it costs against the arm that it is compared with, and how sparse it became.

    An arm of a profile that ARMS does not know comes last, under its own name, and is compared with none.

    Costs are means over paired seeds with 90% intervals, in nats per token; shares are in percent, means over seeds.
    """
    rows = []
    others = {arm: (arm, "") for arm in found.runs["arm"].unique() if arm not in ARMS}
    for arm, (name, base) in (ARMS | others).items():
        if (loss := mean_of_arm(found.runs, arm, "loss")).reason:
            continue
        cost = _interval(paired(found.runs, arm, base, "loss")) if base else ""
        shares = {
            "non-zero neurons %": _percent(found, arm, "final_share"),
            "CETT-PPL %": _percent(found, arm, "activation_ratio"),
            "weights met by non-zeros %": _percent(found, arm, "weights_read"),
        }
        against = f"{cost} ({ARMS[base][0]})" if base else ""
        rows.append({"arm": name, "loss": f"{loss.value:.4f}", "costs": against, **shares})
    return pd.DataFrame(rows).set_index("arm") if rows else pd.DataFrame()


def law_table() -> pd.DataFrame:
    """The printed law: where its optimum lies by its own coefficients, and how much there is to gain."""
    low, high = PRINTED.best_as_rounded()
    best = PRINTED.best()
    rows = {
        "best S, printed": f"{100 * PRINTED_BEST:.2f}%",
        "best S, of the printed coefficients": f"{100 * best:.1f}%",
        "best S, of all coefficients that round to them": f"{100 * low:.0f} to {100 * high:.0f}%",
        "reducible loss saved at the best S": f"{100 * (1 - PRINTED.reducible(best)):.1f}%",
        "reducible loss saved at the printed S": f"{100 * (1 - PRINTED.reducible(PRINTED_BEST)):.1f}%",
        "A(0.4) / A(0)": f"{float(PRINTED.a(0.4) / PRINTED.a(0.0)):.3f}",
    }
    return pd.DataFrame({"value": rows})


def decoding_table(decoding: pd.DataFrame, found: "Found") -> pd.DataFrame:
    """Tokens per second of trained models, each at the learning rate that counts; the table trained_decoding.

    A dash stands where a word differed from what the model itself writes.
    """
    chosen = found.rates.loc[found.rates["experiment"] == "q_sparse", ["arm", "learning_rate"]]
    rows = decoding.merge(chosen, on=["arm", "learning_rate"])

    def times(row: pd.Series, column: str) -> str:
        return f"{row[column]:.2f} ({row[f'low_{column}']:.2f} to {row[f'high_{column}']:.2f})"

    shown = pd.DataFrame(
        {
            "arm": [ARMS[arm][0] for arm in rows["arm"]],
            "computed by": rows["engine"],
            "way": rows["way"],
            "weights read %": (100 * rows["read_share"]).round(1),
            "tokens per second": [f"{speed:,.0f}" for speed in rows["tokens_per_second"]],
            "times transformers": [times(row, "speedup") for _, row in rows.iterrows()],
            "times kernels that skip nothing": [times(row, "strict_speedup") for _, row in rows.iterrows()],
        }
    )
    speeds = ["tokens per second", "times transformers", "times kernels that skip nothing"]
    shown.loc[rows["wrong"] > 0, speeds] = "-"
    return shown.replace(r"^nan.*", "-", regex=True).set_index(["arm", "computed by"])


def rates_table(found: "Found") -> pd.DataFrame:
    """Which learning rate counts for each arm."""
    shown = found.rates.rename(columns={"learning_rate": "learning rate", "at_edge": "at the edge of the grid"})
    return shown.set_index(["experiment", "arm"])


def _percent(found: "Found", arm: str, column: str) -> str:
    values = of_arm(found.runs, arm, column).dropna()
    return f"{100 * values.mean():.1f}" if len(values) else "-"


def _interval(estimate: Estimate) -> str:
    if estimate.reason:
        return "-"
    return f"{estimate.value:+.4f} ({estimate.low:+.4f} to {estimate.high:+.4f})"


@styled
def loss_figure(found: "Found") -> ShownFigure:
    """Loss against the share S of inputs left out: at equally many parameters, and at equally many active ones."""
    shown = ShownFigure(figsize=(8.2, 3.3), layout="constrained")
    left, right = shown.subplots(1, 2)
    _equal_parameters(left, found)
    if found.active is None:
        right.set_visible(False)
    else:
        _by_seed(right, found.active, ACTIVE)
        right.set(title="Equally many active parameters", xlabel="Inputs left out (%)", ylabel="Loss (nats per token)")
    return captioned(
        shown,
        "Small marks: seeds. Large ones: their mean. Each arm at the rate of its lowest loss.\n"
        "Right: as trained; wider models also read larger output heads, which the verdict takes off.",
    )


def _equal_parameters(axes, found: "Found") -> None:
    means = _by_seed(axes, found.runs, LEVELS)
    axes.set(title="Equally many parameters", xlabel="Inputs left out (%)", ylabel="Loss (nats per token)")
    if len(means) >= 3:
        s = np.array([LEVELS[arm] for arm in means.index])
        a, c, beta = exponential_fit(s, means.to_numpy())
        grid = np.linspace(0, s.max(), 100)
        axes.plot(100 * grid, a + c * np.exp(beta / (1 - grid)), "-", color=Look(1).colour, label="a + c exp(β/(1-S))")
        axes.plot(100 * grid, np.polyval(np.polyfit(s, means, 1), grid), ":", color=Look(4).colour, label="line")
        axes.legend(fontsize=7)


def _by_seed(axes, runs: pd.DataFrame, levels: dict[str, float]) -> pd.Series:
    """Draw the losses of arms against their S; return the means over seeds by arm."""
    rows = runs[runs["arm"].isin(levels)]
    look = Look(0)
    axes.plot(100 * rows["arm"].map(levels), rows["loss"], look.marker, color=look.colour, markersize=3, alpha=0.5)
    means = rows.groupby("arm")["loss"].mean().reindex([arm for arm in levels if arm in set(rows["arm"])])
    axes.plot([100 * levels[arm] for arm in means.index], means, look.marker, color=look.colour, markersize=6)
    return means


@styled
def frontier_figure(found: "Found") -> ShownFigure:
    """Loss against how few neurons are left, by both metrics: what each way to train pushes sparsity to."""
    shown = ShownFigure(figsize=(6.6, 3.6), layout="constrained")
    axes = shown.subplots()
    families = {
        "ReLU², inputs kept by size": [*LEVELS],
        "ReLU with an L1 penalty": ["relu", "relu_l1_weak", "relu_l1_strong"],
    }
    metrics = {"final_share": "non-zero neurons", "activation_ratio": "CETT-PPL"}
    for number, (family, arms) in enumerate(families.items()):
        rows = found.runs[found.runs["arm"].isin(arms)]
        means = rows.groupby("arm")[["loss", *metrics]].mean().reindex([arm for arm in arms if arm in set(rows["arm"])])
        for metric, name in metrics.items():
            look, hollow = Look(number), metric == "activation_ratio"
            line = "--" if hollow else "-"
            axes.plot(
                *(100 * means[metric], means["loss"], line),
                color=look.colour,
                marker=look.marker,
                fillstyle="none" if hollow else "full",
                label=f"{family}: {name}",
            )
    axes.set(xscale="log", xlabel="Active neurons (% of d_ff)", ylabel="Loss (nats per token)")
    plain_log(axes.xaxis)
    shown.legend(loc="outside upper left", ncols=2, fontsize=7)
    about = "Means over seeds. A line leads from everything read, or no penalty, to least read, or the strongest one."
    return captioned(shown, about)


@styled
def gradients_figure(flow: pd.DataFrame) -> ShownFigure:
    """Gradient of each layer before the first step, over that of the dense model, with and without the estimator."""
    shown = ShownFigure(figsize=(5.4, 3.0), layout="constrained")
    axes = shown.subplots()
    norms = flow.pivot(index=["seed", "layer"], columns="way", values="norm")
    for number, way in enumerate([way for way in WAYS if way != "dense"]):
        ratio = (norms[way] / norms["dense"]).unstack("seed")  # (layers, seeds)
        look = Look(number)
        axes.plot(
            ratio.index + 1, ratio.mean(axis=1), look.line, color=look.colour, marker=look.marker, label=WAYS[way]
        )
        axes.fill_between(ratio.index + 1, ratio.min(axis=1), ratio.max(axis=1), color=look.colour, alpha=0.2)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="Layer, from the embedding", ylabel="Gradient, of the dense model's", ylim=(0, None))
    axes.legend(fontsize=7)
    return captioned(shown, f"Half of the inputs kept; {flow['seed'].nunique()} seeds, bands: all of them.")


@styled
def sizes_figure(found: "Found") -> ShownFigure:
    """What leaving inputs out costs models of rising size: trained with it, and cut afterwards."""
    shown = ShownFigure(figsize=(8.2, 3.1), layout="constrained")
    left, right = shown.subplots(1, 2)
    gaps = gaps_of_sizes(found.sizes)
    dense = found.sizes[found.sizes["arm"].str.endswith(DENSE)]
    panels = ((left, gaps, "gap", "Trained to leave out 63%"), (right, dense, "rise_untrained", "38% cut afterwards"))
    for axes, rows, column, title in panels:
        look = Look(0)
        axes.plot(rows["parameters"], rows[column], look.marker, color=look.colour, markersize=3, alpha=0.5)
        means = rows.groupby("parameters")[column].mean()
        axes.plot(means.index, means, "-" + look.marker, color=look.colour, markersize=6)
        axes.set(xscale="log", title=title, xlabel="Parameters", ylabel="Rise of the loss (nats per token)")
    return captioned(shown, "ReLU², equal training tokens. Small marks: seeds. Large ones: their mean.")
