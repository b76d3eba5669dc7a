"""Small random models of the real transformers classes, and where each keeps its FFN, written down by hand."""

import math
from dataclasses import dataclass

import torch
import transformers

VOCABULARY = 41


def relu(x):
    return x * (x > 0)


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


@dataclass(frozen=True)
class Layout:
    """The parts of the FFN of layer i: `{}` stands for i."""

    name: str  # the module that find_ffns should name
    act: object
    gate: str  # inside that module; of a plain FFN, its one first map
    up: str | None
    down: str
    fused: bool = False  # gate and up are the two halves of one map
    conv1d: bool = False  # weights are kept transposed


def gated(name, act):
    return Layout(name, act, "gate_proj", "up_proj", "down_proj")


LLAMA = gated("model.layers.{}.mlp", silu)
GEMMA = gated("model.layers.{}.mlp", gelu_tanh)
T5_NAMES = "encoder.block.{0}.layer.1.DenseReluDense", "decoder.block.{0}.layer.2.DenseReluDense"

# family -> (class, layout, options besides the common ones)
FAMILIES = {
    "llama": ("Llama", LLAMA, {"mlp_bias": True}),
    "mistral": ("Mistral", LLAMA, {}),
    "qwen2": ("Qwen2", LLAMA, {}),
    "qwen3": ("Qwen3", LLAMA, {"head_dim": 8}),
    "gemma2": ("Gemma2", GEMMA, {"head_dim": 8}),
    "gemma3": ("Gemma3", GEMMA, {"head_dim": 8}),
    "phi3": ("Phi3", Layout("model.layers.{}.mlp", silu, "gate_up_proj", None, "down_proj", fused=True), {}),
    "granite": ("Granite", LLAMA, {"mlp_bias": True}),
    "olmo2": ("Olmo2", LLAMA, {}),
    "starcoder2": ("Starcoder2", Layout("model.layers.{}.mlp", gelu_tanh, "c_fc", None, "c_proj"), {}),
    "gpt2": ("GPT2", Layout("transformer.h.{}.mlp", gelu_tanh, "c_fc", None, "c_proj", conv1d=True), {}),
    "gpt_neox": ("GPTNeoX", Layout("gpt_neox.layers.{}.mlp", gelu, "dense_h_to_4h", None, "dense_4h_to_h"), {}),
    "opt": ("OPT", Layout("model.decoder.layers.{}", relu, "fc1", None, "fc2"), {}),
    "bloom": ("Bloom", Layout("transformer.h.{}.mlp", gelu_tanh, "dense_h_to_4h", None, "dense_4h_to_h"), {}),
    "falcon": ("Falcon", Layout("transformer.h.{}.mlp", gelu, "dense_h_to_4h", None, "dense_4h_to_h"), {"bias": True}),
    "t5": ("T5", Layout("{}", relu, "wi", None, "wo"), {"feed_forward_proj": "relu"}),
    "t5-gated": ("T5", Layout("{}", gelu_tanh, "wi_0", "wi_1", "wo"), {"feed_forward_proj": "gated-gelu"}),
    "bert": ("Bert", Layout("bert.encoder.layer.{}", gelu, "intermediate.dense", None, "output.dense"), {}),
    "vit": ("ViT", Layout("layers.{}.mlp", gelu, "fc1", None, "fc2"), {}),
    "lfm2": ("Lfm2", Layout("model.layers.{}.feed_forward", silu, "w1", "w3", "w2"), {}),
}
SQUARE = sorted(set(FAMILIES) - {"bloom"})  # those whose d_ff can be d


def config(family, d, d_ff):
    kind, _, options = FAMILIES[family]
    common = {
        "vocab_size": VOCABULARY, "hidden_size": d, "intermediate_size": d_ff, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.4,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "_attn_implementation": "eager",
    }  # fmt: skip
    special = {
        "gpt2": {"n_embd": d, "n_inner": d_ff, "n_layer": 2, "n_head": 2, "n_positions": 32},
        "opt": {"ffn_dim": d_ff, "word_embed_proj_dim": d},
        "bloom": {"n_layer": 2, "n_head": 2},
        "falcon": {"ffn_hidden_size": d_ff},
        "t5": {"d_model": d, "d_kv": 8, "d_ff": d_ff, "num_layers": 2, "num_heads": 2},
        "vit": {"image_size": 8, "patch_size": 4},
        "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    }
    name = "Gemma3Text" if kind == "Gemma3" else kind
    extra = special.get(family.removesuffix("-gated"), {})
    return getattr(transformers, f"{name}Config")(**{**common, **extra, **options})


def randomised(model, dtype=torch.float64, seed=0):
    """All parameters drawn anew, so that biases and experts are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype).eval()


def build(family, d=16, d_ff=24, dtype=torch.float64):
    kind = FAMILIES[family][0]
    heads = {
        "GPT2": "GPT2LMHeadModel",
        "T5": "T5ForConditionalGeneration",
        "ViT": "ViTModel",
        "Bert": "BertForMaskedLM",
    }
    return randomised(getattr(transformers, heads.get(kind, f"{kind}ForCausalLM"))(config(family, d, d_ff)), dtype)


def inputs(family, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator).to(dtype)}
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids[:, :4]} if family.startswith("t5") else {"input_ids": ids}


def output(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


def names(family):
    layout = FAMILIES[family][1]
    patterns = T5_NAMES if family.startswith("t5") else (layout.name,)
    return [pattern.format(i) for pattern in patterns for i in range(2)]


def down(family, model, name):
    return model.get_submodule(f"{name}.{FAMILIES[family][1].down}")


def first_maps(family, model, name):
    """Gate and up of the FFN `name` as (module, weight (d_ff, d), bias (d_ff,) or None); None where there is none."""
    layout = FAMILIES[family][1]
    found = []
    for part in (layout.gate, layout.up):
        module = None if part is None else model.get_submodule(f"{name}.{part}")
        weight = None if module is None else (module.weight.T if layout.conv1d else module.weight).detach()
        found.append(None if module is None else (module, weight, module.bias))
    if layout.fused:
        module, weight, _ = found[0]
        half = len(weight) // 2
        found = [(module, weight[:half], None), (module, weight[half:], None)]
    return found


def mapped(module, x, conv1d):
    """A linear map by its definition."""
    weight = module.weight.T if conv1d else module.weight
    y = (x[:, None, :] * weight[None]).sum(-1)
    return y if module.bias is None else y + module.bias


def neurons(family, model, name, x):
    """s and h (rows, d_ff) of the FFN `name` for x (rows, d)."""
    layout = FAMILIES[family][1]
    gate = mapped(model.get_submodule(f"{name}.{layout.gate}"), x, layout.conv1d)
    if layout.fused:
        gate, up = gate[:, : gate.shape[1] // 2], gate[:, gate.shape[1] // 2 :]
        return layout.act(gate), layout.act(gate) * up
    s = layout.act(gate)
    return s, s if layout.up is None else s * mapped(model.get_submodule(f"{name}.{layout.up}"), x, False)


def left_behind(model):
    """Whatever hooks or replaced forwards a model still has."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return hooks + [m for m in model.modules() if "forward" in vars(m)]


class Keep:
    """A rule that keeps the neurons whose numbers `keep` chooses."""

    def __init__(self, ffns, keep):
        self.values = (0.0,) * (ffns[-1].layer + 1)
        self.keep = keep

    def active(self, ffn, s, h):
        assert s.shape == h.shape and s.shape[-1] == ffn.d_ff
        return self.keep(torch.arange(ffn.d_ff)).expand_as(h)


def keep_all(i):
    return i >= 0


def keep_none(i):
    return i < 0


def keep_even(i):
    return i % 2 == 0
