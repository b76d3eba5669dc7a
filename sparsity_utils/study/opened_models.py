"""Sections of a profile on models that are opened and not trained: notebooks 09, 10 and 13, and their speeds."""

from dataclasses import dataclass

from sparsity_utils.console import check
from sparsity_utils.neurons.input_rules import TRAINING_FREE

PRICE = 1.0  # p of the CETT-PPL-p% that notebook 09 looks at layers, positions, transfer and bfloat16 with


@dataclass(frozen=True)
class PretrainedConfig:
    """How a pretrained model is measured, on English and on Python source: notebook 09."""

    model: str = "smollm2"  # what `python -m sparsity_utils fetch smollm2` brings; or a folder, a GGUF file, owner/name
    english: str | None = None  # a file or folder of documents; None: prose of the pinned packages
    window: int = 256  # tokens; one of each document
    calibration_tokens: int = 2048  # of each text, on which thresholds are solved
    evaluation_tokens: int = 4096  # of each text, disjoint from them
    prices: tuple[float, ...] = (1.0, 10.0)  # p of CETT-PPL-p%

    def __post_init__(self) -> None:
        parts = (self.calibration_tokens, self.evaluation_tokens)
        check(
            self.window >= 2 and all(tokens > 0 and tokens % self.window == 0 for tokens in parts),
            f"pretrained.window is {self.window}; give at least 2, and pretrained.calibration_tokens and "
            f"evaluation_tokens that are multiples of it.",
        )
        check(
            PRICE in self.prices and all(0 < price <= 100 for price in self.prices),
            f"pretrained.prices is {list(self.prices)}; choose percentages up to 100, 1 among them.",
        )


@dataclass(frozen=True)
class CorrectionConfig:
    """How sparse drafts that the full model corrects are measured: notebook 13."""

    model: str = "smollm2"  # as in PretrainedConfig; the profile's own ReLU model is measured beside it
    documents: int = 4  # of each text
    prompt: int = 128  # tokens
    new_tokens: int = 48
    thresholds: tuple[float, ...] = (0.02, 0.1, 0.5)  # least probabilities of an accepted draft
    rounds: int = 5  # of each way of decoding that is timed
    timed_tokens: int = 24  # new ones of the one prompt after which ways are timed

    def __post_init__(self) -> None:
        for name, least in (("documents", 1), ("prompt", 2), ("new_tokens", 2), ("rounds", 1), ("timed_tokens", 2)):
            check(getattr(self, name) >= least, f"correction.{name} is {getattr(self, name)}; give {least} or more.")
        rising = list(self.thresholds) == sorted(set(self.thresholds)) and all(0 <= one <= 1 for one in self.thresholds)
        check(
            rising and 0.1 in self.thresholds,
            f"correction.thresholds is {list(self.thresholds)}; choose rising probabilities, 0.1 among them.",
        )


@dataclass(frozen=True)
class TrainingFreeConfig:
    """How training-free rules are compared: notebook 10. The pretrained model and its English are of `pretrained`."""

    window: int = 256  # tokens; one of each document
    calibration_tokens: int = 1024  # on which thresholds are set
    allocation_tokens: int = 512  # on which greedy allocation compares blocks
    evaluation_tokens: int = 4096
    decoder_tokens: int = 16384  # evaluation tokens of trained decoders
    sparsities: tuple[float, ...] = (0.5,)  # of the pretrained model
    decoder_sparsities: tuple[float, ...] = (0.25, 0.5, 0.625)
    prices: tuple[float, ...] = ()  # rises of perplexity in percent that sparsities are solved for
    greedy_step: float = 0.05  # of a block's weights

    def __post_init__(self) -> None:
        for name in ("calibration_tokens", "allocation_tokens", "evaluation_tokens"):
            tokens = getattr(self, name)
            check(
                self.window >= 2 and tokens > 0 and tokens % self.window == 0,
                f"training_free.{name} is {tokens} and training_free.window {self.window}; give a window of 2 tokens "
                f"or more, and a multiple of it.",
            )
        check(self.decoder_tokens > 0, f"training_free.decoder_tokens is {self.decoder_tokens}; it must be positive.")
        for name in ("sparsities", "decoder_sparsities"):
            shares = getattr(self, name)
            check(
                0.5 in shares and all(0 < share < 0.75 for share in shares),
                f"training_free.{name} is {list(shares)}; choose shares above 0 and below 0.75, 0.5 among them.",
            )
        prices = all(0 < price <= 100 for price in self.prices)
        check(prices, f"training_free.prices is {list(self.prices)}; choose percentages up to 100.")
        step = self.greedy_step
        check(0 < step <= 1, f"training_free.greedy_step is {step}; choose a share of a block's weights, at most 1.")


@dataclass(frozen=True)
class InputSpeedConfig:
    """How fast models decode whose linear maps skip inputs: the table input_speeds. Its text is as in `pretrained`."""

    models: tuple[str, ...] = ("smollm2", "silu")  # as pretrained.model; or an activation function: the study's own
    rules: tuple[str, ...] = ("teal", "wina", "cats", "cett")  # of neurons.input_rules, and cett
    sparsities: tuple[float, ...] = (0.25, 0.4, 0.5)  # of the inputs of each map; of cats of its neurons
    prices: tuple[float, ...] = (1.0, 5.0)  # percent of perplexity
    window: int = 256  # tokens; one of each document
    calibration_tokens: int = 1024  # on which thresholds are solved
    evaluation_tokens: int = 1024  # on which what they cost is measured
    prompt: int = 32  # tokens
    new_tokens: int = 32
    rounds: int = 5  # of each way; medians are quoted

    def __post_init__(self) -> None:
        check(len(self.models) > 0, "input_speeds.models is empty; name at least one model.")
        parts = (self.calibration_tokens, self.evaluation_tokens)
        check(
            self.window >= 2 and all(tokens > 0 and tokens % self.window == 0 for tokens in parts),
            f"input_speeds.window is {self.window}; give at least 2, and input_speeds.calibration_tokens and "
            f"evaluation_tokens that are multiples of it.",
        )
        known = (*TRAINING_FREE, "cett")
        for rule in self.rules:
            check(rule in known, f"input_speeds.rules has {rule!r}; choose from {', '.join(known)}.")
        check(all(0 < share < 1 for share in self.sparsities), "input_speeds.sparsities are shares above 0, below 1.")
        check(all(0 < price <= 100 for price in self.prices), "input_speeds.prices are percentages up to 100.")
        for name, least in (("prompt", 1), ("new_tokens", 2), ("rounds", 1)):
            value = getattr(self, name)
            check(value >= least, f"input_speeds.{name} is {value}; at least {least} is needed.")
