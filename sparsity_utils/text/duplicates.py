"""Exact and near duplicates, removed before the corpus is split, so that no validation text is in training.

Near duplicates: MinHash (Broder 1997) over word 5-grams, found with locality-sensitive hashing; two documents
are duplicates when the estimated Jaccard similarity of their 5-gram sets is at least 0.8.
"""

import hashlib
import zlib

import numpy as np

WORDS = 5  # in a shingle
SIMILARITY = 0.8
PERMUTATIONS = 128
SEED = 1
BANDS, ROWS = 25, 5  # two texts of similarity J are compared with probability 1 - (1 - J^5)^25: 0.99995 at 0.8

_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: multiplication by it is a bijection


class Duplicates:
    """Remembers the documents shown to it; the first of several alike is the one that stays."""

    def __init__(self) -> None:
        from datasketch import MinHash, MinHashLSH

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
        minhash.update_batch(shingles(text).tolist())
        if any(minhash.jaccard(self._kept[other]) >= SIMILARITY for other in self._index.query(minhash)):
            return "near"
        self._index.insert(len(self._kept), minhash)
        self._kept.append(minhash)
        return None


def shingles(text: str) -> np.ndarray:
    """The set of word 5-grams of `text` as sorted 32-bit hashes, (shingles,) uint32; a shorter text is one shingle."""
    words = text.encode().split()
    hashes = np.fromiter(map(zlib.crc32, words), dtype=np.uint64, count=len(words))  # (words,)
    size = min(WORDS, len(words))
    mixed = np.zeros(len(words) - size + 1, dtype=np.uint64)  # (shingles,)
    for start in range(size):
        mixed = (mixed ^ hashes[start : start + len(mixed)]) * _MIX  # wraps modulo 2^64
        mixed ^= mixed >> np.uint64(29)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))
