"""How small networks on images of digits are trained and tested: the section `digits` of a profile."""

from dataclasses import dataclass

from sparsity_utils.console import check


@dataclass(frozen=True)
class DigitsConfig:
    """How top-k activation is compared with all neurons on images of digits: the table digits."""

    seeds: int = 20  # of each arm: 0, 1, 2, ...; both arms have the same ones
    tuning_seeds: int = 3  # the first of them; their mean validation loss chooses the learning rate of an arm
    rates: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01)  # learning rates to choose from
    epochs: int = 40  # passes of the two-layer network over the training images
    transformer_epochs: int = 15

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("tuning_seeds", 1), ("epochs", 1), ("transformer_epochs", 1)):
            check(getattr(self, name) >= least, f"digits.{name} is {getattr(self, name)}; at least {least} is needed.")
        check(
            self.tuning_seeds <= self.seeds,
            f"digits.tuning_seeds is {self.tuning_seeds} of {self.seeds} seeds; give at most digits.seeds.",
        )
        check(
            len(self.rates) > 0 and all(0 < rate < 1 for rate in self.rates),
            f"digits.rates is {list(self.rates)}; name at least one learning rate, each above 0 and below 1.",
        )
