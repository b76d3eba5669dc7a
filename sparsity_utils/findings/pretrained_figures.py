"""Tables and figures of notebook 09, of what `pretrained_model.analyse` found."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from sparsity_utils.findings.style import AXIS, Look, ShownFigure, captioned, side_by_side, styled
from sparsity_utils.laws.limits import last_means
from sparsity_utils.laws.one_model import POSITIONS, layer_sums, over_documents
from sparsity_utils.laws.published import PUBLISHED_LAWS
from sparsity_utils.models.shapes import non_embedding_parameters
from sparsity_utils.neurons.rules import METRICS
from sparsity_utils.study.opened_models import PRICE

if TYPE_CHECKING:
    from sparsity_utils.findings.pretrained_model import Found


def beside(table: pd.DataFrame, line: pd.DataFrame) -> pd.DataFrame:
    """SiLU activation ratios in the order of size: models, parameters (non-embedding), text, ratio, low, high.

    Published limits have no interval. A size of our own line has the mean of its last five stable checkpoints and, in
    place of an interval, the range of its seeds.

    table: pretrained. line: the table relu_vs_silu.
    """
    published = [
        ("published limit", non_embedding_parameters(law.d_model, law.n_layers, 2.5), "their mixture", law.limit)
        for law in PUBLISHED_LAWS
        if law.activation == "silu"
    ]
    own = last_means(line[line["activation"] == "silu"]).groupby("parameters")["last_five_mean"]
    own = own.agg(["mean", "min", "max"]).reset_index().assign(model="our line", text="python")
    columns = ["model", "parameters", "text", "activation_ratio", "low", "high"]
    parts = [
        own[["model", "parameters", "text", "mean", "min", "max"]].set_axis(columns, axis=1),
        table[columns],
        pd.DataFrame(published, columns=columns[:4]),
    ]
    return pd.concat(parts).sort_values("parameters", kind="stable").reset_index(drop=True)


def in_percent(models: pd.DataFrame) -> pd.DataFrame:
    """`beside` for reading: ratios in percent."""
    ratios = (100 * models[["activation_ratio", "low", "high"]]).round(1).add_suffix(" %")
    return pd.concat([models[["model", "parameters", "text"]], ratios], axis=1)


def price_table(found: "Found") -> pd.DataFrame:
    """What each price buys on each text, in percent and points, with 90% intervals as text."""
    rows = found.costs.query("dtype == 'float32' and metric == 'cett-ppl' and text == solved_on")
    rows = rows.sort_values(["text", "price"])
    return pd.DataFrame(
        {
            "text": rows["text"],
            "p %": rows["price"],
            "active %": (100 * rows["activation_ratio"]).round(1),
            "rise of perplexity %": _with_interval(rows, "rise"),
            "accuracy lost, points": _with_interval(rows, "accuracy_lost"),
            "agreement with the dense model %": _with_interval(rows, "agreement"),
        }
    ).set_index(["text", "p %"])


def _with_interval(rows: pd.DataFrame, what: str) -> list[str]:
    ends = (100 * rows[[what, f"low_{what}", f"high_{what}"]]).to_numpy()
    return [f"{here:.2f} ({low:.2f} to {high:.2f})" for here, low, high in ends]


def rivals_table(found: "Found") -> pd.DataFrame:
    """Rise of perplexity and agreement in percent of every metric at equal activation ratio."""
    rows = found.costs.query("dtype == 'float32' and text == solved_on")
    rows = rows[rows.duplicated(["text", "price"], keep=False)]
    wide = (100 * rows.set_index(["text", "price", "metric"])[["rise", "agreement"]]).unstack()
    wide = wide.rename(columns={metric: METRICS[metric].label for metric in set(rows["metric"])})
    return wide.rename_axis(["text", "ratio of CETT-PPL-p%"])


def band_table(found: "Found") -> pd.DataFrame:
    """The bands in which positions are sparse: their layers, and the tested quotient with its interval."""
    rows = []
    for kind, by_text in found.bands.items():
        for text, (band, quotient) in by_text.items():
            layers = f"{band[0]} to {band[-1]}" if band else "none"
            tested = quotient.reason or f"{quotient.value:.2f} ({quotient.low:.2f} to {quotient.high:.2f})"
            rows.append((kind, text, layers, tested, quotient.n))
    columns = ["position", "text", "band of layers", "ratio over that of others", "documents"]
    return pd.DataFrame(rows, columns=columns)


@styled
def ratio_figure(models: pd.DataFrame) -> ShownFigure:
    """Activation ratio against parameters: published limits, our small models, and the pretrained model."""
    figure, (axes,) = side_by_side(1)
    groups = models.groupby(["model", "text"], sort=False)
    for look, ((model, text), rows) in zip(map(Look, range(len(groups))), groups, strict=True):
        reach = 100 * np.abs(rows[["low", "high"]].sub(rows["activation_ratio"], axis=0)).to_numpy().T
        line = look.line if len(rows) > 1 else "none"
        style = {"color": look.colour, "marker": look.marker, "linestyle": line, "capsize": 2, "elinewidth": 0.8}
        axes.errorbar(rows["parameters"], 100 * rows["activation_ratio"], reach, label=f"{model}, {text}", **style)
    axes.set(xscale="log", xlabel="Non-embedding parameters", ylabel=AXIS, ylim=(0, None))
    axes.legend(fontsize=7)
    return captioned(
        figure,
        f"SiLU, CETT-PPL-{PRICE:g}%. Bars: 90% interval over documents;\nof our line the range of its seeds. Size, "
        "text, tokenizer, tuning\nand quantisation differ: no verdict rests on this figure.",
    )


@styled
def layers_figure(found: "Found", neurons: pd.DataFrame) -> ShownFigure:
    """Activation ratio of each layer: of the pretrained model, and of small SiLU models by relative depth.

    neurons: the table activation_patterns.
    """
    figure, (left, right) = side_by_side(2, share_y=True)
    for number, text in enumerate(found.table["text"]):
        sums, look = layer_sums(found.positions, text), Look(number)
        layers = [layer for layer in sums if layer != "tokens"]
        each = [over_documents(sums[[layer, "tokens"]], _mean_of_first) for layer in layers]
        value, low, high = (100 * np.array([getattr(one, end) for one in each]) for end in ("value", "low", "high"))
        left.plot(layers, value, look.line, color=look.colour, label=text)
        left.fill_between(layers, low, high, color=look.colour, alpha=0.25)
    small = neurons[neurons["activation"] == "silu"]
    means = small.groupby(["d_model", "n_layers", "seed", "layer"])["frequency"].mean().reset_index()
    for number, ((d_model, n_layers), rows) in enumerate(means[means["n_layers"] > 1].groupby(["d_model", "n_layers"])):
        mean, look = 100 * rows.groupby("layer")["frequency"].mean(), Look(number)
        label = f"{d_model}x{n_layers}"
        right.plot(mean.index / (n_layers - 1), mean, look.line, marker=look.marker, color=look.colour, label=label)
    first = found.table.iloc[0]
    left.set(xlabel="Layer", ylabel=AXIS, title=first["model"], ylim=(0, None))
    right.set(xlabel="Depth (0: first layer, 1: last)", title="small SiLU models, Python source")
    for axes in (left, right):
        axes.legend(fontsize=7)
    return captioned(
        figure,
        f"CETT-PPL-{PRICE:g}%. Left: {first['documents']} documents of {first['window']} tokens of each text, 90% "
        "intervals over them. Right: mean over seeds.",
    )


def _mean_of_first(sums: pd.DataFrame) -> pd.Series:
    return sums.iloc[:, 0] / sums["tokens"]


@styled
def positions_figure(found: "Found") -> ShownFigure:
    """Heatmap of the activation ratio by layer and class of position, one panel for each text."""
    texts = list(found.table["text"])
    figure = ShownFigure(figsize=(7.4, 1.9 * len(texts) + 0.6), layout="constrained")
    panels = figure.subplots(len(texts), 1, sharex=True, squeeze=False)[:, 0]
    rows = found.positions.assign(active=found.positions["tokens"] * found.positions["activation_ratio"])
    sums = rows.groupby(["text", "position", "layer"])[["active", "tokens"]].sum()
    ratios = 100 * (sums["active"] / sums["tokens"]).unstack()
    for axes, text in zip(panels, texts, strict=True):
        shown = ratios.loc[text].reindex(POSITIONS).dropna(how="all")
        image = axes.imshow(shown, aspect="auto", cmap="viridis", vmin=0, vmax=ratios.to_numpy().max())
        axes.set_yticks(range(len(shown)), shown.index)
        axes.set_title(text)
        axes.grid(visible=False)
    panels[-1].set_xlabel("Layer")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=list(panels), label=AXIS)
    first = found.table.iloc[0]
    return captioned(figure, f"{first['model']}, CETT-PPL-{PRICE:g}%, {first['documents']} documents of each text.")


@styled
def price_figure(found: "Found") -> ShownFigure:
    """Rise of perplexity and disagreement with the dense model against the activation ratio, for every metric."""
    rows = found.costs.query("dtype == 'float32' and text == solved_on")
    texts = list(found.table["text"])
    figure = ShownFigure(figsize=(3.7 * len(texts), 6.0), layout="constrained")
    panels = figure.subplots(2, len(texts), sharex="col", sharey="row", squeeze=False)
    for column, text in enumerate(texts):
        for number, metric in enumerate(("cett-ppl", "fat", "top-k", "top-k-norm")):
            curve, look = rows[(rows["text"] == text) & (rows["metric"] == metric)], Look(number)
            curve = curve.sort_values("activation_ratio")
            style = {"color": look.colour, "marker": look.marker, "linestyle": look.line, "capsize": 2}
            for axes, what, sign in zip(panels[:, column], ("rise", "agreement"), (1, -1), strict=True):
                height = 100 * curve[what] if sign > 0 else 100 - 100 * curve[what]
                reach = 100 * curve[[f"low_{what}", f"high_{what}"]].sub(curve[what], axis=0).abs().to_numpy().T
                reach = reach[::sign]
                axes.errorbar(100 * curve["activation_ratio"], height, reach, label=METRICS[metric].label, **style)
        panels[0, column].set_title(text)
        panels[1, column].set(xlabel=AXIS, xlim=(0, 100))
    panels[0, 0].set_ylabel("Rise of perplexity (%)")
    positive = bool((rows["low_rise"] > 0).all())  # of few tokens an interval can reach below zero
    panels[0, 0].set_yscale("log" if positive else "symlog", **({} if positive else {"linthresh": 0.1}))
    panels[1, 0].set_ylabel("Other likeliest token than dense (%)")
    panels[0, 0].legend(fontsize=7, loc="lower left")
    first = found.table.iloc[0]
    return captioned(
        figure,
        f"{first['model']}; {first['documents']} documents of {first['window']} tokens of each text; 90% intervals "
        "over them.\nRivals of CETT-PPL have its activation ratio on the same documents.",
    )
