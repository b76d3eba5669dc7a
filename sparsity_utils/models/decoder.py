"""The muP decoder of the study: its architecture, its initialisation and its learning rates.

Architecture (arXiv 2411.02335, section 4; multipliers as in MiniCPM, arXiv 2404.06395): RMSNorm, rotary
multi-head attention, gated FFN with d_ff = 2.5 d, tied embeddings, embedding output x 12, each residual branch
x 1.4 / sqrt(n_layers), logits / m with m = d / d_base, attention scores / sqrt(head size).
`transformers` has it natively as Granite, so a checkpoint opens anywhere without code of ours.

muP (arXiv 2203.03466, table 8): hidden matrices start at std 0.1 / sqrt(m) and learn at lr / m; embeddings
start at std 0.1 and norm gains at 1, both at the full lr. m is a matrix's number of inputs over that of the base
model: d / d_base, and d_ff / (2.5 d_base) for the down projection, which is the same at d_ff = 2.5 d. Weight decay
is AdamW's own, so it is coupled to each group's learning rate: a hidden matrix shrinks by lr / m x weight_decay a step;
norm gains are not decayed.

A plain FFN, h = act(W_gate x), is a gated one whose second factor is 1 for good: W_up = 0 with a bias of 1, neither of
them trained. So it is a Granite like all others.
"""

import math

import torch
from transformers import GraniteConfig, GraniteForCausalLM

from sparsity_utils.models.config import ModelConfig
from sparsity_utils.models.input_training import KEPT_INPUTS, KeptInputs
from sparsity_utils.models.shapes import d_ff, head_count

EMBEDDING_MULTIPLIER = 12.0
RESIDUAL_MULTIPLIER = 1.4  # divided by sqrt(n_layers)
INITIAL_STD = 0.1
BASE_FFN_RATIO = 2.5  # d_ff / d_model of the base model


def granite_config(config: ModelConfig) -> GraniteConfig:
    """The `transformers` configuration of this architecture, all muP multipliers set."""
    heads, kept = head_count(config), KeptInputs.of(config)
    return GraniteConfig(
        architectures=["GraniteForCausalLM"],
        vocab_size=config.vocabulary,
        hidden_size=config.d_model,
        intermediate_size=d_ff(config.d_model, config.ffn_ratio),
        num_hidden_layers=config.n_layers,
        num_attention_heads=heads,
        hidden_act=config.activation,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        embedding_multiplier=EMBEDDING_MULTIPLIER,
        residual_multiplier=RESIDUAL_MULTIPLIER / math.sqrt(config.n_layers),
        logits_scaling=config.d_model / config.base_width,
        attention_multiplier=(config.d_model / heads) ** -0.5,
        initializer_range=INITIAL_STD,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        mlp_bias=config.ffn == "plain",  # for the second factor of 1
        **({KEPT_INPUTS: kept.written()} if kept else {}),
    )


def build_model(config: ModelConfig, seed: int) -> GraniteForCausalLM:
    """A freshly initialised model, the same weights for the same (config, seed) on every machine."""
    model = GraniteForCausalLM(granite_config(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.fill_(float("up_proj" in name)).requires_grad_(False)
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            elif config.ffn == "plain" and "up_proj" in name:
                parameter.zero_().requires_grad_(False)
            else:
                std = INITIAL_STD if _is_embedding(name) else INITIAL_STD / math.sqrt(input_multiplier(name, config))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def parameter_groups(
    model: GraniteForCausalLM, config: ModelConfig, learning_rate: float, weight_decay: float
) -> list[dict]:
    """Optimizer groups under muP: hidden matrices at learning_rate / m, embeddings and norm gains at the full rate."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    embeddings = [p for name, p in named if p.ndim == 2 and _is_embedding(name)]
    gains = [p for _, p in named if p.ndim == 1]
    hidden: dict[float, list[torch.nn.Parameter]] = {}  # by m: one group at d_ff = 2.5 d, two elsewhere
    for name, parameter in named:
        if parameter.ndim == 2 and not _is_embedding(name):
            hidden.setdefault(input_multiplier(name, config), []).append(parameter)
    return [
        *({"params": group, "lr": learning_rate / m, "weight_decay": weight_decay} for m, group in hidden.items()),
        {"params": embeddings, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": gains, "lr": learning_rate, "weight_decay": 0.0},
    ]


def input_multiplier(name: str, config: ModelConfig) -> float:
    """muP's m of the hidden matrix `name`: its number of inputs over that of the same matrix in the base model."""
    if "down_proj" in name:
        return d_ff(config.d_model, config.ffn_ratio) / (BASE_FFN_RATIO * config.base_width)
    return config.d_model / config.base_width


def _is_embedding(name: str) -> bool:
    return "embed_tokens" in name or "lm_head" in name


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
