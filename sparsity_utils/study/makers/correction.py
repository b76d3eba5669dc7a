"""Sparse drafts that the full model corrects: what notebook 13 measures, on a pretrained model and on our own.

The measurement is cut into pieces, each of some documents under one way of decoding. Of each document one window is
read, the middle one: its first half is the prompt, and its second half the fresh text that may follow it.
"""

import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsity_utils.console import short_number
from sparsity_utils.decoding.accounting import inputs_density, step_density, weights_read
from sparsity_utils.decoding.correction import KINDS, Correction, corrected, drafted, first_differences
from sparsity_utils.decoding.drafters import Drafter, FromPrompt, Masked, fsparse, top_inputs
from sparsity_utils.decoding.kept_text import KeptText
from sparsity_utils.decoding.speed import greedy
from sparsity_utils.models.decoder import default_device
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.metrics import SparsityReport, measure_sparsity
from sparsity_utils.study.makers.correction_prompts import Documents, read_prompts
from sparsity_utils.study.makers.correction_speed import PERIOD, SHARE, THRESHOLD, speeds
from sparsity_utils.study.makers.maker import Asked, Maker
from sparsity_utils.study.makers.pieces import Frames, Pieces, measurement_key
from sparsity_utils.study.makers.pretrained import not_here, opened
from sparsity_utils.study.opened_models import CorrectionConfig
from sparsity_utils.study.plan import CORRECTION
from sparsity_utils.study.profiles import Profile
from sparsity_utils.text.windows import measurement_batches

SPEEDS = "correction_speeds"  # the table that is of a machine
OTHERS = tuple(name for name in CORRECTION if name != SPEEDS)
VERSION = 1  # raise it when the same settings would measure other numbers
TREE = 4  # a published width of a tree
BATCH = 96  # documents decoded side by side, of all texts: a step reads the weights once
SCORED = 16  # documents whose logits are held at once: 400 MB at a vocabulary of 49,152 and a prompt of 128 tokens
GRAM = 8  # words of a repetition
COLUMNS = (  # of the table correction; what a way or a text does not have is empty
    *("model", "text", "document", "rule", "way", "threshold", "density", "tokens", "rounds", "advance", "rejected"),
    *("log_likelihood", "agreed", "repeated", "right", "place", "gap", "rounding"),
)
PARTS = {"no rewrite": "rewrite", "no interleaving": "interleave", "no rollback": "rollback"}
# On one busy core a pass of SmolLM2-135M took 0.15 s over 8 tokens, 0.23 s over 16 and 0.84 s over 128.
SECONDS_PER_TOKEN_AND_PARAMETER, PASS = 4.5e-11, 16


@dataclass(frozen=True)
class Way:
    """One way to decode: by which rule drafts are sparse, and how they are corrected."""

    rule: str  # "full", "fsparse", "csparse", "teal" or "cett"
    way: str  # "full", "alone", "corrected", "lossless", "tree", or which part is left out
    correction: Correction | None = None

    @property
    def name(self) -> str:
        """Of its piece."""
        threshold = "" if self.correction is None or self.correction.threshold is None else self.correction.threshold
        return f"{self.rule}-{self.way}-{threshold}".replace(" ", "_").rstrip("-")


def ways(rules: Iterable[str], settings: CorrectionConfig) -> list[Way]:
    """All that is measured of a model: parts are left out, and a tree is grown, with the first of `rules` alone."""
    published, first = Correction(PERIOD, THRESHOLD), next(iter(rules))
    found = [Way("full", "full")]
    for rule in rules:
        found.append(Way(rule, "alone"))
        found += [Way(rule, "corrected", replace(published, threshold=value)) for value in settings.thresholds]
        found.append(Way(rule, "lossless", replace(published, threshold=None)))
    found += [Way(first, way, replace(published, **{part: False})) for way, part in PARTS.items()]
    return [*found, Way(first, "tree", replace(published, width=TREE))]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model whose drafts are corrected."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: tuple[str, ...]
    cett: SparsityReport | None = None  # drafts are also made with its thresholds

    @cached_property
    def thresholds(self) -> dict[str, Thresholds]:
        """Those of the rules that have some."""
        found = {"fsparse": fsparse(self.model, SHARE), "teal": top_inputs(self.model, SHARE)}
        return found if self.cett is None else found | {"cett": self.cett.thresholds}

    @cached_property
    def drafters(self) -> dict[str, Drafter]:
        """One for each rule, FSparse first."""
        found: dict[str, Drafter] = {"fsparse": Masked(self.model, self.thresholds["fsparse"])}
        found["csparse"] = FromPrompt(self.model, SHARE)
        return found | {rule: Masked(self.model, value) for rule, value in self.thresholds.items() if rule not in found}

    @cached_property
    def densities(self) -> dict[str, float]:
        """Share of the weights that a step reads under each rule."""
        found = {rule: step_density(self.model, weights_read(rule, SHARE)) for rule in ("fsparse", "csparse")}
        found |= {"full": 1.0, "teal": inputs_density(self.model, SHARE)}
        if self.cett is not None:
            read = weights_read("cett", self.cett.activation_ratio, self.cett.nonzero_share)
            found["cett"] = step_density(self.model, read)
        return found


# Of a piece: its name, its expected cost in tokens, PASS for each pass among them, and its measurement.
Planned = tuple[str, int, Callable[[], Frames]]


def corrected_drafts(subject: Subject, settings: CorrectionConfig, folder: Path) -> Frames:
    """The tables correction, correction_prefixes and correction_text of a model.

    Pieces that are already in `folder` are not measured again; each model, text and setting has a folder of its own.

    Raises InputError for texts with too few documents and for a model that cannot be corrected.
    """
    documents = read_prompts(subject.tokenizer, subject.texts, settings)
    return _together(subject, documents, settings, folder, planned_pieces(subject, documents, settings))


def drafting_speeds(subject: Subject, settings: CorrectionConfig, folder: Path) -> Frames:
    """The table correction_speeds of a model, after its first prompt of Python source, on the device that it is on.

    It is a piece in `folder`, of this device and number of threads.
    """
    documents = read_prompts(subject.tokenizer, subject.texts, settings)
    prompt = documents.prompts[(documents.about["text"] == "python").argmax()][None].to(subject.model.device)

    def measure() -> Frames:
        return {SPEEDS: speeds(subject.model, prompt, subject.thresholds, subject.densities, settings)}

    cost = (PASS + 1) * (4 + 2 * settings.rounds) * 3 * len(subject.drafters) * settings.timed_tokens
    sitting = f"{subject.model.device.type}-{torch.get_num_threads()}"
    name = f"speeds-{sitting}-{settings.rounds}-{settings.timed_tokens}"
    return _together(subject, documents, settings, folder, [(name, cost, measure)])


def _together(
    subject: Subject, documents: Documents, settings: CorrectionConfig, folder: Path, plan: list[Planned]
) -> Frames:
    """The tables of all pieces of a plan."""
    weights = sum(parameter.numel() for parameter in subject.model.parameters())
    about, found = f"{subject.name}, {short_number(weights)} parameters", dict[str, list[pd.DataFrame]]()
    pieces = Pieces(folder / _key(subject, documents, settings), about, weights * SECONDS_PER_TOKEN_AND_PARAMETER)
    cost = sum(cost for _, cost, _ in plan)
    with pieces.shown(subject.model.base_model, cost, PASS), evaluating(subject.model):
        for place, cost, measure in plan:
            for table, frame in pieces.kept(place, cost, measure).items():
                frame.insert(0, "model", subject.name)
                found.setdefault(table, []).append(frame.reindex(columns=COLUMNS) if table == "correction" else frame)
    return {table: pd.concat(frames, ignore_index=True) for table, frames in found.items()}


def planned_pieces(subject: Subject, documents: Documents, settings: CorrectionConfig) -> list[Planned]:
    """Every piece but that of speeds."""
    plan: list[Planned] = []
    for rows in torch.arange(len(documents.about)).split(BATCH):
        batch, place = _Batch(subject, documents[rows].to(subject.model.device), settings.new_tokens), int(rows[0])
        scored = len(rows) * (2 * settings.prompt + settings.new_tokens)
        for way in ways(subject.drafters, settings):
            drafts = 1 if way.correction is None else 2.5 * way.correction.width  # of so many a token that stays costs
            cost = scored + round(drafts * settings.new_tokens * (PASS / 2 + len(rows)))
            plan.append((f"{place}-{way.name}", cost, partial(batch.decoded, way)))
        plan.append((f"{place}-prefixes", scored * (1 + 2 * len(subject.drafters)), batch.prefixes))
    return plan


def _key(subject: Subject, documents: Documents, settings: CorrectionConfig) -> str:
    """Digest of all that decides the numbers of a piece of some name: weights, thresholds, token ids, settings."""
    decides = {"version": VERSION, "batch": BATCH, "new_tokens": settings.new_tokens}
    rules = {rule: thresholds.values for rule, thresholds in subject.thresholds.items()}
    return measurement_key([decides, rules], subject.model, (documents.prompts, documents.fresh))


class _Batch:
    """Some documents under every way to decode."""

    def __init__(self, subject: Subject, documents: Documents, new: int) -> None:
        self.subject, self.model, self.new = subject, subject.model, new
        self.about, self.prompts, self.fresh = documents.about, documents.prompts, documents.fresh

    @cached_property
    def full(self) -> Tensor:
        """The full model's greedy text, (documents, new tokens)."""
        return greedy(self.model, self.prompts, self.new)[0]

    def decoded(self, way: Way) -> Frames:
        """The rows of one way of decoding, and the text of first documents where it is shown."""
        rounds, frames = pd.DataFrame(), dict[str, pd.DataFrame]()
        if way.rule == "full":
            tokens = self.full
        elif way.correction is None:
            tokens = drafted(self.model, self.prompts, self.subject.drafters[way.rule], self.new)[0]
        else:
            found = corrected(self.model, self.prompts, self.subject.drafters[way.rule], way.correction, self.new)
            tokens, rounds = found.tokens, found.rounds
            frames = self._shown(way, tokens, found.kinds)
            rounds = rounds.groupby("sequence").agg(
                rounds=("advance", "size"), advance=("advance", "sum"), rejected=("rejected", "sum")
            )
        rows = self.about[["text", "document"]].assign(tokens=self.new).join(rounds)
        rows["log_likelihood"] = self._log_likelihoods(tokens)
        rows["agreed"] = (tokens == self.full).sum(1).tolist()
        rows["repeated"] = [repeated(row) for row in tokens.tolist()]
        answers, texts = self.about["answer"], self.subject.tokenizer.batch_decode(tokens)
        rows["right"] = [
            _answer(text) == right if isinstance(right, str) else None
            for text, right in zip(texts, answers, strict=True)
        ]
        if way.way == "lossless":
            places = first_differences(self.model, self.prompts, tokens, self.full)
            rows = rows.join(places[["place", "gap", "rounding"]])
        threshold = math.nan if way.correction is None else way.correction.threshold
        about = {"rule": way.rule, "way": way.way, "threshold": threshold, "density": self.subject.densities[way.rule]}
        return {"correction": rows.assign(**about), **frames}

    @cached_property
    def read(self) -> list[KeptText]:
        """The full model after all but the last token of the prompts, of SCORED documents each."""
        return [KeptText(self.model, prompts[:, :-1]) for prompts in self.prompts.split(SCORED)]

    def _log_likelihoods(self, tokens: Tensor, skipped: int = 0) -> list[float]:
        """Log-likelihood of the tokens after the prompts under the full model, summed over each text, in nats.

        skipped: that many first ones do not count.
        """
        found, parts = list[float](), (part.split(SCORED) for part in (self.prompts, tokens))
        for text, prompts, own in zip(self.read, *parts, strict=True):
            logits = _after(text, torch.cat([prompts[:, -1:], own], dim=1))
            found += (-_summed(logits[:, skipped:], own[:, skipped:])).tolist()
        return found

    def _shown(self, way: Way, tokens: Tensor, kinds: Tensor) -> Frames:
        shown = way.way == "corrected" and way.correction is not None and way.correction.threshold == THRESHOLD
        tables = []
        for row in self.about.index[self.about["document"] == 0] if shown else ():
            words = [self.subject.tokenizer.decode([token]) for token in tokens[row].tolist()]
            about = {"text": self.about["text"][row], "rule": way.rule, "place": range(len(words)), "word": words}
            tables.append(pd.DataFrame({**about, "kind": [KINDS[kind] for kind in kinds[row].tolist()]}))
        return {"correction_text": pd.concat(tables)} if tables else {}

    def prefixes(self) -> Frames:
        """How sparse models do when they are fed the full model's text, fresh text, and the prompt once more."""
        given = {"disagreed": self.full, "fresh": self.fresh, "repeated": self.prompts}
        dense = {name: self._log_likelihoods(given[name], skipped=1) for name in ("fresh", "repeated")}
        tables = []
        for rule, drafter in self.subject.drafters.items():
            table = self.about[["text", "document"]].assign(rule=rule, tokens=self.new - 1)
            table["predicted"] = self.fresh.shape[1] - 1
            found: dict[str, list[float]] = {name: [] for name in given}
            for rows in torch.arange(len(table)).split(SCORED):
                with drafter.reading(self.prompts[rows]):
                    text = KeptText(self.model, self.prompts[rows])
                for name, tokens in given.items():
                    with drafter.drafting(torch.arange(len(rows), device=tokens.device)):
                        logits = _after(text, tokens[rows])
                    wanted = tokens[rows, 1:]
                    differs = (logits.argmax(-1) != wanted).sum(1)
                    found[name] += (differs if name == "disagreed" else _summed(logits, wanted)).tolist()
            table["disagreed"] = found["disagreed"]
            for name, values in dense.items():
                table[f"{name}_full"], table[f"{name}_sparse"] = [-value for value in values], found[name]
            tables.append(table)
        return {"correction_prefixes": pd.concat(tables).sort_index(kind="stable")}  # each text's rules side by side


def _after(text: KeptText, tokens: Tensor) -> Tensor:
    """Logits after each of the tokens, (texts, length), but the last one; they are taken back."""
    logits = text.run(tokens[:, :-1])
    text.drop(torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device))
    return logits


def _summed(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of `tokens`, (texts, length), under `logits`, summed over each text, in nats, (texts,)."""
    return nn.functional.cross_entropy(logits.transpose(1, 2).float(), tokens, reduction="none").sum(1)


def repeated(tokens: list[int]) -> int:
    """How many of the sequences of GRAM words in a text came earlier in it."""
    grams = [tuple(tokens[start : start + GRAM]) for start in range(len(tokens) - GRAM + 1)]
    return len(grams) - len(set(grams))


def _answer(text: str) -> str:
    found = re.match(r"\s*(\d+)", text)
    return found[1] if found else ""


def _subjects(study: Asked) -> Iterator[Subject]:
    """The pretrained model where it is here, and the study's own ReLU model."""
    wanted, device = study.profile.correction.model, default_device()
    if not not_here(wanted):
        model, tokenizer = opened(wanted)
        yield Subject(Path(wanted).name, model.to(device), tokenizer, ("english", "python", "arithmetic"))
    model, tokenizer = study.trained_model("relu")
    tokens, measure = study.corpus.tokens("validation"), study.profile.measure
    calibration, evaluation = (
        measurement_batches(tokens, model.config.max_position_embeddings, part, getattr(measure, f"{part}_tokens"))
        for part in ("calibration", "evaluation")
    )
    model = model.eval().to(device)
    cett = measure_sparsity(model, evaluation, "cett-ppl", measure.p, calibration, show_progress=False)
    yield Subject("relu", model, tokenizer, ("python",), cett)


def _tables(study: Asked) -> Frames:
    settings, folder = study.profile.correction, study.output / "correction"
    if missing := not_here(settings.model):
        print(missing)
    parts = [corrected_drafts(subject, settings, folder) for subject in _subjects(study)]
    return {name: pd.concat([part[name] for part in parts]) for name in OTHERS}


def _speeds(study: Asked) -> Frames:
    """Measured in one sitting: a piece that an interruption left is deleted once the table is whole."""
    settings, folder = study.profile.correction, study.output / "correction_speeds"
    parts = [drafting_speeds(subject, settings, folder)[SPEEDS] for subject in _subjects(study)]
    shutil.rmtree(folder)
    return {SPEEDS: pd.concat(parts)}


def _nothing(profile: Profile) -> str:
    """Our own model needs no fetching."""
    return ""


MAKERS = [
    Maker(OTHERS, _tables, _nothing),
    Maker((SPEEDS,), _speeds, _nothing, of_machine=True),
]
