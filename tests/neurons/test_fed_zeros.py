"""Experts that run on every token, fed zeros where they were not chosen: those rows are not routed to them."""

from copy import deepcopy

import pytest
import torch
import transformers
from families import VOCABULARY, Keep, keep_even, keep_none, output, randomised, silu
from mixtures import IDS
from torch import nn

from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.hooks import observe_neurons, sparse_neurons
from sparsity_utils.sparsity.metrics import measure_sparsity

BATCH = {"input_ids": IDS}


def llama4(top_k):
    config = transformers.Llama4TextConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, intermediate_size_mlp=20, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=top_k,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    return randomised(transformers.Llama4ForCausalLM(config))


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_token_counts_in_the_experts_that_it_was_sent_to(top_k):
    model, seen, given = llama4(top_k), {}, []
    ffns = [ffn for ffn in find_ffns(model) if ffn.experts > 1]
    assert [(ffn.expert, ffn.experts) for ffn in ffns] == [(e, 4) for _ in range(2) for e in range(4)]
    with observe_neurons(model, lambda ffn, s, h, tokens: seen.update({(ffn.layer, ffn.expert): (s, h, tokens)})):
        before = output(model, BATCH)
    blocks = [layer.feed_forward for layer in model.model.layers]
    handles = [
        block.register_forward_pre_hook(lambda m, args: given.append(args[0].flatten(0, -2))) for block in blocks
    ]
    assert torch.equal(output(model, BATCH), before)
    for handle in handles:
        handle.remove()
    for i, (block, x) in enumerate(zip(blocks, given, strict=True)):
        scores = block.router.weight @ x.T  # (experts, tokens)
        for e in range(4):
            chosen = [t for t in range(len(x)) if (scores[:, t] > scores[e, t]).sum() < top_k]
            s, h, tokens = seen.get((ffns[4 * i].layer, e), (torch.empty(0, 24), torch.empty(0, 24), torch.empty(0)))
            assert tokens.tolist() == chosen
            for row, t in enumerate(chosen):
                gate, up = (torch.sigmoid(scores[e, t]) * x[t] @ block.experts.gate_up_proj[e]).chunk(2)
                torch.testing.assert_close(s[row], silu(gate), rtol=1e-6, atol=1e-6)  # scores are float32
                torch.testing.assert_close(h[row], silu(gate) * up, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("keep", [keep_none, keep_even])
def test_a_mask_is_a_model_without_those_columns(keep):
    model = llama4(1)
    with sparse_neurons(model, Keep(find_ffns(model), keep)):
        masked = output(model, BATCH)
    without = deepcopy(model)
    for name, parameter in without.named_parameters():
        if "down_proj" in name:
            columns = parameter.data if parameter.dim() == 3 else parameter.data.T  # (..., d_ff, d)
            columns[..., ~keep(torch.arange(columns.shape[-2])), :] = 0
    torch.testing.assert_close(masked, output(without, BATCH), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(masked, output(model, BATCH))


def test_silu_experts_have_no_zeros():
    report = measure_sparsity(llama4(1), [BATCH], "relu")
    assert report.nonzero_share == report.activation_ratio == 1
    routed = report.layers[report.layers["experts"] > 1]
    assert (routed["ratio_of_all_neurons"] == 1 / 4).all()


class AllExperts(nn.Module):
    """Every expert, with biases or without, on every token times its score."""

    def __init__(self, bias):
        super().__init__()
        self.router = nn.Linear(6, 3, bias=False)
        self.first, self.second = nn.Parameter(torch.zeros(3, 6, 9)), nn.Parameter(torch.zeros(3, 9, 6))
        self.bias = nn.Parameter(torch.zeros(3, 1, 9)) if bias else 0

    def forward(self, x):
        scores = torch.relu(self.router(x)).T[..., None]  # (experts, tokens, 1)
        fed = x.repeat(3, 1).view(3, *x.shape) * scores
        return torch.bmm(torch.relu(torch.bmm(fed, self.first) + self.bias), self.second).sum(0)


@pytest.mark.parametrize("bias", [False, True])
def test_experts_whose_biases_act_on_zeros_count(bias):
    model, seen = randomised(AllExperts(bias)), {}
    x = torch.randn(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    find_ffns(model, x)
    with torch.no_grad(), observe_neurons(model, lambda ffn, s, h, tokens: seen.update({ffn.expert: tokens.tolist()})):
        model(x)
    scores = model.router(x).relu()
    expected = {e: [t for t in range(11) if bias or scores[t, e] > 0] for e in range(3)}
    assert seen == expected and any(len(tokens) < 11 for tokens in seen.values()) == (not bias)
