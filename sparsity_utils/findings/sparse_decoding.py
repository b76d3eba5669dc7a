"""Notebook 06, sparse decoding: speeds of single FFNs and of decoding steps beside what the unread bytes allow."""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kernels.shapes import DENSE
from sparsity_utils import paths
from sparsity_utils.findings.claims import Claim, Verdict, Verdicts, stated
from sparsity_utils.findings.style import COLOURS, Look, ShownFigure, captioned, machine_name, side_by_side, styled
from sparsity_utils.laws.cost import DECODING_CASE, FFN_CASE, decoding_limit
from sparsity_utils.laws.limits import require
from sparsity_utils.laws.trends import Estimate
from sparsity_utils.models.config import ACTIVATIONS
from sparsity_utils.study.tables import Tables

NEAR_IDEAL = 0.9  # of the speed-up that the unread bytes allow
BEYOND_WALL = 3.5  # times dense; reading all gates in full caps an exact method below 3
PUBLISHED_SPEEDUP = 4.1  # times: 41.79 against 10.23 tokens per second (arXiv 2411.02335, section 5)
PUBLISHED_SPARSITY = 0.9352  # of the model with these speeds
SHAPE = "2.4B"
INTERVALS = ["speedup", "low_speedup", "high_speedup", "strict_speedup", "low_strict_speedup", "high_strict_speedup"]
NAMES = {
    "dense": "dense, torch",
    "dense compiled": "dense, torch.compile",
    "all rows": "kernel, nothing skipped",
    "sparse": "sparse kernel",
    "certified": "with certified gate",
}
LOOKS = {way: Look(number) for number, way in enumerate(NAMES)}
PARTS = ("FFN", "attention", "output head", "all else", "layers, undivided, and all else")  # of a decoding step

SINGLE_FFN = f"A single FFN of the {SHAPE} shape, float32, one token, random patterns"
NEARLY_IDEAL = Claim(
    "nearly_ideal",
    "sparse_decoding",
    "Skipping neurons saves nearly all the time that their weights take",
    "2.00x and 1.51x in two steps of an FFN (7B, 89% sparse)",
    "of the ideal",
    f"{SINGLE_FFN}: speed-up over the fastest way that reads all weights, by that of the bytes left; the lowest "
    "from 50% to 97% sparsity decides",
    f"90% interval of the median at or above {NEAR_IDEAL:g}",
    region=(NEAR_IDEAL, math.inf),
    scale=1.0,
)
NEVER_SLOWER = Claim(
    "never_slower",
    "sparse_decoding",
    "With nothing to skip the sparse kernel is no slower than dense",
    "none",
    "x dense",
    f"{SINGLE_FFN} and no inactive neuron: speed-up over torch",
    "90% interval of the median at or above 1",
    region=(1.0, math.inf),
    scale=1.0,
)
GATE_WALL = Claim(
    "gate_wall",
    "sparse_decoding",
    "An exact method passes the wall of 3x that reading the gate in full puts up",
    "none",
    "x dense",
    f"{SINGLE_FFN}, certified gate at 93.5% sparsity: speed-up over the fastest way that reads all weights",
    f"90% interval of the median above {BEYOND_WALL:g}",
    region=(BEYOND_WALL, math.inf),
    scale=1.0,
)
FFNS_EXPLAIN = Claim(
    "ffns_explain",
    "sparse_decoding",
    "Sparse FFNs alone can explain the published decoding speed",
    f"{PUBLISHED_SPEEDUP:g}x (2.4B)",
    "x at most",
    "arithmetic: all weights but those of the FFNs are read still; FFNs that cost nothing, no output head",
    f"at or above {PUBLISHED_SPEEDUP:g}",
    region=(PUBLISHED_SPEEDUP, math.inf),
    scale=1.0,
)
SHAPE_GAINS = Claim(
    "shape_gains",
    "sparse_decoding",
    "A decoder of the published 0.1B shape gains from sparse FFNs at 90% sparsity",
    "gains",
    "x dense",
    "random weights, FAT thresholds, one sequence, the masked model's own tokens: speed-up of whole decoding steps "
    "over the faster of torch and the kernels with nothing skipped",
    "90% interval of the median above 1",
    region=(1.0, math.inf),
    scale=1.0,
)
TRAINED_GAIN = Claim(
    "trained_gain",
    "sparse_decoding",
    "The trained models of this study gain from sparse FFNs",
    "gains",
    "x dense",
    "one sequence, CETT-PPL at the study's price, the masked model's own tokens: speed-up of whole decoding "
    "steps over the faster of torch and the kernels with nothing skipped, each activation function; the lowest decides",
    "90% interval of the median above 1 for each",
    region=(1.0, math.inf),
    scale=1.0,
)
ALL = (NEARLY_IDEAL, NEVER_SLOWER, GATE_WALL, FFNS_EXPLAIN, SHAPE_GAINS, TRAINED_GAIN)
CLAIMS = {claim.key: claim for claim in ALL}


def claims() -> pd.DataFrame:
    """The claims, tests and thresholds, as the notebook states them before its results."""
    return stated(CLAIMS.values())


def verdicts(ffns: pd.DataFrame, decoding: pd.DataFrame) -> Verdicts:
    """Single FFNs against their ideal, and whole decoding steps: one verdict per claim.

    ffns, decoding: the tables of the questions sparse_ffn and sparse_decoding (results/columns.csv). Raises InputError
    for missing columns, duplicates and NaN.
    """
    numbers = ["sparsity", "ideal_speedup", "speedup", "strict_speedup"]
    require(ffns, [*FFN_CASE, *INTERVALS, "ideal_speedup"], FFN_CASE, numbers, "FFN speeds")
    require(decoding, [*DECODING_CASE, *INTERVALS, "sparsity"], DECODING_CASE, ["sparsity"], "decoding speeds")
    one = ffns.query("shape == @SHAPE and dtype == 'float32' and tokens == 1 and pattern == 'random'")
    sparse, certified = one[one["way"] == "sparse"], one[one["way"] == "certified"]
    strict = ["strict_speedup", "low_strict_speedup", "high_strict_speedup"]
    of_ideal = sparse.assign(**{column: sparse[column] / sparse["ideal_speedup"] for column in strict})
    steps = decoding[(decoding["way"] == "sparse") & (decoding["sequences"] == 1)]
    shape, trained = (steps[steps["model"] == name] for name in ("random weights", "trained"))
    return Verdicts(
        [
            _lowest(NEARLY_IDEAL, of_ideal[of_ideal["sparsity"].between(0.499, 0.971)]),
            _lowest(NEVER_SLOWER, sparse[sparse["sparsity"] < 0.001], "speedup"),
            _lowest(GATE_WALL, certified[(certified["sparsity"] - 0.935).abs() < 0.001]),
            _ffns_explain(),
            _lowest(SHAPE_GAINS, shape[shape["setting"] == 90]),
            _lowest(TRAINED_GAIN, trained),
        ]
    )


def _lowest(claim: Claim, rows: pd.DataFrame, column: str = "strict_speedup") -> Verdict:
    """The row with the lowest interval decides; rows without a speed gave other tokens than the masked model."""
    if rows.empty:
        return claim.undecided("it was not measured")
    if rows[column].isna().any():
        return claim.undecided("the kernels gave other tokens than the masked model")
    if rows[f"low_{column}"].isna().any():
        return claim.undecided("too few rounds for an interval")
    lowest = rows.loc[rows[f"low_{column}"].idxmin()]
    estimate = Estimate(lowest[column], lowest[f"low_{column}"], lowest[f"high_{column}"], len(rows))
    name = ACTIVATIONS.get(lowest["activation"], lowest["activation"])
    where = f"lowest of {len(rows)}: {name}, {100 * lowest['sparsity']:.1f}% sparse, on {_machine(lowest)}"
    return claim.judged(estimate, where)


def _machine(row: pd.Series) -> str:
    return f"{row['device']}, {row['threads']} threads" if {"device", "threads"} <= set(row.index) else "this machine"


def _ffns_explain() -> Verdict:
    limit = decoding_limit(ffn_share_read=0.0)
    exact = decoding_limit(ffn_share_read=(1 + 2 * (1 - PUBLISHED_SPARSITY)) / 3)
    reason = f"with the gate read in full and {100 * PUBLISHED_SPARSITY:.2f}% sparsity {exact:.2f}x"
    return FFNS_EXPLAIN.judged(Estimate(limit, limit, limit, 1), reason)


def break_even(ffns: pd.DataFrame) -> pd.DataFrame:
    """Sparsity in percent from which on a sparse way is faster than torch, random patterns.

    One row per shape, dtype and tokens, one column per way: 0 where it is faster with nothing to skip, NaN where it
    never is. Between two measured sparsities the log of the speed-up is interpolated linearly.
    """
    rows = ffns[(ffns["pattern"] == "random") & ffns["way"].isin(["sparse", "certified"])]
    points = {
        key: _crossing(curve.sort_values("sparsity"))
        for key, curve in rows.groupby(["d_model", "shape", "dtype", "tokens", "way"])
    }
    return (100 * pd.Series(points)).rename_axis(["d_model", "shape", "dtype", "tokens", "way"]).unstack("way")


def _crossing(curve: pd.DataFrame) -> float:
    sparsity, gain = curve["sparsity"].to_numpy(), np.log(curve["speedup"].to_numpy())
    slower = np.flatnonzero(gain < 0)
    if len(slower) == 0:
        return 0.0
    last = slower[-1]  # from here on it is faster
    if last == len(gain) - 1:
        return math.nan
    return float(np.interp(0, gain[last : last + 2], sparsity[last : last + 2]))


def largest_shape(ffns: pd.DataFrame) -> str:
    """The shape that all sparsities were measured on, one token and random patterns; of several, the widest."""
    rows = ffns[(ffns["tokens"] == 1) & (ffns["pattern"] == "random")]
    counts = rows.groupby(["shape", "d_model"])["sparsity"].nunique().reset_index()
    return counts.sort_values(["sparsity", "d_model"]).iloc[-1]["shape"]


def shares_of_ideal(ffns: pd.DataFrame, shape: str) -> pd.DataFrame:
    """Speed-ups of one shape, float32, one token, random patterns: over torch, strict, ideal, and strict over ideal."""
    rows = ffns.query("shape == @shape and dtype == 'float32' and tokens == 1 and pattern == 'random'")
    rows = rows[rows["way"].isin(["sparse", "certified"])]
    chosen = rows.assign(of_ideal=rows["strict_speedup"] / rows["ideal_speedup"], percent=100 * rows["sparsity"])
    columns = ["speedup", "strict_speedup", "ideal_speedup", "of_ideal"]
    return chosen.assign(percent=chosen["percent"].round(1)).pivot(index="percent", columns="way", values=columns)


def on_a_gpu() -> pd.DataFrame:
    """Strict speed-ups of single FFNs on an H100 beside the ideal ones, recorded once (results/sparse_ffn_gpu.csv).

    One row for each shape, dtype and number of tokens; columns by percent of inactive neurons, random patterns.
    """
    ffns = pd.read_csv(paths.RESULTS / "sparse_ffn_gpu.csv").query("way == 'sparse'")
    chosen = ffns.assign(percent=(100 * ffns["sparsity"]).round().astype(int))
    chosen = chosen[chosen["percent"].isin([0, 50, 90, 97])]  # what most shapes have
    named = chosen.rename(columns={"strict_speedup": "speed-up", "ideal_speedup": "ideal", "percent": "inactive %"})
    about = ["shape", "dtype", "tokens"]
    table = named.pivot(index=about, columns="inactive %", values=["speed-up", "ideal"])
    return table.swaplevel(axis=1).sort_index(axis=1, level=0, sort_remaining=False)


def undecided_rows(decoding: pd.DataFrame) -> pd.DataFrame:
    """Percent of the gate rows that an 8-bit copy leaves undecided, beside the truly needed ones, one sequence."""
    rows = decoding[(decoding["way"] == "certified") & (decoding["sequences"] == 1)]
    table = rows[["model", "shape", "activation", "sparsity", "up_share", "gate_share"]].copy()
    table[["sparsity", "up_share", "gate_share"]] *= 100
    names = {"sparsity": "inactive %", "up_share": "rows needed %", "gate_share": "rows undecided %"}
    return table.rename(columns=names).reset_index(drop=True)


def decoding_limits(sparsity: float) -> pd.DataFrame:
    """Largest speed-up at that sparsity of a ReLU model of a study shape, rule "gate", by what its FFNs read.

    For the FFN alone it is 1 / share of the weights read, for the whole model `decoding_limit`. The certified gate is
    counted at its best, with nothing undecided but the needed rows, for weights of 4 and 2 bytes.
    """
    active = 1 - sparsity
    read = {
        "gate in full, then active rows": (1 + 2 * active) / 3,
        "8-bit gate beside float32": (1 / 4 + 3 * active) / 3,
        "8-bit gate beside 16-bit weights": (1 / 2 + 3 * active) / 3,
        "a perfect predictor: active rows alone": active,
        "nothing": 0.0,
    }
    limits = {name: (1 / share if share else np.inf, decoding_limit(share)) for name, share in read.items()}
    return pd.DataFrame(limits, index=["FFN alone", "whole model, no head"]).T.rename_axis("what the FFNs read")


def figures(study: Tables) -> Iterator[tuple[str, ShownFigure]]:
    """Every figure that a study has the tables for, with its name."""
    if study.answers("sparse_ffn"):
        ffns = study.table("sparse_ffn")
        yield "06_speed_against_sparsity", speed_figure(ffns)
        yield "06_roofline", roofline_figure(ffns)
        yield "06_batches", batches_figure(ffns)
    if study.answers("sparse_decoding"):
        yield "06_decoding", decoding_figure(study.table("sparse_decoding"))


@styled
def speed_figure(ffns: pd.DataFrame) -> ShownFigure:
    """Speed-up of one FFN over the fastest way that reads all weights, beside what the unread bytes allow."""
    shape = largest_shape(ffns)
    rows = ffns[(ffns["tokens"] == 1) & (ffns["pattern"] == "random") & (ffns["shape"] == shape)]
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


def _basis(rows: pd.DataFrame) -> str:
    return f"{rows['rounds'].iloc[0]} rounds, {machine_name(rows)}."


@styled
def roofline_figure(ffns: pd.DataFrame) -> ShownFigure:
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
def batches_figure(ffns: pd.DataFrame) -> ShownFigure:
    """Speed-up against the tokens decoded side by side: an FFN reads the union of their active neurons."""
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
    note = "Dashed: what the unread bytes allow. Trained: CETT-PPL at the study's price, tokens of different texts."
    return captioned(figure, f"{rows['shape'].iloc[0]} shape, float32. {note}\n{_basis(rows)}")


def _near(rows: pd.DataFrame, sparsity: float) -> pd.DataFrame:
    return rows[(rows["pattern"] == "random") & ((rows["sparsity"] - sparsity).abs() < 0.002)]


@styled
def decoding_figure(steps: pd.DataFrame) -> ShownFigure:
    """Where the time of a decoding step goes, dense and sparse, for each model; one sequence."""
    rows = steps[(steps["sequences"] == 1) & steps["tokens_per_second"].notna()]
    models = list(rows.groupby(["model", "shape", "activation", "rule"], sort=False))
    figure, panels = side_by_side(len(models))
    for axes, ((model, shape, activation, _), table) in zip(panels, models, strict=True):
        _steps(axes, table)
        axes.set(title=f"{shape} {ACTIVATIONS[activation]}, {model}", xlabel="Milliseconds per token")
    named = {label: bars for axes in panels for bars, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside upper right", ncols=len(named), fontsize=8)
    undivided = " Undivided: each layer ran as one call." if rows["ffn_time"].isna().any() else ""
    return captioned(
        figure,
        f"Greedy decoding of {rows['new_tokens'].iloc[0]} tokens; sparse rows give the tokens of the masked model."
        f"{undivided} {machine_name(rows)}.",
    )


def _steps(axes: Axes, table: pd.DataFrame) -> None:
    """One bar per way and sparsity, cut by the part of the model that the time goes to.

    Where layers ran as one call, their FFNs and attention are NaN and not told apart from all else.
    """
    full = table["way"].isin(DENSE)
    table = table[~full | ~table["way"].duplicated()]  # full reads were timed anew beside each sparsity
    names = [row.way if row.way in DENSE else f"{row.way}\n{100 * row.sparsity:.0f}%" for row in table.itertuples()]
    left = np.zeros(len(table))
    total = 1e3 / table["tokens_per_second"].to_numpy()
    known = table[["ffn_time", "attention_time", "head_time"]]
    divided, rest = known["ffn_time"].notna(), 1 - known.sum(axis=1)
    shares = [*known.fillna(0).to_numpy().T, rest * divided, rest * ~divided]
    for part, label, colour in zip(map(np.asarray, shares), PARTS, COLOURS, strict=False):
        if not part.any():
            continue
        axes.barh(names, part * total, left=left, color=colour, label=label, height=0.6, edgecolor="white")
        left += part * total
    for place, speed in enumerate(table["tokens_per_second"]):
        axes.text(left[place], place, f" {speed:,.0f}/s", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * left.max())
    axes.grid(visible=False, axis="y")
