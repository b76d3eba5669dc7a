"""Shapes, parameter counts, muP initialisation and learning rates, loading."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsity_utils.console import InputError
from sparsity_utils.models.config import ModelConfig
from sparsity_utils.models.decoder import build_model, parameter_groups
from sparsity_utils.models.loss import linear_cross_entropy
from sparsity_utils.models.pretrained import load_weights
from sparsity_utils.models.shapes import head_count, non_embedding_parameters, solve_shape, training_flops_per_token
from sparsity_utils.models.training import save_checkpoint

PUBLISHED_SHAPES = [
    (768, 16, 0.1e9),
    (1024, 20, 0.2e9),
    (1280, 24, 0.4e9),
    (1536, 28, 0.8e9),
    (1792, 32, 1.2e9),
    (2304, 40, 2.4e9),
]


@pytest.mark.parametrize(("d_model", "n_layers", "name"), PUBLISHED_SHAPES)
def test_published_shapes_have_the_published_size(d_model, n_layers, name):
    count = non_embedding_parameters(d_model, n_layers)
    assert count == 11.5 * n_layers * d_model**2  # study.md, from arXiv 2411.02335
    assert count == pytest.approx(name, rel=0.25)  # the names carry one or two digits


@pytest.mark.parametrize(
    ("d_model", "n_layers", "activation"), [(12, 1, "relu"), (28, 5, "silu"), (64, 2, "gelu"), (20, 3, "relu2")]
)
def test_counts_equal_what_torch_counts(d_model, n_layers, activation):
    model = build_model(ModelConfig(d_model, n_layers, activation, vocabulary=50, head_size=8), 0)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert matrices == non_embedding_parameters(d_model, n_layers)
    assert sum(p.numel() for p in model.parameters()) == matrices + 50 * d_model + (2 * n_layers + 1) * d_model
    groups = parameter_groups(model, ModelConfig(d_model, n_layers), 0.01, 0.1)
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in model.parameters())


def test_flops_equal_those_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(32, 2, vocabulary=100, context=64, head_size=16, base_width=32)
    model = build_model(config, 0)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.randint(0, 100, (2, 64))).logits
    forward = counter.get_total_flops() / (2 * 64)
    head = 2 * 32 * 100
    assert logits.shape == (2, 64, 100)
    # torch counts no attention on this path or counts the whole square; ours is the causal half
    attention = 2 * 2 * 32 * 64
    ours = training_flops_per_token(config) / 3
    assert ours - attention == pytest.approx(2 * non_embedding_parameters(32, 2) + head)
    assert forward == pytest.approx(ours - attention) or forward == pytest.approx(ours + attention)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "relu2"])
def test_activation_is_the_one_asked_for(activation):
    x = torch.linspace(-3, 3, 13)
    wanted = {
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "relu2": lambda x: torch.relu(x) ** 2,
    }
    model = build_model(ModelConfig(12, 1, activation, head_size=6), 0)
    assert torch.allclose(model.model.layers[0].mlp.act_fn(x), wanted[activation](x), atol=1e-6)


def test_initial_weights_follow_mup():
    config = ModelConfig(256, 2, vocabulary=512, head_size=32, base_width=64)
    model = build_model(config, 7)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            wanted = 0.1 if "embed" in name else 0.1 / math.sqrt(4)
            assert parameter.std().item() == pytest.approx(wanted, rel=0.02), name
    hidden, embeddings, gains = parameter_groups(model, config, 0.01, 0.1)
    assert (hidden["lr"], embeddings["lr"], gains["lr"]) == (0.01 / 4, 0.01, 0.01)
    assert (hidden["weight_decay"], embeddings["weight_decay"], gains["weight_decay"]) == (0.1, 0.1, 0.0)
    granite = model.config
    assert granite.logits_scaling == 4 and granite.embedding_multiplier == 12
    assert granite.attention_multiplier == pytest.approx(1 / math.sqrt(32))
    assert granite.residual_multiplier == pytest.approx(1.4 / math.sqrt(2))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again, other = build_model(config, 7), build_model(config, 8)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("d_ff", [40, 80, 320])
def test_the_down_projection_follows_its_own_number_of_inputs(d_ff):
    """Every hidden matrix starts at 0.1 / sqrt(m) and learns at rate / m, m the inputs over those of the base model."""
    config = ModelConfig(32, 2, head_size=16, base_width=64, ffn_ratio=d_ff / 32)
    model = build_model(config, 7)
    assert model.config.intermediate_size == d_ff
    rates = {p: group["lr"] for group in parameter_groups(model, config, 0.01, 0.1) for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            m = parameter.shape[1] / (160 if "down" in name else 64)  # 160: d_ff of the base model
            assert rates[parameter] == pytest.approx(0.01 / m), name
            assert parameter.std().item() == pytest.approx(0.1 / math.sqrt(m), rel=0.06), name
    assert len(rates) == len(list(model.parameters()))
    groups = len(parameter_groups(model, config, 0.01, 0.1))
    assert groups == (3 if d_ff == 80 else 4)  # at 2.5 d as ever: hidden, embeddings, gains


def residual_rms(d_model: int, mup: bool, steps: int = 10) -> float:
    """Root mean square of the residual stream after `steps` AdamW steps on one fixed batch."""
    torch.manual_seed(0)
    config = ModelConfig(d_model, 2, vocabulary=128, context=32, head_size=16, base_width=32)
    model = build_model(config, 0)
    base = config if mup else ModelConfig(d_model, 2, base_width=d_model)  # standard: one rate for all matrices
    optimizer = torch.optim.AdamW(parameter_groups(model, base, 0.01, 0.1), betas=(0.9, 0.95))
    ids = torch.randint(0, 128, (8, 33))
    for _ in range(steps):
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state.flatten(0, 1)
        linear_cross_entropy(
            hidden, model.lm_head.weight, ids[:, 1:].flatten(), 1 / model.config.logits_scaling
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
    seen = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids[:, :-1])
    handle.remove()
    return seen[0].square().mean().sqrt().item()


def test_coordinate_check_residual_stream_does_not_grow_with_width():
    widths = [32, 64, 128, 256]
    slopes = {}
    for mup in (True, False):
        rms = [residual_rms(width, mup) for width in widths]
        slopes[mup] = np.polyfit(np.log(widths), np.log(rms), 1)[0]
    assert abs(slopes[True]) < 0.1, slopes
    assert slopes[False] > 0.1, slopes  # the check can fail: without muP's rates it does


@pytest.mark.parametrize(
    ("parameters", "ratio", "shape"),
    [(45_000, 12, (36, 3)), (106_000, 12, (48, 4)), (108_000_000, 48, (768, 16)), (45_000, 64, (64, 1))],
)
def test_solver_finds_the_shape(parameters, ratio, shape):
    found = solve_shape(parameters, ratio)
    assert (found.d_model, found.n_layers) == shape
    assert found.parameters == non_embedding_parameters(*shape)
    assert found.parameters_error == pytest.approx(found.parameters / parameters - 1)
    assert found.ratio_error == pytest.approx(shape[0] / shape[1] / ratio - 1)
    assert f"{shape[0]}x{shape[1]}" in str(found) and "%" in str(found)


@pytest.mark.parametrize("ratio", [2, 3.43, 5.6, 8, 12, 22, 64])
def test_solver_is_as_good_as_trying_every_shape(ratio):
    def miss(d_model, n_layers):
        return abs(math.log(non_embedding_parameters(d_model, n_layers) / 45_000)) + abs(
            math.log(d_model / n_layers / ratio)
        )

    found = solve_shape(45_000, ratio)
    best = min(miss(d_model, n_layers) for d_model in range(4, 200, 4) for n_layers in range(1, 60))
    assert miss(found.d_model, found.n_layers) == pytest.approx(best)
    assert head_count(ModelConfig(found.d_model, found.n_layers, head_size=16)) > 0


def test_a_ratio_that_no_integers_meet_is_refused():
    with pytest.raises(InputError, match=r"45,000 parameters at width-depth ratio 150 within 10%; the nearest is"):
        solve_shape(45_000, 150)
    with pytest.raises(InputError, match="positive parameters and ratio"):
        solve_shape(0, 12)


@pytest.mark.parametrize(
    ("d_model", "wanted", "heads"), [(24, 16, 2), (36, 16, 2), (48, 16, 3), (20, 16, 1), (768, 64, 12), (10, 16, 1)]
)
def test_heads_have_an_even_size_that_divides_the_width(d_model, wanted, heads):
    assert head_count(ModelConfig(d_model, 1, head_size=wanted)) == heads
    assert d_model % heads == 0 and (d_model // heads) % 2 == 0


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(InputError, match="d_model 46 is not divisible into heads"):
        head_count(ModelConfig(46, 1, head_size=12))
    with pytest.raises(InputError, match="d_model is 45; it must be even"):
        ModelConfig(45, 1)


def test_a_saved_model_loads_here_and_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    config = ModelConfig(24, 2, "silu", vocabulary=100, head_size=12)
    model = build_model(config, 0).eval()
    save_checkpoint(model, tmp_path)
    ids = torch.randint(0, 100, (2, 9))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        assert torch.equal(load_weights(tmp_path)(input_ids=ids).logits, wanted)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits, wanted)


def test_loading_names_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json in .*; name a folder that holds a model"):
        load_weights(tmp_path)
    save_checkpoint(build_model(ModelConfig(24, 2, vocabulary=100, head_size=12), 0), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"do not fit its config\.json \(model\.norm\.weight is missing\)"):
        load_weights(tmp_path)
    with pytest.raises(InputError, match=r"no weights as safetensors in .*\(\.bin\) are never opened"):
        load_weights(tmp_path, "other.safetensors")
