"""What a study measures on a finished run: sparsity along training, and all metrics on the last stable checkpoint."""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pandas as pd
import torch

from sparsity_utils.models.config import LAST_CHECKPOINTS
from sparsity_utils.neurons.hooks import observe_neurons
from sparsity_utils.sparsity.calibration import solve_stabilised_cett
from sparsity_utils.sparsity.metrics import measure_sparsity
from sparsity_utils.study.profiles import MeasureConfig
from sparsity_utils.study.runs import Run
from sparsity_utils.text.corpus import Corpus
from sparsity_utils.text.windows import measurement_batches

VERSION = 3  # raise it when the same settings would measure other numbers: stored measurements are then made again
RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)  # wanted activation ratios of Top-k and FAT
GATE_WINDOWS = 32  # of the calibration text, on which the thresholds of FAT are chosen
CETTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7)

Measurement = Callable[[Run, Corpus, MeasureConfig], pd.DataFrame]


def kept(name: str, measure: Measurement, run: Run, corpus: Corpus, settings: MeasureConfig) -> pd.DataFrame:
    """A measurement of a run, computed once and kept with it under `name`."""
    return run.measured(name, decided_by(settings), lambda: measure(run, corpus, settings))


def decided_by(settings: MeasureConfig) -> dict:
    """All that decides a measurement of a given run; a setting that joined later is left out where it is None."""
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    return {**given, "version": VERSION}


def sparsity_curve(run: Run, corpus: Corpus, settings: MeasureConfig) -> pd.DataFrame:
    """CETT-PPL-p% at every checkpoint of a run: step, activation_ratio, nonzero_share, cett, ppl_ratio, p,
    and note: empty, or how the solution should be read.

    Stabilised protocol: the CETT is solved once, on the last five stable checkpoints together, and applied to every
    checkpoint; per-checkpoint protocol: solved on each. Thresholds and CETT come from calibration tokens, the numbers
    from evaluation tokens.
    """
    calibration, evaluation = study_batches(run, corpus, settings)
    solved = None
    if settings.protocol == "stabilised":
        last = stable_steps(run)[-LAST_CHECKPOINTS:]
        solved = solve_stabilised_cett([run.load(step) for step in last], calibration, settings.p)
    rows = []
    for step in run.checkpoints["step"]:
        how: dict[str, Any] = (
            {"metric": "cett", "cett": solved.cett} if solved else {"metric": "cett-ppl", "p": settings.p}
        )
        report = measure_sparsity(run.load(step), evaluation, calibration=calibration, **how)
        rows.append(
            {
                "step": step,
                "activation_ratio": report.activation_ratio,
                "nonzero_share": report.nonzero_share,
                "cett": report.target_cett,
                "ppl_ratio": report.ppl_ratio,
                "p": settings.p,
                "note": solved.note if solved else report.note,
            }
        )
    return pd.DataFrame(rows)


def metric_comparison(run: Run, corpus: Corpus, settings: MeasureConfig) -> pd.DataFrame:
    """Perplexity against activation ratio for every metric, on the last stable checkpoint of a run (Fig. 2 and 3).

    One row per metric and setting: step, metric, setting (k, eps, CETT or p), activation_ratio, cett, loss, ppl_ratio,
    note.
    """
    step = stable_steps(run)[-1]
    model = run.load(step)
    calibration, evaluation = study_batches(run, corpus, settings)
    d_ff = model.config.intermediate_size
    plan: list[tuple[str, dict]] = [("relu", {})]
    plan += [("top-k", {"k": max(1, round(ratio * d_ff))}) for ratio in RATIOS]
    plan += [("fat", {"eps": eps}) for eps in _gate_quantiles(model, calibration)]
    plan += [("cett", {"cett": cett}) for cett in CETTS] + [("cett-ppl", {"p": settings.p})]
    rows, dense = [], None
    for metric, setting in plan:
        report = measure_sparsity(model, evaluation, metric, calibration=calibration, dense=dense, **setting)
        dense = report.dense
        rows.append(
            {
                "step": step,
                "metric": metric,
                "setting": next(iter(setting.values()), math.nan),
                "activation_ratio": report.activation_ratio,
                "cett": report.cett,
                "loss": report.loss_sparse,
                "ppl_ratio": report.ppl_ratio,
                "note": report.note,
            }
        )
    return pd.DataFrame(rows)


def stable_steps(run: Run) -> list[int]:
    """The steps of the checkpoints of the stable stage, first to last."""
    return run.checkpoints.query("role == 'stable'")["step"].tolist()


def study_batches(run: Run, corpus: Corpus, settings: MeasureConfig) -> tuple[list, ...]:
    """Calibration and evaluation batches of a study: all domains mixed, as the validation text has them."""
    tokens, context = corpus.tokens("validation"), run.manifest["config"]["model"]["context"]
    wanted = {"calibration": settings.calibration_tokens, "evaluation": settings.evaluation_tokens}
    return tuple(measurement_batches(tokens, context, part, count) for part, count in wanted.items())


def _gate_quantiles(model, calibration: list) -> list[float]:
    """The eps at which FAT would keep about each of RATIOS of the neurons: quantiles of |s| in GATE_WINDOWS windows."""
    sizes = []
    with torch.inference_mode(), observe_neurons(model, lambda ffn, s, h, tokens: sizes.append(s.abs().flatten())):
        model.base_model(torch.cat([batch["input_ids"] for batch in calibration])[:GATE_WINDOWS])
    ordered = torch.cat(sizes).sort().values
    quantiles = [float(ordered[int((1 - ratio) * (len(ordered) - 1))]) for ratio in RATIOS]
    return sorted({eps for eps in quantiles if eps > 0})
