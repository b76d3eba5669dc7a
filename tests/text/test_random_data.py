"""Random text and targets: how often what is drawn, what depends on what, and what is held out."""

import numpy as np
import pytest
import torch

from sparsity_utils.console import InputError
from sparsity_utils.text.random_data import RandomData, mixed
from sparsity_utils.text.windows import TrainingBatches, random_batches

VOCABULARY = 50
COUNT = 20_000
SHARES = np.arange(1, VOCABULARY + 1) / np.arange(1, VOCABULARY + 1).sum()  # of the tokens of the corpus
CORPUS = np.random.default_rng(1).choice(VOCABULARY, 30_000, p=SHARES).astype(np.uint16)
VALIDATION = CORPUS[:5000][::-1].copy()


def data(text="corpus", targets="next", distinct=COUNT, seed=0) -> RandomData:
    return RandomData(text, targets, distinct, VOCABULARY, seed)


def as_often(drawn: np.ndarray, shares: np.ndarray) -> bool:
    """Whether each token's share is within five standard errors of `shares`."""
    found = np.bincount(drawn, minlength=VOCABULARY) / len(drawn)
    return bool((abs(found - shares) < 5 * np.sqrt(shares * (1 - shares) / len(drawn))).all())


def frequencies(tokens: np.ndarray) -> np.ndarray:
    return np.bincount(tokens, minlength=VOCABULARY) / len(tokens)


def test_random_text_is_drawn_as_often_as_in_the_corpus_and_in_no_order():
    tokens, targets = data("random", "function").training(CORPUS)
    assert len(tokens) == len(targets) == COUNT + 1
    assert as_often(tokens, frequencies(CORPUS)) and not as_often(tokens, np.full(VOCABULARY, 1 / VOCABULARY))
    same = (tokens[1:] == tokens[:-1]).mean()
    assert same == pytest.approx((frequencies(CORPUS) ** 2).sum(), abs=5 * np.sqrt(0.03 / COUNT))


@pytest.mark.parametrize("text", ["corpus", "random"])
def test_targets_are_drawn_as_often_as_they_say_whatever_the_token(text):
    for targets, shares in (("uniform", np.full(VOCABULARY, 1 / VOCABULARY)), ("unigram", frequencies(CORPUS))):
        tokens, drawn = data(text, targets).training(CORPUS)
        assert as_often(drawn, shares), targets
        for shift in (0, 1):  # neither the token nor the next one
            same = (drawn[: COUNT - shift] == tokens[shift:COUNT]).mean()
            wanted = shares @ frequencies(tokens)
            assert same == pytest.approx(wanted, abs=5 * np.sqrt(wanted / COUNT)), targets


@pytest.mark.parametrize("text", ["corpus", "random"])
@pytest.mark.parametrize("targets", ["uniform", "unigram", "function"])
def test_a_seed_decides_what_is_drawn(text, targets):
    first, again, other = (data(text, targets, seed=seed).training(CORPUS) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert (first[1] != other[1]).mean() > 0.9
    assert (text == "corpus") == np.array_equal(first[0], other[0])


def test_a_function_gives_equal_pairs_equal_targets_also_those_held_out():
    random = data("random", "function", seed=2)
    known: dict[tuple[int, int], int] = {}
    for tokens, targets in (random.training(CORPUS), random.held_out(CORPUS, VALIDATION)):
        for place in range(1, len(tokens)):
            pair = int(tokens[place - 1]), int(tokens[place])
            assert known.setdefault(pair, int(targets[place])) == targets[place]
    assert len(known) > 0.9 * VOCABULARY**2 > 2 * VOCABULARY
    values = np.array(list(known.values()))
    assert values.min() >= 0 and as_often(values, np.full(VOCABULARY, 1 / VOCABULARY))
    for first in range(VOCABULARY):  # it looks at both tokens
        assert len({known.get((first, second)) for second in range(VOCABULARY)}) > 5
        assert len({known.get((second, first)) for second in range(VOCABULARY)}) > 5


def test_bits_are_mixed_as_splitmix64_does():
    def literal(number: int) -> int:
        number = (number + 0x9E3779B97F4A7C15) % 2**64
        number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) % 2**64
        return number ^ (number >> 31)

    numbers = [0, 1, 2, 2**63, 2**64 - 1]
    assert mixed(np.array(numbers, dtype=np.uint64)).tolist() == [literal(number) for number in numbers]
    assert literal(0) == 0xE220A8397B1DCDAF  # the first output of a generator with seed 0, as published


def test_a_function_of_pairs_cannot_be_told_from_its_parts():
    """Knowing what (a, x) and (b, x) lead to says nothing of (a, y) and (b, y): no sum of two parts explains it."""
    random = data("random", "function")
    tokens = np.arange(VOCABULARY)
    targets = np.array([random.function(np.array([one, two]))[1] for one in tokens[:20] for two in tokens[:20]])
    table = targets.reshape(20, 20)
    steps = (table[:, 1:] - table[:, :-1]) % VOCABULARY  # equal in every row if it were a sum
    assert len(np.unique(steps[:, 0])) > 10


def test_what_is_held_out_was_not_trained_on_but_for_targets_learnt_by_heart():
    tokens, targets = data().held_out(CORPUS, VALIDATION)
    assert tokens is VALIDATION and targets is None
    tokens, targets = data("corpus", "function").held_out(CORPUS, VALIDATION)
    assert tokens is VALIDATION and len(targets) == len(VALIDATION)
    trained, fresh = (
        data("random", "function").training(CORPUS)[0],
        data("random", "function").held_out(CORPUS, [])[0],
    )
    assert (trained != fresh).mean() > 0.9 and as_often(fresh, frequencies(CORPUS))
    for name in ("uniform", "unigram"):
        pairs = zip(data("random", name).training(CORPUS), data("random", name).held_out(CORPUS, []), strict=True)
        assert all(np.array_equal(seen, held) for seen, held in pairs)


def test_distinct_tokens_are_the_first_of_the_corpus():
    tokens, targets = data(distinct=640).training(CORPUS)
    assert np.array_equal(tokens, CORPUS[:641]) and targets is None
    assert data(distinct=None).training(CORPUS)[0] is CORPUS
    assert len(data("corpus", "unigram", 640).training(CORPUS)[1]) == 641
    assert len(data(distinct=len(CORPUS) - 1).training(CORPUS)[0]) == len(CORPUS)
    with pytest.raises(InputError, match=r"has 30,000 tokens, not the 30,000 of train\.distinct_tokens and one after"):
        data(distinct=len(CORPUS)).training(CORPUS)
    assert len(data("random", "uniform", 2 * len(CORPUS)).training(CORPUS)[0]) == 2 * len(CORPUS) + 1


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
def test_batches_hand_out_the_targets_of_their_own_positions(dtype):
    """Tokens and targets are their own positions, so that an input names the target that belongs to it."""
    places = np.arange(1001, dtype=np.uint16)
    batches = TrainingBatches(places, 16, 64, seed=0, targets=(places + 1000).astype(dtype))
    seen = []
    for step in range(2 * batches.windows // 4):
        inputs, targets = batches(step)
        assert inputs.shape == targets.shape == (4, 16) and inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, inputs + 1000)
        seen.append(inputs.flatten())
    assert torch.equal(torch.cat(seen).unique(), torch.arange(992)) and batches.passes(62) == 4.0
    evaluated = random_batches(places, (places + 1000).astype(dtype), 16, 333)
    ids = torch.cat([batch["input_ids"] for batch in evaluated])
    assert torch.equal(torch.cat([batch["targets"] for batch in evaluated]), ids + 1000) and ids.shape == (20, 16)
    assert sum(len(batch["input_ids"]) for batch in random_batches(places, places, 16, 10**6)) == 62  # all there are
