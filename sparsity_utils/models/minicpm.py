"""Checkpoints in the MiniCPM format, such as SparseLLM/sparsing-law-*, read as Granite models.

Such a checkpoint brings its own Python code, which is never run. It is not needed: both architectures are Llama's
(RMSNorm, rotary attention, gated FFN, the same names of the weights) with the muP multipliers of arXiv 2404.06395,
and differ only in the names that config.json uses. The authors' model code (GitHub thunlp/SparsingLaw, src/model)
gives the mapping:

    Granite               MiniCPM
    embedding_multiplier  scale_emb
    residual_multiplier   scale_depth / sqrt(num_hidden_layers)
    logits_scaling        hidden_size / dim_model_base
    attention_multiplier  1 / sqrt(head size), as in Llama
"""

import math
from pathlib import Path
from typing import Any

from transformers import GraniteConfig
from transformers.activations import ACT2FN

from sparsity_utils.console import InputError

ARCHITECTURE = "MiniCPMForCausalLM"

NEEDED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "rms_norm_eps", "scale_emb", "dim_model_base", "scale_depth",
)  # fmt: skip
# What the authors' configuration class takes where config.json is silent.
DEFAULTS = {
    "num_key_value_heads": None,  # one per attention head
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
# Keys that alter what the model computes; the mapping holds at these values, which are also their defaults.
HOLDS_AT = {
    "rope_scaling": None,
    "hidden_act_param": None,  # of fatrelu
    "attention_type": "vanilla",
    "ffn_type": "vanilla",
    "pretraining_tp": 1,
}
# Keys of attention and FFN types that are not vanilla, so without effect.
UNUSED = {
    "qk_nope_head_dim", "qk_rope_head_dim", "q_lora_rank", "kv_lora_rank", "v_head_dim",
    "router_act", "expert_size", "moe_top_k", "moe_top_p", "moe_routing_strategy",
}  # fmt: skip
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys of every configuration, or of training alone.
WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version",
    "initializer_range", "attention_dropout", "use_cache",
}  # fmt: skip


def is_minicpm(content: dict[str, Any]) -> bool:
    """Whether `content`, a config.json, is of this format, with or without its model_type."""
    return content.get("architectures") == [ARCHITECTURE] and content.get("model_type", "minicpm") == "minicpm"


def granite_config(content: dict[str, Any], file: Path) -> GraniteConfig:
    """The Granite configuration that computes the same as `content`, read from the MiniCPM config.json `file`.

    Raises `InputError` for a key that is missing, or that asks for something Granite does not compute.
    """
    _check(content, file)
    values = {key: content.get(key, DEFAULTS.get(key)) for key in (*NEEDED, *DEFAULTS)}
    layers, width = values["num_hidden_layers"], values["hidden_size"]
    return GraniteConfig(
        embedding_multiplier=values.pop("scale_emb"),
        residual_multiplier=values.pop("scale_depth") / math.sqrt(layers),
        logits_scaling=width / values.pop("dim_model_base"),
        attention_multiplier=(width // values["num_attention_heads"]) ** -0.5,
        rope_parameters={"rope_type": "default", "rope_theta": float(values.pop("rope_theta"))},
        mlp_bias=False,
        **values,
        **{key: content[key] for key in TOKENS if key in content},
    )


def _check(content: dict[str, Any], file: Path) -> None:
    missing = [key for key in NEEDED if content.get(key) is None]
    if missing:
        raise InputError(f"{file} has no {missing[0]}; copy it again from where the weights are.")
    for key, value in HOLDS_AT.items():
        if content.get(key, value) != value:
            raise InputError(
                f"{file} sets {key} to {content[key]!r}, which the native model cannot compute; "
                f"only {value!r} is supported."
            )
    if content["hidden_act"] not in ACT2FN:
        raise InputError(
            f"{file} names the activation {content['hidden_act']!r}, which transformers does not "
            f"have; only checkpoints with one of its own, such as relu or silu, can be opened."
        )
    known = {*NEEDED, *DEFAULTS, *HOLDS_AT, *TOKENS, *UNUSED, *WITHOUT_EFFECT}
    if content.get("ffn_type") == "vanilla":
        known.add("num_experts")  # written by the authors' class, whatever the FFN
    if unknown := sorted(content.keys() - known):
        raise InputError(
            f"{file} sets {unknown[0]} to {content[unknown[0]]!r}, which may change what the model "
            f"computes and has no counterpart in the native model; remove the key only if you know it has no effect."
        )
