"""Rotated vectors: the model computes the same, and W'^T W' is diagonal for k and gate."""

import pytest
import torch
from families import build, left_behind, output
from linear_maps import Keep, everything, grouped_query
from tiny_granite import granite

from sparsity_utils.neurons.linears import find_linears, observe_inputs, sparse_inputs
from sparsity_utils.neurons.rotations import rotated, rotation_weights

IDS = {"input_ids": torch.randint(3, 29, (3, 7), generator=torch.Generator().manual_seed(1))}
GAINS = {  # how each RMSNorm of these families scales: by its weight, or one more
    "llama": lambda block: (block.input_layernorm.weight, block.post_attention_layernorm.weight),
    "phi3": lambda block: (block.input_layernorm.weight, block.post_attention_layernorm.weight),
    "gemma2": lambda block: (1 + block.input_layernorm.weight, 1 + block.pre_feedforward_layernorm.weight),
    "gpt2": None,  # LayerNorm
    "olmo2": None,  # what attention reads is the residual stream itself
}


def models(family):
    return grouped_query() if family == "grouped queries" else build(family)


@pytest.mark.parametrize("family", [*GAINS, "grouped queries", "gpt_neox", "falcon"])
def test_a_rotated_model_computes_the_same(family):
    model = models(family)
    before, maps = output(model, IDS), rotated(model)
    with sparse_inputs(model, Keep(maps, everything), maps):
        torch.testing.assert_close(output(model, IDS), before, rtol=0, atol=1e-8)
    assert torch.equal(output(model, IDS), before) and left_behind(model) == []


@pytest.mark.parametrize("family", GAINS)
def test_gains_are_folded_in_and_gram_matrices_are_diagonal(family):
    model, seen = build(family), {}
    maps = rotated(model)
    with observe_inputs(model, lambda readers, x: seen.update({one.index: x for one in readers}), maps):
        output(model, IDS)
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    for one, plain in zip(maps, find_linears(model), strict=True):
        if one.role in ("o", "down"):
            assert one.basis is None
            continue
        gains = torch.ones(16).double()
        if GAINS[family] is not None:
            gains = GAINS[family](blocks[one.layer])[one.vector == "ffn"].detach()
        assert torch.linalg.cond(one.weight) == pytest.approx(float(torch.linalg.cond(plain.weight * gains)))
        z = one.coordinates(seen[one.index])
        torch.testing.assert_close(z.norm(dim=-1), (seen[one.index] / gains).norm(dim=-1))  # V is orthogonal
        torch.testing.assert_close(z @ one.weight.T, seen[one.index] @ plain.weight.T)
        if one.role in ("k", "gate"):
            gram = one.weight.T @ one.weight
            torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-10)


def test_a_gain_of_zero_stays_zero():
    model = granite()
    model.model.layers[1].input_layernorm.weight.data[3] = 0
    before, maps = output(model, IDS), rotated(model)
    with sparse_inputs(model, Keep(maps, everything), maps):
        torch.testing.assert_close(output(model, IDS), before, rtol=0, atol=1e-8)


def test_keys_shared_by_queries_need_no_more_coordinates_than_they_have_outputs():
    """W_k has 8 rows of 24: 16 of its rotated columns are zero, and skipping two thirds of its inputs costs nothing."""
    model = grouped_query()
    before, maps = output(model, IDS), rotated(model)
    with sparse_inputs(model, Keep(maps, lambda one, j: (j < 8) | (one.role != "k")), maps):
        torch.testing.assert_close(output(model, IDS), before, rtol=0, atol=1e-8)
    with sparse_inputs(model, Keep(maps, lambda one, j: (j < 7) | (one.role != "k")), maps):
        assert not torch.allclose(output(model, IDS), before, rtol=0, atol=1e-8)


def test_two_products_of_d_by_d_are_counted_per_block():
    assert rotation_weights(rotated(grouped_query(layers=3))) == 3 * 2 * 24**2
    assert rotation_weights(find_linears(grouped_query())) == 0


def test_masks_act_on_the_rotated_coordinates():
    model, ids = grouped_query(layers=1), IDS
    maps = rotated(model)
    with sparse_inputs(model, Keep(maps, lambda one, j: (j >= 5) | (one.role != "gate")), maps):
        masked = output(model, ids)
    gate = next(one for one in maps if one.role == "gate")
    kept = torch.arange(24) >= 5
    model.model.layers[0].mlp.gate_proj.weight.data = gate.weight * kept @ gate.basis.into
    torch.testing.assert_close(masked, output(model, ids), rtol=1e-10, atol=1e-10)
