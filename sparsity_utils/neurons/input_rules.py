"""The training-free rules that decide which inputs of a linear map are kept. Each rule is one class, as in `rules`.

A rule gives each input x_j of a map W a score, |x_j| alone or times a norm of column j. It keeps the inputs whose score
is above a threshold of the map, or the k largest of each token. Its knob is the sparsity, the share of a map's inputs
that is skipped; `Thresholds` holds the threshold, or k, of each map. CATS judges the gates of the FFN instead of
inputs. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sparsity_utils.console import check
from sparsity_utils.neurons.rules import Fat, Knob, Rule, k_largest

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_utils.neurons.linears import LinearMap

SPARSITY = Knob("sparsity", float, "share of the inputs that is skipped, 0 to 1")
WHOLE = 0.01  # inputs: sparsity * width counts as whole if so near, since sparsities are told with six digits


class InputRule(Rule):
    """Kept: every input whose score is above t, the threshold of the map; an exact zero never is."""

    knob = SPARSITY
    decided_on = "input"
    norm = 0  # the score is |x_j| ||W[:, j]|| in this norm; 0: |x_j| alone
    normed: tuple[str, ...] | None = None  # the maps whose score has that norm, by role; None: all
    per_token = False  # True: the number of inputs kept is fixed for each token, and no text is needed to set it

    def scores(self, linear: LinearMap, sizes: Tensor) -> Tensor:
        """The score of each input, (..., in). `sizes`: |x|, float32 or wider."""
        if not self.norm or (self.normed is not None and linear.role not in self.normed):
            return sizes
        return sizes * linear.column_norms(self.norm)

    def active(self, linear: LinearMap, sizes: Tensor, value: float) -> Tensor:  # type: ignore[override]
        return self.scores(linear, sizes) > value

    def value(self, linear: LinearMap, sparsity: float, scores: Tensor | None) -> float:
        """What `active` takes to skip `sparsity` of the inputs of `linear`.

        Args:
            scores: those of the map on calibration tokens, sorted, (n,). The result is their empirical quantile:
                round(sparsity * n) of them are not above it, ties aside. None will do where `per_token`.
        """
        skipped = round(sparsity * len(scores))
        if skipped == len(scores):
            return math.inf
        return float(scores[skipped - 1]) if skipped else 0.0

    def check_value(self, value: float, d_ff: float = math.inf) -> None:
        check(0 <= value <= 1, f"sparsity is {value}; choose a share of the inputs, 0 to 1.")

    def check_sparsity(self, sparsity: float, widths: Iterable[int]) -> None:
        """Raises `InputError` unless every map can skip `sparsity` of its inputs. `widths`: their numbers of inputs."""
        self.check_value(sparsity)

    def nearest(self, sparsity: float, widths: Iterable[int]) -> float:
        """The sparsity nearest to this one that maps of such `widths` can all meet."""
        return sparsity

    def map_share(self, role: str, active: float, nonzero: float = 1.0) -> float:
        return active


class TopInputs(InputRule):
    """Kept: the k inputs of the largest scores, k being the same for each token. Ties with the k-th stay."""

    per_token = True

    def active(self, linear: LinearMap, sizes: Tensor, value: float) -> Tensor:  # type: ignore[override]
        return k_largest(self.scores(linear, sizes), int(value))

    def value(self, linear: LinearMap, sparsity: float, scores: Tensor | None) -> float:
        return round((1 - sparsity) * linear.inputs)

    def check_sparsity(self, sparsity: float, widths: Iterable[int]) -> None:
        self.check_value(sparsity)
        widths = sorted(set(widths))
        met = all(abs(sparsity * width - round(sparsity * width)) <= WHOLE for width in widths)
        check(
            met,
            f"No whole number of {' and of '.join(map(str, widths))} inputs is a share of {sparsity:g}, which "
            f"{self.name!r} would have each token skip: the nearest share that is one is "
            f"{self.nearest(sparsity, widths):.6g}.",
        )

    def nearest(self, sparsity: float, widths: Iterable[int]) -> float:
        parts = math.gcd(*widths)
        return round(sparsity * parts) / parts


class Teal(InputRule):
    """|x_j| > t: TEAL, arXiv 2408.14690."""

    name, label = "teal", "TEAL"


class TealTopK(TopInputs):
    """The k largest |x_j|: TEAL's score with WINA's way to choose, so that the two can be told apart."""

    name, label = "teal-top-k", "TEAL, top-k"


class WinaThreshold(InputRule):
    """|x_j| ||W[:, j]||_2 > t: WINA's score as R-Sparse applies it, arXiv 2504.19449."""

    name, label, norm = "wina-threshold", "WINA, threshold", 2


class Wina(TopInputs):
    """The k largest |x_j| ||W[:, j]||_2: WINA as printed, arXiv 2505.19427v2, section 3."""

    name, label, norm = "wina", "WINA", 2


class WinaReleased(TopInputs):
    """WINA as its published code computes it: the norm counts in k and gate alone, elsewhere it is the k largest |x_j|.

    That code takes the norm of a fused map whole; here q, k, v, gate and up are told apart in fused maps too.
    """

    name, label, norm, normed = "wina-released", "WINA, released", 2, ("k", "gate")


class Was(InputRule):
    """|x_j| ||W[:, j]||_1 > t: the score of WAS (EMNLP 2025)."""

    name, label, norm = "was", "WAS", 1


class Cats(Fat):
    """|s_i| >= eps, eps solved in each layer for one sparsity: CATS, arXiv 2404.08763.

    Its thresholds are of the rule `Fat`. It skips rows of up and columns of down, and no part of attention or gate.
    """

    name, label, knob = "cats", "CATS", SPARSITY

    def check_value(self, value: float, d_ff: float = math.inf) -> None:
        check(0 <= value <= 1, f"sparsity is {value}; choose a share of the neurons, 0 to 1.")


# By name: the rules on inputs, whose `Thresholds` have a value for each linear map, and with them all that can be
# measured without training: CATS too, whose thresholds are of `Fat`, one for each layer.
INPUT_RULES = {rule.name: rule for rule in (Teal(), TealTopK(), WinaThreshold(), Wina(), WinaReleased(), Was())}
TRAINING_FREE = {**INPUT_RULES, Cats.name: Cats()}
