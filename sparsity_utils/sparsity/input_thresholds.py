"""Thresholds of rules on the inputs of linear maps, from calibration text; one sparsity for all maps, or greedy ones.

Every threshold is the empirical quantile of a map's scores on the tokens that are kept, at the sparsity of that map.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from sparsity_utils.console import check, progress
from sparsity_utils.neurons.find import FFN, find_ffns, layer_count, widened
from sparsity_utils.neurons.hooks import observe_neurons
from sparsity_utils.neurons.input_rules import INPUT_RULES, TRAINING_FREE, Cats, InputRule
from sparsity_utils.neurons.linears import LinearMap, by_vector, find_linears, observe_inputs, sparse_inputs
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.rules import Fat
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.passes import Batch, checked, run_backbone

KEPT_BYTES = 2**29  # of kept inputs: SmolLM2-135M in float32 keeps 1,370 tokens, 0.8 or 2.1 million scores of a map
STEP = 0.01  # of a block's weights: what one step of the greedy allocation skips
Batches = Iterable[Mapping[str, Tensor]]


class KeptInputs:
    """The vectors that linear maps read on calibration tokens, in memory."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], maps: Sequence[LinearMap], show_progress: bool = False
    ) -> None:
        """Runs a dense pass over `batches`, keeping every n-th real token so that KEPT_BYTES suffice."""
        self.maps = list(maps)
        width = sum(readers[0].inputs for readers in by_vector(self.maps))
        self.every = thinning(batches, width * next(model.parameters()).element_size())
        parts: dict[tuple[int, str], list[Tensor]] = {}
        rows: Tensor

        def keep(readers: list[LinearMap], x: Tensor) -> None:
            parts.setdefault((readers[0].layer, readers[0].vector), []).append(x[rows].clone())

        for batch in progress(batches, "dense pass", len(batches), show_progress):
            rows = real_rows(batch)[:: self.every]
            with evaluating(model), observe_inputs(model, keep, self.maps):
                run_backbone(model, batch)
        self.x = {place: torch.cat(found) for place, found in parts.items()}
        self._sorted: tuple[str, list[Tensor | None]] = ("", [])  # the rule asked for last, and its scores

    def scores(self, rule: InputRule, linear: LinearMap) -> Tensor | None:
        """The scores of one map on all kept tokens, sorted, (tokens * in,); None where the rule needs none."""
        if rule.per_token:
            return None
        x = self.x[linear.layer, linear.vector]
        return ascending(rule.scores(linear, widened(linear.coordinates(x)).abs()).flatten())

    def thresholds(self, rule: InputRule, sparsities: Sequence[float], show_progress: bool = False) -> Thresholds:
        """Thresholds at which each map skips its own of `sparsities` on the kept tokens."""
        if self._sorted[0] != rule.name:  # scores of one rule are as many numbers as are kept, or half more
            maps = progress(self.maps, "thresholds", len(self.maps), show_progress)
            self._sorted = ("", [])
            self._sorted = (rule.name, [self.scores(rule, linear) for linear in maps])
        parts = zip(self.maps, sparsities, self._sorted[1], strict=True)
        return Thresholds(rule.name, tuple(rule.value(*part) for part in parts))


def thinning(batches: Sequence[Batch], nbytes: int) -> int:
    """The n of which every n-th token of `batches` fits into KEPT_BYTES, at `nbytes` a token."""
    tokens = sum(batch.inputs["input_ids"].numel() for batch in batches)
    return max(1, math.ceil(tokens * nbytes / KEPT_BYTES))


def ascending(values: Tensor) -> Tensor:
    """`values` sorted, (n,). NumPy sorts 2 million floats in a tenth of torch's time on a CPU."""
    return values.sort().values if values.is_cuda else torch.from_numpy(np.sort(values.numpy()))


def real_rows(batch: Batch) -> Tensor:
    """Which rows of a batch, flattened, are no padding, (rows,)."""
    ids = batch.inputs["input_ids"]
    mask = torch.ones_like(ids, dtype=torch.bool) if batch.mask is None else batch.mask
    return mask.flatten().nonzero().flatten()


def calibrated(
    model: nn.Module,
    calibration: Batches,
    rule: str,
    sparsity: float,
    *,
    maps: Sequence[LinearMap] | None = None,
    show_progress: bool = False,
) -> Thresholds:
    """The thresholds of `rule` at which every linear map, or for "cats" the FFN of every layer, has this `sparsity`.

    Args:
        calibration: batches as `measure_sparsity` takes them.
        rule: one of `INPUT_RULES`, or "cats".
        sparsity: share of a map's inputs, for "cats" of the neurons, that is skipped.
        maps: as `find_linears` or `rotated` give them; None: without rotation.

    Raises `InputError` for an unknown rule, a sparsity outside 0 to 1, one that a top-k rule cannot meet by a whole
    number of inputs, and unusable batches.
    """
    check(rule in TRAINING_FREE, f"The rule is {rule!r}; choose one of {', '.join(TRAINING_FREE)}.")
    if rule == Cats.name:
        Cats().check_value(sparsity)
        return Gates(model, list(checked(model, calibration, "calibration")), show_progress).thresholds(sparsity)
    maps = find_linears(model) if maps is None else list(maps)
    INPUT_RULES[rule].check_sparsity(sparsity, {linear.inputs for linear in maps})
    kept = KeptInputs(model, list(checked(model, calibration, "calibration")), maps, show_progress)
    return kept.thresholds(INPUT_RULES[rule], [sparsity] * len(maps), show_progress)


class Gates:
    """The sizes |s| of the neurons of every layer on calibration tokens, sorted, in memory."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], show_progress: bool = False) -> None:
        """Runs a dense pass over `batches`, keeping every n-th real token so that KEPT_BYTES suffice."""
        ffns = find_ffns(model)
        every = thinning(batches, 4 * sum({ffn.layer: ffn.d_ff for ffn in ffns}.values()))
        layers: list[list[Tensor]] = [[] for _ in range(layer_count(ffns))]
        rows: Tensor

        def keep(ffn: FFN, s: Tensor, h: Tensor, tokens: Tensor) -> None:
            layers[ffn.layer].append(widened(s[rows]).abs().flatten())

        for batch in progress(batches, "dense pass", len(batches), show_progress):
            rows = real_rows(batch)[::every]
            with evaluating(model), observe_neurons(model, keep):
                run_backbone(model, batch)
        self.sizes = [ascending(torch.cat(found)) for found in layers]

    def thresholds(self, sparsity: float) -> Thresholds:
        """Thresholds at which each layer leaves out `sparsity` of its neurons on the kept tokens."""
        return Thresholds(Fat.name, tuple(smallest_kept(sizes, sparsity) for sizes in self.sizes))


def smallest_kept(ordered: Tensor, share: float) -> float:
    """The smallest of `ordered`, (n,) ascending, that is kept where `share` of them are left out; inf if all are."""
    skipped = round(share * len(ordered))
    return math.inf if skipped == len(ordered) else float(ordered[skipped])


class _Trial:
    """Thresholds that change from one pass of a block to the next."""

    def __init__(self, rule: InputRule, values: list[float]) -> None:
        self.rule, self.values = rule, values

    def active_inputs(self, linear: LinearMap, x: Tensor) -> Tensor:
        return self.rule.active(linear, widened(x).abs(), self.values[linear.index])


class _Block:
    """A block of the model with its calls on allocation text: its maps can be masked and its output compared."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], rule: InputRule, maps: Sequence[LinearMap]) -> None:
        """Runs a dense pass."""
        self.module, self.maps = model.get_submodule(maps[0].block), list(maps)
        self.calls: list[tuple[tuple, dict]] = []
        handle = self.module.register_forward_pre_hook(
            lambda module, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True
        )
        try:
            kept = KeptInputs(model, batches, maps)
        finally:
            handle.remove()
        self.scores = {linear: kept.scores(rule, linear) for linear in self.maps}
        self.rows = [real_rows(batch) for batch in batches]
        self.dense = [self._output(place) for place in range(len(self.calls))]

    def _output(self, place: int) -> Tensor:
        """Output of the block on one batch, (real tokens, d)."""
        args, kwargs = self.calls[place]
        return _rows_of(self.module(*args, **kwargs), self.rows[place])

    def error(self) -> float:
        """Mean over tokens of ||y - y_dense|| / ||y_dense||, y being the output of the block."""
        errors = [_relative(self._output(place), dense) for place, dense in enumerate(self.dense)]
        return sum(errors) / sum(map(len, self.dense))


def block_errors(
    model: nn.Module, batches: Sequence[Batch], thresholds: Sequence[Thresholds], maps: Sequence[LinearMap]
) -> pd.DataFrame:
    """Mean over tokens of ||y - y_dense|| / ||y_dense||, y being the output of a block on the input of the dense run.

    Returns one row per block and one column for each of `thresholds`, which are of rules on inputs.
    """
    modules = [model.get_submodule(name) for name in dict.fromkeys(linear.block for linear in maps)]
    calls: list[tuple[tuple, dict, Any]] = []
    sums, tokens = np.zeros((len(modules), len(thresholds))), 0

    def keep(module: nn.Module, *call: Any) -> None:
        calls.append(call)

    for batch in batches:
        rows = real_rows(batch)
        calls.clear()
        with evaluating(model):
            with ExitStack() as stack:
                for module in modules:
                    stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
                run_backbone(model, batch)
            dense = [_rows_of(out, rows) for _, _, out in calls]
            for column, values in enumerate(thresholds):
                with sparse_inputs(model, values, maps):
                    for place, (module, (args, kwargs, _)) in enumerate(zip(modules, calls, strict=True)):
                        sums[place, column] += _relative(_rows_of(module(*args, **kwargs), rows), dense[place])
        tokens += len(rows)
    return pd.DataFrame(sums / tokens)


def _rows_of(output: Any, rows: Tensor) -> Tensor:
    """What a block returned, on real tokens, (tokens, d), float32 or wider."""
    return widened(output if isinstance(output, Tensor) else output[0]).flatten(0, -2)[rows]


def _relative(y: Tensor, dense: Tensor) -> float:
    """Sum over tokens of ||y - dense|| / ||dense||; both (tokens, d)."""
    off = torch.linalg.vector_norm(y - dense, dim=-1)
    return float((off / torch.linalg.vector_norm(dense, dim=-1)).sum(dtype=torch.float64))


def greedy_sparsities(
    model: nn.Module,
    batches: Batches,
    rule: str,
    sparsity: float,
    *,
    step: float = STEP,
    maps: Sequence[LinearMap] | None = None,
    show_progress: bool = False,
) -> tuple[list[float], pd.DataFrame]:
    """The sparsity of each map by TEAL's greedy allocation (arXiv 2408.14690, section 4), and the path to it.

    In each block all maps start at zero. At each step one of them skips more: the one with which the block's output
    errs least, the mean over all tokens of ||y - y_dense|| / ||y_dense||. A step is `step` of the block's weights,
    whichever map takes it; a map of which less is left takes that, and the last step is what is left to `sparsity`. The
    input of the block is that of the dense run.

    Args:
        batches: allocation text, as `measure_sparsity` takes it.
        rule: one of `INPUT_RULES`. Top-k rules round each map to whole inputs.
        maps: as `find_linears` or `rotated` give them; None: without rotation.

    Returns: a sparsity for each map, whose mean by weights is `sparsity` in every block, and one row per step: layer,
        sparsity of the block, role of the map that took it, error, and the sparsity of each map by role.

    Raises `InputError` as `calibrated`, and for a step outside 0 to 1.
    """
    check(rule in INPUT_RULES, f"The rule is {rule!r}; choose one of {', '.join(INPUT_RULES)}.")
    chosen = INPUT_RULES[rule]
    chosen.check_value(sparsity)
    check(0 < step <= 1, f"step is {step}; choose a share of a block's weights, above 0 and at most 1.")
    maps = find_linears(model) if maps is None else list(maps)
    path = greedy_path(model, list(checked(model, batches, "allocation")), chosen, sparsity, step, maps, show_progress)
    return sparsities_along(path, maps, sparsity), path


def greedy_path(
    model: nn.Module,
    batches: Sequence[Batch],
    rule: InputRule,
    sparsity: float,
    step: float,
    maps: Sequence[LinearMap],
    show_progress: bool = False,
) -> pd.DataFrame:
    """The path of `greedy_sparsities`, on batches already checked."""
    blocks: dict[int, list[LinearMap]] = {}
    for linear in maps:
        blocks.setdefault(linear.layer, []).append(linear)
    rows = []
    with evaluating(model):
        for own in progress(blocks.values(), "allocation", len(blocks), show_progress):
            rows += _greedy(model, _Block(model, batches, rule, own), rule, maps, sparsity, step)
    return pd.DataFrame(rows, columns=["layer", "sparsity", "role", "error", *dict.fromkeys(one.role for one in maps)])


def sparsities_along(path: pd.DataFrame, maps: Sequence[LinearMap], sparsity: float) -> list[float]:
    """The sparsity of each map where its block's greedy `path` reaches `sparsity`, straight lines between steps."""
    found = []
    for linear in maps:
        rows = path[path["layer"] == linear.layer]
        found.append(float(np.interp(sparsity, [0.0, *rows["sparsity"]], [0.0, *rows[linear.role]])))
    return found


def _greedy(
    model: nn.Module, block: _Block, rule: InputRule, maps: Sequence[LinearMap], target: float, step: float
) -> list[dict]:
    """The steps of one block, each a row of the path."""
    total = sum(linear.size for linear in block.maps)
    trial = _Trial(rule, [0.0] * len(maps))
    now = dict.fromkeys(block.maps, 0.0)

    def set_to(linear: LinearMap, share: float) -> None:
        trial.values[linear.index] = rule.value(linear, share, block.scores[linear])

    rows: list[dict] = []
    with sparse_inputs(model, trial, maps):
        for linear in block.maps:
            set_to(linear, 0.0)
        reached = 0.0
        while reached < target - 1e-12:
            skipped = min(step, target - reached) * total  # weights
            errors = {}
            for linear in block.maps:
                if now[linear] < 1:
                    set_to(linear, min(1.0, now[linear] + skipped / linear.size))
                    errors[linear] = block.error()
                    set_to(linear, now[linear])
            best = min(errors, key=errors.__getitem__)
            now[best] = min(1.0, now[best] + skipped / best.size)
            set_to(best, now[best])
            reached = sum(now[linear] * linear.size for linear in block.maps) / total
            row = {"layer": best.layer, "sparsity": reached, "role": best.role, "error": errors[best]}
            rows.append(row | {linear.role: share for linear, share in now.items()})
    return rows
