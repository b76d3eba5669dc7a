"""What a study measures on a finished run beyond its curve: its neurons, its vocabulary, its dead neurons, and how its
thresholds carry over between kinds of text.

Neurons and tokens are judged at the run's CETT (`sparsity_curve`). Thresholds are solved on calibration documents of
the text in question, and what is reported comes from other documents.
"""

import pandas as pd
import torch

from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.calibration import TOLERANCE, Calibration
from sparsity_utils.sparsity.passes import checked
from sparsity_utils.sparsity.patterns import DEAD, Patterns, activation_patterns, transfer_matrix
from sparsity_utils.study.curves import kept, sparsity_curve, stable_steps, study_batches
from sparsity_utils.study.profiles import MeasureConfig
from sparsity_utils.study.runs import Run
from sparsity_utils.text.corpus import Corpus
from sparsity_utils.text.windows import domain_batches

CALIBRATION_PART, EVALUATION_PART = 2, 6  # of the tokens that the study measures on: what each domain is given
DIGITS = 4  # significant ones of the large tables
MOST_NEURONS = (
    128  # of a layer that the table of neurons lists: its first ones, a fair sample, since order means nothing
)


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
    curve = kept("curve", sparsity_curve, run, corpus, settings)
    return float(curve.set_index("step").loc[step, "cett"])


def _thresholds(model: torch.nn.Module, calibration: list, cett: float) -> Thresholds:
    with evaluating(model):
        batches = list(checked(model, calibration, "calibration"))
        solver = Calibration(model, batches, TOLERANCE, with_loss=False)
        solver.align(cett)
        return solver.thresholds(cett)


def _rounded(values: pd.Series) -> pd.Series:
    return values.map(lambda value: float(f"{value:.{DIGITS}g}"))
