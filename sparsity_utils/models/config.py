"""The settings of a model and of its training; importing this loads nothing heavy."""

from dataclasses import dataclass

from sparsity_utils.console import check

ACTIVATIONS = {"relu": "ReLU", "silu": "SiLU", "gelu": "GELU", "relu2": "ReLU²"}  # as configured -> as written
DTYPES = ("float32", "bfloat16", "float16")  # of a model's weights, named as in torch
LAST_CHECKPOINTS = 5  # stable ones solved together by the stabilised protocol (arXiv 2411.02335, appendix E)
WHOLE = 1e-6  # how far rounding may take d_model x (d_ff / d_model) from the whole number d_ff


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a muP decoder (arXiv 2411.02335, section 4 and appendix; muP as in MiniCPM)."""

    d_model: int
    n_layers: int
    activation: str = "relu"
    vocabulary: int = 1024
    context: int = 256  # tokens
    head_size: int = 12  # wanted head size; the nearest even divisor of d_model is taken
    base_width: int = 64  # d_base: the width at which muP's multipliers are one
    ffn_ratio: float = 2.5  # d_ff / d_model

    def __post_init__(self) -> None:
        check(
            self.activation in ACTIVATIONS,
            f"model.activation is {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}.",
        )
        for name in ("d_model", "n_layers", "vocabulary", "context", "head_size", "base_width"):
            check(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive.")
        check(
            self.d_model % 2 == 0,
            f"model.d_model is {self.d_model}; it must be even, so that heads of an even size divide it.",
        )
        check(self.head_size % 2 == 0, f"model.head_size is {self.head_size}; rotary attention needs an even one.")
        check(self.ffn_ratio > 0, f"model.ffn_ratio is {self.ffn_ratio}; it must be positive.")
        neurons = self.d_model * self.ffn_ratio
        check(
            round(neurons) > 0 and abs(neurons - round(neurons)) < WHOLE,
            f"model.ffn_ratio {self.ffn_ratio:g} gives {neurons:g} neurons at d_model {self.d_model}; d_ff must be a "
            "whole number.",
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run: AdamW under a warm-up, stable, decay schedule."""

    tokens: int  # tokens of the warm-up and stable stages; the decay comes on top
    batch_tokens: int = 8192
    learning_rate: float = 0.01  # peak, before muP's per-group scale
    warmup_share: float = 0.05  # of `tokens`
    decay_share: float = 0.1  # of `tokens`, added after the stable stage
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    checkpoints: int = 16  # log-spaced over the stable stage, the last five evenly spaced
    validation_tokens: int = 49152  # the validation loss at each checkpoint is their mean
    seed: int = 0
    devices: int = 1  # that train the run together; each takes an equal part of every batch
    micro_tokens: int | None = None  # of a device at a time, gradients of a batch are summed; None: its part at once
    recompute: bool = False  # the activations within a layer in the backward pass, in place of keeping them

    def __post_init__(self) -> None:
        check(self.devices >= 1, f"train.devices is {self.devices}; at least 1 is needed.")
        check(
            self.micro_tokens is None or self.micro_tokens >= 1,
            f"train.micro_tokens is {self.micro_tokens}; at least 1 is needed.",
        )
        check(
            self.tokens >= 6 * self.batch_tokens > 0,
            f"train.tokens is {self.tokens}, less than six batches of {self.batch_tokens}.",
        )
        check(self.learning_rate > 0, f"train.learning_rate is {self.learning_rate}; it must be positive.")
        check(0 <= self.warmup_share < 0.5, f"train.warmup_share is {self.warmup_share}; choose 0 to 0.5.")
        check(0 < self.decay_share <= 1, f"train.decay_share is {self.decay_share}; choose above 0, at most 1.")
        check(self.weight_decay >= 0, f"train.weight_decay is {self.weight_decay}; it may not be negative.")
        check(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "train.beta1 and beta2 must be at least 0 and below 1.")
        check(self.clip_norm > 0, f"train.clip_norm is {self.clip_norm}; it must be positive.")
        check(self.seed >= 0, f"a seed is {self.seed}; seeds are 0, 1, 2 and so on.")
        check(
            self.checkpoints >= 6,
            f"train.checkpoints is {self.checkpoints}; at least 6 are needed (the last five are solved together).",
        )

    def check_windows(self, context: int) -> None:
        """Raise InputError for a batch that devices and micro-batches do not divide into windows of `context` tokens.

        What holds for one device at once is told when the text is cut, by `TrainingBatches`.
        """
        part, rest = divmod(self.batch_tokens, self.devices)
        micro = self.micro_tokens or part
        check(
            (self.devices == 1 and self.micro_tokens is None) or rest == part % micro == micro % context == 0,
            f"train.batch_tokens {self.batch_tokens:,} is not divided by train.devices {self.devices} into equal parts "
            f"of whole micro-batches ({micro:,} tokens) of whole windows ({context:,}); change one of them.",
        )
