"""Notebook 00, one measured model: whether thresholds cost on other documents what they were solved for."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sparsity_utils.console import InputError
from sparsity_utils.findings.claims import Claim, Verdicts, stated
from sparsity_utils.findings.style import ShownFigure
from sparsity_utils.laws.trends import Estimate
from sparsity_utils.study.tables import Tables

if TYPE_CHECKING:  # redrawing figures need not load torch
    from sparsity_utils.sparsity.metrics import SparsityReport


def price_claim(p: float = 1.0) -> Claim:
    """Do thresholds that cost p percent more perplexity on calibration documents cost as much on others?"""
    return Claim(
        "price",
        "quickstart",
        "Thresholds solved on some documents cost what they promise on others",
        f"{p:g}%",
        "% rise of perplexity",
        "bootstrap over documents of the rise of perplexity, on documents that had no part in the thresholds",
        f"90% interval inside 0 to {2 * p:g}%; not supported if wholly outside",
        region=(0.0, 2 * p / 100),
    )


def claims() -> pd.DataFrame:
    """The claim, its test and threshold, as the notebook states them before its result."""
    return stated([price_claim()])


def verdicts(report: "SparsityReport", p: float = 1.0) -> Verdicts:
    """Do thresholds solved for p percent more perplexity on calibration documents cost about as much on others?

    Raises InputError for a report that was not made by CETT-PPL-p% with calibration batches of its own.
    """
    if report.metric != "cett-ppl" or report.calibrated_on != "calibration":
        raise InputError(
            f"The report is of metric {report.metric!r} solved on {report.calibrated_on!r} batches; the promise of a "
            "price is about 'cett-ppl' with other documents as calibration."
        )
    low, high = (end - 1 for end in report.ppl_ratio_interval)
    reason = "" if np.isfinite([low, high]).all() else "one document: no interval"
    increase = Estimate(report.ppl_ratio - 1, low, high, report.documents, reason)
    return Verdicts([price_claim(p).counted(increase, "documents", report.note)])


def figures(study: Tables) -> Iterator[tuple[str, ShownFigure]]:
    """No figure: those of this notebook show a model and a text, which no stored table holds."""
    yield from ()
