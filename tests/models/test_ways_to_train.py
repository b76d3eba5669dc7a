"""Plain FFNs and the L1 penalty on activations, against what is written out."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from literal_inputs import literal_maps

from sparsity_utils.console import InputError
from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.models.decoder import build_model, parameter_groups
from sparsity_utils.models.input_training import KeptInputs
from sparsity_utils.models.penalty import ActivationPenalty
from sparsity_utils.models.shapes import non_embedding_parameters
from sparsity_utils.models.training import Training, trainable

PLAIN = ModelConfig(16, 2, vocabulary=64, context=16, head_size=8, base_width=16, ffn="plain")
TRAIN = TrainConfig(tokens=64 * 16, batch_tokens=64, checkpoints=6, l1=0.3)
IDS = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(5))
ACTS = {
    "relu": lambda s: s * (s > 0),
    "relu2": lambda s: (s * (s > 0)) ** 2,
    "silu": lambda s: s / (1 + torch.exp(-s)),
    "gelu": lambda s: s * (1 + torch.erf(s / math.sqrt(2))) / 2,
}


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_plain_ffn_is_two_maps_and_what_is_between(activation, trained):
    config = dataclasses.replace(PLAIN, activation=activation)
    model = (trainable(config, 0, torch.device("cpu")) if trained else build_model(config, 0)).double()
    ffn, x = model.model.layers[1].mlp, torch.randn(2, 3, 16, dtype=torch.float64)
    wanted = ACTS[activation](x @ ffn.gate_proj.weight.t()) @ ffn.down_proj.weight.t()
    torch.testing.assert_close(ffn(x), wanted, rtol=1e-12, atol=1e-14)


def test_what_a_plain_ffn_trains_is_what_its_parameters_count():
    model = build_model(PLAIN, 0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = sum(p.numel() for name, p in trained.items() if p.ndim == 2 and "embed" not in name)
    assert matrices == non_embedding_parameters(16, 2, 2.5, "plain") == 2 * (4 * 16 * 16 + 2 * 16 * 40)
    grouped = [p for group in parameter_groups(model, PLAIN, 0.01, 0.1) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in trained.values()} and len(grouped) == len(trained)
    frozen = set(dict(model.named_parameters())) - set(trained)
    assert {name.split("mlp.")[1] for name in frozen} == {
        *("up_proj.weight", "up_proj.bias", "gate_proj.bias", "down_proj.bias")
    }


def test_weights_of_a_gated_ffn_are_those_they_were():
    """Layers alone have other weights; a plain FFN draws none for its constants."""
    gated, plain = build_model(dataclasses.replace(PLAIN, ffn="gated"), 0), build_model(PLAIN, 0)
    first = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(gated.get_parameter(first), plain.get_parameter(first))
    assert all(p.requires_grad for p in gated.parameters()) and not any(
        "bias" in n for n, _ in gated.named_parameters()
    )


def training(tmp_path, model=PLAIN, **changes) -> Training:
    tokens = np.random.default_rng(0).integers(0, 64, 3000).astype(np.uint16)
    return Training(model, dataclasses.replace(TRAIN, **changes), tokens, [], tmp_path)


KEPT = dataclasses.replace(PLAIN, ffn="gated", keep=8, ffn_ratio=2.0, activation="silu")


@pytest.mark.parametrize("config", [PLAIN, KEPT], ids=["plain", "kept"])
def test_the_penalised_loss_and_its_gradient_equal_the_written_out_ones(tmp_path, config):
    """Of kept inputs, |h| is summed over those that the map down reads."""
    run = training(tmp_path, config)
    run.model.double()
    targets = IDS.roll(-1, 1)
    loss = run._loss(IDS, targets)
    loss.backward()
    literal = build_model(config, 0).double()
    maps = literal_maps(literal, KeptInputs.of(config) or KeptInputs())
    logits = literal(input_ids=IDS).logits.flatten(0, 1)
    sums = [
        sum(neuron.abs() for neuron in token)
        for name in ("0.mlp.down_proj", "1.mlp.down_proj")
        for token in maps[name].read.flatten(0, 1)
    ]
    wanted = torch.nn.functional.cross_entropy(logits, targets.flatten()) + 0.3 * sum(sums) / len(sums)
    wanted.backward()
    assert len(sums) == 2 * 64 and sum(sums).item() > 1
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    parameters = dict(literal.named_parameters())
    for name, p in run.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, parameters[name].grad, rtol=1e-5, atol=1e-7, msg=name)


def test_passes_without_gradients_are_not_counted():
    model = build_model(PLAIN, 0)
    penalty = ActivationPenalty(model, 1.0)
    model(input_ids=IDS)
    first = penalty.taken()
    with torch.no_grad():
        model(input_ids=IDS[:1])
    assert not penalty.sizes
    model(input_ids=IDS)
    torch.testing.assert_close(penalty.taken(), first)


def test_a_penalty_and_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path):
    gradients, losses = [], []
    for micro in (None, 16, 32):
        run = training(tmp_path, micro_tokens=micro, clip_norm=1e9)
        run.optimizer.step = lambda run=run: gradients.append(
            torch.cat([p.grad.flatten() for p in run.model.parameters() if p.requires_grad])
        )
        run.train_step()
        losses.append(run.losses[0])
    for gradient, loss in zip(gradients[1:], losses[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        assert torch.linalg.vector_norm(gradient - gradients[0]) < 1e-5 * torch.linalg.vector_norm(gradients[0])


def test_a_penalty_makes_neurons_smaller(tmp_path):
    def size(run: Training) -> float:
        penalty = ActivationPenalty(run.model, 1.0)
        run.model(input_ids=IDS)
        return penalty.taken().item()

    runs = {l1: training(tmp_path / str(l1), l1=l1) for l1 in (0.0, 0.3)}
    before = size(runs[0.0])
    for run in runs.values():
        for _ in range(16):
            run.train_step()
    assert size(runs[0.3]) < 0.5 * before and size(runs[0.3]) < 0.5 * size(runs[0.0])


REFUSED = [
    ({"l1": 0.1, "recompute": True}, r"train\.l1 penalises .* on one device and without train\.recompute; drop one"),
    ({"l1": 0.1, "devices": 2}, r"train\.l1 penalises .* on one device"),
    ({"l1": -0.1}, r"train\.l1 is -0\.1; it may not be negative"),
    ({"text": "noise"}, r"train\.text is 'noise'; choose one of corpus, random"),
    ({"targets": "last"}, r"train\.targets is 'last'; choose one of next, uniform, unigram, function"),
    ({"text": "random", "distinct_tokens": 640}, r"train\.text random has no next token that could be learnt"),
    ({"targets": "uniform"}, r"say of how many tokens in train\.distinct_tokens"),
    ({"distinct_tokens": 63}, r"train\.distinct_tokens is 63, less than a batch of 64"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_training_that_cannot_be_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TRAIN, **{"l1": 0.0, **changes})
