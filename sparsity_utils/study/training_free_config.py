"""The section `training_free` of a profile."""

from dataclasses import dataclass

from sparsity_utils.console import check


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
