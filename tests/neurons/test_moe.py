"""Mixtures of experts: fused by transformers into one tensor, or a list of modules; routed and shared ones."""

from copy import deepcopy

import pytest
import torch
from families import Keep, gelu_tanh, keep_all, keep_even, keep_none, left_behind, output, randomised, silu
from mixtures import FUSED, IDS, build
from torch import nn

from sparsity_utils.console import InputError
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.hooks import observe_neurons, sparse_neurons
from sparsity_utils.neurons.thresholds import Thresholds

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm", "fallback"]  # the last: grouped_mm where torch has none


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    """How transformers computes fused experts."""
    if request.param == "fallback":
        monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *given: False)
    return request.param


ROUTED = sorted(set(FUSED) - {"gpt_oss"})  # those whose experts are gate_up_proj and down_proj with silu


def assert_close(x, expected):
    tolerance = 1e-10 if x.dtype == torch.float64 else 3e-5
    torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)


def observed(model, run):
    """(layer, expert) -> (s, h, tokens), each seen once."""
    seen = {}

    def keep(ffn, s, h, tokens):
        assert (ffn.layer, ffn.expert) not in seen and len(s) == len(h) == len(tokens) > 0
        seen[ffn.layer, ffn.expert] = s, h, tokens

    with observe_neurons(model, keep):
        run()
    return seen


def routes(model, run):
    """What each experts module was given: x (tokens, d), the experts of each token (tokens, k)."""
    calls, handles = [], []
    for name, module in model.named_modules():
        if name.endswith("experts"):
            handles.append(module.register_forward_pre_hook(lambda m, args: calls.append((m, args[0], args[1]))))
    run()
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("family", ROUTED)
def test_each_routed_expert_sees_its_tokens_and_its_neurons(family, implementation):
    model = build(family, implementation)
    ffns = [ffn for ffn in find_ffns(model) if ffn.experts > 1]
    assert [(ffn.expert, ffn.experts) for ffn in ffns] == [(e, 4) for _ in range(2) for e in range(4)]
    assert {ffn.name for ffn in ffns} == {f"model.layers.{i}.mlp.experts" for i in range(2)}
    seen = observed(model, lambda: output(model, {"input_ids": IDS}))
    calls = routes(model, lambda: output(model, {"input_ids": IDS}))
    count = 0
    for i, (experts, x, chosen) in enumerate(calls):
        layer = ffns[4 * i].layer
        for e in range(4):
            expected = [t for t in range(len(x)) if e in chosen[t].tolist()]
            s, h, tokens = seen.pop((layer, e), (None, None, torch.zeros(0, dtype=torch.long)))
            assert sorted(tokens.tolist()) == expected
            count += len(expected)
            gate, up = experts.gate_up_proj[e].chunk(2)
            for row, token in enumerate(tokens.tolist()):
                slow = silu((gate * x[token]).sum(1))
                assert_close(s[row], slow)
                assert_close(h[row], slow * (up * x[token]).sum(1))
            assert torch.equal(ffns[4 * i + e].down_weight, experts.down_proj[e])
            assert ffns[4 * i + e].gate is None and ffns[4 * i + e].up is None
            assert ffns[4 * i + e].down_weight.data_ptr() == experts.down_proj[e].data_ptr()
    assert count == 2 * 2 * IDS.numel()
    assert all(expert == 0 for _, expert in seen)  # what is left is of shared experts


def test_a_single_token_is_followed_too(implementation):
    model = build("qwen2_moe", implementation)
    seen = observed(model, lambda: output(model, {"input_ids": IDS[:1, :1]}))
    assert len(seen) == 2 * (1 + 2) and all(tokens.tolist() == [0] for _, _, tokens in seen.values())


def test_shared_experts_are_layers_of_their_own():
    model = build("qwen2_moe")
    ffns = find_ffns(model)
    layers = {(ffn.layer, ffn.name, ffn.experts, ffn.d_ff) for ffn in ffns}
    assert layers == {
        (2 * i + j, f"model.layers.{i}.mlp.{name}", count, width)
        for i in range(2)
        for j, (name, count, width) in enumerate([("shared_expert", 1, 20), ("experts", 4, 24)])
    }
    for shared in (ffn for ffn in ffns if ffn.experts == 1):
        module = model.get_submodule(shared.name)
        assert shared.gate.module is module.gate_proj and torch.equal(shared.gate.weight, module.gate_proj.weight)
        assert shared.up.module is module.up_proj and torch.equal(shared.up.weight, module.up_proj.weight)
    seen = observed(model, lambda: output(model, {"input_ids": IDS}))
    assert all(torch.equal(seen[layer, 0][2], torch.arange(IDS.numel())) for layer in (0, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(FUSED))
def test_observing_and_masking_nothing_change_no_bit(family, implementation, dtype):
    model, batch = build(family, implementation, dtype), {"input_ids": IDS}
    before = output(model, batch)
    with observe_neurons(model, lambda ffn, s, h, tokens: torch.zeros_like(h)) as ffns:
        assert torch.equal(output(model, batch), before)
        with torch.inference_mode():
            assert torch.equal(model(**batch)[0], before)
        assert torch.equal(model(**batch)[0], before)  # with gradients
    with sparse_neurons(model, Keep(ffns, keep_all)):
        assert torch.equal(output(model, batch), before)
        with torch.inference_mode():
            assert torch.equal(model(**batch)[0], before)
    assert left_behind(model) == [] and torch.equal(output(model, batch), before)


@pytest.mark.parametrize("keep", [keep_none, keep_even])
@pytest.mark.parametrize("family", sorted(FUSED))
def test_a_mask_is_a_model_without_those_columns(family, implementation, keep):
    model, batch = build(family, implementation), {"input_ids": IDS}
    with sparse_neurons(model, Keep(find_ffns(model), keep)):
        masked = output(model, batch)
    without = deepcopy(model)
    for name, parameter in without.named_parameters():
        if name.endswith("down_proj") or name.endswith("down_proj.weight"):
            columns = parameter.data if family == "gpt_oss" else parameter.data.mT  # (..., d_ff, d)
            columns[..., ~keep(torch.arange(columns.shape[-2])), :] = 0
    assert not torch.allclose(masked, output(model, batch))
    assert_close(masked, output(without, batch))


def test_experts_with_transposed_weights_biases_and_a_written_out_activation(implementation):
    model = build("gpt_oss", implementation)
    ffns = find_ffns(model)
    seen = observed(model, lambda: output(model, {"input_ids": IDS}))
    for i, (experts, x, chosen) in enumerate(routes(model, lambda: output(model, {"input_ids": IDS}))):
        for e in range(4):
            assert torch.equal(ffns[4 * i + e].down_weight, experts.down_proj[e].T)
            assert ffns[4 * i + e].gate is None and ffns[4 * i + e].up is None
            s, h, tokens = seen.get((i, e), (None, None, torch.zeros(0, dtype=torch.long)))
            assert sorted(tokens.tolist()) == [t for t in range(len(x)) if e in chosen[t].tolist()]
            if len(tokens) == 0:
                continue
            both = x[tokens] @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
            gate, up = both[:, ::2].clamp(max=experts.limit), both[:, 1::2].clamp(-experts.limit, experts.limit)
            assert_close(s, gate * torch.sigmoid(gate * experts.alpha))
            assert_close(h, s * (up + 1))


def test_observing_inside_a_mask_sees_what_the_mask_left(implementation):
    model = build("qwen2_moe", implementation)
    ffns, counts = find_ffns(model), {}
    rule = Thresholds("top-k", (3,) * (ffns[-1].layer + 1))

    def count(ffn, s, h, tokens):
        h @ ffn.down_weight.T  # what a callback computes is no FFN
        counts.setdefault((ffn.layer, ffn.expert), []).extend((h != 0).sum(-1).tolist())

    with sparse_neurons(model, rule), observe_neurons(model, count):
        output(model, {"input_ids": IDS})
    assert set(counts) == {(ffn.layer, ffn.expert) for ffn in ffns}
    assert sum(len(values) for values in counts.values()) == 2 * (1 + 2) * IDS.numel()
    assert all(value == 3 for values in counts.values() for value in values)
    assert left_behind(model) == []


def test_nothing_is_left_when_a_callback_or_the_model_raises(implementation):
    model, batch = build("mixtral", implementation), {"input_ids": IDS}
    before = output(model, batch)

    def fails(ffn, s, h, tokens):
        if ffn.layer == 1:
            raise RuntimeError("in layer 1")

    with pytest.raises(RuntimeError, match="in layer 1"), observe_neurons(model, fails):
        output(model, batch)
    assert left_behind(model) == [] and torch.equal(output(model, batch), before)

    class Fails(Keep):
        def active(self, ffn, s, h):
            fails(ffn, s, h, None)
            return super().active(ffn, s, h)

    with pytest.raises(RuntimeError, match="in layer 1"), sparse_neurons(model, Fails(find_ffns(model), keep_all)):
        output(model, batch)
    assert left_behind(model) == [] and torch.equal(output(model, batch), before)


def test_masked_experts_refuse_to_pass_wrong_gradients():
    model = build("mixtral")
    with sparse_neurons(model, Keep(find_ffns(model), keep_even)), pytest.raises(InputError, match=r"torch\.no_grad"):
        model(input_ids=IDS)


class Expert(nn.Module):
    def __init__(self, d, d_ff):
        super().__init__()
        self.wi, self.act, self.wo = nn.Linear(d, d_ff), nn.GELU(approximate="tanh"), nn.Linear(d_ff, d)

    def forward(self, x):
        return self.wo(self.act(self.wi(x)))


class Mixture(nn.Module):
    """Top-1 routing among modules of a list, and one shared expert."""

    def __init__(self, d, d_ff, experts):
        super().__init__()
        self.router = nn.Linear(d, experts)
        self.experts = nn.ModuleList(Expert(d, d_ff) for _ in range(experts))
        self.shared = Expert(d, 3)

    def forward(self, x):
        rows = x.view(-1, x.shape[-1])
        chosen = self.router(rows).argmax(-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero().squeeze(1)
            if len(mine):
                out[mine] = expert(rows[mine])
        return x + out.view_as(x) + self.shared(x)


class Tower(nn.Module):
    def __init__(self, layers=2, experts=4):
        super().__init__()
        self.layers = nn.ModuleList(Mixture(6, 9, experts) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_experts_in_a_list_share_a_layer_also_those_that_no_token_was_sent_to():
    model = randomised(Tower())
    ffns = find_ffns(model, torch.zeros(1, 2, 6, dtype=torch.float64))  # all tokens go to one expert
    for layer in (0, 2):
        routed = [ffn for ffn in ffns if ffn.layer == layer]
        assert [ffn.expert for ffn in routed] == [0, 1, 2, 3] and {ffn.experts for ffn in routed} == {4}
        assert {ffn.name for ffn in routed} == {f"layers.{layer // 2}.experts"}
        experts = model.layers[layer // 2].experts
        assert all(ffn.parameter is expert.wo.weight for ffn, expert in zip(routed, experts, strict=True))
        assert all(ffn.gate is None and ffn.up is None for ffn in routed)
    assert [ffn.name for ffn in ffns if ffn.layer in (1, 3)] == ["layers.0.shared", "layers.1.shared"]

    x = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = model(x)
    seen = observed(model, lambda: model(x))
    rows = x.view(-1, 6)
    chosen = model.layers[0].router(rows).argmax(-1)
    assert len(chosen.unique()) > 1
    for number, expert in enumerate(model.layers[0].experts):
        mine = (chosen == number).nonzero().squeeze(1)
        if len(mine):
            s, h, tokens = seen[0, number]
            assert tokens.tolist() == mine.tolist()
            assert_close(h, gelu_tanh(expert.wi(rows[mine])))
            assert torch.equal(s, h)
    assert torch.equal(seen[1, 0][2], torch.arange(15))

    with torch.no_grad(), sparse_neurons(model, Keep(ffns, keep_none)):
        masked = model(x)
    for layer in model.layers:
        for expert in [*layer.experts, layer.shared]:
            expert.wo.weight.data.zero_()
    assert torch.equal(masked, model(x)) and not torch.equal(masked, before)
    assert left_behind(model) == []
