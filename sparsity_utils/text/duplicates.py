"""Exact and near duplicates, removed before the corpus is split, so that no validation text is in training.

Near duplicates: MinHash (Broder 1997) over 5-grams of units, found with locality-sensitive hashing; two documents
are duplicates when the estimated Jaccard similarity of their 5-gram sets is at least 0.8. What a unit is, the rule of
the corpus says:

    1   a word, between white space
    2   a character of a script that is written without spaces; every PIECE characters of a longer run than any word
        (minified code, base64, DNA); any other word
"""

import hashlib
import re
import unicodedata
import zlib

import numpy as np

WORDS = 5  # in a shingle
SIMILARITY = 0.8
PERMUTATIONS = 128
SEED = 1
BANDS, ROWS = 25, 5  # two texts of similarity J are compared with probability 1 - (1 - J^5)^25: 0.99995 at 0.8

# Scripts written without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, Tai and Javanese letters, Chinese
# and Japanese characters and punctuation, Yi, full-width forms.
UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u1950-\u1aaf\u1b00-\u1b7f\u2e80-\u2fff\u3001-\u312f\u31a0-\u4dbf\u4e00-\ua4cf"
    "\ua980-\ua9ff\uaa60-\uaadf\uf900-\ufaff\uff00-\uffef\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
INVISIBLE = "\u200b\u2060\ufeff"  # zero width: where a line may break, or not
_RUN = re.compile(rf"[{UNSPACED}]|[^\s{INVISIBLE}{UNSPACED}]+")
LONGEST_WORD = 32  # characters
PIECE = 9  # characters: five successive pieces are 13, of which texts of four letters seldom share one by chance

_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: multiplication by it is a bijection


class Duplicates:
    """Remembers the documents shown to it; the first of several alike is the one that stays."""

    def __init__(self, rule: int) -> None:
        from datasketch import MinHash, MinHashLSH

        self._rule = rule
        self._exact: set[bytes] = set()
        self._index = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, ROWS))
        self._kept: list[MinHash] = []
        # Shingles arrive as integers (`int` passes them through): one vectorised pass instead of a SHA-1 each.
        self._empty = MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=int)

    def kind(self, text: str) -> str | None:
        """`"exact"` or `"near"` when `text` repeats a document seen before; otherwise remember it and return None."""
        digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
        if digest in self._exact:
            return "exact"
        self._exact.add(digest)
        minhash = self._empty.copy()
        minhash.update_batch(shingles(text, self._rule).tolist())
        if any(minhash.jaccard(self._kept[other]) >= SIMILARITY for other in self._index.query(minhash)):
            return "near"
        self._index.insert(len(self._kept), minhash)
        self._kept.append(minhash)
        return None


def shingles(text: str, rule: int) -> np.ndarray:
    """The set of 5-grams of units of `text` as sorted 32-bit hashes, (shingles,) uint32; a shorter text is one."""
    words = text.encode().split() if rule == 1 else [unit.encode() for unit in units(text)]
    hashes = np.fromiter(map(zlib.crc32, words), dtype=np.uint64, count=len(words))  # (words,)
    size = min(WORDS, len(words))
    mixed = np.zeros(len(words) - size + 1, dtype=np.uint64)  # (shingles,)
    for start in range(size):
        mixed = (mixed ^ hashes[start : start + len(mixed)]) * _MIX  # wraps modulo 2^64
        mixed ^= mixed >> np.uint64(29)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def units(text: str) -> list[str]:
    """What rule 2 makes 5-grams of, in reading order; of a run longer than a word, its overlapping pieces."""
    found = []
    for run in _RUN.findall(unicodedata.normalize("NFC", text)):
        if len(run) <= LONGEST_WORD:
            found.append(run)
        else:
            found += [run[start : start + PIECE] for start in range(len(run) - PIECE + 1)]
    return found
