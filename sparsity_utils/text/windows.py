"""Cut documents into windows of tokens, for the steps of training and for measurements.

A batch is a dict of input_ids and attention_mask, (windows, length), and documents, (windows,): which document each
window is of. All are int64. Batches of training are pure functions of the corpus, the seed and the step.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsity_utils.console import InputError, note
from sparsity_utils.text.config import CorpusConfig
from sparsity_utils.text.corpus import collect
from sparsity_utils.text.documents import Document, Skipped, normalised
from sparsity_utils.text.files import SUFFIXES, path_documents, text_files
from sparsity_utils.text.sources import PROSE, open_source

LEAST = 2  # tokens: the first is never predicted
LARGEST = 50e6  # bytes of a text file: tokenising takes 0.2 kB of memory and 1 microsecond a byte

BATCH_WINDOWS = 16  # of one measurement batch. On a CPU 16 of 256 tokens took 0.8 of the time of 32: they stay in cache
MOST_DOMAINS = 7  # the largest ones: transfer is measured between every two of them
CALIBRATION_SHARE = 1 / 3  # of a domain's tokens, or of the documents


class TrainingBatches:
    """Batches of windows, each epoch a new permutation of the same windows.

    Step s takes windows [s B, (s + 1) B) of the endless sequence permutation(seed, 0), permutation(seed, 1), ...,
    so a batch depends on (seed, step) alone and a resumed run sees what it would have seen.
    """

    def __init__(
        self, tokens: np.ndarray, context: int, batch_tokens: int, seed: int, targets: np.ndarray | None = None
    ):
        """targets: what each position of `tokens` predicts; None: the next token."""
        self.tokens, self.targets, self.context, self.seed = tokens, targets, context, seed
        self.windows = (len(tokens) - 1) // context
        self.batch_windows = batch_tokens // context
        if batch_tokens % context or not batch_tokens:
            raise InputError(
                f"train.batch_tokens {batch_tokens} is not a multiple of model.context {context}; a batch holds whole "
                f"windows: change one of them."
            )
        if self.windows < self.batch_windows:
            raise InputError(
                f"The training text has {len(tokens):,} tokens, less than one batch of {batch_tokens:,} and the token "
                f"after it; give more text or lower train.batch_tokens."
            )
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(self.windows)
        )

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of `step`, each (windows, context) int64."""
        places = range(step * self.batch_windows, (step + 1) * self.batch_windows)
        chosen = [self._permutation(place // self.windows)[place % self.windows] for place in places]
        return _inputs_and_targets(self.tokens, np.asarray(chosen), self.context, self.targets)

    def passes(self, steps: int) -> float:
        """How often `steps` steps read the training text."""
        return steps * self.batch_windows / self.windows


def measurement_batches(tokens: np.ndarray, context: int, part: str, wanted: int) -> list[dict[str, torch.Tensor]]:
    """About `wanted` validation tokens of one part, as a list of {"input_ids": (windows, context)}.

    part "calibration" is the first third of the validation text, "evaluation" the rest, so that no document (but the
    one at the boundary) is on both sides; within a part the windows lie evenly spaced, so that a small set still visits
    many documents. Raises InputError when that part of the text is too short.
    """
    windows = (len(tokens) - 1) // context
    first, last = (0, windows // 3) if part == "calibration" else (windows // 3, windows)
    count = wanted // context
    if count < 1 or count > last - first:
        raise InputError(
            f"{wanted:,} {part} tokens are asked for, but the validation text has {(last - first) * context:,} for it "
            f"in windows of {context}; give more text, a larger corpus.validation_share, or ask for fewer."
        )
    return _spaced_batches(tokens, context, first, last, count)


def random_batches(tokens: np.ndarray, targets: np.ndarray, context: int, wanted: int) -> list[dict[str, torch.Tensor]]:
    """At most `wanted` tokens with targets of their own, evenly spaced: {"input_ids", "targets": (windows, context)}.

    Such batches are of `random_data`; a text is predicted with those of `measurement_batches`.
    """
    windows = (len(tokens) - 1) // context
    groups = _spaced_groups(0, windows, max(1, min(wanted // context, windows)))
    pairs = (_inputs_and_targets(tokens, group, context, targets) for group in groups)
    return [{"input_ids": ids, "targets": predicted} for ids, predicted in pairs]


def domain_batches(
    tokens: np.ndarray, documents: pd.DataFrame, context: int, calibration_tokens: int, evaluation_tokens: int
) -> dict[str, tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]]:
    """(calibration, evaluation) batches of the largest domains that have enough text, largest first.

    `documents`: start, stop, domain and name as `Corpus.documents` gives them. Every file of a domain is on one side
    alone, a third of the tokens for calibration; the windows run over the joined documents of a side, evenly spaced.
    All domains get the same number of tokens, the wanted one rounded down to whole windows.
    Raises InputError when no domain has that many on both sides.
    """
    wanted = calibration_tokens // context, evaluation_tokens // context
    sides: dict[str, Any] = {}
    sized = documents.assign(size=documents["stop"] - documents["start"])
    order = sized.groupby("domain")["size"].sum().sort_values(ascending=False, kind="stable").index
    for domain in order:
        texts = [_joined(tokens, side) for side in _split_files(sized[sized["domain"] == domain])]
        windows = [(len(text) - 1) // context for text in texts]
        if all(there >= count > 0 for there, count in zip(windows, wanted, strict=True)):
            parts = zip(texts, windows, wanted, strict=True)
            sides[domain] = tuple(_spaced_batches(text, context, 0, there, count) for text, there, count in parts)
        if len(sides) == MOST_DOMAINS:
            break
    if not sides:
        raise InputError(
            f"No domain of the validation text has {calibration_tokens:,} tokens for calibration and in other files "
            f"{evaluation_tokens:,} for evaluation, in windows of {context}; give more text, a larger "
            f"corpus.validation_share, or lower measure.calibration_tokens and measure.evaluation_tokens."
        )
    return sides


def _split_files(documents: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Calibration and evaluation documents of one domain: whole files, the largest first, each to the side that
    lacks more tokens. The parts of a long file are named file#0, file#1 and so on."""
    files = documents["name"].str.replace(r"#\d+$", "", regex=True)
    sizes = documents.groupby(files, sort=False)["size"].sum().sort_values(ascending=False, kind="stable")
    lacking = sizes.sum() * np.array([CALIBRATION_SHARE, 1 - CALIBRATION_SHARE])
    side = {}
    for file, size in sizes.items():
        side[file] = int(np.argmax(lacking))
        lacking[side[file]] -= size
    return tuple(documents[files.map(side) == number] for number in (0, 1))


def _joined(tokens: np.ndarray, documents: pd.DataFrame) -> np.ndarray:
    """The tokens of `documents` one after the other."""
    pieces = [tokens[row.start : row.stop] for row in documents.itertuples()]
    return np.concatenate(pieces) if pieces else tokens[:0]


def evenly_spaced(count: int, total: int, *, centred: bool = False) -> list[int]:
    """Positions of `count` of `total` items: the first, or if `centred` the middle one, of each of `count` equal parts.

    Three of nine: 0, 3, 6, or 1, 4, 7.
    """
    return [(2 * place + centred) * total // (2 * count) for place in range(count)]


def _spaced_batches(tokens: np.ndarray, context: int, first: int, last: int, count: int) -> list[dict]:
    """`count` of the windows `first` to `last`, evenly spaced, as batches of {"input_ids": (windows, context)}."""
    groups = _spaced_groups(first, last, count)
    return [{"input_ids": _inputs_and_targets(tokens, group, context)[0]} for group in groups]


def _spaced_groups(first: int, last: int, count: int) -> list[np.ndarray]:
    """The numbers of `count` windows from `first` to `last`, evenly spaced, in groups of a batch."""
    chosen = first + np.array(evenly_spaced(count, last - first))
    return np.array_split(chosen, -(-count // BATCH_WINDOWS))


def _inputs_and_targets(
    tokens: np.ndarray, windows: np.ndarray, context: int, targets: np.ndarray | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    index = windows[:, None] * context + np.arange(context + 1)  # (windows, context + 1)
    ids = torch.from_numpy(tokens[index].astype(np.int64))
    return ids[:, :-1], ids[:, 1:] if targets is None else torch.from_numpy(targets[index[:, :-1]].astype(np.int64))


def read_documents(path: Path) -> list[str]:
    """The documents of a file or folder of .txt, .md, .jsonl and .parquet, in a fixed order, as a corpus reads them.

    A text file is one document, a row of a table too, in its field `text`. A file of any other kind is read as text
    when it is named itself. What cannot be read, is no text in UTF-8, is empty or too large is left out, and said.

    Raises `InputError` when there is no such path, no text in it, or a table that cannot be read.
    """
    path, skipped = Path(path).expanduser(), Skipped()
    other_kind = path.is_file() and path.suffix.lower() not in SUFFIXES
    files = [path] if other_kind else text_files(path)
    found = path_documents(path, files, "text", skipped, LARGEST)
    documents = [document.text for document in normalised(found, skipped)]
    if not documents:
        raise InputError(
            f"{path} holds no text; give a file or folder with text in UTF-8 (left out: {skipped.told() or 'nothing'})."
        )
    if skipped:
        note(f"Of {path}, {len(documents):,} documents are read and {skipped.total():,} left out: {skipped.told()}.")
    return documents


def pinned_documents(source: str, megabytes: float = 1.0) -> list[Document]:
    """The first documents of "python-prose" or "python-source", up to so many 1e6 bytes, without duplicates.

    They come from the packages that the lock file pins, in an order that mixes them all. Here "python-source" gives
    code alone, of files other than the prose is from, so that thresholds can go from one to the other.
    """
    config = CorpusConfig(source, max_megabytes=megabytes)
    documents = [part.document for part in collect(open_source(config), config).parts]
    return [document for document in documents if document.domain != PROSE]


def text_batches(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int, batch_windows: int = 8
) -> list[dict[str, Tensor]]:
    """Batches of windows of `length` tokens, in reading order, each window of one document alone.

    Each document is tokenised whole, so that the special tokens of the tokenizer are added once. Its last, shorter
    window is padded on the right with attention_mask 0; a last window of a single token is left out.

    Args:
        tokenizer: the model's own.
        documents: texts; in the batches each is known by its position among them.
        length: tokens of a window, at least 2 and at most the model's context.
        batch_windows: windows of a batch; the last may have fewer.

    Raises `InputError` without documents, without two tokens in any of them, and for lengths out of range.
    """
    if length < LEAST or batch_windows < 1:
        raise InputError(
            f"Windows of {length} tokens, {batch_windows} to a batch, cannot be made; choose at least {LEAST} tokens "
            f"and one window."
        )
    if not documents:
        raise InputError("There is no document to measure on; give at least one text.")
    windows: list[list[int]] = []
    owners: list[int] = []
    for number, document in enumerate(documents):
        tokens = tokenizer(document, verbose=False)["input_ids"]
        cut = [tokens[start : start + length] for start in range(0, len(tokens) - LEAST + 1, length)]
        windows += cut
        owners += [number] * len(cut)
    if not windows:
        raise InputError(f"No document has {LEAST} tokens, so that there is nothing to predict; give a longer text.")
    padding = tokenizer.pad_token_id or 0
    ids = torch.tensor([window + [padding] * (length - len(window)) for window in windows])
    lengths = torch.tensor([len(window) for window in windows])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return _batches({"input_ids": ids, "attention_mask": mask, "documents": torch.tensor(owners)}, batch_windows)


def split_documents(
    batches: Sequence[Mapping[str, Tensor]], share: float = CALIBRATION_SHARE
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """(calibration, evaluation): batches of about `share` of the documents, evenly spaced, and batches of the others.

    A single document is divided instead: its first windows calibrate, the rest evaluate. Batches are of the size of
    the first one given.

    Raises `InputError` when there are not two documents or two windows to divide, or `share` is not within (0, 1).
    """
    if not 0 < share < 1:
        raise InputError(f"The share {share} of the documents for calibration is not between 0 and 1; correct it.")
    rows = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]} if batches else {}
    if not rows or len(rows["documents"]) < 2:
        raise InputError(
            "There is too little text to calibrate and to evaluate on; give two windows of tokens or more."
        )
    owners = rows["documents"]
    present = owners.unique()
    if len(present) > 1:
        chosen = evenly_spaced(_part(len(present), share), len(present), centred=True)
        calibrates = torch.isin(owners, present[chosen])
    else:
        calibrates = torch.arange(len(owners)) < _part(len(owners), share)
    size = len(batches[0]["documents"])
    calibration, evaluation = (
        _batches({key: tensor[chosen] for key, tensor in rows.items()}, size) for chosen in (calibrates, ~calibrates)
    )
    return calibration, evaluation


def _part(total: int, share: float) -> int:
    """`share` of `total`, at least one and not all."""
    return min(max(round(total * share), 1), total - 1)


def _batches(rows: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """`rows`, tensors with one entry per window, cut into batches of `size` windows."""
    parts = {key: tensor.split(size) for key, tensor in rows.items()}
    return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)]
