"""Notebook 11, the theorem: at initialisation the mean gradient lowers every active ReLU neuron, in proportion to it.

The claims are judged in the theorem's own setting, a hidden layer whose random output weights V give the logits at
once; `laws.initial_gradient` derives what is expected. Two things in real networks lie outside of it:

- A normalisation between the neurons and the loss. If it makes the loss blind to the scale of h, then
  sum_i p_i d loss / d p_i = 0 in every draw, so that the gradient cannot be positive for all active neurons.
- Output weights that start at zero, as some recipes of maximal update parametrisation (muP) choose: with variance 0 the
  gradient is 0 too, and has no sign.

The theorem speaks of the first step only. That trained networks become sparse does not follow from it.
"""

import math
from collections.abc import Mapping
from functools import cache

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsity_utils.findings.claims import Claim, Verdict, Verdicts, stated
from sparsity_utils.findings.style import Look, ShownFigure, captioned, side_by_side, styled
from sparsity_utils.laws.initial_gradient import (
    CROSS_ENTROPY,
    LOSSES,
    SQUARED_ERROR,
    InitialGradient,
    initial_gradients,
)
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Estimate

QUESTION = "initial_gradient"
WIDTH = 64  # hidden neurons, half of them active
VARIANCE = 1 / WIDTH  # of an output weight, so that outputs are of the size of the neurons
SMALLEST, LARGEST = 0.25, 4.0  # |p|: evenly spaced between them, on both sides of 0
ERRORS = 3  # standard errors to each side of an estimate
THREE_ERRORS = math.erf(ERRORS / math.sqrt(2))  # the level of such an interval: 99.7%
REACH = 0.1  # how far from the exact slope the interval may reach, relative to it
GAUSSIAN = "Gaussian"
DRAWS = {(GAUSSIAN, 32): 40_000, (GAUSSIAN, 1024): 5_000, ("uniform", 32): 100_000, ("Rademacher", 32): 100_000}

Case = tuple[str, int]  # how the entries of V are drawn, and the number of outputs
Found = Mapping[Case, Mapping[str, InitialGradient]]  # gradients of each case and loss

EXACT = {
    loss: Claim(
        key,
        QUESTION,
        f"At initialisation the mean gradient of an active neuron has its exact size, {loss}",
        f"above 0 (arXiv 2210.06313); derived here: {value}",
        "% above the exact slope",
        f"{WIDTH} neurons, Gaussian V, 32 and 1,024 outputs; slope of the mean gradient on p_i over draws of V, by the "
        f"exact one, less 1; interval of {ERRORS} standard errors over draws, those of the exact slope included",
        f"interval contains 0 and lies inside {-100 * REACH:g} to {100 * REACH:g}% for both numbers of outputs; not "
        "supported if one does not contain 0: sign or size is wrong; else inconclusive",
        region=(-REACH, REACH),
        level=THREE_ERRORS,
    )
    for key, loss, value in (
        ("exact_cross_entropy", CROSS_ENTROPY, "v p_i E[1 - sum q^2]"),
        ("exact_squared_error", SQUARED_ERROR, "v n_out p_i"),
    )
}
POSITIVE = Claim(
    "positive_gradient",
    QUESTION,
    "At initialisation the mean gradient of every active neuron is positive, also where V is not Gaussian",
    "above 0 for independent entries of mean 0 (arXiv 2210.06313)",
    "standard errors above 0",
    f"{WIDTH} neurons, 32 outputs, V uniform and V of entries -1 and 1, scaled, both losses; mean gradient over its "
    "standard error over draws, of each active neuron; the smallest is shown",
    f"value less {ERRORS} above 0 for every active neuron; not supported if value plus {ERRORS} is below 0 for one",
    scale=1.0,
    level=THREE_ERRORS,
)


def claims() -> pd.DataFrame:
    """The claims, tests and thresholds, as the notebook states them before its results."""
    return stated([*EXACT.values(), POSITIVE])


def analyse(draws: Mapping[Case, int] = DRAWS, seed: int = 0) -> Found:
    """Gradients at initialisation for every case, over so many draws of V each; about eight seconds at the default.

    A process draws them once.
    """
    return dict(_analysed(tuple(draws.items()), seed))


@cache
def _analysed(draws: tuple[tuple[Case, int], ...], seed: int) -> Found:
    sizes = np.linspace(SMALLEST, LARGEST, WIDTH // 2)
    p = np.concatenate([-sizes, sizes])  # (WIDTH,)
    return {
        (entries, outputs): initial_gradients(p, outputs, VARIANCE, count, entries, seed)
        for (entries, outputs), count in draws
    }


def verdicts(found: Found) -> Verdicts:
    """The verdict on every claim, in the order of `claims`.

    found: `analyse`, with a Gaussian case and another one.
    """
    return Verdicts([*(_exact(found, loss) for loss in LOSSES), _positive(found)])


def excess(gradient: InitialGradient) -> Estimate:
    """Measured slope / exact slope - 1, with the interval of ERRORS standard errors of both together."""
    ratio = gradient.slope / gradient.predicted
    reach = ERRORS * math.hypot(gradient.slope_error, ratio * gradient.predicted_error) / gradient.predicted
    return Estimate(ratio - 1, ratio - 1 - reach, ratio - 1 + reach, gradient.draws)


def _exact(found: Found, loss: str) -> Verdict:
    claim = EXACT[loss]
    gradients = {f"{outputs:,} outputs": losses[loss] for outputs, losses in _gaussian(found).items()}
    excesses = {name: excess(gradient) for name, gradient in gradients.items()}

    def word(estimate: Estimate) -> str:
        if not estimate.low <= 0 <= estimate.high:
            return NOT_SUPPORTED
        return SUPPORTED if claim.decide(estimate) == SUPPORTED else INCONCLUSIVE

    return claim.judged_all(excesses, "draws", words={name: word(estimate) for name, estimate in excesses.items()})


def _gaussian(found: Found) -> dict[int, Mapping[str, InitialGradient]]:
    """The cases of Gaussian V, by their number of outputs."""
    return {outputs: losses for (entries, outputs), losses in found.items() if entries == GAUSSIAN}


def _positive(found: Found) -> Verdict:
    heights = {
        f"p = {p:.3g}, {entries} V, {loss}": Estimate(height, height - ERRORS, height + ERRORS, gradient.draws)
        for (entries, _), gradients in found.items()
        if entries != GAUSSIAN
        for loss, gradient in gradients.items()
        for p, height in zip(gradient.p, (gradient.mean / gradient.error).tolist(), strict=True)
    }
    return POSITIVE.judged_all(heights, "draws")


def table(found: Found) -> pd.DataFrame:
    """One row per case and loss, as rounded text.

    Columns: entries_of_V, outputs, loss, draws, slope (measured), exact_slope, excess (in percent, with its interval)
    and lowest_in_errors (the smallest mean gradient of an active neuron, in its standard errors).
    """
    rows = []
    for (entries, outputs), gradients in found.items():
        for loss, gradient in gradients.items():
            exact = between = "not known"
            if math.isfinite(gradient.predicted):
                above = excess(gradient)
                exact = f"{gradient.predicted:.4g}"
                between = f"{100 * above.value:+z.1f}% ({100 * above.low:+z.1f} to {100 * above.high:+z.1f})"
            lowest = f"{(gradient.mean / gradient.error).min():.1f}"
            about = (entries, f"{outputs:,}", loss, f"{gradient.draws:,}")
            rows.append((*about, f"{gradient.slope:.4g}", exact, between, lowest))
    columns = ["entries_of_V", "outputs", "loss", "draws", "slope", "exact_slope", "excess", "lowest_in_errors"]
    return pd.DataFrame(rows, columns=columns)


@styled
def figure(found: Found) -> ShownFigure:
    """Mean gradient of each active neuron against p_i, with the exact line; a panel per loss, Gaussian V.

    Squared error is drawn per output: its exact line is then the same for every number of outputs.
    """
    shown, panels = side_by_side(len(LOSSES), share_y=True)
    cases = _gaussian(found)
    for axes, loss in zip(panels, LOSSES, strict=True):
        for number, (outputs, gradients) in enumerate(cases.items()):
            unit = 1e-3 * (outputs if loss == SQUARED_ERROR else 1)
            _draw(axes, gradients[loss], unit, Look(number), f"{outputs:,} outputs")
        axes.axhline(0, color="dimgrey", linewidth=0.8)
        axes.set(title=loss.capitalize(), xlabel="Activation p of the neuron")
        axes.legend(loc="upper left")
    panels[0].set_ylabel("Mean d loss / d p (1e-3)")
    panels[1].set_title(f"{SQUARED_ERROR.capitalize()}, per output")
    counts = ", ".join(f"{losses[CROSS_ENTROPY].draws:,} at {outputs:,} outputs" for outputs, losses in cases.items())
    about = f"Bars: {ERRORS} standard errors; lines: exact, not fitted. Draws of Gaussian V: {counts}."
    return captioned(shown, about)


def _draw(axes: Axes, gradient: InitialGradient, unit: float, look: Look, label: str) -> None:
    """Points with their errors, hollow and larger the later they are drawn, and the exact line from 0."""
    ends = np.array([0, gradient.p.max()])
    axes.plot(ends, gradient.predicted * ends / unit, look.line, color=look.colour, linewidth=1)
    style = {"color": look.colour, "fillstyle": "none" if look.number else "full", "markersize": 3 + 2 * look.number}
    axes.errorbar(
        gradient.p,
        gradient.mean / unit,
        ERRORS * gradient.error / unit,
        label=label,
        fmt=look.marker,
        capsize=2,
        elinewidth=0.8,
        **style,
    )
