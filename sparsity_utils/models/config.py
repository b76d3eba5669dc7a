"""The settings of a model and of its training; importing this loads nothing heavy."""

from dataclasses import dataclass

from sparsity_utils.console import check

ACTIVATIONS = {"relu": "ReLU", "silu": "SiLU", "gelu": "GELU", "relu2": "ReLU²"}  # as configured -> as written
DTYPES = ("float32", "bfloat16", "float16")  # of a model's weights, named as in torch
LAST_CHECKPOINTS = 5  # stable ones solved together by the stabilised protocol (arXiv 2411.02335, appendix E)
FFNS = ("gated", "plain")  # h = act(W_gate x) * (W_up x); h = act(W_gate x)
PARTS = 16  # what shares of kept inputs are told in: the same share at every width that 16 divides
RESCALES = ("none", "ratio", "unit")  # of the inputs that are kept, see `input_training`
TARGETS = ("next", "uniform", "unigram", "function")  # what a token is trained to predict, see `text.random_data`
TEXTS = ("corpus", "random")
RANDOM_TARGETS = "random_targets"  # true in the config.json of a model that was trained on random data
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
    ffn: str = "gated"  # or "plain", without a second factor
    keep: int = PARTS  # sixteenths of the inputs of every linear map that it reads, those of the largest size
    block: int = 0  # neighbouring inputs among which they are chosen; 0: all inputs of the map
    straight_through: bool = True  # whether inputs that are not read get the gradient that they would have had
    rescale: str = "none"  # how the size of what is read is made up for
    quantised: bool = False  # inputs of 8 bits, weights of -1, 0 and 1 times a scale

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
        self._check_variant(round(neurons))

    def _check_variant(self, neurons: int) -> None:
        """Raise InputError for a way to train that this shape does not have."""
        check(self.ffn in FFNS, f"model.ffn is {self.ffn!r}; choose one of {', '.join(FFNS)}.")
        check(self.rescale in RESCALES, f"model.rescale is {self.rescale!r}; choose one of {', '.join(RESCALES)}.")
        check(
            1 <= self.keep <= PARTS,
            f"model.keep is {self.keep}; choose 1 to {PARTS}, the sixteenths of its inputs that a map reads.",
        )
        check(self.block >= 0, f"model.block is {self.block}; give a number of inputs, or 0 for all of a map.")
        check(self.keep < PARTS or not self.block, f"model.block is {self.block}, but model.keep {PARTS} reads all.")
        check(
            self.keep < PARTS or (self.rescale == "none" and self.straight_through),
            f"model.rescale is {self.rescale} and model.straight_through {self.straight_through}, but model.keep "
            f"{PARTS} reads all, so that neither would do anything; leave them out.",
        )
        for width in (self.d_model, neurons) if self.keep < PARTS else ():
            group = self.block or width
            check(width % group == 0, f"model.block {group} does not divide the {width} inputs of a map; change one.")
            check(
                group * self.keep % PARTS == 0,
                f"model.keep {self.keep} is no whole number of {group} inputs, of which a sixteenth is "
                f"{group / PARTS:g}; choose another share or width.",
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
    l1: float = 0.0  # times the mean over layers and tokens of sum |h_i| is added to the loss (arXiv 2603.23198)
    text: str = "corpus"  # or "random": every token drawn alone, as often as in the corpus
    targets: str = "next"  # what is predicted; others than the next token are random
    distinct_tokens: int | None = None  # of the text, read over and over; None: all of a corpus

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
        self._check_variant()

    @property
    def random(self) -> bool:
        """Whether text or targets are random, so that a loss on the corpus says nothing of the model."""
        return self.text != "corpus" or self.targets != "next"

    def _check_variant(self) -> None:
        """Raise InputError for a penalty or data that cannot be trained with."""
        check(self.l1 >= 0, f"train.l1 is {self.l1}; it may not be negative.")
        check(
            not self.l1 or (not self.recompute and self.devices == 1),
            "train.l1 penalises activations as they are computed, on one device and without train.recompute; drop one.",
        )
        check(self.text in TEXTS, f"train.text is {self.text!r}; choose one of {', '.join(TEXTS)}.")
        check(self.targets in TARGETS, f"train.targets is {self.targets!r}; choose one of {', '.join(TARGETS)}.")
        check(
            not (self.text == "random" and self.targets == "next"),
            "train.text random has no next token that could be learnt; choose other train.targets.",
        )
        check(
            not self.random or self.distinct_tokens is not None,
            "Random text and targets are drawn before training; say of how many tokens in train.distinct_tokens.",
        )
        check(
            self.distinct_tokens is None or self.distinct_tokens >= self.batch_tokens,
            f"train.distinct_tokens is {self.distinct_tokens}, less than a batch of {self.batch_tokens}.",
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
