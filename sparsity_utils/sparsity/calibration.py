"""Solve the thresholds of CETT and the CETT of CETT-PPL-p% on calibration text (arXiv 2411.02335, section 3, App. E).

The activations of a sample of the calibration windows are kept in memory. On the sample, a point of an error curve
costs one matrix product, and a trial of a CETT costs one short pass. So it tells roughly where the solution lies, and
how thresholds change with the CETT. Then one dense pass over all windows corrects the error curve of each layer by a
factor, and a few sparse passes find the CETT: two or three where perplexity is smooth, up to seven where it is rough
(ReLU 48x4). The memory of activations does not depend on how many calibration tokens there are.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsity_utils.console import InputError, share_bar
from sparsity_utils.neurons.find import FFN, find_ffns, layer_count
from sparsity_utils.neurons.hooks import observe_neurons, sparse_neurons
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.rules import METRICS, CettPpl
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.error_curve import NARROWEST, QUANTILES, WIDTH_SHARE, ErrorCurve, relative_errors
from sparsity_utils.sparsity.passes import Batch, Losses, checked, joined, mean_losses, ppl_ratio, run_backbone
from sparsity_utils.sparsity.search import find_root_near
from sparsity_utils.sparsity.work import Work
from sparsity_utils.text.windows import evenly_spaced

# Perplexity is a rough function of CETT: on 8,192 tokens it wavers by about 1% of a 1% increase. Solving closer than
# that chases the roughness; solving to 1e-8 instead moved activation ratios by 0.1 to 0.2 percentage points.
TOLERANCE = 5e-3  # of log(1 + p/100): at p = 1 the PPL ratio is solved to 5e-5
SAMPLE_TOLERANCE = 0.05  # the same on the sample, whose solution is only a start
THRESHOLD_SHARE = 0.1  # of TOLERANCE: how much closer the CETT of each layer is solved, as a share of the CETT
FALL = 0.05  # of log(1 + p/100): a fall of perplexity as CETT increases that is worth a note
NEAR, ALIGNMENTS = 1.3, 2  # correction factors hold up to 1.3 times the CETT or 1/1.3; else they are measured again
FIRST_GUESS = 0.2  # CETT at p = 1; the increase of the loss is about quadratic in CETT
SAMPLE_TOKENS = 2048  # kept with their activations, 8 bytes per token, neuron and layer in float32
CACHE_BYTES = 2**29  # a large model keeps fewer
ROUTED = 8  # experts that a token is assumed to reach at most, for that estimate

# What progress expects of a search: sparse passes over the sample, the same where the sample is all, and over all
# tokens otherwise; errors of a layer that its first points and then each new CETT take.
SAMPLE_TRIALS, WHOLE_TRIALS, TRIALS = 5, 8, 3
FIRST_ERRORS, ERRORS = len(QUANTILES) + 2, 3


class KeptTokens:
    """Calibration windows with their activations in memory: exact error curves, short passes."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Batch],
        tolerance: float,
        with_loss: bool,
        every: int,
        work: Work,
        tokens: float,
        trials: int,
    ) -> None:
        """Runs one dense pass, keeping `every`-th token; with the language-model head only if `with_loss`.

        `work` is told; `tokens` of the batches and `trials` of a CETT are what it expects.
        """
        self.model, self.batches, self.tolerance = model, batches, tolerance
        self.work, self.tokens, self.trials = work, tokens, trials if with_loss else 0
        self.error_work = tokens / every * work.of_an_error
        self.solved: dict[tuple[float, ...], Thresholds] = {}
        self.dense = Losses()  # of the windows
        self.sparse: dict[float, Losses] = {}  # at each CETT tried
        ffns = {(ffn.layer, ffn.expert): ffn for ffn in find_ffns(model)}
        layers: list[list[tuple[FFN, Tensor]]] = [[] for _ in range(layer_count(list(ffns.values())))]
        self.trial_work = tokens + ERRORS * len(layers) * self.error_work
        first = tokens + FIRST_ERRORS * len(layers) * self.error_work
        work.begin("sample", first + self.trials * self.trial_work)
        kept: dict[tuple[int, int], list[Tensor]] = {place: [] for place in ffns}  # (tokens of a batch, d_ff) each
        for batch in batches:

            def keep(ffn: FFN, s: Tensor, h: Tensor, tokens: Tensor, batch: Batch = batch) -> None:
                kept[ffn.layer, ffn.expert].append(every_nth(h[batch.real(ffn, tokens)], every))

            with observe_neurons(model, keep):
                if with_loss:
                    self.dense.add(model, batch)
                else:
                    run_backbone(model, batch)
        for place, h in kept.items():
            if h:  # an expert may have met no token
                layers[place[0]].append((ffns[place], torch.cat(h)))
        self.curves: list[ErrorCurve] = []
        for parts in layers:
            self.curves.append(ErrorCurve(parts))
            work.add(FIRST_ERRORS * self.error_work)

    def thresholds(self, cetts: Sequence[float]) -> Thresholds:
        """The threshold of each layer at its CETT; a second call gives the same ones."""
        key = tuple(cetts)
        if key not in self.solved:  # a curve that has gained points could find another crossing
            tolerance, values = self.tolerance * THRESHOLD_SHARE, []
            for curve, cett in zip(self.curves, cetts, strict=True):
                known = len(curve.points)
                values.append(curve.threshold(cett, tolerance))
                self.work.add((len(curve.points) - known) * self.error_work)
            self.solved[key] = Thresholds("cett", tuple(values))
        return self.solved[key]

    def ppl_ratio(self, cett: float) -> float:
        """exp(loss_sparse - loss_dense) of the kept windows: one sparse pass."""
        self.work.begin("sample", max(self.trials - len(self.sparse), 1) * self.trial_work)
        with sparse_neurons(self.model, self.thresholds([cett] * len(self.curves))):
            self.sparse[cett] = mean_losses(self.model, self.batches)
        return ppl_ratio(self.sparse[cett], self.dense)


def every_nth(h: Tensor, n: int) -> Tensor:
    """Every n-th row of `h`: `h` itself for n = 1, else a copy, because a view would keep all of its memory."""
    return h if n == 1 else h[::n].clone()


class Calibration:
    """A model and its calibration windows: a kept sample, and passes over all of them.

    Where the sample is the whole, every threshold is exact. Otherwise the threshold of a layer at a CETT is that of the
    sample's curve at factor * CETT. `align` measures the factor: err(eps) of the sample / err(eps) of all tokens, at
    one threshold eps. Near the CETT that it was measured at, the factor hardly changes.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Batch],
        tolerance: float,
        with_loss: bool,
        work: Work | None = None,
    ) -> None:
        """Runs a dense pass over the sample. `work` is told what is done; None: nobody is."""
        self.model, self.batches, self.tolerance, self.with_loss = model, batches, tolerance, with_loss
        self.work = work or Work(model, share_bar("", shown=False))
        self.tokens = sum(batch.windows * (batch.length or _patches(model, batch)) for batch in batches)
        sample, every = _sample(model, batches, self.tokens, with_loss)
        self.whole = sample is batches and every == 1
        self.trials = TRIALS if with_loss else 0  # expected
        self.work.left["calibration"] = 0 if self.whole else (1 + self.trials) * self.tokens
        tokens = self.tokens * sum(batch.windows for batch in sample) / sum(batch.windows for batch in batches)
        trials = WHOLE_TRIALS if self.whole else SAMPLE_TRIALS
        self.sample = KeptTokens(model, sample, tolerance, with_loss, every, self.work, tokens, trials)
        self.factors = [1.0] * len(self.sample.curves)
        self.dense = self.sample.dense if self.whole else Losses()  # of all windows, once `align` has run
        self.sparse: dict[float, Losses] = self.sample.sparse if self.whole else {}  # at each CETT tried

    def align(self, cett: float) -> None:
        """Measure the factor of each layer at `cett` and the dense losses: one dense pass, none for a whole sample."""
        if self.whole:
            return
        self.work.begin("calibration", (1 + self.trials) * self.tokens)
        self.factors, self.sparse = [1.0] * len(self.factors), {}
        thresholds = self.thresholds(cett)
        losses = self.with_loss and not self.dense.sums  # which a second call knows
        errors, counts = [0.0] * len(self.factors), [0] * len(self.factors)
        for batch in self.batches:

            def add(ffn: FFN, s: Tensor, h: Tensor, tokens: Tensor, batch: Batch = batch) -> None:
                real = batch.real(ffn, tokens)
                s, h = s[real], h[real]
                found, zero = relative_errors(ffn, h, thresholds.active(ffn, s, h))
                errors[ffn.layer] += float(found.sum(dtype=torch.float64))
                counts[ffn.layer] += len(h) - int(zero.sum())

            with observe_neurons(self.model, add):
                if losses:
                    self.dense.add(self.model, batch)
                else:
                    run_backbone(self.model, batch)
        for layer, curve in enumerate(self.sample.curves):
            if errors[layer] > 0 and not curve.empty:
                self.factors[layer] = curve.error(thresholds.values[layer]) / (errors[layer] / counts[layer])

    def thresholds(self, cett: float) -> Thresholds:
        """The threshold of each layer at a CETT shared by all; a second call gives the same ones."""
        inside = 0 < cett < 1
        return self.sample.thresholds([min(cett * factor, 1 - 1e-9) if inside else cett for factor in self.factors])

    def ppl_ratio(self, cett: float) -> float:
        """exp(loss_sparse - loss_dense) on all windows: one sparse pass. `align` comes first."""
        self.work.begin("calibration", max(self.trials - len(self.sparse), 1) * self.tokens)
        with sparse_neurons(self.model, self.thresholds(cett)):
            self.sparse[cett] = mean_losses(self.model, self.batches)
        return ppl_ratio(self.sparse[cett], self.dense)

    def losses(self, cett: float) -> Losses:
        """The sparse losses of all windows at `cett`."""
        if cett not in self.sparse:
            self.ppl_ratio(cett)
        return self.sparse[cett]

    def activation_ratio(self, cett: float) -> float:
        """The activation ratio of the sample at `cett`, mean over layers."""
        values = self.thresholds(cett).values
        shares = [curve.activation_ratio(eps) for curve, eps in zip(self.sample.curves, values, strict=True)]
        return math.fsum(shares) / len(shares)


def _sample(model: nn.Module, batches: list[Batch], tokens: int, with_loss: bool) -> tuple[list[Batch], int]:
    """Of `tokens` in `batches` evenly spaced windows with about SAMPLE_TOKENS, and n: memory keeps every n-th token.

    Windows without anything to measure are left out. The sample is `batches` itself where that has no more tokens.
    """
    routed = {ffn.layer: ffn.d_ff * min(ffn.experts, ROUTED) for ffn in find_ffns(model)}
    keepable = max(1, CACHE_BYTES // (8 * sum(routed.values())))
    if tokens <= SAMPLE_TOKENS:
        return batches, max(1, math.ceil(tokens / keepable))
    windows = sum(batch.windows for batch in batches)
    usable = [batch.usable(with_loss) for batch in batches]  # rows
    places = sum(map(len, usable))
    count = min(places, max(1, round(SAMPLE_TOKENS / tokens * windows)))
    chosen = set(evenly_spaced(count, places, centred=True))
    sample, start = [], 0
    for batch, rows in zip(batches, usable, strict=True):
        taken = [row for place, row in enumerate(rows, start) if place in chosen]
        start += len(rows)
        if taken:
            sample.append(batch.rows(torch.tensor(taken)))
    return joined(sample), max(1, math.ceil(tokens / windows * count / keepable))


def _patches(model: nn.Module, batch: Batch) -> int:
    """How many patches a layer sees of one image of `batch`: one short pass tells, since the image does not."""
    seen: list[int] = []
    with observe_neurons(model, lambda ffn, s, h, tokens: seen.append(int(tokens.max()) + 1)):
        run_backbone(model, batch.rows(torch.tensor([0])))
    return max(seen)


@dataclass(frozen=True)
class SolvedCett:
    """The CETT at which the mean PPL ratio of one or several models is 1 + p/100."""

    cett: float
    ppl_ratios: tuple[float, ...]  # of each model at that CETT, on the calibration tokens
    evaluations: int  # values of CETT tried on all tokens: each one sparse pass of each model
    exponent: float  # b, the increase of the loss being about CETT^b from half to one and a half times the solution
    note: str  # empty, or what the reader should know about this solution


def solve_stabilised_cett(
    checkpoint_models: Iterable[nn.Module],
    calibration: Iterable[Mapping[str, Tensor]],
    p: float = 1.0,
    *,
    tolerance: float = TOLERANCE,
) -> SolvedCett:
    """The CETT at which the mean of the models' PPL ratios is 1 + p/100.

    The stabilised protocol of arXiv 2411.02335, App. E, solves it on the last five checkpoints of a run. Then
    `measure_sparsity(model, ..., metric="cett", cett=solved.cett)` applies it to every checkpoint. The models are held
    in memory together, each with its kept sample.

    Args:
        checkpoint_models: loaded models of one shape.
        calibration: batches as `measure_sparsity` takes them.
        p: accepted increase of perplexity in percent, above 0 and at most 100.
        tolerance: accepted error of the log of the mean PPL ratio, as a share of log(1 + p/100).

    Raises `InputError` for p outside its range, no models, and unusable batches.
    """
    METRICS[CettPpl.name].check_value(p)
    calibration = list(calibration)
    calibrations = []
    for model in checkpoint_models:
        with evaluating(model):
            batches = list(checked(model, calibration, "calibration"))
            calibrations.append(Calibration(model, batches, tolerance, with_loss=True))
    if not calibrations:
        raise InputError("No checkpoint models were given: a stabilised CETT needs at least one, usually five.")
    return solve_cett(calibrations, p)


def solve_cett(calibrations: list[Calibration], p: float) -> SolvedCett:
    """As `solve_stabilised_cett`, on calibrations already made: first on their samples, then on all windows.

    The samples are also tried at half and at one and a half times their solution. That gives the slope for the search
    on all windows, and may show that perplexity does not increase with CETT throughout.
    """
    guess, tolerance = min(FIRST_GUESS * math.sqrt(p), 0.9), calibrations[0].tolerance
    sample = PplIncrease([calibration.sample for calibration in calibrations], p)
    whole = all(calibration.whole for calibration in calibrations)
    cett = sample.solve(guess, math.sqrt(sample.target) / guess, tolerance if whole else SAMPLE_TOLERANCE)
    guess = cett or min(tried for tried in sample.tried if tried > 0)
    low, high = guess / 2, min(1.5 * guess, 1.0)
    slope = (sample.height(high) - sample.height(low)) / (high - low)
    increase = sample
    for _ in range(0 if whole else ALIGNMENTS):
        for calibration in calibrations:
            with evaluating(calibration.model):
                calibration.align(guess)
        increase = PplIncrease(calibrations, p)
        cett = increase.solve(guess, slope, tolerance)
        if cett in (0, 1) or guess / NEAR <= cett <= guess * NEAR:
            break
        guess = cett  # the factors measured there do not hold here
    for probe in (low, high) if not whole else ():
        if probe in sample.falls(FALL):  # is it noise of the few tokens of the sample? All tokens tell
            increase.height(probe)
    note = ""
    if cett == 0:
        note = f"every CETT tried raises perplexity by more than {p:g}%; CETT 0 was used"
    elif cett == 1 and _log_mean(increase.tried[1.0]) < increase.target * (1 - tolerance):
        note = f"no CETT in [0, 1] raises perplexity by {p:g}%; CETT 1 was used"
    elif increase.falls(FALL):
        note = "perplexity did not rise with CETT throughout; the solution found may be one of several"
    return SolvedCett(cett, increase.tried[cett], len(increase.tried), sample.exponent(low, high), note)


class PplIncrease:
    """How the mean PPL ratio of several models increases with CETT: the CETTs tried so far, and a search for one.

    y = log(mean PPL ratio) is about quadratic in CETT. The root finder works on its signed square root, which is almost
    straight and zero at CETT 0. The target is y = log(1 + p/100).
    """

    def __init__(self, measured: Sequence[KeptTokens | Calibration], p: float) -> None:
        self.measured, self.target = measured, math.log1p(p / 100)
        self.tried: dict[float, tuple[float, ...]] = {}  # CETT -> PPL ratio of each model

    def height(self, cett: float) -> float:
        """sign(y) sqrt(|y|) - sqrt(target) at `cett`."""
        if cett not in self.tried:
            ratios = []
            for one in self.measured:
                with evaluating(one.model):
                    ratios.append(one.ppl_ratio(cett))
            self.tried[cett] = tuple(ratios)
        increase = _log_mean(self.tried[cett])
        return math.copysign(math.sqrt(abs(increase)), increase) - math.sqrt(self.target)

    def solve(self, guess: float, slope: float, tolerance: float) -> float:
        """The CETT at which y is the target, up to the share `tolerance` of it; 1 where y stays below.

        `slope` is what is known of d height / d CETT at the `guess`.
        """
        enough = tolerance * math.sqrt(self.target) / 2  # d sqrt(y) = dy / (2 sqrt(y))
        width = max(tolerance * WIDTH_SHARE, NARROWEST)
        cett = find_root_near(self.height, (0.0, -math.sqrt(self.target)), guess, slope, 1.0, enough, width)
        self.height(cett)  # CETT 0, where already the first step of perplexity is above the target, was not tried
        return cett

    def exponent(self, low: float, high: float) -> float:
        """d log y / d log CETT between two CETTs tried; 2 where perplexity does not increase."""
        below, above = (_log_mean(self.tried[cett]) for cett in (low, high))
        return math.log(above / below) / math.log(high / low) if 0 < below < above else 2.0

    def falls(self, slack: float) -> list[float]:
        """The CETTs tried at which y is more than `slack` * target below the y of the next smaller CETT."""
        tried = [(0.0, 0.0), *((cett, _log_mean(self.tried[cett])) for cett in sorted(self.tried))]
        return [cett for (_, before), (cett, after) in pairwise(tried) if after < before - slack * self.target]


def _log_mean(ratios: tuple[float, ...]) -> float:
    return math.log(math.fsum(ratios) / len(ratios))
