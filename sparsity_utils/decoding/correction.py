"""Greedy decoding with a sparse model that the full model corrects (Sirius, github.com/Infini-AI-Lab/Sirius).

The prompt and the first token are the full model's. Then, round by round, the sparse model drafts period - 1 tokens;
one pass of the full model over the last `period` tokens rewrites their keys and values; the longest prefix of the
drafts that the full model accepts is kept, the rest is taken back; and the full model's likeliest next token follows.
Sparse and full model have the same weights and share one cache.

With the threshold None a draft is accepted where it is the full model's likeliest token: the text is then the full
model's own greedy text, up to rounding (`first_differences`).
"""

import time
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsity_utils.console import check
from sparsity_utils.decoding.drafters import Drafter
from sparsity_utils.decoding.kept_text import KeptText, check_decoder, wait
from sparsity_utils.models.context import vocabulary_size
from sparsity_utils.neurons.modes import evaluating

# How a token came about. Rejected drafts stay only where rollback or interleaving is left out.
KINDS = ("first", "accepted", "interleaved", "corrected", "rejected")
FIRST, ACCEPTED, INTERLEAVED, CORRECTED, REJECTED = range(5)


@dataclass(frozen=True)
class Correction:
    """When and how the full model corrects. The last three leave out a part of the method each."""

    period: int = 16  # tokens of one pass of the full model: the last one that is known and the drafts after it
    threshold: float | None = 0.1  # least probability of an accepted draft; None: it must be the likeliest token
    temperature: float = 0.6  # of that probability, softmax(logits / temperature)
    width: int = 1  # of the tree: how many continuations are drafted side by side
    rewrite: bool = True  # False: the keys and values of the sparse model stay
    rollback: bool = True  # False: rejected drafts stay
    interleave: bool = True  # False: the full model adds no token; a first draft stays even where it is rejected

    def __post_init__(self) -> None:
        check(self.period >= 1, f"The period is {self.period}; choose at least 1 token.")
        possible = self.threshold is None or 0 <= self.threshold <= 1
        check(possible, f"The threshold is {self.threshold}; choose a probability, 0 to 1, or None.")
        check(self.temperature > 0, f"The temperature is {self.temperature}; it must be positive.")
        check(self.width >= 1, f"The tree has the width {self.width}; choose at least 1.")
        enough = self.interleave or self.period > 1
        check(enough, "With a period of 1 and no interleaving there is never a next token; choose a longer period.")

    def accepts(self, logits: Tensor, drafts: Tensor) -> Tensor:
        """Which `drafts`, (..., tokens), the full model's `logits` for them accept, (..., tokens, vocabulary)."""
        if self.threshold is None:
            return logits.argmax(dim=-1) == drafts
        probabilities = (logits.float() / self.temperature).softmax(dim=-1)
        return probabilities.gather(-1, drafts[..., None])[..., 0] >= self.threshold


@dataclass(frozen=True, eq=False)
class Corrected:
    """A text that a sparse model drafted and the full model corrected."""

    tokens: Tensor  # (sequences, new tokens)
    kinds: Tensor  # how each came about, a place in KINDS, of the same shape
    rounds: pd.DataFrame  # one row per sequence and round: sequence, accepted (drafts), advance (tokens), rejected
    seconds: float  # of all but the prompt

    @property
    def average_advance(self) -> float:
        """AAL: tokens that a round advances, on average."""
        return float(self.rounds["advance"].mean())


def corrected(
    model: PreTrainedModel, prompts: Tensor, drafter: Drafter, correction: Correction, new_tokens: int
) -> Corrected:
    """The `new_tokens` after each of `prompts`, (sequences, length): drafted by `drafter`, corrected by `model`.

    Sequences are independent: each advances as far as its own drafts are accepted, and leaves when it has its tokens.
    All rounds are whole, so that the last one of a sequence may draft tokens beyond them, which are cut.

    Raises `InputError` for prompts that leave no room in the model's context, for a model that generates no text, and
    for one whose cache cannot give tokens back (sliding windows, recurrent layers).
    """
    check_decoder(model, prompts, new_tokens, correction.period - 1)
    check(correction.width <= vocabulary_size(model), "The tree is wider than the vocabulary; choose a smaller width.")
    with evaluating(model):
        with drafter.reading(prompts):
            text = KeptText(model, prompts)
        wait(prompts)
        started = time.perf_counter()
        book = _Book(text.likeliest)
        sequences, last = torch.arange(len(prompts), device=prompts.device), text.likeliest
        while len(sequences):
            paths = _draft(text, drafter, sequences, last, correction)
            last = _correct(text, paths, correction, book, sequences)
            missing = torch.tensor([len(book.tokens[i]) < new_tokens for i in sequences.tolist()], device=last.device)
            if not missing.all():
                text.select(missing.nonzero()[:, 0])
                sequences, last = sequences[missing], last[missing]
        wait(prompts)
        return book.closed(new_tokens, time.perf_counter() - started, prompts.device)


def drafted(model: PreTrainedModel, prompts: Tensor, drafter: Drafter, new_tokens: int) -> tuple[Tensor, float]:
    """The sparse model's own greedy text, never corrected, (sequences, new_tokens), and the seconds after the prompt.

    The prompt and the first token are the full model's, as in `corrected`. Raises `InputError` as that does.
    """
    check_decoder(model, prompts, new_tokens)
    with evaluating(model):
        with drafter.reading(prompts):
            text = KeptText(model, prompts)
        wait(prompts)
        started = time.perf_counter()
        alone = Correction(period=new_tokens)
        tokens = _draft(text, drafter, torch.arange(len(prompts), device=prompts.device), text.likeliest, alone)
        wait(prompts)
        return tokens, time.perf_counter() - started


class _Book:
    """What is known of each sequence so far."""

    def __init__(self, first: Tensor) -> None:
        self.tokens = [[token] for token in first.tolist()]
        self.kinds = [[FIRST] for _ in self.tokens]
        self.rounds: list[tuple[int, int, int, bool]] = []

    def add(self, sequence: int, tokens: list[int], kinds: list[int], accepted: int, rejected: bool) -> None:
        """One round of one sequence."""
        self.tokens[sequence] += tokens
        self.kinds[sequence] += kinds
        self.rounds.append((sequence, accepted, len(tokens), rejected))

    def closed(self, new_tokens: int, seconds: float, device: torch.device) -> Corrected:
        """The texts, cut to `new_tokens`."""
        tokens, kinds = (
            torch.tensor([row[:new_tokens] for row in rows], device=device) for rows in (self.tokens, self.kinds)
        )
        rounds = pd.DataFrame(self.rounds, columns=["sequence", "accepted", "advance", "rejected"])
        return Corrected(tokens, kinds, rounds, seconds)


def _draft(text: KeptText, drafter: Drafter, sequences: Tensor, last: Tensor, correction: Correction) -> Tensor:
    """The best paths of `period` tokens from `last`, (rows,), on: (rows * width, period), best first in each row.

    Every path is continued by its `width` likeliest tokens, and the `width` paths of highest probability live on.
    The rows of `text` become those of the paths, with all but their last token.
    """
    rows, width = len(last), correction.width
    if width > 1:
        text.select(torch.arange(rows, device=last.device).repeat_interleave(width))
    paths = last.repeat_interleave(width)[:, None]
    score = torch.full((rows, width), -torch.inf, device=last.device)
    score[:, 0] = 0.0  # at first all paths of a row are the same
    if correction.period == 1:
        return paths
    with drafter.drafting(sequences.repeat_interleave(width)):
        for _ in range(correction.period - 1):
            logits = text.run(paths[:, -1:])[:, -1]
            if width == 1:
                paths = torch.cat([paths, logits.argmax(dim=-1, keepdim=True)], dim=1)
                continue
            best = logits.float().log_softmax(dim=-1).topk(width, dim=-1)  # (rows * width, width)
            total = score[..., None] + best.values.view(rows, width, width)
            score, place = total.flatten(1).topk(width, dim=-1)  # (rows, width)
            parents = (place // width + width * torch.arange(rows, device=last.device)[:, None]).flatten()
            tokens = best.indices.view(rows, -1).gather(1, place).view(-1, 1)
            text.select(parents)
            paths = torch.cat([paths[parents], tokens], dim=1)
    return paths


def _correct(text: KeptText, paths: Tensor, correction: Correction, book: _Book, sequences: Tensor) -> Tensor:
    """One pass of the full model over `paths`; what it keeps goes into `book`. Returns the last known tokens, (rows,).

    `text` then has one row per sequence again, with all tokens that are known but the last.
    """
    drafts = paths.shape[1] - 1
    sparse = None if correction.rewrite else text.last(drafts)
    text.drop(torch.full((len(paths),), drafts, device=paths.device))
    logits = text.run(paths)  # (rows * width, period, vocabulary)
    accepted = correction.accepts(logits[:, :-1], paths[:, 1:])  # (rows * width, drafts)
    prefix = accepted.long().cumprod(dim=1).sum(dim=1)
    if sparse is not None:
        text.put(sparse)
    if correction.width > 1:
        order = prefix.view(-1, correction.width) * correction.width - torch.arange(correction.width).to(prefix)
        best = order.argmax(dim=1) + correction.width * torch.arange(len(order)).to(prefix)  # the first of equals
        text.select(best)
        paths, logits, accepted, prefix = paths[best], logits[best], accepted[best], prefix[best]
    kept = prefix if correction.rollback else torch.full_like(prefix, drafts)
    if not correction.interleave:
        kept = kept.clamp(min=1)
    known = torch.cat([paths[:, 1:], paths[:, :1]], dim=1)  # the last column gives room for a full model's token
    rows = torch.arange(len(paths), device=paths.device)
    known[rows, kept] = logits[rows, kept].argmax(dim=-1)
    added = kept + int(correction.interleave)
    text.drop(drafts + 1 - added)
    whole = zip(*(part.tolist() for part in (sequences, known, accepted, prefix, kept, added)), strict=True)
    for sequence, tokens, right, length, drafts_kept, count in whole:
        kinds = [ACCEPTED if one else REJECTED for one in right[:drafts_kept]]
        kinds.append(INTERLEAVED if drafts_kept == drafts else CORRECTED)
        book.add(sequence, tokens[:count], kinds[:count], length, length < drafts)
    return known[rows, added - 1]


def first_differences(model: PreTrainedModel, prompts: Tensor, tokens: Tensor, expected: Tensor) -> pd.DataFrame:
    """Where the texts `tokens` leave the full model's own, `expected`, both (sequences, new tokens).

    One row per sequence: sequence, place (of the first difference; -1 without one), gap (by how much the logit of one
    word exceeds that of the other there), rounding (largest difference of any logit between passes of one token and
    one pass over all, up to there). A text that differs by rounding alone has gap <= 2 rounding.
    """
    rows = []
    for number, (prompt, one, other) in enumerate(zip(prompts, tokens, expected, strict=True)):
        differs = (one != other).nonzero()
        if not len(differs):
            rows.append((number, -1, 0.0, 0.0))
            continue
        place = int(differs[0])
        batched, single = _both_passes(model, prompt[None], one[None, :place])
        gap = float((batched[-1, one[place]] - batched[-1, other[place]]).abs())
        rows.append((number, place, gap, float((batched - single).abs().max())))
    return pd.DataFrame(rows, columns=["sequence", "place", "gap", "rounding"])


def _both_passes(model: PreTrainedModel, prompt: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits after the prompt and each token, (1 + tokens, vocabulary), of one pass and of passes of one token."""
    with evaluating(model):
        text = KeptText(model, prompt)
        single = [model(input_ids=prompt).logits[:, -1:], *(text.run(token[None]) for token in tokens.T)]
        return model(input_ids=torch.cat([prompt, tokens], 1)).logits[0, prompt.shape[1] - 1 :], torch.cat(single, 1)[0]
