"""One checkpoint under a training-free rule: `python -m sparsity_utils measure --metric teal`, and the like."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from sparsity_utils import paths
from sparsity_utils.commands.measure import known, prepared, versions
from sparsity_utils.console import check
from sparsity_utils.neurons.input_rules import TRAINING_FREE
from sparsity_utils.neurons.rules import CettPpl
from sparsity_utils.sparsity.training_free import RuleReport, TrainingFree
from sparsity_utils.text.config import MEASURED_TOKENS

NUMBERS = (
    "sparsity", "calibrated_sparsity", "weights_read", "model_read", "loss_dense", "loss_sparse", "ppl_ratio",
    "excess_interval", "accuracy_dense", "accuracy_sparse", "tokens", "documents",
)  # fmt: skip


class MeasuredRule(NamedTuple):
    """A report and the settings it was made with."""

    report: RuleReport
    settings: dict[str, Any]


def measure_rule(
    model: str,
    text: Path,
    metric: str,
    *,
    length: int | None = None,
    calibration: Path | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    max_tokens: int = MEASURED_TOKENS,
    sparsity: float | None = None,
    p: float | None = None,
    **others: float | None,
) -> MeasuredRule:
    """Open `model` and measure what a rule of `TRAINING_FREE` costs on the documents of `text`, and what it saves.

    Args:
        sparsity: share of the inputs of each linear map (of the neurons, for "cats") that is skipped.
        p: instead, the rise of perplexity in percent at which the rule is to be measured; 1 if neither is given.
        others: knobs of other metrics, which must be None.

    The rest is as for `commands.measure.measure_checkpoint`; thresholds are always solved on calibration text. Raises
    `InputError` for whatever cannot be opened, read or measured.
    """
    rule = TRAINING_FREE[metric]
    for name, value in others.items():
        check(value is None, f"{name} was given, and metric {metric!r} does not use it: leave {name} out.")
    check(sparsity is None or p is None, "Both --sparsity and --p were given; give one of them.")
    if sparsity is not None:
        rule.check_value(sparsity)
    given = prepared(
        model, text, length=length, calibration=calibration, dtype=dtype, revision=revision, max_tokens=max_tokens,
        solves=True,
    )  # fmt: skip
    judge = TrainingFree(given.model, given.calibration or [], given.evaluation, show_progress=True)
    if sparsity is None:
        p = CettPpl.knob.default if p is None else p
        report = judge.at_perplexity(metric, p)
    else:
        report = judge.at(metric, sparsity)
    return MeasuredRule(report, given.settings | {"metric": metric, "sparsity": sparsity, "p": p})


def summary(measured: MeasuredRule) -> str:
    """What the command prints: what is skipped and read, what it costs, and the maps by what they compute."""
    report, settings = measured
    low, high = (math.expm1(end) for end in report.excess_interval)
    spread = f"95% interval {low:+.2%} to {high:+.2%}" if report.documents > 1 else "one document, no interval"
    dense, sparse = math.exp(report.loss_dense), math.exp(report.loss_sparse)
    price = f"solved for {settings['p']:g}%" if settings["p"] else f"set to {settings['sparsity']:.1%}"
    return "\n".join(
        [
            f"{TRAINING_FREE[settings['metric']].label} skips "
            f"{report.sparsity:.1%} of the weights of the linear maps ({price}): a token reads "
            f"{report.weights_read:.1%} of theirs, {report.model_read:.1%} of the model's.",
            f"Perplexity goes from {dense:.2f} to {sparse:.2f} ({report.ppl_ratio - 1:+.2%}; {spread}), the share of "
            f"next tokens guessed right from {report.accuracy_dense:.1%} to {report.accuracy_sparse:.1%}.",
            f"{report.tokens:,} tokens of {report.documents} document{'s' if report.documents > 1 else ''}; thresholds "
            f"set on {settings['calibration'] or 'other text'}.",
            settings["opened"],
            "",
            _roles(report),
        ]
    )


def _roles(report: RuleReport) -> str:
    """Weights and share read of each kind of map, as text."""
    table = report.maps.assign(read=report.maps["weights"] * report.maps["share_read"])
    sums = table.groupby("role", sort=False)[["weights", "read"]].sum()
    shares = (100 * sums["read"] / sums["weights"]).round(1)
    return sums[["weights"]].assign(**{"read %": shares}).rename_axis("map").reset_index().to_string(index=False)


def write_results(measured: MeasuredRule, folder: Path) -> list[Path]:
    """Write report.json and maps.csv (one row per linear map); return the files."""
    report, settings = measured
    numbers = {name: known(getattr(report, name)) for name in NUMBERS}
    texts = {
        "report.json": json.dumps({**numbers, "settings": settings, "versions": versions()}, indent=1) + "\n",
        "maps.csv": report.maps.to_csv(index=False, float_format="%.8g"),
    }
    for name, text in texts.items():
        with paths.written_aside(folder / name) as aside:
            aside.write_text(text, encoding="utf-8")
    return [folder / name for name in texts]
