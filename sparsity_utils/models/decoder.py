"""The muP decoder of the study: its shapes, its initialisation and learning rates, its parameter counts.

Architecture (arXiv 2411.02335, section 4; multipliers as in MiniCPM, arXiv 2404.06395): RMSNorm, rotary
multi-head attention, gated FFN with d_ff = 2.5 d, tied embeddings, embedding output x 12, each residual branch
x 1.4 / sqrt(n_layers), logits / m with m = d / d_base, attention scores / sqrt(head size).
`transformers` has it natively as Granite, so a checkpoint opens anywhere without code of ours.

muP (arXiv 2203.03466, table 8): hidden matrices start at std 0.1 / sqrt(m) and learn at lr / m; embeddings
start at std 0.1 and norm gains at 1, both at the full lr. m is a matrix's number of inputs over that of the base
model: d / d_base, and d_ff / (2.5 d_base) for the down projection, which is the same at d_ff = 2.5 d. Weight decay
is AdamW's own, so it is coupled to each group's learning rate: a hidden matrix shrinks by lr / m x weight_decay a step;
norm gains are not decayed.
"""

import math
from dataclasses import dataclass

import torch
from transformers import GraniteConfig, GraniteForCausalLM

from sparsity_utils.console import InputError
from sparsity_utils.models.config import ModelConfig

EMBEDDING_MULTIPLIER = 12.0
RESIDUAL_MULTIPLIER = 1.4  # divided by sqrt(n_layers)
INITIAL_STD = 0.1
BASE_FFN_RATIO = 2.5  # d_ff / d_model of the base model
WIDTH_STEP = 4  # d is a multiple of it, so that d_ff = 2.5 d is even and even head sizes exist
SHAPE_TOLERANCE = 0.10


@dataclass(frozen=True)
class Shape:
    """The integer shape nearest to what was asked, and how far it is from it."""

    d_model: int
    n_layers: int
    parameters: int  # non-embedding
    parameters_error: float  # relative to what was asked
    ratio_error: float  # likewise, of d_model / n_layers

    def __str__(self) -> str:
        return (
            f"{self.d_model}x{self.n_layers}: {self.parameters:,} parameters ({self.parameters_error:+.1%}), "
            f"ratio {self.d_model / self.n_layers:.3g} ({self.ratio_error:+.1%})"
        )


def non_embedding_parameters(d_model: int, n_layers: int, ffn_ratio: float = 2.5) -> int:
    """Weights of all attention and FFN matrices, (4 + 3 ffn_ratio) n_layers d^2: 11.5 n_layers d^2 at ratio 2.5."""
    return n_layers * (4 * d_model**2 + 3 * d_model * d_ff(d_model, ffn_ratio))


def d_ff(d_model: int, ffn_ratio: float = 2.5) -> int:
    """Neurons of one FFN."""
    return round(d_model * ffn_ratio)


def solve_shape(parameters: int, ratio: float, ffn_ratio: float = 2.5) -> Shape:
    """The (d_model, n_layers) nearest to `parameters` non-embedding parameters at width-depth ratio `ratio`.

    Nearest is the smallest sum of the two absolute log errors. Raises InputError when no pair of integers is
    within 10% of both.
    """
    if parameters <= 0 or ratio <= 0:
        raise InputError(
            f"A shape needs positive parameters and ratio, not {parameters} and {ratio}; correct the profile."
        )
    ideal_layers = (parameters / ((4 + 3 * ffn_ratio) * ratio**2)) ** (1 / 3)

    def shape(d_model: int, n_layers: int) -> Shape:
        count = non_embedding_parameters(d_model, n_layers, ffn_ratio)
        return Shape(d_model, n_layers, count, count / parameters - 1, d_model / n_layers / ratio - 1)

    candidates = [
        shape(d_model, n_layers)
        for n_layers in range(max(1, math.floor(ideal_layers * 0.8)), math.ceil(ideal_layers * 1.25) + 1)
        for d_model in _widths_near(ratio * n_layers)
        + _widths_near(math.sqrt(parameters / n_layers / (4 + 3 * ffn_ratio)))
    ]
    best = min(candidates, key=lambda s: abs(math.log1p(s.parameters_error)) + abs(math.log1p(s.ratio_error)))
    if max(abs(best.parameters_error), abs(best.ratio_error)) > SHAPE_TOLERANCE:
        raise InputError(
            f"No integer shape has {parameters:,} parameters at width-depth ratio {ratio:g} within "
            f"{SHAPE_TOLERANCE:.0%}; the nearest is {best}. Choose another ratio or size."
        )
    return best


def _widths_near(width: float) -> list[int]:
    below = max(WIDTH_STEP, math.floor(width / WIDTH_STEP) * WIDTH_STEP)
    return [below, below + WIDTH_STEP]


def head_count(config: ModelConfig) -> int:
    """Heads for the even head size that divides d_model and is nearest (in log) to the one wanted.

    Raises InputError when the nearest is off by more than a factor of two.
    """
    sizes = [size for size in range(2, config.d_model + 1, 2) if config.d_model % size == 0]
    size = min(sizes, key=lambda s: abs(math.log(s / config.head_size)))
    if abs(math.log2(size / config.head_size)) > 1 and config.d_model > config.head_size:
        raise InputError(
            f"model.d_model {config.d_model} is not divisible into heads: no even head size near {config.head_size} "
            f"divides it (nearest: {size}). Choose a d_model with more divisors or another head_size."
        )
    return config.d_model // size


def granite_config(config: ModelConfig) -> GraniteConfig:
    """The `transformers` configuration of this architecture, all muP multipliers set."""
    heads = head_count(config)
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
    )


def build_model(config: ModelConfig, seed: int) -> GraniteForCausalLM:
    """A freshly initialised model, the same weights for the same (config, seed) on every machine."""
    model = GraniteForCausalLM(granite_config(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                std = INITIAL_STD if _is_embedding(name) else INITIAL_STD / math.sqrt(input_multiplier(name, config))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def parameter_groups(
    model: GraniteForCausalLM, config: ModelConfig, learning_rate: float, weight_decay: float
) -> list[dict]:
    """Optimizer groups under muP: hidden matrices at learning_rate / m, embeddings and norm gains at the full rate."""
    named = list(model.named_parameters())
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


def training_flops_per_token(config: ModelConfig) -> float:
    """Multiply-adds x 2 of one forward and backward pass (x 3) per token: matrices, head and causal attention.

    Matrices: 6 N. Head: 6 d V. Attention scores and values: 6 n_layers d context (half of the square is masked).
    As in PaLM, arXiv 2204.02311, appendix B, with the causal half counted once.
    """
    matrices = non_embedding_parameters(config.d_model, config.n_layers, config.ffn_ratio)
    head = config.d_model * config.vocabulary
    attention = config.n_layers * config.d_model * config.context
    return 6.0 * (matrices + head + attention)


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
