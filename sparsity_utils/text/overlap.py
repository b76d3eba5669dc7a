"""Tell whether text that sets thresholds is also text that they are judged on."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np

from sparsity_utils.console import InputError

GRAM = 32  # tokens in a row that count as the same text when they are equal; licence headers aside, few repeat
MOST = 0.5  # of a document: above, it is in the other text
FEW = 0.1  # of a window, that may stand in earlier ones: several such overlaps are still less than MOST

Windows = Iterable[tuple[int, np.ndarray]]  # of each window: number of its document, its tokens (length,)


def check_disjoint(texts: Mapping[str, Windows]) -> None:
    """Raises `InputError` when a document of one of `texts`, by role, is found in another, wherever it was cut.

    A document is found when more than half of its runs of GRAM tokens are there; a shorter window is one run.
    """
    grams = {role: _grams(windows) for role, windows in texts.items()}
    for (role, documents), (other, others) in combinations(grams.items(), 2):
        there = np.unique(np.concatenate([np.empty(0, np.uint64), *others.values()]))
        for number, own in documents.items():
            if np.isin(own, there).mean() > MOST:
                raise InputError(
                    f"Document {number} of the {role} text is also in the {other} text: a rule is judged on documents "
                    f"that set nothing; divide them, for instance by split_documents."
                )


def distinct(windows: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
    """The windows of which hardly a run of GRAM tokens is in earlier ones that were kept: they can be divided."""
    there: set[int] = set()
    for window in windows:
        own = _grams([(0, np.asarray(window))])[0].tolist()
        if sum(gram in there for gram in own) <= FEW * len(own):
            there.update(own)
            yield window


def _grams(windows: Windows) -> dict[int, np.ndarray]:
    """A hash of each run of GRAM tokens, by document."""
    multipliers = np.random.default_rng(0).integers(1, 2**63, GRAM, dtype=np.uint64) | np.uint64(1)
    found: dict[int, list[np.ndarray]] = {}
    for document, tokens in windows:
        run = min(GRAM, len(tokens))
        runs = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64) + np.uint64(1), run)
        found.setdefault(document, []).append((runs * multipliers[:run]).sum(axis=1, dtype=np.uint64))
    return {document: np.concatenate(parts) for document, parts in found.items()}
