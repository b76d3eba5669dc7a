"""Tables and figures of notebook 10, of what `training_free.analyse` found."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer

from sparsity_utils.findings.style import Look, ShownFigure, captioned, side_by_side, styled
from sparsity_utils.laws.rules_compared import SETTING, over_units, shares
from sparsity_utils.neurons.input_rules import TRAINING_FREE

if TYPE_CHECKING:
    from sparsity_utils.findings.training_free import Found

SCORES = {"gate": "gate |s|", "h": "|h|", "n": "‖n‖"}
ALLOCATIONS = {"top-k": "k per token", "shared": "one ε", "cett": "one relative error (CETT)"}


def label(row: pd.Series) -> str:
    """The name of a setting without its level."""
    if row["method"] in SCORES:
        return f"{SCORES[row['method']]}, {ALLOCATIONS[row['allocation']]}"
    rotated = ", rotated" if row["rotated"] else ""
    greedy = ", greedy" if row["allocation"] == "greedy" else ""
    return TRAINING_FREE[row["method"]].label + rotated + greedy


def over_seeds(decoders: pd.DataFrame) -> pd.DataFrame:
    """The rows of trained decoders, means over seeds; low and high are the t interval of the excess, 95%."""
    rows = []
    for setting, group in decoders.groupby(SETTING, sort=False, dropna=False):
        excess = over_units(group["excess"])
        means = group[["skipped", "weights_read", "accuracy_dense", "accuracy", "agreement"]].mean()
        rows.append({**dict(zip(SETTING, setting, strict=True)), **means, "seeds": len(group)})
        rows[-1] |= {"excess": group["excess"].mean(), "low": excess.low, "high": excess.high}
    return pd.DataFrame(rows)


def models_of(found: "Found") -> list[tuple[str, pd.DataFrame]]:
    """A title and the rows of each kind of model that was measured."""
    parts = []
    if len(found.real):
        parts.append((found.real["model"].iloc[0], found.real))
    if len(found.decoders):
        seeds = found.decoders["seed"].nunique()
        parts.append((f"{found.decoders['model'].iloc[0]}, {seeds} seeds", over_seeds(found.decoders)))
    return parts


def method_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Excess loss in nats per token of every method on linear maps at each sparsity, with 95% intervals as text.

    rows: those of one model, or `over_seeds` of several. A rotated rule stands where it reads as little as the others.
    """
    whole = rows[rows["by"].isin(["sparsity", "weights"]) & ~rows["method"].isin(list(SCORES))]
    level = whole["level"].where(whole["by"] == "sparsity", 1 - whole["level"]).round(6)
    shown = whole.assign(
        method=whole.apply(label, axis=1),
        level=[f"{100 * share:g}%" for share in level],
        excess=[f"{r.excess:.3f} ({r.low:.3f} to {r.high:.3f})" for r in whole.itertuples()],
    )
    return shown.pivot(index="method", columns="level", values="excess").reindex(shown["method"].unique()).fillna("")


def read_table(rows: pd.DataFrame) -> pd.DataFrame:
    """What every method on linear maps reads and keeps at half sparsity, in percent."""
    whole = rows[~rows["method"].isin(list(SCORES)) & np.isclose(rows["level"], 0.5) & (rows["by"] != "perplexity")]
    columns = {
        "skipped %": "skipped",
        "of the maps read %": "weights_read",
        "of all read %": "model_read",
        "next token right %": "accuracy",
        "agrees with dense %": "agreement",
    }
    known = {name: (100 * whole[column]).round(1) for name, column in columns.items() if column in whole}
    return pd.DataFrame({"method": whole.apply(label, axis=1), **known}).set_index("method")


def price_table(rows: pd.DataFrame) -> pd.DataFrame | None:
    """Sparsity and weights read of every method at a price in perplexity, in percent; None where none was solved."""
    solved = rows[rows["by"] == "perplexity"]
    if solved.empty:
        return None
    names = solved.apply(label, axis=1)
    shown = solved.assign(
        method=names,
        price=[f"+{level:g}%" for level in solved["level"]],
        **{"skipped %": (100 * solved["skipped"]).round(1), "read %": (100 * solved["weights_read"]).round(1)},
        **{"rise here %": (100 * np.expm1(solved["excess"])).round(2)},
    )
    wide = shown.pivot(index="method", columns="price", values=["skipped %", "read %", "rise here %"])
    return wide.reindex(names.unique())


def theory_table(found: "Found") -> pd.DataFrame:
    """What checks of the printed theory found, by kind: maps or stacks, vectors or masks tried, how often it fails."""
    rows = []
    for (model, check), group in found.theory.groupby(["model", "check"], sort=False):
        counts = group[["draws", "violations", "beaten", "errs_less"]].sum(min_count=1)  # the last two are of stacks
        whole = {name: "" if pd.isna(count) else int(count) for name, count in counts.items()}
        rows.append({"model": model, "check": check, "maps or stacks": len(group), **whole})
        rows[-1]["identity"] = group["identity"].max()
    names = {"violations": "fails", "beaten": "lower bound by |x|", "errs_less": "lower error by |x|"}
    table = pd.DataFrame(rows).rename(columns=names)
    return table.assign(identity=[f"{worst:.0e}" if pd.notna(worst) else "" for worst in table["identity"]])


def blocks_table(found: "Found") -> pd.DataFrame:
    """Greedy allocation of TEAL at half sparsity: mean sparsity of each kind of map, error over uniform, in percent."""
    roles = [role for role in ("q", "k", "v", "o", "gate", "up", "down") if role in found.blocks]
    rows = found.blocks.assign(error=found.blocks["greedy"] / found.blocks["uniform"])
    return (100 * rows.groupby("model", sort=False)[[*roles, "error"]].mean()).round(1)


def down_table(rows: pd.DataFrame, level: float) -> pd.DataFrame:
    """Excess loss of masks on the down projection alone, in millinats per token: a row per score."""
    chosen = rows[rows["method"].isin(list(SCORES)) & np.isclose(rows["level"], level)]
    wide = (1000 * chosen.pivot_table("excess", "method", "allocation")).round(2)
    return wide.reindex(list(SCORES)).reindex(columns=list(ALLOCATIONS)).rename(index=SCORES, columns=ALLOCATIONS)


def shares_table(found: "Found") -> pd.DataFrame:
    """How much of CETT's advantage over Top-k by gates is of its score, and how much of its allocation, in percent."""
    rows = []
    for title, table in models_of(found):
        for level in sorted(table.loc[table["method"] == "n", "level"].unique()):
            split = shares(table, level)
            if split is not None:
                rows.append({"model": title, "skipped %": 100 * level, **(100 * split).round(1)})
    names = {"advantage": "CETT against Top-k %", "score": "by score %", "allocation": "by allocation %"}
    return pd.DataFrame(rows).rename(columns=names)


@styled
def pareto_figure(found: "Found") -> ShownFigure:
    """Excess loss against the share of the weights of all maps that a token reads, one line per method."""
    models = [(title, _drawn(rows)) for title, rows in models_of(found) if _levels(rows) > 1]
    figure, panels = side_by_side(max(1, len(models)), share_y=False)
    figure.set_size_inches(4.6 * max(1, len(models)), 3.9)
    styles, handles = _styles([rows for _, rows in models]), {}
    for axes, (title, rows) in zip(panels, models, strict=False):
        for name, curve in rows.groupby("name", sort=False):
            handles[name] = _line(axes, curve, styles[str(name)])
        axes.set(yscale="log", title=title, xlabel="Weights of the linear maps read (%)")
        axes.invert_xaxis()
    panels[0].set_ylabel("Excess loss (nats per token)")
    panels[-1].legend(handles.values(), handles, fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return captioned(
        figure,
        "A colour for each score, and one for rotated vectors.\n"
        "Bars: 95% intervals, over documents of a pretrained model, or over seeds.\n"
        "Rotations are counted as read; embeddings and head, which all methods read alike, are not.",
    )


def _drawn(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of methods on linear maps at given sparsities, with a name for each method."""
    whole = rows[~rows["method"].isin(list(SCORES)) & (rows["by"] != "perplexity") & (rows["excess"] > 0)]
    return whole.assign(name=[label(row) for _, row in whole.iterrows()])


def _styles(tables: list[pd.DataFrame]) -> dict[str, dict[str, str]]:
    """How each method of `tables` is drawn: a colour for its score, or for rotated vectors; a marker of its own."""
    scores: dict[str, str] = {}  # name of the method -> teal, wina, was, cats or rotated
    for rows in tables:
        score = rows["method"].str.partition("-")[0].mask(rows["rotated"], "rotated")
        scores |= dict(zip(rows["name"], score, strict=True))
    order = list(dict.fromkeys(scores.values()))
    looks = {name: (Look(order.index(score)), Look(number)) for number, (name, score) in enumerate(scores.items())}
    return {
        name: {"color": score.colour, "marker": own.marker, "linestyle": own.line}
        for name, (score, own) in looks.items()
    }


def _levels(rows: pd.DataFrame) -> int:
    """At how many sparsities TEAL was measured: a model with one has no lines."""
    return rows.query("method == 'teal' and allocation == 'uniform' and by == 'sparsity'")["level"].nunique()


def _line(axes: Axes, curve: pd.DataFrame, style: dict[str, str]) -> ErrorbarContainer:
    curve = curve.sort_values("weights_read")
    reach = np.abs(curve[["low", "high"]].sub(curve["excess"], axis=0)).to_numpy().T.copy()
    reach[0] = np.minimum(reach[0], 0.9 * curve["excess"])  # an interval of few tokens may reach below zero
    x, y, bars = 100 * curve["weights_read"], curve["excess"], np.nan_to_num(reach)
    return axes.errorbar(x, y, bars, label=curve["name"].iloc[0], capsize=2, elinewidth=0.8, **style)


@styled
def down_figure(found: "Found") -> ShownFigure:
    """Excess loss of masks on the down projection alone against its sparsity: a colour per score, a line per way."""
    models = [part for part in models_of(found) if part[1]["method"].isin(list(SCORES)).any()]
    figure, panels = side_by_side(max(1, len(models)))
    figure.set_size_inches(4.6 * max(1, len(models)), 3.9)
    for axes, (title, rows) in zip(panels, models, strict=False):
        for number, score in enumerate(SCORES):
            for place, allocation in enumerate(ALLOCATIONS):
                chosen = (rows["method"] == score) & (rows["allocation"] == allocation) & (rows["excess"] > 0)
                curve, colour, way = rows[chosen].sort_values("skipped"), Look(number), Look(place)
                name = f"{SCORES[score]}, {ALLOCATIONS[allocation]}"
                style = {"color": colour.colour, "marker": colour.marker, "linestyle": way.line}
                axes.plot(100 * curve["skipped"], curve["excess"], label=name, **style)
        axes.set(yscale="log", title=title, xlabel="Inputs of the down projection skipped (%)")
    panels[0].set_ylabel("Excess loss (nats per token)")
    panels[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return captioned(figure, "Three scores of a neuron, three ways to choose how many stay; all else dense.")
