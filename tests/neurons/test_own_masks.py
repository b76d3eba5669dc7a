"""FFNs with thresholds, Top-k masks or two activated maps of their own: found, with the s and h that they compute."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from written_out import run

from sparsity_utils.console import InputError
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.hooks import observe_neurons, sparse_neurons
from sparsity_utils.neurons.thresholds import Thresholds

T, K = 0.4, 4


def gated(m, x):
    return functional.silu(x @ m.gate), x @ m.up


def drelu(m, x):
    return (torch.relu(x @ m.gate) * torch.relu(x @ m.up)) @ m.down


def threshold_on_g(m, x):
    g = x @ m.gate
    return (g * (g.abs() > T)) @ m.down


def threshold_on_g_of_a_gated_one(m, x):
    g = x @ m.gate
    return (g * (g.abs() > T) * (x @ m.up)) @ m.down


def shifted_relu(m, x):
    return (functional.relu(x @ m.gate - T) * (x @ m.up)) @ m.down


def threshold_on_s_by_where(m, x):
    s, u = gated(m, x)
    return (torch.where(s.abs() > T, s, 0.0) * u) @ m.down


def threshold_on_s_in_place(m, x):
    s, u = gated(m, x)
    s[s.abs() < T] = 0
    return (s * u) @ m.down


def threshold_on_s_by_masked_fill_in_place(m, x):
    s, u = gated(m, x)
    return (s.masked_fill_(s.abs() < T, 0) * u) @ m.down


def mask_of_s_on_h(m, x):
    s, u = gated(m, x)
    return (s * u * (s.abs() > T)) @ m.down


def threshold_on_h(m, x):
    s, u = gated(m, x)
    h = s * u
    return (h * (h.abs() > T)) @ m.down


def hardshrink_on_h(m, x):
    s, u = gated(m, x)
    return functional.hardshrink(s * u, T) @ m.down


def top_k_of_h_by_its_smallest(m, x):
    s, u = gated(m, x)
    h = s * u
    smallest = h.abs().topk(K, dim=-1).values[..., -1:]
    return (h * (h.abs() >= smallest)) @ m.down


def top_k_of_h_by_scatter(m, x):
    s, u = gated(m, x)
    h = s * u
    mask = torch.zeros_like(h).scatter(-1, h.abs().topk(K, dim=-1).indices, 1.0)
    return (h * mask) @ m.down


def top_k_of_s_by_scatter_in_place(m, x):
    s, u = gated(m, x)
    mask = torch.zeros_like(s)
    mask.scatter_(-1, s.abs().sort(dim=-1, descending=True).indices[..., :K], 1)
    return (s * mask * u) @ m.down


def top_k_of_g_by_its_values(m, x):
    g = x @ m.gate
    values, places = g.topk(K, dim=-1)
    return torch.zeros_like(g).scatter(-1, places, values) @ m.down


def smallest_cut_of_h(m, x):
    s, u = gated(m, x)
    h = s * u
    return h.scatter(-1, h.abs().topk(9 - K, dim=-1, largest=False).indices, 0.0) @ m.down


def largest(z):
    """Where |z| is among the K largest of its row, by counting."""
    return (z.abs()[..., :, None] < z.abs()[..., None, :]).sum(-1) < K


def cut(z):
    return z * (z.abs() > T)


EXPECTED = {  # body -> s and h of gate g and up u
    drelu: lambda g, u: (g.clamp(min=0), g.clamp(min=0) * u.clamp(min=0)),
    threshold_on_g: lambda g, u: (cut(g), cut(g)),
    threshold_on_g_of_a_gated_one: lambda g, u: (cut(g), cut(g) * u),
    shifted_relu: lambda g, u: ((g - T).clamp(min=0), (g - T).clamp(min=0) * u),
    threshold_on_s_by_where: lambda g, u: (cut(silu(g)), cut(silu(g)) * u),
    threshold_on_s_in_place: lambda g, u: (cut(silu(g)), cut(silu(g)) * u),
    threshold_on_s_by_masked_fill_in_place: lambda g, u: (cut(silu(g)), cut(silu(g)) * u),
    mask_of_s_on_h: lambda g, u: (silu(g), cut(silu(g)) * u),
    threshold_on_h: lambda g, u: (silu(g), cut(silu(g) * u)),
    hardshrink_on_h: lambda g, u: (silu(g), cut(silu(g) * u)),
    top_k_of_h_by_its_smallest: lambda g, u: (silu(g), silu(g) * u * largest(silu(g) * u)),
    top_k_of_h_by_scatter: lambda g, u: (silu(g), silu(g) * u * largest(silu(g) * u)),
    top_k_of_s_by_scatter_in_place: lambda g, u: (silu(g) * largest(silu(g)), silu(g) * largest(silu(g)) * u),
    top_k_of_g_by_its_values: lambda g, u: 2 * (positive_largest(g),),
    smallest_cut_of_h: lambda g, u: (silu(g), silu(g) * u * largest(silu(g) * u)),
}


def silu(z):
    return z / (1 + torch.exp(-z))


def positive_largest(z):
    return z * ((z[..., :, None] < z[..., None, :]).sum(-1) < K)


@pytest.mark.parametrize("body", EXPECTED)
def test_s_and_h_are_what_the_model_makes_of_them(body):
    model, x = run(body, (2, 5, 6), up=(6, 9), gate=(6, 9), down=(9, 6))
    before, seen = model(x), []
    (ffn,) = find_ffns(model, x)
    assert ffn.parameter is model.down and torch.equal(ffn.down_weight, model.down.T)
    with torch.no_grad(), observe_neurons(model, lambda ffn, s, h, tokens: seen.append((s.clone(), h, tokens))):
        assert torch.equal(model(x), before)
    ((s, h, tokens),) = seen
    expected = EXPECTED[body]((x @ model.gate).flatten(0, 1), (x @ model.up).flatten(0, 1))
    torch.testing.assert_close((s, h), tuple(expected), rtol=1e-12, atol=1e-12)
    assert 0 < (h == 0).double().mean() < 1 and torch.equal(tokens, torch.arange(10))
    with torch.no_grad(), sparse_neurons(model, Thresholds("cett", (float("inf"),))):
        assert not model(x).any()


class DReLU(nn.Module):
    """One activation module serves both maps: what it returns last is not s."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.act, self.down = nn.Linear(6, 9), nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.act(self.up(x)))


def test_drelu_by_modules_has_the_gate_that_is_the_first_factor():
    model, x, seen = DReLU().double(), torch.randn(2, 5, 6, dtype=torch.float64), []
    (ffn,) = find_ffns(model, x)
    assert ffn.gate.module is model.gate and ffn.up.module is model.up
    with torch.no_grad(), observe_neurons(model, lambda ffn, s, h, tokens: seen.append((s, h))):
        model(x)
    g, u = model.gate(x).flatten(0, 1), model.up(x).flatten(0, 1)
    torch.testing.assert_close(seen, [(g.clamp(min=0), g.clamp(min=0) * u.clamp(min=0))], rtol=1e-12, atol=1e-12)


class MaskInDown(nn.Linear):
    """Its argument is not what its weight is applied to."""

    def forward(self, h):
        return super().forward(h * (h.abs() > T))


def test_h_is_what_the_weight_is_applied_to_not_the_argument_of_its_module():
    model, x, seen = DReLU().double(), torch.randn(2, 5, 6, dtype=torch.float64), []
    model.down = MaskInDown(9, 6).double()
    find_ffns(model, x)
    with torch.no_grad(), observe_neurons(model, lambda ffn, s, h, tokens: seen.append(h)):
        model(x)
    h = (model.gate(x).clamp(min=0) * model.up(x).clamp(min=0)).flatten(0, 1)
    torch.testing.assert_close(seen, [cut(h)], rtol=1e-12, atol=1e-12)


def softmax_memory(m, x):
    g = x @ m.gate
    return ((g - g.amax(-1, keepdim=True)).softmax(-1) * (x @ m.up)) @ m.down


def mask_of_another_vector(m, x):
    s, u = gated(m, x)
    other = (x.roll(1, 1) @ m.gate).abs() > T
    return (s * u * other) @ m.down


@pytest.mark.parametrize("body", [softmax_memory, mask_of_another_vector])
def test_what_is_no_element_wise_function_of_x_is_not_found(body):
    model, x = run(body, (2, 5, 6), up=(6, 9), gate=(6, 9), down=(9, 6))
    with pytest.raises(InputError, match="No FFN was found in Model"):
        find_ffns(model, x)
