"""Where the linear maps of the families in `families.py` lie, written down by hand, and masks for them."""

import torch
from families import FAMILIES, build, first_maps, names, randomised
from transformers import LlamaConfig, LlamaForCausalLM

DECODERS = sorted(set(FAMILIES) - {"t5", "t5-gated", "bert", "vit", "lfm2"})
SEPARATE = "self_attn.{}_proj"
# family -> the modules of q, k, v and o inside a block, and how a fused one lays out q, k and v
ATTENTION = {
    "opt": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", None),
    "phi3": (*["self_attn.qkv_proj"] * 3, "self_attn.o_proj", "blocks"),
    "gpt2": (*["attn.c_attn"] * 3, "attn.c_proj", "blocks"),
    "gpt_neox": (*["attention.query_key_value"] * 3, "attention.dense", "heads"),
    "bloom": (*["self_attention.query_key_value"] * 3, "self_attention.dense", "heads"),
    "falcon": (*["self_attention.query_key_value"] * 3, "self_attention.dense", "one key"),
}
LAYOUTS = {  # two heads of size eight: columns of q, k and v
    None: (range(16), range(16), range(16)),
    "blocks": (range(16), range(16, 32), range(32, 48)),
    "heads": ([*range(8), *range(24, 32)], [*range(8, 16), *range(32, 40)], [*range(16, 24), *range(40, 48)]),
    "one key": (range(16), range(16, 24), range(24, 32)),
}


def grouped_query(layers=2, dtype=torch.float64):
    """A Llama with six heads of size four of queries and two of keys and values."""
    config = LlamaConfig(
        vocab_size=41, hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    return randomised(LlamaForCausalLM(config), dtype)


def expected_maps(family, model):
    """(block, role) -> module, columns and weight (out, in) of each map."""
    layout = FAMILIES[family][1]
    found = {}
    for layer, ffn in enumerate(names(family)):
        block = ffn if family == "opt" else ffn.rpartition(".")[0]
        default = (*(SEPARATE.format(role) for role in "qkvo"), None)
        *attention, kind = ATTENTION.get(family, default)
        for role, name, columns in zip("qkvo", attention, (*LAYOUTS[kind], range(16)), strict=True):
            module, columns = model.get_submodule(f"{block}.{name}"), list(columns)
            weight = module.weight.detach().T if layout.conv1d else module.weight.detach()
            found[layer, role] = module, columns, weight[columns]
        maps = dict(zip(("gate", "up"), first_maps(family, model, ffn), strict=True))
        for role, first in maps.items():
            if first is not None:
                module, weight, _ = first
                start = len(weight) if layout.fused and role == "up" else 0
                found[layer, role] = module, list(range(start, start + len(weight))), weight
        module = model.get_submodule(f"{ffn}.{layout.down}")
        weight = module.weight.detach().T if layout.conv1d else module.weight.detach()
        found[layer, "down"] = module, list(range(len(weight))), weight
    return found


def decoder(family):
    return build(family)


class Keep:
    """A mask that keeps the inputs that `keep(linear, j)` chooses."""

    def __init__(self, maps, keep):
        self.values, self.keep = (0.0,) * len(maps), keep

    def active_inputs(self, linear, x):
        assert x.shape[-1] == linear.inputs
        return self.keep(linear, torch.arange(linear.inputs)).expand_as(x)


def everything(linear, j):
    return j >= 0


def nothing(linear, j):
    return j < 0


def every_other(linear, j):
    """Another half for each map."""
    return (j + linear.index) % 2 == 0
