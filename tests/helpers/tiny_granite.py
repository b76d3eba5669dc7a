"""A small random model of the study's architecture."""

import torch
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM


def granite(act="relu", *, d=12, d_ff=30, layers=3, vocabulary=29, bias=False, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    config = GraniteConfig(
        vocab_size=vocabulary, hidden_size=d, intermediate_size=d_ff, num_hidden_layers=layers, num_attention_heads=2,
        hidden_act=act, mlp_bias=bias, initializer_range=0.4, pad_token_id=None, attention_multiplier=0.4,
    )  # fmt: skip
    model = GraniteForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return model


def hooks_of(model):
    return [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
