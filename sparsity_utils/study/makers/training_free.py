"""Training-free rules in one protocol: what notebook 10 measures, on a pretrained model and on trained decoders.

The measurement is cut into pieces, one of each setting. One window of each document is read, the middle one. The
documents that set thresholds, those that a greedy allocation compares blocks on, and those that all is judged on are
different ones.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsity_utils.console import InputError, check, short_number
from sparsity_utils.neurons.input_rules import INPUT_RULES, Cats
from sparsity_utils.neurons.linears import LinearMap, find_linears, observe_inputs
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.rotations import rotated
from sparsity_utils.sparsity.down_masks import ALLOCATIONS, SCORES, DownScores
from sparsity_utils.sparsity.optimality import check_lemma, check_stack, counter_example, diagonalised
from sparsity_utils.sparsity.passes import run_backbone
from sparsity_utils.sparsity.rule_report import RuleReport
from sparsity_utils.sparsity.training_free import GREEDY_TO, TrainingFree
from sparsity_utils.study.makers.maker import Asked, Maker
from sparsity_utils.study.makers.pieces import Frames, Pieces, measurement_key
from sparsity_utils.study.makers.pretrained import middle_windows, not_here, opened, pinned
from sparsity_utils.study.opened_models import TrainingFreeConfig
from sparsity_utils.study.plan import TRAINING_FREE_TABLES, planned
from sparsity_utils.study.profiles import Profile
from sparsity_utils.text.corpus import Corpus
from sparsity_utils.text.overlap import distinct
from sparsity_utils.text.windows import read_documents, split_documents

VERSION = 1  # raise it when the same settings would measure other numbers
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}  # 200 MB and 3.2 GB of float32 logits at a vocabulary of 49,152
VECTORS = 64  # that the printed theory is checked on, of each map
BEYOND = 0.05  # of a block: how far greedy paths go beyond the largest sparsity, which top-k rules round
QUARTER = 0.25  # sparsity of TEAL that is measured in any case, for the claims on it
HALF = 0.5  # block sparsity at which greedy and uniform allocation are compared block by block
TRIALS = {"perplexity": 9, "sparsity": 2}  # passes over calibration text in which a setting is solved, about
EXAMPLE = "example"  # a model of no weights: the counter-example among the checks of the printed theory
TOP_K = [name for name, rule in INPUT_RULES.items() if rule.per_token]
# A masked pass of SmolLM2-135M over 2,048 tokens on two quiet cores, as `Pieces` counts cost.
SECONDS_PER_TOKEN_AND_PARAMETER = 2.5e-11

DOCUMENT_COLUMNS = (  # of the table training_free_documents
    *("document", "tokens", "loss_dense", "loss", "right_dense", "right", "agreed"),
    *("method", "allocation", "by", "level", "rotated", "model", "seed"),
)

Texts = tuple[list[dict[str, Tensor]], list[dict[str, Tensor]], list[dict[str, Tensor]]]  # of each role, in this order
ROLES = ("calibration", "allocation", "evaluation")


@dataclass(frozen=True)
class Setting:
    """One way to leave weights out, and how much of it."""

    method: str  # a key of INPUT_RULES, "cats", or a score of masks on the down projection: "gate", "h", "n"
    allocation: str  # "uniform" or "greedy"; of masks on the down projection "top-k", "shared" or "cett"
    by: str  # what `level` is: "sparsity", "weights" (share of all maps that is read) or "perplexity" (percent)
    level: float
    rotated: bool = False

    @property
    def name(self) -> str:
        """Of its piece."""
        return f"{self.method}-{self.allocation}{'-rotated' * self.rotated}-{self.by}-{self.level:g}"


def settings_of(sparsities: Sequence[float], prices: Sequence[float]) -> list[Setting]:
    """All that is measured of a model; what the claims need first."""
    found = [Setting("teal", "uniform", "sparsity", QUARTER)] if QUARTER not in sparsities else []
    for share in sorted(sparsities, key=lambda share: abs(share - HALF)):
        found += [Setting(rule, "uniform", "sparsity", share) for rule in (*INPUT_RULES, Cats.name)]
        found += [Setting("teal", "greedy", "sparsity", share), Setting("wina", "uniform", "weights", 1 - share, True)]
        found += [Setting(score, allocation, "sparsity", share) for score, allocation in product(SCORES, ALLOCATIONS)]
    for price in prices:
        found += [Setting(rule, "uniform", "perplexity", price) for rule in ("teal", "wina", "was", Cats.name)]
        found += [Setting("teal", "greedy", "perplexity", price), Setting("wina", "uniform", "perplexity", price, True)]
    return found


def read_text(tokenizer: PreTrainedTokenizerBase, english: str | None, settings: TrainingFreeConfig) -> Texts:
    """Windows of English documents: of the file or folder `english`, or prose of the pinned packages.

    Raises InputError for a text with too few documents.
    """
    documents = read_documents(Path(english)) if english else pinned("python-prose")
    windows = middle_windows(tokenizer, documents, settings.window)
    return _divided(windows, settings, "evaluation_tokens", settings.window, "The English text")


def corpus_text(corpus: Corpus, context: int, settings: TrainingFreeConfig) -> Texts:
    """Windows of a study's own validation documents, `context` tokens each. Raises InputError for too few."""
    tokens, documents = corpus.tokens("validation"), corpus.documents("validation")
    files = documents["name"].str.replace(r"#\d+$", "", regex=True)  # a long file comes in parts

    def middle() -> Iterator[list[int]]:
        for row in documents[~files.duplicated()].itertuples():
            if windows := (row.stop - row.start) // context:
                start = row.start + (windows - 1) // 2 * context
                yield tokens[start : start + context].astype(np.int64).tolist()

    return _divided(middle(), settings, "decoder_tokens", context, "The validation text")


def _divided(
    windows: Iterable[Sequence[int]], settings: TrainingFreeConfig, evaluation: str, length: int, about: str
) -> Texts:
    sizes = (settings.calibration_tokens, settings.allocation_tokens, getattr(settings, evaluation))
    calibration, allocation, evaluated = (max(1, tokens // length) for tokens in sizes)
    count = calibration + allocation + evaluated
    ids = torch.tensor([window for _, window in zip(range(count), distinct(windows), strict=False)])
    check(
        len(ids) == count,
        f"{about} has {len(ids)} documents of {length} tokens, and {count} are asked for, one window of each; give "
        f"more text, or lower training_free.{evaluation}.",
    )
    one = [{"input_ids": ids, "documents": torch.arange(count)}]
    first, rest = split_documents(one, calibration / count)
    second, third = split_documents(rest, allocation / (count - calibration))
    return first, second, third


def batched(batches: list[dict[str, Tensor]], tokens: int) -> list[dict[str, Tensor]]:
    """The rows of one batch in batches of about so many tokens."""
    (whole,) = batches
    size = max(1, tokens // whole["input_ids"].shape[1])
    parts = {name: values.split(size) for name, values in whole.items()}
    return [dict(zip(parts, rows, strict=True)) for rows in zip(*parts.values(), strict=True)]


def measured(
    about: dict[str, Any],
    model: PreTrainedModel,
    texts: Texts,
    sparsities: Sequence[float],
    prices: Sequence[float],
    settings: TrainingFreeConfig,
    folder: Path,
    decoder: bool = False,
) -> Frames:
    """The tables of `plan.TRAINING_FREE_TABLES` of a model; results/columns.csv describes them.

    Pieces that are already in `folder` are not measured again; each model, text and setting has a folder of its own.

    Args:
        about: columns that name the model: model, seed.
        decoder: one of the study's own, of which several seeds are measured: its stacks are checked, and sums by
            document are not stored.

    Raises InputError for a model that cannot be measured.
    """
    greedy_to = GREEDY_TO if prices else max(sparsities) + BEYOND
    return _Work(about, model, texts, settings, folder, decoder, greedy_to).tables(settings_of(sparsities, prices))


def example_table() -> pd.DataFrame:
    """The two-by-two counter-example to Theorem 3.2 as rows of training_free_theory."""
    found = check_stack(*counter_example(), share=0.5)
    return pd.DataFrame([{"model": EXAMPLE, "check": "stack", **found._asdict()}])


class _Work:
    """What is measured of one model."""

    def __init__(
        self,
        about: dict[str, Any],
        model: PreTrainedModel,
        texts: Texts,
        settings: TrainingFreeConfig,
        folder: Path,
        decoder: bool,
        greedy_to: float,
    ) -> None:
        self.about, self.model, self.settings = about, model, settings
        self.decoder, self.greedy_to = decoder, greedy_to
        size = BATCH_TOKENS[model.device.type]
        self.texts = dict(zip(ROLES, (batched(part, size) for part in texts), strict=True))
        self.tokens = {role: part[0]["input_ids"].numel() for role, part in zip(ROLES, texts, strict=True)}
        weights = sum(parameter.numel() for parameter in model.parameters())
        seed = f" seed {about['seed']}" if decoder else ""
        title = f"{about['model']}{seed}, {short_number(weights)} parameters"
        key = _key(model, texts, settings)
        self.pieces = Pieces(folder / key, title, weights * SECONDS_PER_TOKEN_AND_PARAMETER)

    @cached_property
    def judge(self) -> TrainingFree:
        """The protocol on these texts."""
        calibration, allocation, evaluation = (self.texts[role] for role in ROLES)
        step = self.settings.greedy_step
        return TrainingFree(self.model, calibration, evaluation, allocation, greedy_step=step, greedy_to=self.greedy_to)

    @cached_property
    def down(self) -> DownScores:
        """Neurons on the calibration text."""
        return DownScores(self.model, self.judge.texts["calibration"])

    def tables(self, settings: list[Setting]) -> Frames:
        """All pieces, put together."""
        plan = self._plan(settings)
        found: dict[str, list[pd.DataFrame]] = {}
        total = sum(cost for _, cost, _ in plan)
        with self.pieces.shown(self.model.base_model, total), evaluating(self.model):
            for place, cost, measure in plan:
                for table, frame in self.pieces.kept(place, cost, measure).items():
                    if table == "path":
                        self.judge.path("teal", known=frame)
                    else:
                        found.setdefault(table, []).append(frame)
        return {
            table: pd.concat([frame.assign(**self.about) for frame in frames], ignore_index=True)
            for table, frames in found.items()
        }

    def _plan(self, settings: list[Setting]) -> list[tuple[str, int, Callable[[], Frames]]]:
        """Name, expected cost in tokens and measurement of every piece."""
        steps = round(self.greedy_to / self.settings.greedy_step) * 7  # trials, one for each map of a block
        calibration, allocation, evaluation = (self.tokens[role] for role in ROLES)
        plan: list[tuple[str, int, Callable[[], Frames]]] = [
            (f"path-{self.greedy_to:g}", steps * allocation, lambda: {"path": self.judge.path("teal")}),
            ("theory", 2 * VECTORS, lambda: {"training_free_theory": self.theory()}),
            ("blocks", 3 * calibration, lambda: {"training_free_blocks": self.blocks()}),
        ]
        for setting in settings:
            trials = TRIALS.get(setting.by, 0)
            plan.append((setting.name, evaluation + trials * calibration, partial(self.reported, setting)))
        return plan

    def reported(self, setting: Setting) -> Frames:
        """The row of a setting, and sums over its documents where they are stored."""
        try:
            report = self._report(setting)
        except InputError as error:  # a rise of perplexity that no mask reaches, as of random weights
            if setting.by != "perplexity":
                raise
            return {"training_free": pd.DataFrame([{**asdict(setting), "note": str(error)}])}
        row = {**asdict(setting), **_numbers(report)}
        frames = {"training_free": pd.DataFrame([row])}
        if not self.decoder:
            frames["training_free_documents"] = report.by_document.assign(**asdict(setting))
        return frames

    def _report(self, setting: Setting) -> RuleReport:
        method, level, judge = setting.method, setting.level, self.judge
        options = {"greedy": setting.allocation == "greedy", "rotate": setting.rotated}
        if setting.by == "perplexity":
            return judge.at_perplexity(method, level, **options)
        if setting.by == "weights":
            return judge.at_weights_read(method, level, **options)
        if method in SCORES:
            return judge.at_realised(partial(self.down.mask, method, setting.allocation), level)
        if method in TOP_K:
            return judge.at(method, self.nearest(level))
        return judge.at_realised(partial(judge.thresholds, method, greedy=options["greedy"]), self.nearest(level))

    def nearest(self, level: float) -> float:
        """The sparsity nearest to `level` that top-k rules can meet in all maps: the same for all rules."""
        return self.judge.nearest("wina", level)

    def blocks(self) -> pd.DataFrame:
        """Error of each block under the uniform and the greedy thresholds of TEAL, and the greedy sparsities."""
        level = self.nearest(HALF)
        pair = [self.judge.thresholds("teal", level, greedy=greedy) for greedy in (False, True)]
        errors = self.judge.block_errors(pair).set_axis(["uniform", "greedy"], axis=1)
        places = pd.MultiIndex.from_tuples([(linear.layer, linear.role) for linear in find_linears(self.model)])
        shares = pd.Series(self.judge.sparsities("teal", level), places)
        return errors.assign(sparsity=level, layer=range(len(errors))).join(shares.unstack(), on="layer")

    def theory(self) -> pd.DataFrame:
        """Lemma 3.1 on rotated k and gate of every block, half of the inputs kept; Theorem 3.2 on up and down."""
        maps, seen = rotated(self.model), dict[tuple[int, str], Tensor]()

        def keep(readers: list[LinearMap], x: Tensor) -> None:
            seen[readers[0].layer, readers[0].vector] = x[:: max(1, len(x) // VECTORS)][:VECTORS].double()

        with observe_inputs(self.model, keep, maps):
            run_backbone(self.model, self.judge.texts["calibration"][0])
        rows = []
        for linear in maps:
            if linear.role in ("k", "gate"):
                basis, x = linear.basis, seen[linear.layer, linear.vector]
                weight, v = diagonalised(linear.weight.double())  # once more: the basis is of the model's dtype
                found = check_lemma(weight, x @ basis.into.double().mT @ v, linear.inputs // 2)
                rows.append({"layer": linear.layer, "check": f"lemma {linear.role}", **found._asdict()})
        plain = {(linear.layer, linear.role): linear for linear in find_linears(self.model)} if self.decoder else {}
        for (layer, role), linear in plain.items():
            if role == "down":
                second, v = diagonalised(linear.weight)
                first = v.mT @ plain[layer, "up"].weight.double()
                stack = check_stack(first, second, seen[layer, "ffn"], HALF)
                rows.append({"layer": layer, "check": "stack", **stack._asdict()})
        return pd.DataFrame(rows)


def _numbers(report: RuleReport) -> dict[str, object]:
    """The numbers of a report that are stored."""
    low, high = report.excess_interval
    return {
        "calibrated_sparsity": report.calibrated_sparsity,
        "sparsity": report.sparsity,
        "skipped": report.skipped,
        "maps_weights": report.maps_weights,
        "maps_read": report.maps_read,
        "rotation_weights": report.rotation_weights,
        "head_weights": report.head_weights,
        "embedding_weights": report.embedding_weights,
        "weights_read": report.weights_read,
        "model_read": report.model_read,
        "tokens": report.tokens,
        "documents": report.documents,
        "loss_dense": report.loss_dense,
        "loss": report.loss_sparse,
        "excess": report.excess,
        "low": low,
        "high": high,
        "accuracy_dense": report.accuracy_dense,
        "accuracy": report.accuracy_sparse,
        "agreement": report.agreement,
        "note": "",
    }


def _key(model: nn.Module, texts: Texts, settings: TrainingFreeConfig) -> str:
    """Digest of all that decides the numbers but the setting: weights, token ids, step of the greedy allocation."""
    decides = {"version": VERSION, "step": settings.greedy_step}
    return measurement_key(decides, model, [part[0]["input_ids"] for part in texts])


def _tables(study: Asked) -> Frames:
    """Of the pretrained model where it is here, else a line says how to get it, and of the study's own decoders."""
    parts = [{"training_free_theory": example_table()}, *_of_pretrained(study), *_of_decoders(study)]
    found: Frames = {}
    for name in TRAINING_FREE_TABLES:
        frames = [part[name] for part in parts if name in part]
        none = pd.DataFrame(columns=DOCUMENT_COLUMNS)  # trained decoders have no sums by document
        found[name] = pd.concat(frames, ignore_index=True) if frames else none
    return found


def _of_pretrained(study: Asked) -> Iterator[Frames]:
    settings, given = study.profile.training_free, study.profile.pretrained
    if missing := not_here(given.model):
        print(missing)
        return
    model, tokenizer = opened(given.model)
    texts = read_text(tokenizer, given.english, settings)
    about, shares = {"model": Path(given.model).name, "seed": 0}, (settings.sparsities, settings.prices)
    yield measured(about, model, texts, *shares, settings, study.output / "training_free")


def _of_decoders(study: Asked) -> Iterator[Frames]:
    settings = study.profile.training_free
    configs = study.configs("training_free")
    for config, run in zip(configs, study.trained_runs(configs), strict=True):
        if run.diverged:
            warnings.warn(f"{run.diverged} The study goes on without it.", stacklevel=2)
            continue
        texts = corpus_text(study.corpus, config.model.context, settings)
        about = {"model": config.title.partition(" seed")[0], "seed": config.train.seed}
        model, shares = run.load(run.last_step), (settings.decoder_sparsities, ())
        yield measured(about, model, texts, *shares, settings, study.output / "training_free", decoder=True)


def _missing(profile: Profile) -> str:
    return "" if planned(profile, "training_free") else not_here(profile.pretrained.model)


MAKERS = [Maker(TRAINING_FREE_TABLES, _tables, _missing)]
