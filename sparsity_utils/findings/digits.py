"""Notebook 11, images of digits: does top-k activation help against noise in labels and pixels, and calibration?

The claims are those of Table 1 of arXiv 2210.06313, which compares vision transformers without repetition. Here two
small networks are trained on images of digits (`study.makers.digits`) with 20 seeds. The pairs of one seed differ in
the arm alone: all ReLU neurons, or the 21 largest of 512.
"""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsity_utils.console import InputError
from sparsity_utils.findings.claims import Claim, Verdicts, stated
from sparsity_utils.findings.style import Look, ShownFigure, captioned, styled
from sparsity_utils.laws.data_law import LEVEL
from sparsity_utils.laws.limits import require
from sparsity_utils.laws.trends import Estimate, mean_over_runs, no_estimate

ALL, TOP_K = "all", "top-k"
ARMS = {ALL: "all neurons", TOP_K: "top-k"}
MODELS = {"mlp": "two-layer MLP", "transformer": "one-layer transformer"}
GAPS = [f"gap_{number}" for number in range(10)]  # one for each bin of confidence, from 0 to 1
KEY = ["model", "arm", "label_noise", "seed"]
WORSE = 0.01  # accuracy that may be lost on clean images
DRAWS, DRAW_SEED = 4000, 0  # of the bootstrap over seeds
CALIBRATION = "calibration"
# What is compared: column of the table, label noise of the training images, its name on an axis, and the published
# gain of a vision transformer in points (arXiv 2210.06313, Table 1).
GAINS = {
    "clean": ("accuracy", 0.0, "clean", -0.02),
    "labels_40": ("accuracy", 0.4, "40% label noise", 2.69),
    "labels_80": ("accuracy", 0.8, "80% label noise", 5.45),
    "gaussian": ("accuracy_gaussian", 0.0, "Gaussian pixels", 2.75),
    "impulse": ("accuracy_impulse", 0.0, "impulse pixels", 2.70),
    "shot": ("accuracy_shot", 0.0, "shot pixels", 2.12),
}
LOWER_ERROR = ("calibration", 0.94)  # name on an axis, and the published decrease in points
SENTENCES = {
    "clean": "Top-k costs a {} at most 1 point of accuracy on clean digits",
    "labels_40": "Top-k makes a {} more accurate when 40% of the training labels are redrawn",
    "labels_80": "Top-k makes a {} more accurate when 80% of the training labels are redrawn",
    "gaussian": "Top-k makes a {} more accurate under Gaussian pixel noise",
    "impulse": "Top-k makes a {} more accurate under impulse pixel noise",
    "shot": "Top-k makes a {} more accurate under shot pixel noise",
    CALIBRATION: "Top-k lowers the expected calibration error of a {}",
}
PAIRED = "t interval over seeds of the paired difference in test accuracy, top-k less all neurons; the learning rate "
PAIRED += "of each arm has the lowest validation loss"
POOLED = f"expected calibration error ({len(GAPS)} bins, test images of all seeds pooled) of all neurons less that of "
POOLED += "top-k, trained on true labels; bootstrap over seeds, percentiles"


def _claim(model: str, name: str) -> Claim:
    error = name == CALIBRATION
    published = f"{LOWER_ERROR[1]:g} points lower (ViT)" if error else f"{GAINS[name][3]:+.2f} points (ViT)"
    claim = Claim(
        f"digits_{model}_{name}",
        "digits",
        SENTENCES[name].format(MODELS[model]),
        published,
        "points lower" if error else "points",
        POOLED if error else PAIRED,
        primary=model == "mlp",
    )
    if name != "clean":
        return claim
    return replace(claim, threshold=f"{LEVEL:.0%} interval above {-100 * WORSE:g} point", region=(-WORSE, math.inf))


CLAIMS = {(model, name): _claim(model, name) for model in MODELS for name in SENTENCES}


def claims() -> pd.DataFrame:
    """What is stated before the results."""
    return stated(CLAIMS.values())


def checked(table: pd.DataFrame) -> pd.DataFrame:
    """The table digits. Raises InputError as `require`, and for a seed that one arm lacks."""
    require(table, [*KEY, *(gain[0] for gain in GAINS.values()), "images", *GAPS], KEY, ["accuracy", *GAPS], "digits")
    clean = table[table["label_noise"] == 0]
    require(clean, [], KEY, [gain[0] for gain in GAINS.values()], "digits (trained on true labels)")
    arms = table.groupby(["model", "label_noise", "seed"])["arm"].agg(set)
    alone = arms[arms != set(ARMS)]
    if len(alone):
        model, noise, seed = alone.index[0]
        raise InputError(
            f"The digits table has one arm alone of {model}, label noise {noise}, seed {seed}; measure both arms."
        )
    return table


def _rows(table: pd.DataFrame, model: str, arm: str, noise: float) -> pd.DataFrame:
    """The rows of one condition by seed, in order."""
    rows = table[(table["model"] == model) & (table["arm"] == arm) & (table["label_noise"] == noise)]
    return rows.set_index("seed").sort_index()


def calibration_error(gaps: np.ndarray, images: np.ndarray) -> np.ndarray:
    """ECE = sum over bins |sum of gaps over seeds| / images of all seeds.

    gaps: (..., seeds, bins), sums over the images in a bin of confidence less 1 where correct. images: (..., seeds).
    """
    return np.abs(gaps.sum(axis=-2)).sum(axis=-1) / images.sum(axis=-1)


def lower_error(table: pd.DataFrame, model: str) -> Estimate:
    """The calibration error of all neurons less that of top-k, both pooled over the same seeds."""
    rows = [_rows(table, model, arm, 0.0) for arm in ARMS]
    seeds = len(rows[0])
    if seeds < 2:
        return no_estimate(f"only {seeds} seeds; at least 2 are needed", seeds)
    drawn = np.random.default_rng(DRAW_SEED).integers(seeds, size=(DRAWS, seeds))
    places = np.concatenate([np.arange(seeds)[None], drawn])  # (1 + DRAWS, seeds), first each seed once
    errors = [calibration_error(row[GAPS].to_numpy()[places], row["images"].to_numpy()[places]) for row in rows]
    difference = errors[0] - errors[1]
    low, high = np.quantile(difference[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(difference[0]), float(low), float(high), seeds)


def estimates(table: pd.DataFrame, model: str) -> dict[str, Estimate]:
    """What each claim on a model is about, by the names of SENTENCES. table: `checked`."""
    found = {}
    for name, (column, noise, *_) in GAINS.items():
        gain = _rows(table, model, TOP_K, noise)[column] - _rows(table, model, ALL, noise)[column]
        found[name] = mean_over_runs(gain)
    return {**found, CALIBRATION: lower_error(table, model)}


def verdicts(table: pd.DataFrame | None) -> Verdicts:
    """One verdict per claim.

    table: the table digits; None where the study leaves it out. Raises InputError as `checked`.
    """
    if table is None:
        return Verdicts([claim.undecided("the study has no table digits") for claim in CLAIMS.values()])
    found = {model: estimates(checked(table), model) for model in MODELS}
    return Verdicts([claim.counted(found[model][name], "seeds") for (model, name), claim in CLAIMS.items()])


@styled
def figure(table: pd.DataFrame) -> ShownFigure:
    """For each model: accuracy against label noise, the gains of top-k beside the published ones, and calibration."""
    rows = checked(table)
    shown = ShownFigure(figsize=(11, 6.2), layout="constrained")
    panels = shown.subplots(len(MODELS), 3)
    for line, (model, network) in zip(panels, MODELS.items(), strict=True):
        _accuracies(line[0], rows, model)
        _gains(line[1], estimates(rows, model))
        _calibration(line[2], rows, model)
        line[0].set_title(f"Accuracy of a {network}")
        for axes in line:
            axes.legend(fontsize=8)
    seeds, images = rows["seed"].nunique(), rows["images"].iloc[0]
    about = (
        f"{seeds} seed{'s' if seeds > 1 else ''}, {images} test images each. Bars: {LEVEL:.0%} interval over seeds. "
    )
    about += "Published: ViT, arXiv 2210.06313, Table 1.\nCalibration: trained on true labels, seeds pooled."
    return captioned(shown, about)


def _accuracies(axes: Axes, table: pd.DataFrame, model: str) -> None:
    noises = sorted(table["label_noise"].unique())
    for number, (arm, name) in enumerate(ARMS.items()):
        look, found = Look(number), [mean_over_runs(_rows(table, model, arm, noise)["accuracy"]) for noise in noises]
        style = {"color": look.colour, "marker": look.marker, "linestyle": look.line, "capsize": 3, "label": name}
        axes.errorbar([100 * noise for noise in noises], *_ends(found), **style)
    axes.set(xlabel="Redrawn training labels (%)", ylabel="Test accuracy (%)")


def _gains(axes: Axes, found: dict[str, Estimate]) -> None:
    names = [*(gain[2] for gain in GAINS.values()), LOWER_ERROR[0]]
    published = [*(gain[3] for gain in GAINS.values()), LOWER_ERROR[1]]
    places = range(len(names))
    values, reach = _ends(list(found.values()))
    look = Look(1)
    style = {"color": look.colour, "marker": look.marker, "linestyle": "none", "capsize": 3, "label": "here"}
    axes.errorbar(values, places, xerr=reach, **style)
    axes.plot(published, places, "x", color="black", label="published")
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set(xlabel="Points that top-k is better", title="Gain of top-k over all neurons")


def _calibration(axes: Axes, table: pd.DataFrame, model: str) -> None:
    places = np.arange(len(GAPS))
    for number, (arm, name) in enumerate(ARMS.items()):
        rows, look = _rows(table, model, arm, 0.0), Look(number)
        error = calibration_error(rows[GAPS].to_numpy(), rows["images"].to_numpy())
        heights = 100 * rows[GAPS].sum() / rows["images"].sum()
        bar = {"width": 0.04, "color": look.colour, "hatch": "//" if number else "", "edgecolor": "white"}
        axes.bar((places + 0.3 + 0.4 * number) / len(GAPS), heights, label=f"{name}: ECE {100 * error:.2f}%", **bar)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="Confidence", ylabel="Confidence less accuracy\n(points of all images)", title="Calibration error")


def _ends(found: list[Estimate]) -> tuple[list[float], list[list[float]]]:
    """Values in percent, and how far their intervals reach below and above; no reach where there is no interval."""
    values = [100 * one.value for one in found]
    reach = [[100 * (one.value - one.low) for one in found], [100 * (one.high - one.value) for one in found]]
    return values, reach
