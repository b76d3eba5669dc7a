"""Random text and random targets: what sparsity does not need, if it comes with them too (arXiv 2210.06313).

Text is that of the corpus or drawn, every token alone with the frequency that it has in the corpus. Targets are

    uniform   drawn once per position, every entry of the vocabulary alike
    unigram   drawn once per position, with the frequencies of the corpus
    function  a fixed random function of the token and the one before it

Targets of the first two can only be learnt by heart, those of the third also for text that was not trained on.
"""

from dataclasses import dataclass

import numpy as np

from sparsity_utils.console import check

TEXT, TARGETS, FUNCTION, HELD_OUT = range(4)  # which stream of random numbers of a seed


@dataclass(frozen=True)
class RandomData:
    """What is drawn for a run."""

    text: str  # "corpus" or "random"
    targets: str  # "next", "uniform", "unigram" or "function"
    distinct_tokens: int | None  # None: all of the corpus
    vocabulary: int
    seed: int

    def training(self, corpus: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The training tokens, and for each position what it predicts; None where that is the next token.

        corpus: the training tokens of the corpus. Both results have distinct_tokens + 1 entries, the last without a
        target. Raises InputError for a corpus that is too short.
        """
        if self.distinct_tokens is not None and self.text == "corpus":
            check(
                len(corpus) > self.distinct_tokens,
                f"The training text has {len(corpus):,} tokens, not the {self.distinct_tokens:,} of "
                "train.distinct_tokens and one after them; give more text or ask for fewer.",
            )
            corpus = corpus[: self.distinct_tokens + 1]
        tokens = corpus if self.text == "corpus" else self._drawn(corpus, self._rng(TEXT))
        if self.targets == "next":
            return tokens, None
        if self.targets == "function":
            return tokens, self.function(tokens)
        if self.targets == "uniform":
            return tokens, self._rng(TARGETS).integers(self.vocabulary, size=len(tokens), dtype=np.int64)
        return tokens, self._drawn(corpus, self._rng(TARGETS))

    def held_out(self, corpus: np.ndarray, validation: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Likewise, of what training does not see; of targets that can only be learnt by heart, what it saw."""
        if self.targets in ("uniform", "unigram"):
            return self.training(corpus)
        tokens = validation if self.text == "corpus" else self._drawn(corpus, self._rng(HELD_OUT))
        return tokens, None if self.targets == "next" else self.function(tokens)

    def function(self, tokens: np.ndarray) -> np.ndarray:
        """A random entry of the vocabulary for every pair of a token and the one before it, the same for equal pairs.

        A random number of the seed is added to the number of the pair, its bits are mixed (`mixed`), and the upper 32
        of them are taken modulo the vocabulary. The first token of all stands before itself.
        """
        start = np.uint64(self._rng(FUNCTION).integers(1 << 62))
        before = np.concatenate([tokens[:1], tokens[:-1]]).astype(np.uint64)
        pairs = before * np.uint64(self.vocabulary) + tokens.astype(np.uint64)
        return ((mixed(pairs + start) >> np.uint64(32)) % np.uint64(self.vocabulary)).astype(np.int64)

    def _drawn(self, corpus: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Tokens as frequent as in the corpus, each drawn alone: as many as are distinct, and one."""
        return rng.choice(corpus, size=(self.distinct_tokens or len(corpus) - 1) + 1)

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream])


def mixed(numbers: np.ndarray) -> np.ndarray:
    """uint64 -> uint64 so that neighbours come out as if drawn: the finaliser of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        numbers = (numbers + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return numbers ^ (numbers >> np.uint64(31))
