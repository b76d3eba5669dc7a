"""The certified head: the likeliest words and their logits are those of the full head, whatever it skips."""

import pytest
import torch

from kernels.head import CertifiedHead

pytestmark = pytest.mark.usefixtures("threads")


def head(vocabulary=500, d=63, k=1, bias=False, seed=0):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, d, generator=random) * torch.rand(vocabulary, 1, generator=random)
    return CertifiedHead(weight, k, torch.randn(vocabulary, generator=random) if bias else None)


def states(tokens, d=63, seed=1):
    return 3 * torch.randn(tokens, d, generator=torch.Generator().manual_seed(seed))


def full(head, x):
    """All logits in float64."""
    y = x.double() @ head.weight.double().T
    return y if head.bias is None else y + head.bias.double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [1, 5, 500])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_the_k_likeliest_words_are_exact(tokens, k, bias):
    certified, x = head(k=k, bias=bias), states(tokens)
    logits, expected = certified(x), full(certified, x)
    for mine, exact in zip(logits, expected, strict=True):
        assert mine.topk(k).indices.sort().values.equal(exact.topk(k).indices.sort().values)
        kept = mine.isfinite()
        assert torch.allclose(mine[kept].double(), exact[kept], rtol=1e-5, atol=1e-5)


def test_a_logit_does_not_depend_on_what_is_skipped():
    x = states(4)
    few, many = head(k=1)(x), head(k=500)(x)
    kept = few.isfinite()
    assert many.isfinite().all() and torch.equal(few[kept], many[kept])
    assert kept.double().mean() < 0.1  # or nothing would be saved


def test_the_kernel_reads_what_the_rule_asks_for():
    certified, x = head(k=3), states(5)
    assert torch.equal(certified(x).isfinite(), certified.undecided(x))


def test_no_likeliest_word_is_skipped_for_the_worst_inputs():
    """x along the rounding error of a row leads that row's estimate as far astray as any x of its size can."""
    certified = head(vocabulary=60, d=37)
    copy = certified.copy
    error = certified.weight.double() - copy.scale[:, None] * copy.bits.double()
    directions = torch.cat([error, -error, certified.weight.double()])
    for size in torch.logspace(-3, 3, 7, dtype=torch.float64):
        x = (directions / directions.norm(dim=1, keepdim=True) * size).float()
        best = full(certified, x).argmax(dim=1, keepdim=True)
        assert certified.undecided(x).gather(1, best).all()


def test_equal_words_are_all_kept():
    weight = torch.randn(7, 20).repeat(2, 1)
    logits = CertifiedHead(weight)(states(1, d=20))
    best = logits.argmax()
    assert logits[0, best] == logits[0, (best + 7) % 14]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_numbers_reach_the_output(bad):
    certified, x = head(), states(2)
    x[1, 7] = bad
    logits = certified(x)
    assert logits[0].isfinite().any() and not logits[1].isfinite().any()
    weight = certified.weight.clone()
    weight[3, 5] = bad
    assert not CertifiedHead(weight)(states(1))[0, 3].isfinite()


def test_numbers_near_overflow_are_not_trusted():
    certified = CertifiedHead(torch.tensor([[1.0, 1.0], [1.0, -1.0]]) * 1e30)
    assert certified.undecided(torch.full((1, 2), 1e10)).all()


@pytest.mark.parametrize("vocabulary", [1, 2, 499])
def test_the_same_bits_on_one_thread_and_on_two(two_threads, vocabulary):
    certified, x = head(vocabulary), states(3)
    two = certified(x)
    torch.set_num_threads(1)
    assert torch.equal(certified(x), two) and two.isfinite().any()


def test_many_tokens_get_all_logits():
    certified, x = head(), states(17)
    assert torch.equal(certified(x[None])[0], torch.nn.functional.linear(x, certified.weight))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"weight": torch.zeros(3, 4, dtype=torch.bfloat16)}, "float32, on a CPU"),
        ({"weight": torch.ones(3, 4), "k": 4}, "choose 1 to 3"),
        ({"weight": torch.ones(3, 4), "bias": torch.zeros(4)}, r"must be \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        CertifiedHead(**given)


def test_an_input_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"must be \(\.\.\., 63\)"):
        head()(torch.zeros(2, 62))
