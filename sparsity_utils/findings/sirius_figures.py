"""Tables and figures of notebook 13, of what `sirius.analyse` found."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from sparsity_utils.findings.style import COLOURS, Look, ShownFigure, captioned, styled
from sparsity_utils.laws.corrections import near_ties, prefix_rises

RULES = {"full": "full model", "fsparse": "FSparse", "csparse": "CSparse", "teal": "TEAL, top-k", "cett": "CETT"}
SHADES = {
    "corrected": (COLOURS[1], "orange: put in place of a rejected draft"),
    "interleaved": (COLOURS[0], "blue: added by the full model"),
}
LINE = 92  # characters of a line of shown text


def ways_table(ways: pd.DataFrame, model: str, text: str) -> pd.DataFrame | str:
    """Every way of decoding a text: advance, what is read, what correction changes, and how good the text is.

    Percent are of tokens; log-likelihood is under the full model, nats per token. "not measured" without such rows.
    """
    rows = ways[(ways["model"] == model) & (ways["text"] == text)]
    if rows.empty:
        return "not measured"
    numbers = {  # values and their digits
        "AAL": (rows["advance"], 2),
        "break-even": (rows["break_even"].where(rows["advance"].notna()), 2),
        "effective density": (rows["effective_density"], 3),
        "corrected %": (100 * rows["corrected"], 1),
        "log-likelihood": (rows["log_likelihood"], 3),
        "as the full model %": (100 * rows["agreed"], 1),
        "repeated %": (100 * rows["repeated"], 1),
    }
    if "right" in rows and rows["right"].notna().any():
        numbers["right answers %"] = (100 * rows["right"], 0)
    table = pd.DataFrame(
        {"rule": rows["rule"].map(RULES), "way": rows["way"], "threshold": _written(rows["threshold"])}
    )
    return table.assign(**{name: _written(*given) for name, given in numbers.items()}).reset_index(drop=True)


def _written(values: pd.Series, digits: int | None = None) -> list[str]:
    """Numbers with so many digits behind the point, or as short as they are; empty for NaN."""
    return ["" if pd.isna(value) else f"{value:g}" if digits is None else f"{value:.{digits}f}" for value in values]


def speeds_table(speeds: pd.DataFrame) -> pd.DataFrame:
    """Tokens per second after one prompt, with 90% intervals, and megabytes of weights read per token."""
    names = {"low_tokens_per_second": "low", "tokens_per_second": "tokens per second", "high_tokens_per_second": "high"}
    names |= {"advance": "AAL", "megabytes": "MB read per token", "same_tokens": "the right text"}
    table = speeds[["model", "rule", "way", *names]].rename(columns=names)
    return table.assign(rule=table["rule"].map(RULES)).round(2)


def prefixes_table(prefixes: pd.DataFrame) -> pd.DataFrame:
    """Where sparse models fail: rises of perplexity in percent, and how often their likeliest word is another."""
    table = prefix_rises(prefixes)
    table["rule"] = table["rule"].map(RULES)
    table[["fresh", "repeated", "disagreed"]] *= 100
    names = {"fresh": "rise on fresh text %", "repeated": "rise on repeated text %", "disagreed": "another word %"}
    return table.rename(columns=names).round(1).replace(-0.0, 0.0)


def lossless_table(table: pd.DataFrame) -> pd.DataFrame:
    """How many lossless texts are not the full model's, and how many of those by a near tie."""
    found = near_ties(table)
    return found.assign(rule=found["rule"].map(RULES))


@styled
def trade_figure(ways: pd.DataFrame) -> ShownFigure:
    """Above, advance against threshold, with break-even; below, quality against reads; a column for each text."""
    rows = ways[(ways["way"] == "corrected") & (ways["text"] != "arithmetic")]
    panels, rules = list(rows.groupby(["model", "text"], sort=False)), [rule for rule in RULES if rule != "full"]
    figure = ShownFigure(figsize=(3.2 * len(panels), 5.6), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False, sharey="row", sharex="row")
    for (upper, lower), ((model, text), curves) in zip(axes.T, panels, strict=True):
        full = ways[(ways["model"] == model) & (ways["text"] == text) & (ways["way"] == "full")]
        for number, rule in enumerate(rules):
            look, curve = Look(number), curves[curves["rule"] == rule].sort_values("threshold")
            if curve.empty:
                continue
            style = {"color": look.colour, "marker": look.marker, "linestyle": look.line, "label": RULES[rule]}
            upper.plot(curve["threshold"], curve["advance"], **style)
            upper.axhline(curve["break_even"].iloc[0], color=look.colour, linewidth=0.8, linestyle=":")
            lower.plot(curve["effective_density"], curve["log_likelihood"] - full["log_likelihood"].iloc[0], **style)
        ticks = sorted(curves["threshold"].unique())
        upper.set(xscale="log", xlabel="Threshold of acceptance", xticks=ticks, xticklabels=[f"{t:g}" for t in ticks])
        upper.minorticks_off()
        upper.set_title(f"{model}, {text}: {full['documents'].iloc[0]} documents")
        lower.set(xlabel="Weights read per token (full model: 1)")
        lower.axvline(1, color="grey", linewidth=0.8)
        lower.axhline(0, color="grey", linewidth=0.8)
    axes[0, 0].set(ylabel="Average advance (tokens)")
    axes[1, 0].set(ylabel="Log-likelihood per token,\nless the full model's (nats)")
    found = {name: line for row in axes.flat for line, name in zip(*row.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=len(found))
    return captioned(figure, "Dotted: break-even, 15 d + 1. A curve's points are thresholds.")


@styled
def text_figure(text: pd.DataFrame) -> ShownFigure:
    """A text of each model that FSparse drafted, with the words marked that the full model put in."""
    chosen = text[(text["rule"] == "fsparse") & (text["text"] != "arithmetic")]
    shown = list(chosen.groupby(["model", "text"], sort=False))
    lines = [_lines(rows) for _, rows in shown]
    figure = ShownFigure(figsize=(8, 0.35 * len(shown) + 0.2 * sum(map(len, lines))), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[len(one) + 1 for one in lines])[:, 0]
    for axes, ((model, kind), _), rows in zip(panels, shown, lines, strict=True):
        _write(axes, rows)
        axes.set_title(f"{model}, {kind}")
    marks = ", ".join(about for _, about in SHADES.values())
    return captioned(figure, f"First document of each text, threshold 0.1. Shaded {marks}.")


def _lines(rows: pd.DataFrame) -> list[list[tuple[int, str, str]]]:
    """(column, letters, kind) of the words, cut into lines of LINE characters and at line breaks."""
    lines: list[list[tuple[int, str, str]]] = [[]]
    column = 0
    for word, kind in zip(rows["word"].fillna(""), rows["kind"], strict=True):
        for number, part in enumerate(str(word).replace("\t", "    ").split("\n")):
            if number or column + len(part) > LINE:
                lines.append([])
                column = 0
            if part:
                lines[-1].append((column, part, kind))
                column += len(part)
    return lines


def _write(axes: Axes, lines: list[list[tuple[int, str, str]]]) -> None:
    axes.set(xlim=(0, LINE), ylim=(len(lines), 0))
    axes.axis("off")
    for number, line in enumerate(lines):
        for column, part, kind in line:
            if kind in SHADES:
                axes.add_patch(_box(column, number, len(part), SHADES[kind][0]))
            for place, letter in enumerate(part):
                centre = {"ha": "center", "va": "center", "parse_math": False}
                axes.text(column + place + 0.5, number + 0.5, letter, family="monospace", fontsize=7.5, **centre)


def _box(column: int, line: int, width: int, colour: str) -> Rectangle:
    return Rectangle((column, line), width, 1, color=colour, alpha=0.35, linewidth=0)
