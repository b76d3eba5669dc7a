"""Sparse drafts that the full model corrects: what notebook 13 measures, on a pretrained model and on our own.

The measurement is cut into pieces, each of some documents of one text under one way of decoding. Of each document one
window is read, the middle one: its first half is the prompt, and its second half the fresh text of claim S6.
"""

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsity_utils.console import check, short_number
from sparsity_utils.decoding.accounting import step_density, weights_read
from sparsity_utils.decoding.correction import KINDS, Correction, corrected, drafted, first_differences
from sparsity_utils.decoding.drafters import Drafter, FromPrompt, Masked, fsparse
from sparsity_utils.decoding.kept_text import KeptText
from sparsity_utils.decoding.speed import greedy
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.sparsity.metrics import SparsityReport
from sparsity_utils.study.correction_speed import PERIOD, SHARE, THRESHOLD, speeds
from sparsity_utils.study.pieces import Frames, Pieces
from sparsity_utils.study.pretrained import middle_windows, pinned
from sparsity_utils.study.profiles import CorrectionConfig

VERSION = 1  # raise it when the same settings would measure other numbers
TREE = 4  # a published width of a tree
BATCH = 8  # documents decoded side by side: a step of 8 reads the weights once
GRAM = 8  # words of a repetition
EXAMPLES = 24  # sums before the one that is asked for
COLUMNS = (  # of the table correction; what a way or a text does not have is empty
    *("model", "text", "document", "rule", "way", "threshold", "density", "tokens", "rounds", "advance", "rejected"),
    *("log_likelihood", "agreed", "repeated", "right", "place", "gap", "rounding"),
)
PARTS = {"no rewrite": "rewrite", "no interleaving": "interleave", "no rollback": "rollback"}
# A pass of SmolLM2-135M over 8 tokens, its weights read once, took 0.1 s on two cores.
SECONDS_PER_PASS_AND_PARAMETER = 7.5e-10


@dataclass(frozen=True)
class Way:
    """One way to decode: by which rule drafts are sparse, and how they are corrected."""

    rule: str  # "full", "fsparse", "csparse" or "cett"
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


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, text: str, settings: CorrectionConfig
) -> tuple[Tensor, Tensor, list[str]]:
    """Prompts, (documents, prompt), and what follows them there, of the same shape; answers, of sums alone.

    What follows sums are other sums.

    Raises InputError for a text with too few documents.
    """
    size, answers = settings.prompt, []
    if text == "arithmetic":
        count = settings.documents
        sums = [_sums(number) for number in range(2 * count)]
        answers = [answer for _, answer in sums[:count]]
        ends = [tokenizer(words, verbose=False)["input_ids"][-size:] for words, _ in sums]
        windows = [first + second for first, second in zip(ends[:count], ends[count:], strict=True)]
        check(
            all(len(window) == 2 * size for window in windows),
            f"{EXAMPLES} sums have fewer than {size} tokens; lower correction.prompt.",
        )
    else:
        source = {"english": "python-prose", "python": "python-source"}[text]
        windows = list(islice(middle_windows(tokenizer, pinned(source), 2 * size), settings.documents))
    check(
        len(windows) == settings.documents,
        f"The {text} text has {len(windows)} documents of {2 * size} tokens, and {settings.documents} are asked for; "
        f"lower correction.documents or correction.prompt.",
    )
    ids = torch.tensor(windows)
    return ids[:, :size], ids[:, size:], answers


def _sums(number: int) -> tuple[str, str]:
    """Sums with their answers, the last one without; and that answer."""
    rng = random.Random(number)
    pairs = [(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(EXAMPLES + 1)]
    *solved, (a, b) = pairs
    return "".join(f"{x} + {y} = {x + y}\n" for x, y in solved) + f"{a} + {b} =", str(a + b)


def measured(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    cett: SparsityReport | None,
    settings: CorrectionConfig,
    folder: Path,
) -> Frames:
    """The tables correction, correction_prefixes, correction_speeds and correction_text of a model.

    Pieces that are already in `folder` are not measured again; each model, text and setting has a folder of its own.

    Args:
        cett: drafts are also made with its thresholds, of the rule "cett", which kernels have.

    Raises InputError for texts with too few documents and for a model that cannot be corrected.
    """
    given = {text: prompts_of(tokenizer, text, settings) for text in texts}
    return _Work(name, model, tokenizer, cett, settings).tables(given, folder)


Given = Mapping[str, tuple[Tensor, Tensor, list[str]]]  # of each text, as `prompts_of` gives it


class _Work:
    """What is measured of one model."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cett: SparsityReport | None,
        settings: CorrectionConfig,
    ) -> None:
        self.name, self.model, self.tokenizer, self.settings = name, model, tokenizer, settings
        self.thresholds = {"fsparse": fsparse(model, SHARE)} | ({} if cett is None else {"cett": cett.thresholds})
        masked = {rule: Masked(model, thresholds) for rule, thresholds in self.thresholds.items()}
        self.drafters: dict[str, Drafter] = {**masked, "csparse": FromPrompt(model, SHARE)}
        read: dict[str, tuple[float, ...]] = {"fsparse": (SHARE,), "csparse": (SHARE,)}
        if cett is not None:
            read["cett"] = (cett.activation_ratio, cett.nonzero_share)
        self.densities = {rule: step_density(model, weights_read(rule, *ratios)) for rule, ratios in read.items()}
        self.densities["full"] = 1.0

    def tables(self, given: Given, folder: Path) -> Frames:
        """All pieces, put together."""
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        about = f"{self.name}, {short_number(weights)} parameters"
        pieces = Pieces(folder / self._key(given), about, weights * SECONDS_PER_PASS_AND_PARAMETER)
        plan, found = self._plan(given), dict[str, list[pd.DataFrame]]()
        total = sum(cost for _, cost, _ in plan)
        with pieces.shown(self.model.base_model, total, "pass", lambda _: 1), evaluating(self.model):
            for place, cost, measure in plan:
                for table, frame in pieces.kept(place, cost, measure).items():
                    frame.insert(0, "model", self.name)
                    found.setdefault(table, []).append(
                        frame.reindex(columns=COLUMNS) if table == "correction" else frame
                    )
        return {table: pd.concat(frames, ignore_index=True) for table, frames in found.items()}

    def _plan(self, given: Given) -> list[tuple[str, int, Callable[[], Frames]]]:
        """Name, expected passes and measurement of every piece."""
        plan: list[tuple[str, int, Callable[[], Frames]]] = []
        for text, (prompts, fresh, answers) in given.items():
            for rows in torch.arange(len(prompts)).split(BATCH):
                some = [answers[i] for i in rows.tolist()] if answers else []
                batch, place = _Batch(self, text, rows, prompts[rows], fresh[rows], some), f"{text}-{int(rows[0])}"
                for way in ways(self.drafters, self.settings):
                    plan.append((f"{place}-{way.name}", self._cost(way), partial(batch.decoded, way)))
                plan.append((f"{place}-prefixes", 6 * len(self.drafters), batch.prefixes))
        prompt, cost = given["python"][0][:1].to(self.model.device), 8 * self.settings.rounds * self.settings.new_tokens
        timed = partial(speeds, self.model, prompt, self.thresholds, self.densities, self.settings)
        return [*plan, ("speeds", cost, lambda: {"correction_speeds": timed()})]

    def _cost(self, way: Way) -> int:
        """Passes that a way is expected to take, those that score its text included."""
        rounds = 1 if way.correction is None else 1.5  # of so many tokens a token that stays costs
        return round(rounds * self.settings.new_tokens) + 4

    def _key(self, given: Given) -> str:
        """Digest of all that decides the numbers: weights, thresholds, token ids, settings."""
        decides = {**asdict(self.settings), "model": None, "version": VERSION, "batch": BATCH}
        rules = {rule: thresholds.values for rule, thresholds in self.thresholds.items()}
        digest = hashlib.sha256(json.dumps([decides, rules], sort_keys=True).encode())
        ids = [part for prompts, fresh, _ in given.values() for part in (prompts, fresh)]
        for tensor in (*self.model.parameters(), *ids):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


@dataclass
class _Batch:
    """Some documents of one text."""

    work: _Work
    text: str
    documents: Tensor
    prompts: Tensor  # (documents, prompt)
    fresh: Tensor  # what follows, (documents, prompt)
    answers: list[str]

    def __post_init__(self) -> None:
        self.model, self.new = self.work.model, self.work.settings.new_tokens
        device = self.model.device
        self.prompts, self.fresh = self.prompts.to(device), self.fresh.to(device)
        self._full: Tensor | None = None

    @property
    def full(self) -> Tensor:
        """The full model's greedy text, (documents, new tokens)."""
        if self._full is None:
            self._full = greedy(self.model, self.prompts, self.new)[0]
        return self._full

    def decoded(self, way: Way) -> Frames:
        """The rows of one way of decoding, and the text of the first document where it is shown."""
        if way.correction is None:
            tokens = self.full if way.rule == "full" else self._alone(way)
            rounds, frames = pd.DataFrame(), {}
        else:
            found = corrected(self.model, self.prompts, self.work.drafters[way.rule], way.correction, self.new)
            tokens, rounds = found.tokens, found.rounds
            frames = self._shown(way, tokens, found.kinds)
            rounds = rounds.groupby("sequence").agg(
                rounds=("advance", "size"), advance=("advance", "sum"), rejected=("rejected", "sum")
            )
        rows = pd.DataFrame({"document": self.documents.tolist(), "tokens": self.new}).join(rounds)
        rows["log_likelihood"] = -_losses(self.model, self.prompts, tokens).cpu().numpy()
        rows["agreed"] = (tokens == self.full).sum(1).cpu().numpy()
        rows["repeated"] = [repeated(row) for row in tokens.tolist()]
        if self.answers:
            texts = self.work.tokenizer.batch_decode(tokens)
            rows["right"] = [_answer(text) == answer for text, answer in zip(texts, self.answers, strict=True)]
        if way.way == "lossless":
            places = first_differences(self.model, self.prompts, tokens, self.full)
            rows = rows.join(places[["place", "gap", "rounding"]])
        threshold = math.nan if way.correction is None else way.correction.threshold
        about = {"text": self.text, "rule": way.rule, "way": way.way, "threshold": threshold}
        about["density"] = self.work.densities[way.rule]
        return {"correction": rows.assign(**about), **frames}

    def _alone(self, way: Way) -> Tensor:
        return drafted(self.model, self.prompts, self.work.drafters[way.rule], self.new)[0]

    def _shown(self, way: Way, tokens: Tensor, kinds: Tensor) -> Frames:
        shown = way.way == "corrected" and way.correction.threshold == THRESHOLD and int(self.documents[0]) == 0
        if not shown:
            return {}
        words = [self.work.tokenizer.decode([token]) for token in tokens[0].tolist()]
        about = {"text": self.text, "rule": way.rule, "place": range(len(words)), "word": words}
        return {"correction_text": pd.DataFrame({**about, "kind": [KINDS[kind] for kind in kinds[0].tolist()]})}

    def prefixes(self) -> Frames:
        """How the sparse model does when it is fed the full model's text, fresh text, and the prompt once more."""
        rows = []
        for rule, drafter in self.work.drafters.items():
            table = {
                "text": self.text,
                "document": self.documents,
                "rule": rule,
                "tokens": self.new - 1,
                "predicted": len(self.fresh[0]) - 1,
            }
            sparse = self._logits(self.full, drafter)
            table["disagreed"] = (sparse.argmax(-1) != self.full[:, 1:]).sum(1).cpu().numpy()
            for name, text in (("fresh", self.fresh), ("repeated", self.prompts)):
                table[f"{name}_full"] = _summed(self._logits(text), text).cpu().numpy()
                table[f"{name}_sparse"] = _summed(self._logits(text, drafter), text).cpu().numpy()
            rows.append(pd.DataFrame(table))
        return {"correction_prefixes": pd.concat(rows)}

    def _logits(self, tokens: Tensor, drafter: Drafter | None = None) -> Tensor:
        """Logits for all but the first of the tokens after the prompts, which the full model reads."""
        if drafter is None:
            return KeptText(self.model, self.prompts).run(tokens[:, :-1])
        with drafter.reading(self.prompts):
            text = KeptText(self.model, self.prompts)
        with drafter.drafting(torch.arange(len(tokens), device=tokens.device)):
            return text.run(tokens[:, :-1])


def _losses(model: PreTrainedModel, prompts: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of the tokens after the prompts, summed over each text, in nats, (texts,)."""
    logits = model(input_ids=torch.cat([prompts, tokens], dim=1)).logits[:, prompts.shape[1] - 1 : -1]
    return nn.functional.cross_entropy(logits.transpose(1, 2).float(), tokens, reduction="none").sum(1)


def _summed(logits: Tensor, text: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.transpose(1, 2).float(), text[:, 1:], reduction="none").sum(1)


def repeated(tokens: list[int]) -> int:
    """How many of the sequences of GRAM words in a text came earlier in it."""
    grams = [tuple(tokens[start : start + GRAM]) for start in range(len(tokens) - GRAM + 1)]
    return len(grams) - len(set(grams))


def _answer(text: str) -> str:
    found = re.match(r"\s*(\d+)", text)
    return found[1] if found else ""
