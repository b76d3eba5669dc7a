"""The figures of notebook 06: speed against sparsity, memory and batch, and decoding steps. Table in, figure out."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsity_utils.decoding.speed import DENSE
from sparsity_utils.findings.style import COLOURS, Look, captioned, side_by_side, styled
from sparsity_utils.models.config import ACTIVATIONS

NAMES = {
    "dense": "dense, torch",
    "dense compiled": "dense, torch.compile",
    "all rows": "kernel, nothing skipped",
    "sparse": "sparse kernel",
    "certified": "with certified gate",
}
LOOKS = {way: Look(number) for number, way in enumerate(NAMES)}
PARTS = {"ffn": "FFN", "attention": "attention", "head": "output head", "other": "all else"}


@styled
def speed_against_sparsity(ffns: pd.DataFrame) -> Figure:
    """Speed-up of one FFN over the fastest way that reads all weights, beside what the unread bytes allow."""
    rows = ffns[(ffns["tokens"] == 1) & (ffns["pattern"] == "random")]
    shape = largest_shape(rows)
    rows = rows[rows["shape"] == shape]
    dtypes = [dtype for dtype in ("float32", "float16", "bfloat16") if dtype in set(rows["dtype"])]
    figure, panels = side_by_side(len(dtypes), share_y=True)
    for axes, dtype in zip(panels, dtypes, strict=True):
        for way, look in LOOKS.items():
            curve = rows[(rows["dtype"] == dtype) & (rows["way"] == way)].sort_values("sparsity")
            if way in ("sparse", "certified") and len(curve):
                _with_ideal(axes, 100 * curve["sparsity"], curve, look, NAMES[way])
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xlabel="Inactive neurons (%)", title=f"{shape} shape, {dtype}", yscale="log")
        axes.set_yticks([0.5, 1, 2, 3, 5, 10], ["0.5", "1", "2", "3", "5", "10"])
        axes.minorticks_off()
    panels[0].set_ylabel("Speed-up over the fastest full read")
    panels[0].legend(loc="upper left", fontsize=8)
    return captioned(figure, f"Dashed: what the unread bytes allow. Bars: 90% interval of the median. {_basis(rows)}")


def _with_ideal(axes: Axes, x: pd.Series, curve: pd.DataFrame, look: Look, label: str) -> None:
    y = curve["strict_speedup"]
    reach = [y - curve["low_strict_speedup"], curve["high_strict_speedup"] - y]
    style = {"color": look.colour, "marker": look.marker, "label": label, "capsize": 2, "elinewidth": 0.8}
    axes.errorbar(x, y, reach, linestyle="-", **style)
    axes.plot(x, curve["ideal_speedup"], "--", color=look.colour, linewidth=0.9)


def largest_shape(rows: pd.DataFrame) -> str:
    """The shape that all sparsities were measured on; of several, the widest."""
    counts = rows.groupby(["shape", "d_model"])["sparsity"].nunique().reset_index()
    return counts.sort_values(["sparsity", "d_model"]).iloc[-1]["shape"]


def _basis(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    return f"{first['rounds']} rounds, {first['device']}, {first['threads']} threads, {first['date']}."


@styled
def roofline(ffns: pd.DataFrame) -> Figure:
    """Time of one FFN against the megabytes it must read, beside the time that memory takes for them."""
    rows = ffns[(ffns["tokens"] == 1) & (ffns["pattern"] == "random") & (ffns["dtype"] == "float32")]
    figure, (axes, rates) = side_by_side(2)
    for way, look in LOOKS.items():
        points = rows[rows["way"] == way]
        style = {"color": look.colour, "marker": look.marker, "linestyle": "none", "alpha": 0.8, "label": NAMES[way]}
        axes.plot(points["megabytes"], points["milliseconds"], **style)
        rates.plot(points["megabytes"], 100 * points["gb_per_s"] / points["read_gb_per_s"], **style)
    grid, read = np.geomspace(rows["megabytes"].min(), rows["megabytes"].max(), 2), rows["read_gb_per_s"]
    axes.plot(grid, grid / read.median(), color="black", linewidth=0.9, label=f"memory, {read.median():.0f} GB/s")
    rates.axhline(100, color="black", linewidth=0.9)
    for panel in (axes, rates):
        panel.set(xscale="log", xlabel="Weights that must be read (MB)")
    axes.set(yscale="log", ylabel="Time of one FFN (ms)", title="Time, float32, one token")
    rates.set(ylabel="% of the rate of reading memory", title="Rate", ylim=(0, None))
    axes.legend(fontsize=7)
    shapes = ", ".join(dict.fromkeys(rows.sort_values("d_model")["shape"]))
    ends = f"{read.quantile(0.05):.0f} to {read.quantile(0.95):.0f} GB/s"
    return captioned(
        figure,
        f"Shapes {shapes}, 0 to {100 * rows['sparsity'].max():.0f}% inactive; memory gave {ends}.\n{_basis(rows)}",
    )


@styled
def batches(ffns: pd.DataFrame) -> Figure:
    """How the speed-up decays when several tokens are decoded side by side and their active neurons unite."""
    rows = ffns[(ffns["dtype"] == "float32") & (ffns["way"] == "sparse")]
    rows = rows[rows["shape"].isin(rows.loc[rows["tokens"] > 1, "shape"])]
    chosen = {f"random, {100 * s:.0f}% inactive": _near(rows, s) for s in (0.5, 0.9, 0.97)}
    for name, pattern in rows[rows["pattern"] != "random"].groupby("pattern"):
        sparsity = pattern.loc[pattern["tokens"] == 1, "sparsity"].mean()
        chosen[f"{name}, {100 * sparsity:.0f}% inactive"] = pattern
    figure, (left, right) = side_by_side(2)
    for look, (name, curve) in zip(map(Look, range(len(chosen))), chosen.items(), strict=True):
        curve = curve.sort_values("tokens")
        _with_ideal(left, curve["tokens"], curve, look, name)
        right.plot(curve["tokens"], 100 * curve["active_share"], look.line, marker=look.marker, color=look.colour)
    for axes in (left, right):
        axes.set(xscale="log", xlabel="Tokens decoded side by side")
        axes.set_xticks(*[sorted(set(rows["tokens"]))] * 2)
        axes.minorticks_off()
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(ylabel="Speed-up over the fastest full read", title="Speed")
    right.set(ylabel="Neurons active for some token (%)", title="Union of active neurons", ylim=(0, 100))
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3, fontsize=7)
    note = "Dashed: what the unread bytes allow. Trained: CETT-PPL-1%, tokens of different texts."
    return captioned(figure, f"{rows['shape'].iloc[0]} shape, float32. {note}\n{_basis(rows)}")


def _near(rows: pd.DataFrame, sparsity: float) -> pd.DataFrame:
    return rows[(rows["pattern"] == "random") & ((rows["sparsity"] - sparsity).abs() < 0.002)]


@styled
def decoding(steps: pd.DataFrame) -> Figure:
    """Where the time of a decoding step goes, dense and sparse, for each model; one sequence."""
    rows = steps[(steps["sequences"] == 1) & steps["tokens_per_second"].notna()]
    models = list(rows.groupby(["model", "shape", "activation", "rule"], sort=False))
    figure, panels = side_by_side(len(models))
    for axes, ((model, shape, activation, _), table) in zip(panels, models, strict=True):
        _steps(axes, table)
        axes.set(title=f"{shape} {ACTIVATIONS[activation]}, {model}", xlabel="Milliseconds per token")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(PARTS), fontsize=8)
    first = rows.iloc[0]
    return captioned(
        figure,
        f"Greedy decoding of {first['new_tokens']} tokens; sparse rows give the tokens of the masked model. "
        f"{first['device']}, {first['threads']} threads, {first['date']}.",
    )


def _steps(axes: Axes, table: pd.DataFrame) -> None:
    """One bar per way and sparsity, cut by the part of the model that the time goes to."""
    full = table["way"].isin(DENSE)
    table = table[~full | ~table["way"].duplicated()]  # these are timed beside each sparsity
    names = [row.way if row.way in DENSE else f"{row.way}\n{100 * row.sparsity:.0f}%" for row in table.itertuples()]
    left = np.zeros(len(table))
    total = 1e3 / table["tokens_per_second"].to_numpy()
    known = table[["ffn_time", "attention_time", "head_time"]].to_numpy()
    shares = np.column_stack([known, 1 - known.sum(axis=1)])
    for part, label, colour in zip(shares.T, PARTS.values(), COLOURS, strict=False):
        axes.barh(names, part * total, left=left, color=colour, label=label, height=0.6, edgecolor="white")
        left += part * total
    for place, speed in enumerate(table["tokens_per_second"]):
        axes.text(left[place], place, f" {speed:,.0f}/s", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * left.max())
    axes.grid(visible=False, axis="y")
