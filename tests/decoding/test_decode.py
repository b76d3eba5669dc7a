"""Models whose FFNs run on sparse kernels give what the same masks give densely, and are left as they were."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import FAMILIES, build, inputs, left_behind, output
from mixtures import build as build_mixture
from torch import nn

from kernels import SparseFFN
from sparsity_utils.console import InputError
from sparsity_utils.decoding.decode import kernel_of, kernel_rule, sparse_kernels
from sparsity_utils.models.pretrained import load_weights
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.hooks import observe_neurons, sparse_neurons
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.paths import RECORDED_MODELS

SUPPORTED = sorted(set(FAMILIES) - {"lfm2"})  # the activation of lfm2 is no module


def thresholds(rule, model):
    layers = find_ffns(model)[-1].layer + 1
    return Thresholds(rule, (0.2,) * layers)


def few(family, dtype):
    """Inputs of at most 16 tokens, so that no kernel falls back."""
    size = 1 if family == "vit" else 2
    return {key: value[:size] for key, value in inputs(family, dtype).items()}


@pytest.mark.parametrize("rule", ["relu", "fat", "cett"])
@pytest.mark.parametrize("family", SUPPORTED)
def test_every_family_computes_what_the_mask_computes(family, rule):
    model, batch = build(family, dtype=torch.float32), few(family, torch.float32)
    chosen = thresholds(rule, model)
    dense = output(model, batch)
    with sparse_neurons(model, chosen):
        expected = output(model, batch)
    with sparse_kernels(model, chosen) as kernels:
        assert len(kernels) == len(find_ffns(model))
        assert torch.allclose(output(model, batch), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(output(model, batch), dense) and not left_behind(model)
    if rule != "relu":
        assert not torch.allclose(expected, dense, rtol=1e-2, atol=1e-2)  # or the mask would prove nothing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    model, batch = build("llama", dtype=dtype), few("llama", dtype)
    chosen = thresholds("relu", model)
    expected = output(model, batch)
    with sparse_kernels(model, chosen):
        error = (output(model, batch) - expected).float()
    assert error.square().mean().sqrt() < 0.05 * expected.float().square().mean().sqrt()


@pytest.mark.parametrize("name", ["relu", "silu"])
@pytest.mark.parametrize("rule", ["relu", "fat", "cett"])
def test_generate_gives_the_same_greedy_tokens(name, rule):
    model = load_weights(RECORDED_MODELS / name).eval()
    prompt = torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    chosen = Thresholds(rule, (0.05,) * model.config.num_hidden_layers)
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    with sparse_neurons(model, chosen):
        expected = model.generate(prompt, **options)
    certified = rule != "cett" and (name, rule) != ("silu", "relu")
    with sparse_kernels(model, chosen, certified=certified) as kernels:
        assert torch.equal(model.generate(prompt, **options), expected)
    assert all((kernel.certificate is not None) == certified for kernel in kernels)


def test_fat_keeps_neurons_at_the_threshold_itself():
    ffn = find_ffns(build("llama", dtype=torch.float32))[0]
    value = 0.1
    rule, threshold = kernel_rule(ffn, Thresholds("fat", (value, value)))
    at = torch.tensor(value)
    assert rule == "gate" and at > threshold and torch.nextafter(at, torch.tensor(0.0)) <= threshold
    assert kernel_rule(ffn, Thresholds("fat", (0.0, 0.0))) == ("gate", 0.0)


def test_kernels_share_the_model_s_weights_but_those_of_the_down_projection():
    model = build("llama", dtype=torch.float32)
    ffn = find_ffns(model)[0]
    kernel = kernel_of(ffn, thresholds("cett", model))
    assert isinstance(kernel, SparseFFN) and kernel.w_gate.data_ptr() == ffn.gate.weight.data_ptr()
    assert kernel.w_up.data_ptr() == ffn.up.weight.data_ptr() and kernel.w_down_t.is_contiguous()


def refused(model, match, **options):
    with pytest.raises(InputError, match=match), sparse_kernels(model, **options):
        pass
    assert not left_behind(model)


def test_what_no_kernel_can_replace_is_refused_before_the_block():
    lfm2 = build("lfm2", dtype=torch.float32)
    refused(lfm2, "not computed by modules of its own", thresholds=thresholds("relu", lfm2))
    mixture = build_mixture("mixtral")
    refused(mixture, "routed experts", thresholds=thresholds("relu", mixture))


def test_thresholds_that_do_not_fit_are_refused():
    model = build("llama", dtype=torch.float32)
    refused(model, "for 3 layers and the model has 2", thresholds=Thresholds("relu", (0.0,) * 3))
    refused(model, "no rule 'top-k'", thresholds=Thresholds("top-k", (4, 4)))
    refused(model, "mlp cannot run.*certainly inactive", thresholds=Thresholds("cett", (0.1, 0.1)), certified=True)


def test_a_dtype_without_a_kernel_is_refused():
    model = build("llama")
    refused(model, "float64.*float32, float16 or bfloat16", thresholds=thresholds("relu", model))


class Shifted(nn.Module):
    """An FFN with (u + 1) in the place of u, which no kernel computes."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act = nn.SiLU()

    def forward(self, x):
        return x + self.down(self.act(self.gate(x)) * (self.up(x) + 1))


class Unknown(Shifted):
    def __init__(self):
        super().__init__()
        self.act = nn.Tanh()

    def forward(self, x):
        return x + self.down(self.act(self.gate(x)) * self.up(x))


class Leaking(Shifted):
    """A model that uses the gate once more, outside its FFN."""

    def forward(self, x):
        g = self.gate(x)
        return x + self.down(self.act(g) * self.up(x)) + g[..., :8]


class Adapted(Shifted):
    """A down projection with an adapter beside it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x):
        h = self.act(self.gate(x)) * self.up(x)
        return x + self.down(h) + self.b(self.a(h))


class Twice(nn.Module):
    """Two FFNs of one block with a common down projection."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act, self.act_too = nn.SiLU(), nn.SiLU()

    def forward(self, x):
        x = x + self.down(self.act(self.one(x)))
        return x + self.down(self.act_too(self.other(x)))


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (Shifted, "computes more than"),
        (Unknown, "function Tanh"),
        (Leaking, "makes more of the parts"),
        (Adapted, "are also read in"),
        (Twice, "shares a linear map with another FFN"),
    ],
)
def test_ffns_that_compute_something_else_are_refused(kind, match):
    torch.manual_seed(0)
    model = nn.Sequential(kind()).eval()
    refused(model, match, thresholds=None, inputs=torch.randn(2, 5, 8))


def test_with_nothing_skipped_a_model_computes_what_it_computes_densely():
    model, batch = build("llama", dtype=torch.float32), few("llama", torch.float32)
    expected = output(model, batch)
    with sparse_kernels(model, None):
        assert torch.allclose(output(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_training_inside_the_block_is_refused():
    model, batch = build("llama", dtype=torch.float32), few("llama", torch.float32)
    with sparse_kernels(model, None):
        with pytest.raises(InputError, match="does not train"):
            model(**batch)
        model.train()
        with pytest.raises(InputError, match="does not train"):
            output(model, batch)


def test_observing_masking_and_nesting_inside_the_block_are_refused():
    model = build("llama", dtype=torch.float32)
    with sparse_kernels(model, None):
        for block in (observe_neurons(model, print), sparse_neurons(model, thresholds("relu", model)),
                      sparse_kernels(model, None)):  # fmt: skip
            with pytest.raises(InputError, match="run on sparse kernels; leave that block"), block:
                pass
    assert not left_behind(model)
    with observe_neurons(model, lambda *seen: None):
        output(model, few("llama", torch.float32))


def test_threads_may_share_a_model():
    model = build("llama", dtype=torch.float32)
    batches = [
        {"input_ids": torch.randint(3, 41, (1, 9), generator=torch.Generator().manual_seed(i))} for i in range(24)
    ]
    with sparse_kernels(model, None), ThreadPoolExecutor(4) as pool:
        expected = [output(model, batch) for batch in batches]
        for _ in range(5):
            found = list(pool.map(lambda batch: output(model, batch), batches))
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))


def test_a_model_is_as_before_after_an_exception():
    model = build("llama", dtype=torch.float32)
    with pytest.raises(KeyError), sparse_kernels(model, thresholds("cett", model)):
        raise KeyError
    assert not left_behind(model)


def test_prompts_longer_than_a_kernel_takes_run_under_the_same_mask():
    model, chosen = build("llama", dtype=torch.float32), Thresholds("cett", (0.2, 0.2))
    batch = {"input_ids": torch.randint(3, 41, (2, 11), generator=torch.Generator().manual_seed(2))}
    with sparse_neurons(model, chosen):
        expected = output(model, batch)
    with sparse_kernels(model, chosen):
        assert torch.allclose(output(model, batch), expected, rtol=1e-4, atol=1e-4)
