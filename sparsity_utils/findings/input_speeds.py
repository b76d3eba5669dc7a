"""Tokens per second with inputs of linear maps skipped, beside what a user would pick instead: in notebook 10.

Of a program that this project does not depend on, llama.cpp, there is a recorded row (results/llama_cpp.csv). To repeat
it: `pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36` in an environment of its own, which builds it
for this processor, and

    from llama_cpp import Llama
    import time
    model = Llama("SmolLM2-135M-Instruct.Q4_1.gguf", n_threads=2, n_ctx=256, verbose=False)
    model.eval(PROMPT)  # 32 token ids
    started = time.perf_counter()
    for _ in range(128):
        model.eval([model.sample(temp=0.0)])  # greedy
    print(128 / (time.perf_counter() - started), "tokens/s")
"""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsity_utils import paths
from sparsity_utils.findings.style import (
    COLOURS,
    Look,
    ShownFigure,
    captioned,
    machine_name,
    plain_log,
    side_by_side,
    styled,
)
from sparsity_utils.laws.limits import require
from sparsity_utils.neurons.input_rules import TRAINING_FREE
from sparsity_utils.study.tables import Tables

WHOLE = "nothing skipped"
CASE = ["model", "engine", "rule", "setting", "weights", "head"]
NAMES = {**{name: rule.label for name, rule in TRAINING_FREE.items()}, "cett": "CETT"}


def checked(table: pd.DataFrame) -> pd.DataFrame:
    """The table input_speeds with the share of the maps' weights that a token skips. Raises InputError as `require`."""
    require(table, [*CASE, "read_share", "megabytes", "tokens_per_second"], CASE, ["read_share", "megabytes"], "speeds")
    return table.fillna({"setting": ""}).assign(skipped=1 - table["read_share"])


def _rows_of(table: pd.DataFrame, model: str | None) -> pd.DataFrame:
    """The rows of one model; None: the first of the table."""
    rows = checked(table)
    return rows[rows["model"] == (rows["model"].iloc[0] if model is None else model)]


def others() -> pd.DataFrame:
    """The recorded rows of programs that the project does not depend on; columns are in results/columns.csv."""
    return pd.read_csv(paths.PUBLISHED / "llama_cpp.csv")


def _beside(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `others` that are of the same model as `rows`."""
    found = others()
    return found[found["model"] == rows["model"].iloc[0]]


def speeds(table: pd.DataFrame, model: str | None = None) -> pd.DataFrame:
    """The rows of one model for reading, llama.cpp last. Speeds are medians with their 90% interval.

    There is no speed where the kernels chose a word that the masked model could not have chosen.
    """
    rows = _rows_of(table, model)
    dense = rows.query("engine == 'transformers' and weights == 'bfloat16'")["tokens_per_second"]
    shown = pd.DataFrame(
        {
            "way": rows["engine"].where(rows["engine"] == "transformers", rows["rule"].replace(NAMES)),
            "at": rows["setting"].fillna(""),
            "weights": rows["weights"],
            "head": rows["head"],
            "skipped %": (100 * rows["skipped"]).round(1),
            "perplexity x": rows["ppl_ratio"].round(3),
            "tokens/s": _ranged(rows, "tokens_per_second"),
            "prompt tokens/s": rows["prompt_tokens_per_second"].round(0),
            "x float32": rows["speedup"].round(2),
            "x bfloat16": (rows["tokens_per_second"] / dense.iloc[0]).round(2) if len(dense) else math.nan,
            "x nothing skipped": rows["strict_speedup"].round(2),
            "MB a token": rows["megabytes"].round(0),
            "% of memory's rate": (100 * rows["memory_share"]).round(0),
            "words that differ": rows["differing"],
        }
    )
    beside = _beside(rows)
    last = {
        "way": beside["engine"],
        "at": "",
        "weights": beside["weights"],
        "head": "full",
        "skipped %": 0.0,
        "tokens/s": _ranged(beside, "tokens_per_second"),
        "prompt tokens/s": beside["prompt_tokens_per_second"].round(0),
        "MB a token": beside["megabytes"].round(0),
    }
    return pd.concat([shown, pd.DataFrame(last)], ignore_index=True) if len(beside) else shown.reset_index(drop=True)


def _ranged(rows: pd.DataFrame, column: str) -> pd.Series:
    """`24.1 (23.9 to 24.3)`; empty where there is no median."""
    parts = [rows[name].map("{:.1f}".format).astype(str) for name in (column, f"low_{column}", f"high_{column}")]
    return (parts[0] + " (" + parts[1] + " to " + parts[2] + ")").where(rows[column].notna(), "")


def break_even(table: pd.DataFrame, model: str | None = None) -> pd.DataFrame:
    """Percent of the maps' weights that must be skipped to be as fast as each way that skips nothing, to one decimal.

    One row for each rule, weights and head; 0 where it is as fast with nothing skipped, NaN where no measured setting
    is. Between two settings the log of the speed is interpolated linearly.
    """
    rows = _rows_of(table, model)
    whole = rows[rows["rule"] == WHOLE]
    rivals = {
        f"{row.engine}, {row.weights}, {row.head} head": row.tokens_per_second
        for row in whole.itertuples()
        if row.engine == "transformers" or row.weights == "8 bits"
    }
    rivals |= {f"{row.engine}, {row.weights}": row.tokens_per_second for row in _beside(rows).itertuples()}
    rivals = {name: speed for name, speed in rivals.items() if speed > 0}  # NaN: no median is recorded
    found = {}
    for (rule, weights, head), curve in rows[rows["rule"] != WHOLE].groupby(["rule", "weights", "head"], sort=False):
        start = whole[(whole["engine"] == "kernels") & (whole["weights"] == weights) & (whole["head"] == head)]
        points = pd.concat([start, curve]).dropna(subset="tokens_per_second").sort_values("skipped")
        found[NAMES[rule], weights, head] = {
            name: 100 * _crossing(points["skipped"].to_numpy(), np.log(points["tokens_per_second"].to_numpy() / rival))
            for name, rival in rivals.items()
        }
    return pd.DataFrame(found).T.rename_axis(["rule", "weights", "head"]).round(1)


def _crossing(skipped: np.ndarray, gain: np.ndarray) -> float:
    """Where `gain`, of rising `skipped`, is above zero from then on."""
    slower = np.flatnonzero(gain < 0)
    if len(slower) == 0:
        return 0.0
    last = slower[-1]
    if last == len(gain) - 1:
        return math.nan
    return float(np.interp(0, gain[last : last + 2], skipped[last : last + 2]))


def figures(study: Tables) -> Iterator[tuple[str, ShownFigure]]:
    """The figure, if a study has the table."""
    if study.answers("input_speeds"):
        yield "10_speed", figure(study.table("input_speeds"))


@styled
def figure(table: pd.DataFrame, model: str | None = None) -> ShownFigure:
    """Tokens per second against the share of weights skipped: float32 and 8 bits, each with its limit by bytes."""
    rows = _rows_of(table, model)
    drawn, panels = side_by_side(2, share_y=True)
    for axes, weights in zip(panels, ("float32", "8 bits"), strict=True):
        own = rows[(rows["engine"] == "kernels") & (rows["weights"] == weights)]
        head = "certified" if (own["head"] == "certified").any() else "full"  # certified heads are for CPUs
        _lines(axes, own[own["head"] == head])
        _dense(axes, rows, named=axes is panels[-1])
        axes.set(xlabel="Weights of linear maps skipped (%)", title=f"Weights in {weights}, {head} head", yscale="log")
        plain_log(axes.yaxis)
    panels[0].set_ylabel("Tokens per second")
    panels[0].legend(fontsize=7, loc="upper left")
    return captioned(
        drawn,
        f"{rows['model'].iloc[0]}, one sequence, {rows['rounds'].iloc[0]} rounds, {machine_name(rows)}.\n"
        "Dashed: what reading its bytes at memory's rate would allow. Bars: 90% interval.",
    )


def _lines(axes: Axes, own: pd.DataFrame) -> None:
    whole, skipping = own[own["rule"] == WHOLE], own[own["rule"] != WHOLE]
    for number, (rule, curve) in enumerate(skipping.groupby("rule", sort=False)):
        points, look = pd.concat([whole, curve]).sort_values("skipped"), Look(number)
        y = points["tokens_per_second"]
        reach = [y - points["low_tokens_per_second"], points["high_tokens_per_second"] - y]
        style = {"color": look.colour, "marker": look.marker, "linestyle": "-", "label": NAMES[str(rule)]}
        axes.errorbar(100 * points["skipped"], y, reach, capsize=2, elinewidth=0.8, **style)
    limits = own.sort_values("skipped")
    axes.plot(100 * limits["skipped"], 1e3 * limits["read_gb_per_s"] / limits["megabytes"], "--", color="grey")


def _dense(axes: Axes, rows: pd.DataFrame, named: bool) -> None:
    """Lines across for what skips nothing, with their names at the right edge."""
    rivals = pd.concat([rows[rows["engine"] == "transformers"], _beside(rows)])
    for number, row in enumerate(rivals.dropna(subset="tokens_per_second").itertuples()):
        axes.axhline(row.tokens_per_second, color=COLOURS[-1 - number], linewidth=0.9, linestyle="-.")
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 7}
        if named:
            engine = str(row.engine).partition(" (")[0]
            axes.annotate(f"{engine},\n{row.weights}", (1.02, row.tokens_per_second), **place)
