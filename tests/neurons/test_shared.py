"""Layers that share their weights or their modules, against an unshared copy with the same weights."""

from copy import deepcopy

import pytest
import torch
import transformers
from families import VOCABULARY, Keep, build, inputs, keep_even, keep_none, left_behind, output, randomised
from torch import nn

from sparsity_utils.console import InputError
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.hooks import observe_neurons, sparse_neurons
from sparsity_utils.sparsity.metrics import measure_sparsity

LAYERS = 3


def albert(groups=1):
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=8, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, num_hidden_groups=groups, inner_group_num=1,
        attn_implementation="eager",
    )  # fmt: skip
    return randomised(transformers.AlbertForMaskedLM(config))


def unshared_albert():
    """Each layer a group of its own, with the weights of the one."""
    shared, model = albert(), albert(groups=LAYERS)
    state = shared.state_dict()
    for name in list(state):
        for i in range(1, LAYERS):
            state[name.replace("layer_groups.0.", f"layer_groups.{i}.")] = state[name]
    model.load_state_dict(state)
    return shared, model


def tied_llama():
    """Two layers whose FFNs are modules with the same parameters."""
    model = build("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    for part in ("gate_proj", "up_proj", "down_proj"):
        getattr(second, part).weight = getattr(first, part).weight
        getattr(second, part).bias = getattr(first, part).bias
    return model, untied(model)


def tied_down():
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    return model, untied(model)


def untied(model):
    copy = deepcopy(model)
    for module in copy.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
    return copy


def one_module_in_two_layers():
    model = build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    copy = build("llama")
    copy.load_state_dict(model.state_dict())
    return model, copy


class Tower(nn.Module):
    """One FFN, made of functions, in each of three steps."""

    def __init__(self, own):
        super().__init__()
        self.steps = nn.ModuleList(Step() for _ in range(3 if own else 1))

    def forward(self, x):
        for i in range(3):
            x = self.steps[i % len(self.steps)](x)
        return x


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.down = nn.Parameter(torch.zeros(9, 6)), nn.Parameter(torch.zeros(6, 9))

    def forward(self, x):
        return x + torch.relu(x @ self.gate.T) @ self.down.T


def functional_steps():
    shared = randomised(Tower(own=False))
    own = Tower(own=True).double()
    for step in own.steps:
        step.load_state_dict(shared.steps[0].state_dict())
    return shared, own


PAIRS = {
    "albert": unshared_albert, "tied": tied_llama, "tied down": tied_down, "module twice": one_module_in_two_layers,
    "functions": functional_steps,
}  # fmt: skip


def given(pair, seed=1):
    if pair == "functions":
        return {"x": torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))}
    return inputs("llama")


def run(model, batch):
    with torch.no_grad():
        result = model(**batch)
    return result if isinstance(result, torch.Tensor) else result[0]


def seen_in(model, batch):
    seen = []
    with observe_neurons(model, lambda ffn, s, h, tokens: seen.append((ffn.layer, ffn.call, s, h, tokens))):
        for _ in range(2):
            run(model, batch)
    return seen


@pytest.mark.parametrize("pair", PAIRS)
def test_shared_layers_are_measured_and_masked_as_their_unshared_copy(pair):
    shared, own = PAIRS[pair]()
    batch = given(pair)
    if pair == "functions":
        find_ffns(shared, batch)
        find_ffns(own, batch)
    ffns, layers = find_ffns(shared), len(find_ffns(own))
    assert [ffn.layer for ffn in ffns] == list(range(layers))
    assert layers == (LAYERS if pair in ("albert", "functions") else 2)
    before = run(shared, batch)
    seen, expected = seen_in(shared, batch), seen_in(own, batch)
    assert [layer for layer, *_ in seen] == 2 * list(range(layers))
    for one, other in zip(seen, expected, strict=True):
        assert one[0] == other[0] and other[1] == 0
        torch.testing.assert_close(one[2:], other[2:], rtol=1e-12, atol=1e-12)
    for keep in (keep_none, keep_even):
        rule = Keep(ffns, keep)
        with sparse_neurons(shared, rule), sparse_neurons(own, rule):
            torch.testing.assert_close(run(shared, batch), run(own, batch), rtol=1e-12, atol=1e-12)
    assert torch.equal(run(shared, batch), before) and left_behind(shared) == []


class PerLayer(Keep):
    """Keeps the neurons below another number in each layer."""

    def active(self, ffn, s, h):
        return (torch.arange(ffn.d_ff) < 3 + 5 * ffn.layer).expand_as(h)


@pytest.mark.parametrize("pair", PAIRS)
def test_each_call_has_the_threshold_of_its_layer(pair):
    shared, own = PAIRS[pair]()
    batch = given(pair)
    if pair == "functions":
        find_ffns(shared, batch)
        find_ffns(own, batch)
    rule = PerLayer(find_ffns(own), None)
    with sparse_neurons(shared, rule), sparse_neurons(own, rule):
        torch.testing.assert_close(run(shared, batch), run(own, batch), rtol=1e-12, atol=1e-12)


def test_a_report_on_shared_layers_is_that_of_their_copy():
    batches = [inputs("llama") | {"labels": inputs("llama")["input_ids"]}]
    reports = [measure_sparsity(model, batches, "cett", cett=0.2) for model in unshared_albert()]
    assert len(reports[0].layers) == LAYERS and reports[0].ratio_of_all_neurons == reports[0].activation_ratio
    for name in ("activation_ratio", "cett", "nonzero_share", "ppl_ratio", "loss_sparse"):
        assert getattr(reports[0], name) == pytest.approx(getattr(reports[1], name), rel=1e-9)
    columns = ["threshold", "activation_ratio", "ratio_of_all_neurons", "cett"]
    one, other = (report.layers[columns].to_numpy() for report in reports)
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-9, atol=1e-12)


def test_a_pass_that_fails_between_calls_does_not_shift_the_next():
    model, batch = albert(), inputs("llama")
    find_ffns(model)
    calls, seen = [], []

    def fails_once(module, args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the second call")

    handle = model.albert.encoder.albert_layer_groups[0].register_forward_pre_hook(fails_once)
    with observe_neurons(model, lambda ffn, s, h, tokens: seen.append(ffn.layer)):
        with pytest.raises(RuntimeError, match="in the second call"):
            output(model, batch)
        output(model, batch)
    handle.remove()
    assert seen == [0, *range(LAYERS)] and left_behind(model) == []


def test_another_number_of_calls_is_refused():
    model, batch = albert(), inputs("llama")
    find_ffns(model)
    model.config.num_hidden_layers = LAYERS - 1
    with (
        observe_neurons(model, lambda *seen: None),
        pytest.raises(InputError, match=f"serves {LAYERS} layers .* another number of times: run the whole model"),
    ):
        output(model, batch)
    assert left_behind(model) == []


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Albert"])
def test_an_ffn_in_chunks_sees_every_token_once(kind):
    options = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    build, config = getattr(transformers, f"{kind}ForMaskedLM"), getattr(transformers, f"{kind}Config")
    whole = randomised(build(config(**options)))
    for size in (1, 7):
        chunked = build(config(**options, chunk_size_feed_forward=size)).double().eval()
        chunked.load_state_dict(whole.state_dict())
        assert [ffn.layer for ffn in find_ffns(chunked)] == [0, 1]
        torch.testing.assert_close(by_token(chunked), by_token(whole), rtol=1e-12, atol=1e-12)


def by_token(model):
    """layer -> s and h of every token, in order."""
    parts = {}
    with observe_neurons(model, lambda ffn, s, h, tokens: parts.setdefault(ffn.layer, []).append((s, h, tokens))):
        output(model, inputs("llama"))
    result = {}
    for layer, pieces in parts.items():
        s, h, tokens = (torch.cat(part) for part in zip(*pieces, strict=True))
        assert sorted(tokens.tolist()) == list(range(21))
        result[layer] = s[tokens.argsort()], h[tokens.argsort()]
    return result
