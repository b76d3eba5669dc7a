"""Training-free rules under one protocol: calibration, allocation and evaluation on documents of their own.

A rule is compared with another at equal sparsity, at equal weights read, or at the sparsity of each that costs one
percent of perplexity. Every number is of the evaluation text, on all of its positions unless a share is left dense.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsity_utils.console import InputError, check, progress
from sparsity_utils.neurons.find import FFN
from sparsity_utils.neurons.hooks import sparse_neurons
from sparsity_utils.neurons.input_rules import INPUT_RULES, TRAINING_FREE, InputRule
from sparsity_utils.neurons.linears import LinearMap, find_linears, sparse_inputs
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.rotations import rotated, rotation_weights
from sparsity_utils.neurons.rules import RULES, CettPpl, Rule
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.down_masks import DownMask
from sparsity_utils.sparsity.evaluation import DocumentBootstrap
from sparsity_utils.sparsity.input_thresholds import (
    STEP,
    Gates,
    KeptInputs,
    block_errors,
    greedy_path,
    sparsities_along,
)
from sparsity_utils.sparsity.inputs import predicts_next_token
from sparsity_utils.sparsity.passes import Batch, checked
from sparsity_utils.sparsity.predictions import token_predictions
from sparsity_utils.sparsity.rule_report import RuleReport, skipped
from sparsity_utils.sparsity.search import find_root
from sparsity_utils.text.overlap import check_disjoint

GREEDY_TO = 0.75
ROOT_SHARE, NARROWEST = 0.02, 1e-3  # a sparsity is solved to 2% of the increase of the loss, or to 0.1 points
REALISED, CORRECTIONS = 0.001, 4  # how near a realised sparsity is brought to the wanted one, and in how many runs
LARGEST = 20.0  # nats: what a model with everything masked is taken to lose at most
Batches = Iterable[Mapping[str, Tensor]]
Mask = Thresholds | DownMask
Counts = dict[int, Tensor | int]


class _Counted:
    """A mask that keeps every input at the first positions, and counts what it keeps on real tokens."""

    def __init__(self, thresholds: Mask, dense_share: float) -> None:
        self.thresholds, self.values, self.dense_share = thresholds, thresholds.values, dense_share
        self.shape: tuple[int, ...] = (0, 0)  # (windows, length)
        self.mask: Tensor | None = None  # which tokens are real; None: all
        self.tokens = 0  # of these
        self.kept: Counts = {}  # map, or layer of an FFN -> inputs or neurons kept
        self.nonzero: Counts = {}  # layer -> neurons with s != 0, or at dense positions
        self.places: dict[int, int] = {}  # map, or layer -> inputs or neurons that it judged, kept or not

    def begin(self, batch: Batch) -> None:
        """`batch` runs next."""
        self.shape, self.mask = tuple(batch.inputs["input_ids"].shape), batch.mask
        self.tokens = batch.inputs["input_ids"].numel() if batch.mask is None else int(batch.mask.sum())

    def active_inputs(self, linear: LinearMap, x: Tensor) -> Tensor:
        active = self._opened(self.thresholds.active_inputs(linear, x))  # type: ignore[union-attr]  # a rule on inputs
        self._count(self.kept, linear.index, active)
        self.places[linear.index] = self.places.get(linear.index, 0) + self.tokens * linear.inputs
        return active

    def active(self, ffn: FFN, s: Tensor, h: Tensor) -> Tensor:
        active = self._opened(self.thresholds.active(ffn, s, h))
        self._count(self.kept, ffn.layer, active)
        self._count(self.nonzero, ffn.layer, self._opened(s != 0))
        self.places[ffn.layer] = self.places.get(ffn.layer, 0) + self.tokens * ffn.d_ff
        return active

    def _opened(self, active: Tensor) -> Tensor:
        """`active` with everything kept at the first positions of each window, in place."""
        positions = active.view(*self.shape, -1)  # (windows, length, in)
        positions[:, : int(self.dense_share * self.shape[1])] = True
        return active

    def _count(self, counts: Counts, key: int, active: Tensor) -> None:
        real = active if self.mask is None else active.view(*self.shape, -1)[self.mask]
        counts[key] = counts.get(key, 0) + real.count_nonzero()  # on its device: a GPU is not waited for

    def share(self, counts: Counts, key: int) -> float:
        return int(counts[key]) / self.places[key]


@dataclass(eq=False)
class TrainingFree:
    """A model with its calibration, allocation and evaluation text, and reports of rules on it."""

    model: PreTrainedModel
    calibration: Batches  # sets thresholds, and the sparsity at a perplexity; batches as `measure_sparsity` takes them
    evaluation: Batches
    allocation: Batches | None = None  # on which greedy allocation compares blocks; needed for that alone
    # Share of the positions of each window, from the first on, that stay dense, rounded down. TEAL's published
    # evaluation leaves half of them dense, WINA's one in a hundred; generation masks all.
    dense_share: float = 0.0
    greedy_step: float = STEP  # of a block's weights
    greedy_to: float = GREEDY_TO  # block sparsity up to which greedy paths are followed
    show_progress: bool = False
    texts: dict[str, list[Batch]] = field(init=False, default_factory=dict)  # by role, checked, on the model's device
    _known: dict = field(init=False, default_factory=dict)  # dense predictions, kept inputs and greedy paths

    def __post_init__(self) -> None:
        """Raises `InputError` for models that do not predict the next token, and for documents in two of the texts."""
        check(predicts_next_token(self.model), f"{type(self.model).__name__} does not predict the next token.")
        check(0 <= self.dense_share < 1, f"dense_share is {self.dense_share}; choose a share of the positions below 1.")
        given = {"calibration": self.calibration, "allocation": self.allocation, "evaluation": self.evaluation}
        for role, batches in given.items():
            if batches is not None:
                self.texts[role] = list(checked(self.model, batches, role))
        check_disjoint({role: _windows(batches) for role, batches in self.texts.items()})

    def at(self, rule: str, sparsity: float, *, greedy: bool = False, rotate: bool = False) -> RuleReport:
        """The report of `rule` at one sparsity: that of each map, with `greedy` the mean of each block.

        Args:
            rule: one of `INPUT_RULES`, or "cats", whose sparsity is that of the neurons.
            greedy: allocate by `greedy_sparsities` on the allocation text.
            rotate: rotate vectors as `neurons.rotations` does.

        Raises `InputError` as `calibrated`, and for "cats" with `greedy` or `rotate`.
        """
        chosen = _rule(rule, greedy, rotate)
        chosen.check_value(sparsity)
        if isinstance(chosen, InputRule) and not greedy:
            chosen.check_sparsity(sparsity, self._widths)
        thresholds = self._thresholds(chosen, sparsity, greedy, rotate)
        return self.evaluated(thresholds, rotate=rotate, calibrated_sparsity=sparsity)

    def at_realised(self, masks: Callable[[float], Mask], sparsity: float) -> RuleReport:
        """The report of the mask with which the model, run sparse, skips `sparsity`.

        Thresholds of a dense run skip more than was asked for, since earlier masks make what later maps see smaller:
        52.1% of SmolLM2's inputs for 50. So the sparsity that is asked for is corrected by what a sparse run of the
        calibration text is off, until it is within REALISED, CORRECTIONS runs at most.

        Args:
            masks: the mask for a sparsity that is asked for.
        """
        maps, correction, asked = self._maps(False), 0.0, sparsity
        for _ in range(CORRECTIONS):
            asked = min(max(asked - correction, 0.0), 1.0)
            mask = masks(asked)
            correction = skipped(_table(maps, mask, self._run("calibration", mask, maps)[1]), mask.rule) - sparsity
            if abs(correction) <= REALISED:
                break
        return self.evaluated(mask, calibrated_sparsity=asked)

    def at_weights_read(self, rule: str, share: float, *, greedy: bool = False, rotate: bool = False) -> RuleReport:
        """As `at`, at the sparsity at which `share` of the weights of all maps is read, rotations included.

        Top-k rules take the nearest sparsity that they can meet. Raises `InputError` where none reads so little.
        """
        chosen, maps = _rule(rule, greedy, rotate), self._maps(rotate)
        total, turning = sum(linear.size for linear in maps), rotation_weights(maps)
        least, most = (
            (sum(linear.size * chosen.map_share(linear.role, kept, 1.0) for linear in maps) + turning) / total
            for kept in (0.0, 1.0)
        )
        possible = least <= share <= most
        check(possible, f"{rule!r} reads {least:.4g} to {most:.4g} of the weights of this model; {share:g} is outside.")
        sparsity = self.nearest(rule, (most - share) / (most - least), greedy=greedy)
        return self.at(rule, sparsity, greedy=greedy, rotate=rotate)

    def at_perplexity(self, rule: str, p: float = 1.0, *, greedy: bool = False, rotate: bool = False) -> RuleReport:
        """As `at`, at the sparsity that raises perplexity by p percent on the calibration text.

        That text also sets the thresholds. Top-k rules take the nearest sparsity that they can meet.
        """
        CettPpl().check_value(p)
        chosen, target = _rule(rule, greedy, rotate), math.log1p(p / 100)
        dense = self._dense("calibration")

        def height(sparsity: float) -> float:
            """Square root of the increase of the loss, which is about straight, less that of the target."""
            sparsity = self.nearest(rule, sparsity, greedy=greedy)
            thresholds = self._thresholds(chosen, sparsity, greedy, rotate)
            sparse = self._run("calibration", thresholds, self._maps(rotate))[0]
            increase = min(float((sparse.sums - dense.sums)[:, 0].sum() / dense.sums[:, 2].sum()), LARGEST)
            return math.copysign(math.sqrt(abs(increase)), increase) - math.sqrt(target)

        most = self.greedy_to if greedy else 1.0
        top = height(most)
        if top <= 0:
            raise InputError(
                f"{rule!r} does not raise perplexity by {p:g}% up to a sparsity of {most:g}: ask for less."
            )
        enough = ROOT_SHARE * math.sqrt(target) / 2
        sparsity = find_root(height, (0.0, -math.sqrt(target)), (most, top), enough, NARROWEST)
        return self.at(rule, self.nearest(rule, sparsity, greedy=greedy), greedy=greedy, rotate=rotate)

    def evaluated(
        self, thresholds: Mask, *, rotate: bool = False, calibrated_sparsity: float | None = None
    ) -> RuleReport:
        """The report under `thresholds` of any rule, such as those of CETT that `measure_sparsity` solved, or a mask.

        rotate: for rules on inputs.
        """
        maps = self._maps(rotate)
        dense = self._dense("evaluation")
        sparse, counted = self._run("evaluation", thresholds, maps)
        table = _table(maps, thresholds, counted)
        documents = self._by_document(dense, sparse)
        bootstrap = DocumentBootstrap(3)
        for row in documents[["document", "loss_dense", "loss", "tokens"]].itertuples(index=False):
            bootstrap.add(int(row[0]), np.array(row[1:]))
        sums = bootstrap.replicates
        with np.errstate(invalid="ignore", divide="ignore"):
            excess = (sums[:, 1] - sums[:, 0]) / sums[:, 2]
        whole = documents.sum()
        head, embeddings = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        return RuleReport(
            rule=thresholds.rule,
            maps_weights=int(table["weights"].sum()),
            maps_read=float((table["weights"] * table["share_read"]).sum()),
            rotation_weights=rotation_weights(maps) if thresholds.rule in INPUT_RULES else 0,
            head_weights=head.weight.numel(),
            embedding_weights=embeddings.weight.shape[1],
            loss_dense=whole["loss_dense"] / whole["tokens"],
            loss_sparse=whole["loss"] / whole["tokens"],
            accuracy_dense=whole["right_dense"] / whole["tokens"],
            accuracy_sparse=whole["right"] / whole["tokens"],
            tokens=int(whole["tokens"]),
            documents=bootstrap.documents,
            by_document=documents,
            excess_replicates=excess,
            maps=table,
            thresholds=thresholds,
            calibrated_sparsity=calibrated_sparsity,
        )

    def path(self, rule: str, rotate: bool = False, known: pd.DataFrame | None = None) -> pd.DataFrame:
        """The path of `greedy_sparsities` on the allocation text; `known`: what this gave before."""
        key = ("path", rule, rotate)
        if known is not None:
            self._known[key] = known
        if key not in self._known:
            batches, maps, chosen = self.texts["allocation"], self._maps(rotate), INPUT_RULES[rule]
            self._known[key] = greedy_path(
                self.model, batches, chosen, self.greedy_to, self.greedy_step, maps, self.show_progress
            )
        return self._known[key]

    def sparsities(self, rule: str, sparsity: float, *, rotate: bool = False) -> list[float]:
        """The sparsity of each map by greedy allocation. Raises `InputError` without allocation text."""
        check(
            "allocation" in self.texts and sparsity <= self.greedy_to,
            f"A greedy allocation needs allocation text, and goes up to a sparsity of {self.greedy_to:g}.",
        )
        return sparsities_along(self.path(rule, rotate), self._maps(rotate), sparsity)

    def nearest(self, rule: str, sparsity: float, *, greedy: bool = False) -> float:
        """The sparsity nearest to this one that `at` takes: top-k rules keep whole numbers of inputs in every map."""
        chosen = _rule(rule, greedy, rotate=False)
        return chosen.nearest(sparsity, self._widths) if isinstance(chosen, InputRule) and not greedy else sparsity

    def thresholds(self, rule: str, sparsity: float, *, greedy: bool = False, rotate: bool = False) -> Thresholds:
        """Those of `at`, which sets them on the calibration text."""
        return self._thresholds(_rule(rule, greedy, rotate), sparsity, greedy, rotate)

    def block_errors(self, thresholds: Sequence[Thresholds], *, rotate: bool = False) -> pd.DataFrame:
        """`input_thresholds.block_errors` on the calibration text."""
        return block_errors(self.model, self.texts["calibration"], thresholds, self._maps(rotate))

    def _by_document(self, dense: "_Scores", sparse: "_Scores") -> pd.DataFrame:
        """Sums over each document of the evaluation text: document, and the columns of `predictions.by_document`."""
        columns = {
            "document": torch.cat([batch.documents for batch in self.texts["evaluation"]]),
            "tokens": dense.sums[:, 2],
            "loss_dense": dense.sums[:, 0],
            "loss": sparse.sums[:, 0],
            "right_dense": dense.sums[:, 1],
            "right": sparse.sums[:, 1],
            "agreed": torch.tensor(
                [int((one == other).sum()) for one, other in zip(dense.likeliest, sparse.likeliest, strict=True)]
            ),
        }
        windows = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
        return windows.groupby("document").sum().reset_index()

    @cached_property
    def _widths(self) -> set[int]:
        return {linear.inputs for linear in find_linears(self.model)}

    @cached_property
    def _rotated(self) -> list[LinearMap]:
        return rotated(self.model, show_progress=self.show_progress)

    @cached_property
    def _gates(self) -> Gates:
        return Gates(self.model, self.texts["calibration"], self.show_progress)

    def _maps(self, rotate: bool) -> list[LinearMap]:
        return self._rotated if rotate else find_linears(self.model)

    def _thresholds(self, rule: Rule, sparsity: float, greedy: bool, rotate: bool) -> Thresholds:
        if not isinstance(rule, InputRule):
            return self._gates.thresholds(sparsity)
        maps = self._maps(rotate)
        if ("inputs", rotate) not in self._known:
            self._known["inputs", rotate] = KeptInputs(self.model, self.texts["calibration"], maps, self.show_progress)
        shares = self.sparsities(rule.name, sparsity, rotate=rotate) if greedy else [sparsity] * len(maps)
        return self._known["inputs", rotate].thresholds(rule, shares, self.show_progress)

    def _dense(self, role: str) -> "_Scores":
        if ("dense", role) not in self._known:
            self._known["dense", role] = self._scored(role, "dense pass")
        return self._known["dense", role]

    def _run(self, role: str, thresholds: Mask, maps: Sequence[LinearMap]) -> tuple["_Scores", _Counted]:
        """What the model predicts under the mask, and what the mask kept."""
        counted = _Counted(thresholds, self.dense_share)
        on_inputs = thresholds.rule in INPUT_RULES
        block = sparse_inputs(self.model, counted, maps) if on_inputs else sparse_neurons(self.model, counted)
        with block:
            return self._scored(role, "sparse pass", counted), counted

    def _scored(self, role: str, about: str, counted: _Counted | None = None) -> "_Scores":
        batches, sums, likeliest = self.texts[role], [], []
        for batch in progress(batches, about, len(batches), self.show_progress):
            if counted is not None:
                counted.begin(batch)
            with evaluating(self.model):
                for one in token_predictions(self.model, batch):
                    right = (one.likeliest == one.target).sum()
                    sums.append(torch.stack([one.loss.double().sum(), right.double()]))
                    likeliest.append(one.likeliest)
        counts = torch.tensor([len(ids) for ids in likeliest])
        return _Scores(torch.column_stack([torch.stack(sums).cpu(), counts]), likeliest)


class _Scores(NamedTuple):
    """What a model predicts of a text, window by window."""

    sums: Tensor  # losses, correct and predicted tokens, (windows, 3) float64, on the CPU
    likeliest: list[Tensor]  # ids


def _rule(name: str, greedy: bool, rotate: bool) -> Rule:
    check(name in TRAINING_FREE, f"The rule is {name!r}; choose one of {', '.join(TRAINING_FREE)}.")
    on_inputs = name in INPUT_RULES
    check(on_inputs or not (greedy or rotate), f"{name!r} is on gates: it is neither allocated greedily nor rotated.")
    return TRAINING_FREE[name]


def _windows(batches: Sequence[Batch]) -> Iterator[tuple[int, np.ndarray]]:
    for batch in batches:
        ids = batch.inputs["input_ids"].cpu()
        real = torch.ones_like(ids, dtype=torch.bool) if batch.mask is None else batch.mask.cpu()
        for document, row, mask in zip(batch.documents.tolist(), ids, real, strict=True):
            yield document, row[mask].numpy()


def _table(maps: Sequence[LinearMap], thresholds: Mask, counted: _Counted) -> pd.DataFrame:
    """One row per linear map: layer, role, weights and the share of them that a token reads."""
    known: dict[str, Rule] = {**INPUT_RULES, **RULES}
    rule = thresholds if isinstance(thresholds, DownMask) else known[thresholds.rule]
    shares = []
    for linear in maps:
        if isinstance(rule, InputRule):
            active, nonzero = counted.share(counted.kept, linear.index), 1.0
        else:
            active, nonzero = (counted.share(counts, linear.layer) for counts in (counted.kept, counted.nonzero))
        shares.append(rule.map_share(linear.role, active, nonzero))
    columns = {name: [getattr(linear, name) for linear in maps] for name in ("layer", "role", "size")}
    return pd.DataFrame(columns | {"share_read": shares}).rename(columns={"size": "weights"})
