"""The rules that decide which neurons are active. Each rule is one class, which holds all that is known of it.

For each token and neuron a rule compares one size, |s_i| or |h_i| (see `neurons.find`), with a limit. The inactive
neurons are the set D of arXiv 2411.02335, section 3. To add a rule, write its class and name it in `RULES`.
Nothing here imports torch, so that the command line, whose options are these rules and knobs, answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from sparsity_utils.console import InputError, check

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_utils.neurons.find import FFN


class Knob(NamedTuple):
    """The number that a rule is set with, such as k of Top-k."""

    name: str  # of the keyword argument and, behind two dashes, of the option
    kind: type
    about: str
    default: float | None = None  # None: it must be given


class Rule:
    """What the package asks of a rule. `value` is its knob's or, where thresholds are solved, that of a layer."""

    name: str
    label: str  # in figures
    knob: Knob | None = None
    decided_on = "gate"  # what is compared, named as in `kernels`: "gate" |s_i|, "neuron" |h_i|
    solved = False  # True: each layer's threshold is solved on calibration text for a CETT

    def active(self, ffn: FFN, sizes: Tensor, value: float) -> Tensor:
        """True where a neuron is active, bool; a size of exactly zero never is.

        Args:
            sizes: |s| or |h|, as `decided_on` says, float32 or wider, (..., d_ff).
        """
        raise NotImplementedError

    def limit(self, ffn: FFN, value: float) -> Tensor | float:
        """The size from which on a neuron is active: one number for all, or (d_ff,). Kernels compare with it.

        Raises `InputError` where it differs from token to token.
        """
        sentence = f"The kernels have no rule {self.name!r}, whose limit differs from token to token: use another rule."
        raise InputError(sentence)

    def check_value(self, value: float, d_ff: float = math.inf) -> None:
        """Raises `InputError` unless the knob can be set to `value`, in FFNs of at least `d_ff` neurons."""

    def setting(self, given: Mapping[str, float | None]) -> dict[str, float]:
        """Name and value of the knob, from the knobs `given` (None: not given); empty where the rule has none.

        Raises `InputError` when the knob is missing, or that of another rule is given.
        """
        own = self.knob.name if self.knob else None
        for name, value in given.items():
            sentence = f"{name} was given, and metric {self.name!r} does not use it: leave {name} out."
            check(value is None or name == own, sentence)
        if own is None:
            return {}
        value = self.knob.default if given.get(own) is None else given[own]
        check(value is not None, f"Metric {self.name!r} needs {own}: give {own}=..., on the command line --{own}.")
        return {own: value}

    def map_share(self, role: str, active: float, nonzero: float) -> float:
        """Share of the weights of one linear map of a block that one token needs, `role` as in `neurons.linears`.

        W_gate is read in full, since it decides, and all of attention. A rule on the gate reads W_in, "up", for active
        neurons. A rule on the neuron's output reads it wherever s is not zero, to know h. Of W_out, "down", the active
        columns are read.

        Args:
            active: share of the neurons that are active, or in rules on inputs share of the map's inputs.
            nonzero: share of the neurons with s != 0.
        """
        return {"up": nonzero if self.decided_on == "neuron" else active, "down": active}.get(role, 1.0)

    def weights_read(self, activation_ratio: float, nonzero_share: float) -> float:
        """Share of the weights of a gated FFN, three matrices of one size, that one token needs; 1 if dense."""
        return sum(self.map_share(role, activation_ratio, nonzero_share) for role in ("gate", "up", "down")) / 3


def k_largest(sizes: Tensor, k: int) -> Tensor:
    """True at the k largest of each row, bool; ties with the k-th stay, zeros do not. Both (..., n), `sizes` >= 0."""
    from kernels.selection import kth_largest

    if k < 1:
        return sizes < 0  # none
    return (sizes >= kth_largest(sizes, min(k, sizes.shape[-1]))) & (sizes != 0)


class NonZero(Rule):
    """Active: s_i != 0. The value is not used."""

    name, label = "relu", "non-zero"

    def active(self, ffn: FFN, sizes: Tensor, value: float) -> Tensor:
        return sizes != 0

    def limit(self, ffn: FFN, value: float) -> float:
        return 0.0


class TopK(Rule):
    """Active: the k largest |s_i|. Ties with the k-th stay, so that the order of the neurons does not matter."""

    name, label = "top-k", "Top-k"
    knob = Knob("k", int, "neurons kept per token and layer")

    def active(self, ffn: FFN, sizes: Tensor, value: float) -> Tensor:
        return k_largest(sizes, int(value))

    def check_value(self, value: float, d_ff: float = math.inf) -> None:
        possible = 1 <= value <= d_ff and int(value) == value
        check(possible, f"{self.knob.name} is {value}; choose a whole number from 1 to d_ff = {d_ff}.")


class TopKNorm(TopK):
    """Active: the k largest ||n_i||_2 = |h_i| * ||W_out[:, i]||_2: Top-k with the score of CETT."""

    name, label = "top-k-norm", "Top-k of ‖n‖"
    knob = Knob("kept", int, "neurons kept per token and layer, by the norm of what they write")
    decided_on = "neuron"

    def active(self, ffn: FFN, sizes: Tensor, value: float) -> Tensor:
        return super().active(ffn, sizes * ffn.column_norms(), value)


class Fat(Rule):
    """Active: |s_i| >= eps."""

    name, label = "fat", "FAT-ε"
    knob = Knob("eps", float, "threshold on the size of a gate's output")

    def active(self, ffn: FFN, sizes: Tensor, value: float) -> Tensor:
        return (sizes >= value) & (sizes != 0)

    def limit(self, ffn: FFN, value: float) -> float:
        return value

    def check_value(self, value: float, d_ff: float = math.inf) -> None:
        check(0 <= value < math.inf, f"eps is {value}; it must be a number, zero or positive.")


class Cett(Rule):
    """Active: ||n_i||_2 = |h_i| * ||W_out[:, i]||_2 >= value, solved for a relative error of the layer's output."""

    name, label = "cett", "CETT"
    knob = Knob("cett", float, "accepted relative error of a layer's output, 0 to 1")
    decided_on, solved = "neuron", True

    def active(self, ffn: FFN, sizes: Tensor, value: float) -> Tensor:
        return sizes >= self.limit(ffn, value)

    def limit(self, ffn: FFN, value: float) -> Tensor:
        norms = ffn.column_norms()
        smallest = norms.new_zeros(()).nextafter(norms.new_ones(()))  # above exact zeros, whatever the value
        return (value / norms).nan_to_num(nan=0.0, posinf=math.inf).clamp(min=smallest)

    def check_value(self, value: float, d_ff: float = math.inf) -> None:
        check(0 <= value <= 1, f"cett is {value}; choose 0 to 1.")


class CettPpl(Cett):
    """CETT at the value that raises perplexity by p%. Its thresholds are of the rule `Cett`."""

    name, label = "cett-ppl", "CETT-PPL"
    knob = Knob("p", float, "accepted rise of perplexity in percent", default=1.0)

    def check_value(self, value: float, d_ff: float = math.inf) -> None:
        check(0 < value <= 100, f"p is {value}; choose a rise of perplexity above 0 and at most 100 percent.")


RULES = {rule.name: rule for rule in (NonZero(), TopK(), TopKNorm(), Fat(), Cett())}  # of thresholds
METRICS = RULES | {CettPpl.name: CettPpl()}  # of measurements


def metric_named(name: str) -> Rule:
    """The rule of a metric; raises `InputError` when there is none of this name."""
    check(name in METRICS, f"The metric is {name!r}; choose one of {', '.join(METRICS)}.")
    return METRICS[name]
