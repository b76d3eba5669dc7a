"""Small random mixtures of experts."""

import torch
import transformers
from families import VOCABULARY, randomised

IDS = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))


# family -> (class, config options)
FUSED = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "intermediate_size": 24}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}),
    "olmoe": ("Olmoe", {"num_experts": 4, "intermediate_size": 24}),
    "square": ("Mixtral", {"num_local_experts": 4, "intermediate_size": 16}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
    ),
    "gpt_oss": (  # transposed, interleaved, with biases, its activation function written out
        "GptOss",
        {
            "num_local_experts": 4, "intermediate_size": 24, "head_dim": 8,
            "layer_types": ["full_attention"] * 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}  # fmt: skip


def build(family, implementation="eager", dtype=None):
    kind, options = FUSED[family]
    dtype = dtype or (torch.float32 if implementation == "grouped_mm" else torch.float64)
    common = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "_attn_implementation": "eager",
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**common, **options)
    model = randomised(getattr(transformers, f"{kind}ForCausalLM")(config), dtype)
    model.set_experts_implementation("grouped_mm" if implementation == "fallback" else implementation)
    return model
