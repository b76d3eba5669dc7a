"""Which neurons, or inputs of linear maps, are inactive under a rule and its thresholds.

For neurons: the set D of arXiv 2411.02335, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from sparsity_utils.console import check
from sparsity_utils.neurons.find import FFN, widened
from sparsity_utils.neurons.input_rules import INPUT_RULES
from sparsity_utils.neurons.rules import RULES

if TYPE_CHECKING:
    from sparsity_utils.neurons.linears import LinearMap


@dataclass(frozen=True)
class Thresholds:
    """A rule and its thresholds: one of `rules.RULES` and that of each layer, or of `INPUT_RULES` and of each map.

    A neuron that is exactly zero (s_i, for "cett" h_i) is in D whatever the threshold. Comparisons are made in
    float32 or wider.
    """

    rule: str
    values: tuple[float, ...]  # one per layer, first layer first; or per linear map, in the order of `find_linears`

    def __post_init__(self) -> None:
        known = RULES | INPUT_RULES
        check(self.rule in known, f"The threshold rule is {self.rule!r}; choose one of {', '.join(known)}.")
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

    def active_inputs(self, linear: LinearMap, x: Tensor) -> Tensor:
        """True where an input of `linear` is kept, bool; `x` and the result are (..., in)."""
        check(self.rule in INPUT_RULES, f"The rule {self.rule!r} is on neurons; use sparse_neurons, not sparse_inputs.")
        return INPUT_RULES[self.rule].active(linear, widened(x).abs(), self.values[linear.index])

    def check_on_neurons(self) -> None:
        """Raises `InputError` when the rule is on the inputs of linear maps."""
        sentence = f"The rule {self.rule!r} is on inputs of linear maps, not on neurons: only sparse_inputs takes it."
        check(self.rule in RULES, sentence)


def magnitudes(ffn: FFN, h: Tensor) -> Tensor:
    """||n_i||_2 = |h_i| * ||W_out[:, i]||_2 in float32 or wider, (..., d_ff)."""
    return widened(h).abs() * ffn.column_norms()
