"""What a study measures on a finished run: sparsity along training, metrics, active neurons and tokens."""

import math
from dataclasses import asdict
from typing import Any

import pandas as pd
import torch

from sparsity_utils.models.config import LAST_CHECKPOINTS
from sparsity_utils.neurons.hooks import observe_neurons
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.calibration import TOLERANCE, Calibration, solve_stabilised_cett
from sparsity_utils.sparsity.metrics import measure_sparsity
from sparsity_utils.sparsity.passes import checked
from sparsity_utils.sparsity.patterns import DEAD, Patterns, activation_patterns, transfer_matrix
from sparsity_utils.study.ends import run_ends
from sparsity_utils.study.profiles import MeasureConfig
from sparsity_utils.study.runs import Run
from sparsity_utils.text.corpus import Corpus
from sparsity_utils.text.windows import domain_batches, measurement_batches

VERSION = 3  # raise it when the same settings would measure other numbers: stored measurements are then made again
RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)  # wanted activation ratios of Top-k and FAT
GATE_WINDOWS = 32  # of the calibration text, on which the thresholds of FAT are chosen
CETTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7)
CALIBRATION_PART, EVALUATION_PART = 2, 6  # of the tokens that the study measures on: what each domain is given
DIGITS = 4  # significant ones of the large tables
MOST_NEURONS = 128  # of a layer in the table of neurons: its first ones, a fair sample, since order means nothing


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


def neuron_frequencies(run: Run, corpus: Corpus, settings: MeasureConfig) -> pd.DataFrame:
    """Activation frequency of the neurons in every domain, at the last stable checkpoint (compare Fig. 9).

    One row per domain and neuron, of the first MOST_NEURONS of each layer: step, layer, neuron, domain, frequency.
    """
    step = stable_steps(run)[-1]
    table = _domain_patterns(run, corpus, settings).frequencies.assign(step=step)
    table = table[table["neuron"] < MOST_NEURONS].reset_index(drop=True)
    table["frequency"] = _rounded(table["frequency"])
    return table[["step", "layer", "neuron", "domain", "frequency"]]


def token_ratios(run: Run, corpus: Corpus, settings: MeasureConfig) -> pd.DataFrame:
    """Mean activation ratio of every vocabulary token that occurs, at the last stable checkpoint (Fig. 10 and 16).

    One row per token: step, token_id, count, activation_ratio, first, middle, last.
    """
    table = _domain_patterns(run, corpus, settings).vocabulary
    ratios = ["activation_ratio", "first", "middle", "last"]
    table[ratios] = table[ratios].apply(_rounded)
    table.insert(0, "step", stable_steps(run)[-1])
    return table


def dead_curve(run: Run, corpus: Corpus, settings: MeasureConfig) -> pd.DataFrame:
    """Dead neurons at every stable checkpoint, judged at the run's CETT and by the zero threshold.

    One row per checkpoint and layer: step, layer, neurons, dead_share, activation_ratio, dying_ratio (the part of the
    activation ratio that lies in neurons dead at the last stable checkpoint), then dead_share_zero and nonzero_share,
    which are the first two by the zero threshold.
    """
    calibration, evaluation = study_batches(run, corpus, settings)
    judged: tuple[dict, dict] = {}, {}  # by the run's CETT, by zero: step -> frequency of each (layer, neuron)
    for step in stable_steps(run):
        model = run.load(step)
        thresholds = _thresholds(model, calibration, _cett(run, corpus, settings, step))
        layers = len(thresholds.values)
        for found, rule in zip(judged, (thresholds, Thresholds("relu", (0.0,) * layers)), strict=True):
            table = activation_patterns(model, {"all": evaluation}, rule).frequencies
            found[step] = table.set_index(["layer", "neuron"])["frequency"]
    cett, zero = (pd.DataFrame(found) for found in judged)  # (neurons, steps)
    dying = cett.iloc[:, -1] < DEAD
    columns = {
        "neurons": cett.notna().groupby("layer").sum(),
        "dead_share": (cett < DEAD).groupby("layer").mean(),
        "activation_ratio": cett.groupby("layer").mean(),
        "dying_ratio": cett.where(dying, 0.0).groupby("layer").mean(),
        "dead_share_zero": (zero < DEAD).groupby("layer").mean(),
        "nonzero_share": zero.groupby("layer").mean(),
    }
    tables = {name: table.rename_axis(columns="step").T.stack() for name, table in columns.items()}
    return pd.DataFrame(tables).reset_index()


def domain_transfer(run: Run, corpus: Corpus, settings: MeasureConfig) -> pd.DataFrame:
    """`transfer_matrix` between the domains, at the last stable checkpoint: step, its columns, and p."""
    step = stable_steps(run)[-1]
    table = transfer_matrix(run.load(step), _domains(run, corpus, settings), settings.p)
    table.insert(0, "step", step)
    return table.assign(p=settings.p)


def _domain_patterns(run: Run, corpus: Corpus, settings: MeasureConfig) -> Patterns:
    step, domains = stable_steps(run)[-1], _domains(run, corpus, settings)
    model = run.load(step)
    calibration = [batch for part, _ in domains.values() for batch in part]
    thresholds = _thresholds(model, calibration, _cett(run, corpus, settings, step))
    return activation_patterns(model, {name: evaluation for name, (_, evaluation) in domains.items()}, thresholds)


def _domains(run: Run, corpus: Corpus, settings: MeasureConfig) -> dict[str, tuple[list, list]]:
    """(calibration, evaluation) batches of each domain."""
    return domain_batches(
        corpus.tokens("validation"),
        corpus.documents("validation"),
        run.manifest["config"]["model"]["context"],
        settings.domain_calibration_tokens or settings.calibration_tokens // CALIBRATION_PART,
        settings.evaluation_tokens // EVALUATION_PART,
    )


def _cett(run: Run, corpus: Corpus, settings: MeasureConfig, step: int) -> float:
    """The CETT of a checkpoint as the run's sparsity curve has it: stabilised, or solved on the checkpoint alone."""
    curve = measurement(run, corpus, settings, "curve")
    return float(curve.set_index("step").loc[step, "cett"])


def _thresholds(model: torch.nn.Module, calibration: list, cett: float) -> Thresholds:
    with evaluating(model):
        batches = list(checked(model, calibration, "calibration"))
        solver = Calibration(model, batches, TOLERANCE, with_loss=False)
        solver.align(cett)
        return solver.thresholds(cett)


def _rounded(values: pd.Series) -> pd.Series:
    return values.map(lambda value: float(f"{value:.{DIGITS}g}"))


MEASUREMENTS = {
    "curve": sparsity_curve,
    "metrics": metric_comparison,
    "neurons": neuron_frequencies,
    "vocabulary": token_ratios,
    "dead": dead_curve,
    "transfer": domain_transfer,
    "ends": run_ends,
}
# Processor time of each, in training tokens per calibration token and per evaluation token. Measured on 32x4, where
# training took 18 microseconds a token: with 16,384 and 49,152 of them the curve took 21 s, metrics 21, dead 10,
# transfer 10; with 65,536 and 49,152 they took 29, 26, 15 and 11. The ends of a run, whose thresholds are solved on at
# most 16,384 tokens whatever is asked for, took 14 s on 32x4 and 25 on 64x4 where training took 37 and 70 microseconds.
EFFORT = {
    "curve": (9.3, 20.0),
    "metrics": (5.5, 22.0),
    "neurons": (0.0, 0.8),
    "vocabulary": (0.0, 0.8),
    "dead": (5.6, 9.7),
    "transfer": (0.0, 11.6),
    "ends": (0.0, 7.5),
}


def measurement(run: Run, corpus: Corpus, settings: MeasureConfig, what: str) -> pd.DataFrame:
    """A measurement of a run, a key of MEASUREMENTS, computed once and kept with it."""
    return run.measured(what, decided_by(settings), lambda: MEASUREMENTS[what](run, corpus, settings))
