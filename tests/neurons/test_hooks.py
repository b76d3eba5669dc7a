"""FFN discovery, observation and masking on small random models."""

import pytest
import torch
from literal_metrics import ffn_inputs, neurons
from tiny_granite import granite, hooks_of
from torch import nn
from torch.nn import functional
from transformers import MambaConfig, MambaForCausalLM
from written_out import run

from sparsity_utils.console import InputError
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.hooks import observe_neurons, sparse_neurons
from sparsity_utils.neurons.thresholds import Thresholds

IDS = torch.arange(3 * 7).view(3, 7) % 29


class PlainFFN(nn.Module):
    def __init__(self, d, d_ff):
        super().__init__()
        self.fc_in, self.act, self.fc_out = nn.Linear(d, d_ff), nn.GELU(), nn.Linear(d_ff, d)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(self.fc_out(self.act(self.fc_in(x))))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("d_ff", [30, 12], ids=["wide", "square"])
def test_ffns_are_found_in_the_order_of_the_layers(d_ff):
    model = granite(d_ff=d_ff)
    ffns = find_ffns(model)
    assert [ffn.layer for ffn in ffns] == [0, 1, 2]
    assert [ffn.name for ffn in ffns] == [f"model.layers.{i}.mlp" for i in range(3)]
    for ffn, block in zip(ffns, model.model.layers, strict=True):
        assert ffn.down is block.mlp.down_proj and ffn.activation is block.mlp.act_fn
        assert ffn.d_ff == d_ff and ffn.down_weight.data_ptr() == block.mlp.down_proj.weight.data_ptr()


def test_a_model_without_ffns_is_refused_by_naming_what_was_looked_at():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8)))
    with pytest.raises(InputError, match=r"No FFN was found in Sequential.*Sequential \(the model itself\)"):
        find_ffns(model, torch.ones(3, 4))


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_observed_s_and_h_are_those_of_the_definition(act):
    model, seen = granite(act, bias=True), []
    with observe_neurons(model, lambda ffn, s, h, tokens: seen.append((ffn.layer, s, h))):
        logits(model)
    assert [layer for layer, _, _ in seen] == [0, 1, 2]
    inputs = ffn_inputs(model, {"input_ids": IDS})
    for (layer, s, h), x in zip(seen, inputs, strict=True):
        assert s.shape == h.shape == (21, 30)
        expected_s, expected_h, _ = neurons(model.model.layers[layer].mlp, act, x)
        torch.testing.assert_close(s, expected_s.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(h, expected_h.detach(), rtol=1e-12, atol=1e-12)


def test_a_plain_ffn_has_h_equal_to_s():
    torch.manual_seed(0)
    model, seen = nn.Sequential(PlainFFN(6, 15), PlainFFN(6, 11)).eval(), []
    find_ffns(model, torch.zeros(1, 2, 6))
    with observe_neurons(model, lambda ffn, s, h, tokens: seen.append((ffn.d_ff, s, h))):
        model(torch.randn(2, 5, 6))
    assert [d_ff for d_ff, _, _ in seen] == [15, 11]
    assert all(torch.equal(s, h) for _, s, h in seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_observing_and_masking_nothing_change_no_bit(dtype):
    model = granite("silu", dtype=dtype)
    before = logits(model)
    with observe_neurons(model, lambda ffn, s, h, tokens: h):  # a callback's tensor must not replace h
        assert torch.equal(logits(model), before)
    with sparse_neurons(model, Thresholds("cett", (0.0, 0.0, 0.0))):
        assert torch.equal(logits(model), before)
    with sparse_neurons(model, Thresholds("top-k", (30, 30, 30))):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("bias", [False, True])
def test_masking_everything_leaves_the_output_bias(bias):
    model, outputs = granite("gelu", bias=bias), []
    find_ffns(model)  # runs the model, once
    handles = [b.mlp.register_forward_hook(lambda m, a, out: outputs.append(out)) for b in model.model.layers]
    with sparse_neurons(model, Thresholds("cett", (float("inf"),) * 3)):
        logits(model)
    for handle in handles:
        handle.remove()
    for output, block in zip(outputs, model.model.layers, strict=True):
        expected = block.mlp.down_proj.bias if bias else torch.zeros(12, dtype=torch.float64)
        assert torch.equal(output, expected.detach().expand_as(output))


def test_a_mask_removes_exactly_its_neurons():
    model = granite("silu")

    class Even:
        values = (0.0, 0.0, 0.0)

        def active(self, ffn, s, h):
            return (torch.arange(ffn.d_ff) % 2 == 0).expand_as(h)

    with sparse_neurons(model, Even()):
        masked = logits(model)
    for block in model.model.layers:
        block.mlp.down_proj.weight.data[:, 1::2] = 0
    torch.testing.assert_close(masked, logits(model), rtol=1e-12, atol=1e-12)


def test_observing_inside_a_mask_sees_what_the_mask_left():
    model, kept = granite("silu"), []
    thresholds = Thresholds("top-k", (4, 4, 4))
    with (
        sparse_neurons(model, thresholds),
        observe_neurons(model, lambda f, s, h, tokens: kept.append((h != 0).sum(-1))),
    ):
        logits(model)
    assert all(bool((count == 4).all()) for count in kept)


@pytest.mark.parametrize("context", [lambda m, f: observe_neurons(m, f), lambda m, f: sparse_neurons(m, f)])
def test_hooks_are_gone_after_an_exception(context):
    model = granite()
    before = logits(model)

    class Fails:
        values = (0.0, 0.0, 0.0)

        def __call__(self, ffn, s, h, tokens=None):
            if ffn.layer == 1:
                raise RuntimeError("in layer 1")

        def active(self, ffn, s, h):
            self(ffn, s, h)
            return torch.ones_like(h, dtype=torch.bool)

    with pytest.raises(RuntimeError, match="in layer 1"), context(model, Fails()):
        assert len(hooks_of(model)) == 6
        logits(model)
    assert hooks_of(model) == []
    with pytest.raises(IndexError), context(model, Fails()):
        model(input_ids=IDS + 1000)
    assert hooks_of(model) == []
    assert torch.equal(logits(model), before)


def test_hooks_of_others_stay():
    model = granite()
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, a: None)
    with observe_neurons(model, lambda ffn, s, h, tokens: None):
        logits(model)
    assert len(hooks_of(model)) == 1


def test_thresholds_of_another_depth_are_refused():
    model = granite()
    with (
        pytest.raises(InputError, match="for 2 layers and the model has 3:"),
        sparse_neurons(model, Thresholds("relu", (0.0, 0.0))),
    ):
        pass


def test_finding_leaves_modes_random_numbers_and_gradients_as_they_were():
    model = granite().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    find_ffns(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks_of(model) == [] and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_model_runs_once_until_a_module_is_replaced():
    model, runs = granite(), []
    model.register_forward_pre_hook(lambda module, args: runs.append(1))
    ffns = find_ffns(model)
    assert find_ffns(model) == ffns and len(runs) == 1
    model.model.layers[1].mlp.down_proj = nn.Linear(30, 12, bias=False, dtype=torch.float64)
    again = find_ffns(model)
    assert len(runs) == 2 and again[1].down is model.model.layers[1].mlp.down_proj


def test_a_model_that_does_not_run_on_the_inputs_is_refused():
    with pytest.raises(InputError, match=r"Sequential takes neither input_ids nor pixel_values.*inputs="):
        find_ffns(nn.Sequential(PlainFFN(6, 15)))
    with pytest.raises(InputError, match=r"did not run on the given inputs.*RuntimeError"):
        find_ffns(nn.Sequential(PlainFFN(6, 15)), torch.zeros(1, 2, 7))


def relu_in_place(m, x):
    return torch.relu_(x @ m.up) @ m.down


def square_of_relu(m, x):
    return torch.square(functional.relu(x @ m.up)) @ m.down


def gelu_written_out(m, x):
    z = x @ m.up
    return (0.5 * z * (1 + torch.tanh(0.8 * (z + 0.04 * z.pow(3))))) @ m.down


def einsum(m, x):
    return torch.einsum("blf,fd->bld", functional.silu(torch.einsum("bld,df->blf", x, m.up)), m.down)


PLAIN = {
    relu_in_place: lambda z: z.clamp(min=0),
    square_of_relu: lambda z: z.clamp(min=0) ** 2,
    gelu_written_out: lambda z: 0.5 * z * (1 + torch.tanh(0.8 * (z + 0.04 * z**3))),
    einsum: lambda z: z * torch.sigmoid(z),
}


def product_in_place(m, x):
    s = functional.gelu(x @ m.gate)
    s *= x @ m.up + 1
    return s @ m.down


def casts_and_dropout(m, x):
    s = functional.gelu((x @ m.gate).to(torch.float64))
    return functional.dropout(s * (x @ m.up + 1), 0.5, m.training) @ m.down


def scaled_per_token(m, x):
    h = functional.gelu(x @ m.gate) * (x @ m.up + 1)
    return (h / h.norm(dim=-1, keepdim=True)) @ m.down


GATED = [product_in_place, casts_and_dropout, scaled_per_token]


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("body", [*PLAIN, *GATED])
def test_an_ffn_made_of_functions_is_observed_and_masked(body, grad):
    model, x = run(body, (2, 5, 6), up=(6, 9), gate=(6, 9), down=(9, 6))
    before, seen = model(x), []
    (ffn,) = find_ffns(model, x)
    assert ffn.parameter is model.down and torch.equal(ffn.down_weight, model.down.T)
    assert ffn.gate is None and ffn.up is None and ffn.down_bias is None
    with observe_neurons(model, lambda ffn, s, h, tokens: seen.append((s.clone(), h.clone(), tokens))), grad():
        assert torch.equal(model(x), before)
    ((s, h, tokens),) = seen
    up, gate = (x @ model.up).flatten(0, 1), (x @ model.gate).flatten(0, 1)
    expected_s = PLAIN[body](up) if body in PLAIN else functional.gelu(gate)
    torch.testing.assert_close(s, expected_s, rtol=1e-12, atol=1e-12)
    expected_h = expected_s if body in PLAIN else expected_s * (up + 1)
    if body is scaled_per_token:
        expected_h = expected_h / expected_h.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(h, expected_h, rtol=1e-12, atol=1e-12)
    assert torch.equal(tokens, torch.arange(10))
    with torch.no_grad(), sparse_neurons(model, Thresholds("cett", (float("inf"),))):
        assert not model(x).any()
    assert torch.equal(model(x), before) and "forward" not in vars(model)


def test_an_ffn_that_is_computed_in_another_way_is_not_passed_over_in_silence():
    model, x = run(casts_and_dropout, (2, 5, 6), up=(6, 9), gate=(6, 9), down=(9, 6))
    find_ffns(model, x)
    with (
        observe_neurons(model, lambda *seen: None),
        pytest.raises(InputError, match="run the model in evaluation mode"),
    ):
        model.train()(x)
    assert "forward" not in vars(model)


def state_space_gate(m, x):
    scanned = (x @ m.up).cumsum(1)
    return (functional.silu(x @ m.gate) * scanned) @ m.down


def attention_gate(m, x):
    v = x @ m.up
    mixed = (v @ v.mT).softmax(-1) @ v
    return (torch.sigmoid(x @ m.gate) * mixed) @ m.down


def attention_alone(m, x):
    v = x @ m.up
    return ((v @ v.mT).softmax(-1) @ v) @ m.down


def pooler(m, x):
    return torch.tanh(x[:, 0] @ m.up) @ m.down[:, :2]


def gate_of_another_vector(m, x):
    return (functional.silu(x @ m.gate) * (x.roll(1, 1) @ m.up)) @ m.down


def softmax_of_a_map(m, x):
    return (x @ m.up).softmax(-1) @ m.down


def bounds_only(m, x):
    return (x @ m.up).clamp(-9, 9) @ m.down


def two_linear_maps(m, x):
    return ((x @ m.up) * (x @ m.gate)) @ m.down


NOT_FFNS = [
    state_space_gate, attention_gate, attention_alone, pooler, gate_of_another_vector, softmax_of_a_map, bounds_only,
    two_linear_maps,
]  # fmt: skip


@pytest.mark.parametrize("body", NOT_FFNS)
def test_what_only_resembles_an_ffn_is_not_found(body):
    model, x = run(body, (2, 5, 6), up=(6, 6), gate=(6, 6), down=(6, 6))
    with pytest.raises(InputError, match="No FFN was found in Model"):
        find_ffns(model, x)


def test_state_space_models_have_no_ffn():
    config = MambaConfig(vocab_size=29, hidden_size=8, state_size=4, num_hidden_layers=2, expand=1)
    with pytest.raises(InputError, match=r"No FFN was found in MambaForCausalLM.*MambaMixer \(backbone\.layers"):
        find_ffns(MambaForCausalLM(config))
