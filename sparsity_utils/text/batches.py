"""Which tokens a training step or a measurement sees: pure functions of the corpus, the seed and the step."""

from functools import lru_cache

import numpy as np
import pandas as pd
import torch

from sparsity_utils.console import InputError

# Of one measurement batch. On a CPU 16 windows of 256 tokens took 0.8 of the time of 32: more of them stay in cache.
BATCH_WINDOWS = 32 if torch.cuda.is_available() else 16
MOST_DOMAINS = 7  # the largest ones: transfer is measured between every two of them
CALIBRATION_SHARE = 1 / 3  # of a domain's tokens


class TrainingBatches:
    """Batches of windows, each epoch a new permutation of the same windows.

    Step s takes windows [s B, (s + 1) B) of the endless sequence permutation(seed, 0), permutation(seed, 1), ...,
    so a batch depends on (seed, step) alone and a resumed run sees what it would have seen.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch_tokens: int, seed: int):
        self.tokens, self.context, self.seed = tokens, context, seed
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
        """Inputs and next-token targets of `step`, each (windows, context) int64."""
        places = range(step * self.batch_windows, (step + 1) * self.batch_windows)
        chosen = [self._permutation(place // self.windows)[place % self.windows] for place in places]
        return _inputs_and_targets(self.tokens, np.asarray(chosen), self.context)

    def passes(self, steps: int) -> float:
        """How often `steps` steps read the training text."""
        return steps * self.batch_windows / self.windows


def measurement_batches(tokens: np.ndarray, context: int, part: str, wanted: int) -> list[dict[str, torch.Tensor]]:
    """About `wanted` validation tokens of one part, as a list of {"input_ids": (windows, context)}.

    part "calibration" is the first third of the validation text, "evaluation" the rest, so that no document (but the
    one at the seam) is on both sides; within a part the windows lie evenly spaced, so that a small set still visits
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


def domain_batches(
    tokens: np.ndarray, documents: pd.DataFrame, context: int, calibration_tokens: int, evaluation_tokens: int
) -> dict[str, tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]]:
    """(calibration, evaluation) batches of the largest domains that have enough text, largest first.

    `documents`: start, stop, domain and name as `Corpus.documents` gives them. Every file of a domain is on one side
    alone, a third of the tokens for calibration; the windows run over the joined documents of a side, evenly spaced.
    All domains get the same number of tokens, the wanted one rounded down to whole windows.
    Raises InputError when no domain has that many on both sides.
    """
    wanted, sides = (calibration_tokens // context, evaluation_tokens // context), {}
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


def _spaced_batches(tokens: np.ndarray, context: int, first: int, last: int, count: int) -> list[dict]:
    """`count` of the windows `first` to `last`, evenly spaced, as batches of {"input_ids": (windows, context)}."""
    chosen = first + (np.arange(count) * (last - first)) // count
    groups = np.array_split(chosen, -(-count // BATCH_WINDOWS))
    return [{"input_ids": _inputs_and_targets(tokens, group, context)[0]} for group in groups]


def _inputs_and_targets(tokens: np.ndarray, windows: np.ndarray, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    index = windows[:, None] * context + np.arange(context + 1)  # (windows, context + 1)
    ids = torch.from_numpy(tokens[index].astype(np.int64))
    return ids[:, :-1], ids[:, 1:]
