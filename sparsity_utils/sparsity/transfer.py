"""Do thresholds carry over from one kind of text to another? Solved on each domain, applied to every domain."""

from collections.abc import Mapping

import pandas as pd
from torch import nn

from sparsity_utils.console import InputError
from sparsity_utils.sparsity.metrics import Batches, apply_thresholds, measure_sparsity


def transfer_matrix(model: nn.Module, domains: Mapping[str, tuple[Batches, Batches]], p: float = 1.0) -> pd.DataFrame:
    """CETT-PPL-p% solved on one domain's calibration batches and applied to every domain's evaluation batches.

    Args:
        model: as `measure_sparsity` takes it.
        domains: (calibration, evaluation) batches of each kind of text, of different documents. The evaluation batches
            are read once per domain: give lists.
        p: accepted rise of perplexity in percent.

    Returns: one row per ordered pair of domains: calibrated_on, applied_to, activation_ratio, ppl_ratio and cett, as
        `SparsityReport` defines them, on the evaluation batches; note (empty, or how the solution should be read).

    Raises `InputError` without domains and where `measure_sparsity` does.
    """
    if not domains:
        raise InputError(
            "No domain was given: pass a mapping from a name to its (calibration, evaluation) batches, "
            "such as {'code': (calibration, evaluation)}."
        )
    solved = {
        domain: measure_sparsity(model, evaluation, "cett-ppl", p, calibration)
        for domain, (calibration, evaluation) in domains.items()
    }
    rows = []
    for calibrated_on, own in solved.items():
        for applied_to, (_, evaluation) in domains.items():
            report = own
            if applied_to != calibrated_on:
                report = apply_thresholds(model, evaluation, own.thresholds, dense=solved[applied_to].dense)
            rows.append(
                {
                    "calibrated_on": calibrated_on,
                    "applied_to": applied_to,
                    "activation_ratio": report.activation_ratio,
                    "ppl_ratio": report.ppl_ratio,
                    "cett": report.cett,
                    "note": own.note,
                }
            )
    return pd.DataFrame(rows)
