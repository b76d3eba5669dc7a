"""Which neurons are inactive under a rule and one threshold per layer: the set D of arXiv 2411.02335, section 3."""

from dataclasses import dataclass

from torch import Tensor

from sparsity_utils.console import check
from sparsity_utils.neurons.find import FFN, widened
from sparsity_utils.neurons.rules import RULES


@dataclass(frozen=True)
class Thresholds:
    """A rule, one of `rules.RULES`, and its threshold in each layer.

    A neuron that is exactly zero (s_i, for "cett" h_i) is in D whatever the threshold. Comparisons are made in
    float32 or wider.
    """

    rule: str
    values: tuple[float, ...]  # one entry per layer, first layer first

    def __post_init__(self) -> None:
        check(self.rule in RULES, f"The threshold rule is {self.rule!r}; choose one of {', '.join(RULES)}.")
        possible = all(value >= 0 for value in self.values)
        check(possible, f"The thresholds are {self.values}; none may be negative or NaN.")

    def active(self, ffn: FFN, s: Tensor, h: Tensor) -> Tensor:
        """True where a neuron is active, False where it is in D.

        Args:
            ffn: the FFN that `s` and `h`, (..., d_ff), were seen in.

        Returns: bool, (..., d_ff).
        """
        rule = RULES[self.rule]
        compared = s if rule.decided_on == "gate" else h
        return rule.active(ffn, widened(compared).abs(), self.values[ffn.layer])


def magnitudes(ffn: FFN, h: Tensor) -> Tensor:
    """||n_i||_2 = |h_i| * ||W_out[:, i]||_2 in float32 or wider, (..., d_ff)."""
    return widened(h).abs() * ffn.column_norms()
