"""Activation sparsity of a model by one of the metrics of `neurons.rules`.

Definitions: arXiv 2411.02335, section 3. Activation ratio and achieved CETT describe the activations of the dense run,
to which the definitions apply; only the sparse loss comes from a run in which the inactive neurons are skipped.

In a mixture of experts the neurons of a token are those of the experts it is routed to: a routed pair of token and
expert counts as one FFN application, with the share of that expert's neurons, and its own relative error in CETT.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor, nn

from sparsity_utils.console import check
from sparsity_utils.neurons.find import find_ffns, layer_count
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.rules import CettPpl, Rule, metric_named
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.calibration import TOLERANCE, Calibration, SolvedCett, solve_cett
from sparsity_utils.sparsity.evaluation import REPLICATES, DocumentBootstrap, Evaluation, interval, standard_error
from sparsity_utils.sparsity.passes import Batch, Losses, checked, ppl_ratio
from sparsity_utils.sparsity.work import Work, work_of

OTHER_DOCUMENTS = 1  # seed of the bootstrap of calibration documents that are not those of the evaluation
TIMES = (0.1, 10.0)  # bounds of a replicate's loss increase over that of all: few documents may even gain from the mask
UNKNOWN = 4  # token passes of an evaluation of unknown length, for each calibration token: two over twice the text
CETT_STEPS = 9  # between these, at which the activation ratio may be looked up
Batches = Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class SparsityReport:
    """What `measure_sparsity` found. Every number is of the evaluation tokens; losses are in nats per token.

    Intervals are 90% and, like the standard error, from a bootstrap over documents; NaN where there is only one. For
    "cett-ppl" they include the effect of the choice of calibration documents, if there are several: others would have
    solved another CETT.
    """

    metric: str
    activation_ratio: float  # mean over layers of the share of active neurons per token
    standard_error: float  # of the activation ratio
    interval: tuple[float, float]  # of the activation ratio
    ratio_of_all_neurons: float  # the same counting all experts of a mixture; equal in a dense model
    cett: float  # achieved: mean over layers of the token mean of ||sum_{i in D} n_i|| / ||FFN(x)||
    target_cett: float | None  # the CETT the thresholds were solved for; None for metrics without one
    nonzero_share: float  # share of neurons with s_i != 0: the straightforward ReLU activation ratio, for comparison
    ppl_ratio: float  # exp(loss_sparse - loss_dense); NaN, as the losses, for a model that was given nothing to predict
    ppl_ratio_interval: tuple[float, float]
    loss_dense: float
    loss_sparse: float
    tokens: int  # over which activations were counted
    documents: int
    skipped_tokens: int  # token-layer pairs with a zero FFN output, left out of CETT
    thresholds: Thresholds
    layers: pd.DataFrame  # one row per layer: see `_layer_table`
    per_token: pd.DataFrame | None  # on request: document, position in the window without padding before it, token_id,
    # and each layer's activation ratio
    dense: Losses  # of each evaluation window; the next measurement on the same batches can be given it
    calibrated_on: str  # "calibration", "evaluation" (the same tokens), or "none": nothing was solved
    note: str = ""  # empty, or a sentence on how the solution should be read

    @property
    def sparsity(self) -> float:
        """Share of neurons in D."""
        return 1 - self.activation_ratio


def measure_sparsity(
    model: nn.Module,
    batches: Batches,
    metric: str = "cett-ppl",
    p: float = 1.0,
    calibration: Batches | None = None,
    *,
    per_token: bool = False,
    dense: Losses | None = None,
    tolerance: float = TOLERANCE,
    show_progress: bool = False,
    **knobs: float | None,
) -> SparsityReport:
    """Activation ratio, achieved CETT and perplexity of `model` on `batches`.

    Args:
        model: a transformers model with FFNs that `find_ffns` finds. It is run in evaluation mode, in its own dtype
            (norms are taken in float32), and left as it was.
        batches: evaluation batches, dicts as the model takes them: see `passes.checked`. Each is read once, so a
            generator will do, and only the losses of each window stay in memory. Padding does not count.
        metric: "relu", "top-k" (needs `k`), "fat" (needs `eps`), "cett" (needs `cett`) or "cett-ppl" (uses `p`).
        p: "cett-ppl": accepted increase of perplexity in percent, above 0 and at most 100.
        calibration: batches on which thresholds and the PPL target are solved, disjoint from `batches`; their token
            ids are held in memory. None: solved on `batches` themselves, which the report says.
        per_token: also report every token; that table grows with the text.
        dense: `SparsityReport.dense` of an earlier report on the same batches: saves computing the dense loss again.
        tolerance: accepted error of log(PPL ratio) as a share of log(1 + p/100). On up to 2,048 calibration tokens the
            CETT of each layer is solved ten times closer; on more, a sample of them gives it to about 1%.
        show_progress: show a bar of the whole measurement, with an estimate of what is left (never in CI).
        knobs: the one that the metric has (`neurons.rules`): k, neurons kept per token, 1 to d_ff; eps, threshold on
            |s_i|, not negative; cett, 0 to 1.

    Raises `InputError` for an argument or a batch that cannot be used, and for activations or logits that are NaN.
    """
    ffns = find_ffns(model)
    rule = metric_named(metric)
    priced = isinstance(rule, CettPpl)
    setting = rule.setting({**knobs, "p": p} if priced else knobs)
    value = next(iter(setting.values()), 0.0)
    rule.check_value(value, min(ffn.d_ff for ffn in ffns))
    check(0 < tolerance < 1, f"tolerance is {tolerance}; choose a share between 0 and 1.")
    own = rule.solved and calibration is None
    if own:
        batches = calibration = list(batches)
    with work_of(model, show_progress) as work:
        if rule.solved:
            work.left["evaluation"] = (1 if own and priced else 2) * (_tokens(batches) or 0)
            role = "evaluation" if own else "calibration"
            solution = _solve(model, calibration, role, rule, value, tolerance, work)
        else:
            solution = _Solution(Thresholds(metric, (value,) * layer_count(ffns)), metric)
        return _report(model, batches, solution, per_token, dense, work)


def apply_thresholds(
    model: nn.Module,
    batches: Batches,
    thresholds: Thresholds,
    *,
    per_token: bool = False,
    dense: Losses | None = None,
    show_progress: bool = False,
) -> SparsityReport:
    """The report on `batches` under `thresholds` solved elsewhere, such as `report.thresholds` of other text.

    Arguments and errors as for `measure_sparsity`; the report's metric is the rule of the thresholds.
    """
    with work_of(model, show_progress) as work:
        return _report(model, batches, _Solution(thresholds, thresholds.rule), per_token, dense, work)


@dataclass
class _Solution:
    """Thresholds, and how they were found."""

    thresholds: Thresholds
    metric: str
    cett: float | None = None
    calibrated_on: str = "none"
    note: str = ""
    shift: np.ndarray | float = 0.0  # of the activation ratio, had each replicate's documents solved the CETT
    known: tuple[Losses | None, Losses | None] = (None, None)  # dense and sparse losses of the evaluation batches


def _solve(
    model: nn.Module,
    calibration: Batches,
    role: str,
    rule: Rule,
    value: float,
    tolerance: float,
    work: Work,
) -> _Solution:
    """The thresholds of `rule` set to `value`, solved on `calibration`; `role`: "evaluation" where it is that, too."""
    priced, own = isinstance(rule, CettPpl), role == "evaluation"
    with evaluating(model):
        kept = list(checked(model, calibration, role))
        unknown = UNKNOWN * sum(batch.windows * (batch.length or 1) for batch in kept)
        work.left["evaluation"] = work.left["evaluation"] or unknown
        solver = Calibration(model, kept, tolerance, priced, work)
        if not priced:
            solver.align(value)
            return _Solution(solver.thresholds(value), rule.name, value, role)
        solved = solve_cett([solver], value)
        thresholds, shift = solver.thresholds(solved.cett), _shift(solver, solved, own)
        known = (solver.dense, solver.losses(solved.cett)) if own else (None, None)
        return _Solution(thresholds, rule.name, solved.cett, role, solved.note, shift, known)


def _shift(solver: Calibration, solved: SolvedCett, own: bool) -> np.ndarray:
    """By how much the activation ratio would differ had other calibration documents solved the CETT, (REPLICATES,).

    The increase of the loss is about CETT^b. Documents with x times the increase therefore allow x^(-1/b) * CETT, and
    the shift is ratio(x^(-1/b) * CETT) - ratio(CETT), both on the kept sample. The ratio is looked up at steps of
    log x, at those that some replicate lies next to.
    """
    bootstrap = DocumentBootstrap(3, seed=0 if own else OTHER_DOCUMENTS)
    cett, dense, sparse = solved.cett, solver.dense, solver.losses(solved.cett)
    for batch, *columns in zip(solver.batches, dense.sums, sparse.sums, dense.counts, strict=True):
        for document, values in zip(batch.documents.tolist(), np.stack(columns, axis=1), strict=True):
            bootstrap.add(document, values)
    increase = sparse.value - dense.value
    if not 0 < cett < 1 or increase <= 0:
        return np.zeros(REPLICATES)
    sums = bootstrap.replicates.T
    with np.errstate(invalid="ignore", divide="ignore"):
        wanted = np.log(np.clip((sums[1] - sums[0]) / sums[2] / increase, *TIMES))
    known = wanted[np.isfinite(wanted)]  # a replicate may be empty
    low, high = np.log(TIMES)
    steps = np.linspace(low, high, CETT_STEPS)
    steps = steps[steps.searchsorted(known.min(), "right") - 1 : steps.searchsorted(known.max()) + 1]
    ratios = [solver.activation_ratio(min(1.0, cett * math.exp(-step / solved.exponent))) for step in steps]
    return np.interp(wanted, steps, ratios) - solver.activation_ratio(cett)


def _report(
    model: nn.Module,
    batches: Batches,
    solution: _Solution,
    per_token: bool,
    dense: Losses | None,
    work: Work,
) -> SparsityReport:
    with evaluating(model):
        found = Evaluation(model, solution.thresholds, per_token)
        passes, tokens = 1 if solution.known[1] else 2, _tokens(batches)
        read = _counted(checked(model, batches, "evaluation"), passes, tokens, work)
        found.run(read, solution.known if dense is None else (dense, solution.known[1]))
    ratios, ppl_ratios = found.replicates()
    ratios, documents = np.clip(ratios + solution.shift, 0, 1), found.bootstrap.documents
    return SparsityReport(
        metric=solution.metric,
        activation_ratio=found.mean("activation_ratio"),
        standard_error=standard_error(ratios, documents),
        interval=interval(ratios, documents),
        ratio_of_all_neurons=found.mean("ratio_of_all_neurons"),
        cett=found.mean("cett"),
        target_cett=solution.cett,
        nonzero_share=found.mean("nonzero_share"),
        ppl_ratio=ppl_ratio(found.sparse, found.dense),
        ppl_ratio_interval=interval(ppl_ratios, documents),
        loss_dense=found.dense.value,
        loss_sparse=found.sparse.value,
        tokens=found.layers[-1].tokens,
        documents=documents,
        skipped_tokens=sum(tally.skipped for tally in found.layers),
        thresholds=solution.thresholds,
        layers=_layer_table(solution.thresholds, found),
        per_token=pd.concat(found.tables, ignore_index=True) if per_token else None,
        dense=found.dense,
        calibrated_on=solution.calibrated_on,
        note=solution.note,
    )


def _tokens(batches: Batches) -> int | None:
    """Tokens of `batches`, padding included; None where these do not tell before they are read."""
    given = list(batches) if isinstance(batches, Sequence) else [None]
    texts = [batch.get("input_ids") if isinstance(batch, Mapping) else None for batch in given]
    return sum(text.numel() for text in texts) if all(isinstance(text, Tensor) for text in texts) else None


def _counted(batches: Iterable[Batch], passes: int, tokens: int | None, work: Work) -> Iterator[Batch]:
    """Read `batches`, `passes` over each, and tell `work` what is left of their `tokens`.

    None: nobody knows how many follow. As much is expected as `work` expects, then as much again as there was.
    """
    start, expected = work.done, work.left["evaluation"] if tokens is None else passes * tokens
    for batch in batches:
        spent, this = work.done - start, passes * batch.windows * (batch.length or 1)
        work.begin("evaluation", max(expected - spent, spent if tokens is None else 0, this))
        yield batch


def _layer_table(thresholds: Thresholds, found: Evaluation) -> pd.DataFrame:
    """One row per layer: where it is, its threshold, and what `LayerTally` counted there."""
    tallies = found.layers
    return pd.DataFrame(
        {
            "layer": range(len(tallies)),
            "name": [tally.ffn.name for tally in tallies],
            "experts": [tally.ffn.experts for tally in tallies],
            "threshold": thresholds.values,
            "activation_ratio": [tally.activation_ratio for tally in tallies],
            "ratio_of_all_neurons": [tally.ratio_of_all_neurons for tally in tallies],
            "nonzero_share": [tally.nonzero_share for tally in tallies],
            "cett": [tally.cett for tally in tallies],
            "skipped_tokens": [tally.skipped for tally in tallies],
        }
    )
