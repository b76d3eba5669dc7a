"""Finding the FFNs of a model leaves every attribute and every buffer of it as it was."""

from collections import OrderedDict

import pytest
import torch
import transformers
from families import FAMILIES, VOCABULARY, build, output, randomised
from mixtures import FUSED
from mixtures import build as build_mixture
from torch import nn

from sparsity_utils.console import InputError
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.modes import unchanged


def big_bird():
    config = transformers.BigBirdConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, block_size=2, num_random_blocks=1,
    )  # fmt: skip
    return randomised(transformers.BigBirdForMaskedLM(config))


class Busy(nn.Module):
    """An FFN that counts, collects and remembers."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 9), nn.Linear(9, 6), nn.BatchNorm1d(6)
        self.calls, self.log, self.seen, self.table, self.pair = 0, [], set(), {"lengths": []}, ([], 1)
        self.register_buffer("mean", torch.zeros(6))
        self.plain, self.empty = torch.zeros(3), Empty()

    def forward(self, x):
        self.calls += 1
        self.log.append(x.shape)
        self.seen.add(len(x))
        self.table["lengths"].append(len(x))
        self.pair[0].append(1)
        self.mean.mul_(0.9).add_(x.mean(0))
        self.plain += 1
        self.empty.value = x
        self.cached = x
        self.norm.train()
        self.norm(x)
        self.register_buffer("late", x)
        self.extra = nn.Linear(1, 1)
        return self.down(torch.relu(self.up(x)))


class Empty:
    pass


def state(model):
    """Everything that can be reached from the model, by path: numbers and strings by value, the rest by identity."""
    found, seen = {}, set()

    def walk(path, part):
        if isinstance(part, torch.Tensor):
            found[path] = (id(part), part.detach().clone())
        elif isinstance(part, (int, float, str, bool, type(None), torch.dtype, torch.device)):
            found[path] = part
        elif id(part) not in seen:
            seen.add(id(part))
            found[path] = id(part)
            if isinstance(part, (dict, OrderedDict)):
                for key, value in part.items():
                    walk((*path, key), value)
            elif isinstance(part, (list, tuple)):
                for i, value in enumerate(part):
                    walk((*path, i), value)
            elif isinstance(part, set):
                found[(*path, "set")] = sorted(map(str, part))
            elif isinstance(part, (nn.Module, transformers.PretrainedConfig, Empty)):
                walk((*path, "."), vars(part))

    walk((), model)
    return found


def assert_same(before, after):
    assert before.keys() == after.keys()
    for path, one in before.items():
        other = after[path]
        if isinstance(one, tuple):
            assert one[0] == other[0] and torch.equal(one[1], other[1]), path
        else:
            assert one == other, path


def test_big_bird_keeps_its_attention():
    model = big_bird()
    before = state(model)
    assert len(find_ffns(model)) == 2
    assert_same(before, state(model))
    assert model.bert.attention_type == "block_sparse"
    long = {"input_ids": torch.randint(3, VOCABULARY, (1, 32), generator=torch.Generator().manual_seed(0))}
    torch.testing.assert_close(output(model, long), output(big_bird(), long), rtol=0, atol=0)


def test_a_module_that_counts_collects_and_remembers_forgets_the_tiny_run():
    model = Busy().eval()
    model.norm.weight.requires_grad_(False)
    before = state(model)
    (ffn,) = find_ffns(model, torch.randn(5, 6))
    assert ffn.parameter is model.down.weight
    assert_same(before, state(model))
    assert model.calls == 0 and not model.norm.training and not hasattr(model, "cached") and not model.mean.any()


def test_also_when_the_run_fails():
    model = Busy().eval()
    before = state(model)
    with pytest.raises(InputError, match="did not run on the given inputs"):
        find_ffns(model, torch.randn(5, 7))
    assert_same(before, state(model))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_stay_as_they_are(family):
    model = build(family).train()
    before = state(model)
    find_ffns(model)
    assert_same(before, state(model))


@pytest.mark.parametrize("family", sorted(FUSED))
def test_mixtures_stay_as_they_are(family):
    model = build_mixture(family)
    before = state(model)
    find_ffns(model)
    assert_same(before, state(model))


def test_what_runs_after_the_block_still_changes_the_model():
    model = Busy().eval()
    with unchanged(model):
        model(torch.ones(5, 6))
    model(torch.ones(4, 6))
    assert model.calls == 1 and model.log == [(4, 6)] and model.seen == {4} and model.table == {"lengths": [4]}
    torch.testing.assert_close(model.mean, torch.ones(6))
