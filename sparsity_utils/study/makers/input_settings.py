"""The settings whose decoding speed is measured: thresholds of each rule at a sparsity or at a price in perplexity.

Thresholds are solved on calibration text, what they cost is measured on evaluation text, and both are kept as pieces.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd
from transformers import PreTrainedModel

from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.metrics import measure_sparsity
from sparsity_utils.sparsity.rule_report import RuleReport
from sparsity_utils.sparsity.training_free import TrainingFree
from sparsity_utils.study.makers.pieces import Frames, Pieces
from sparsity_utils.study.makers.pretrained import Text
from sparsity_utils.study.opened_models import InputSpeedConfig

SOLVING = 8  # passes over the calibration text that a price takes; a sparsity takes one


@dataclass(frozen=True)
class Setting:
    """Thresholds of one rule, and what they cost on the evaluation text."""

    rule: str
    setting: str  # a sparsity, "50%", or a price, "1% of perplexity"
    thresholds: Thresholds
    sparsity: float  # share of the weights of the linear maps that a token does not read
    ppl_ratio: float


class Calibrated:
    """The settings of one model, solved on its calibration text and kept as pieces."""

    def __init__(self, model: PreTrainedModel, text: Text, settings: InputSpeedConfig, pieces: Pieces) -> None:
        self.model, self.text, self.settings, self.pieces = model, text, settings, pieces
        self.report = TrainingFree(model, text.calibration, text.evaluation)

    def __iter__(self) -> Iterator[Setting]:
        for rule in self.settings.rules:
            for sparsity in self.settings.sparsities if rule != "cett" else ():
                yield self._kept(rule, f"{100 * sparsity:g}%", 1, partial(self._at, rule, sparsity))
            for price in self.settings.prices:
                name = f"{price:g}% of perplexity"
                yield self._kept(rule, name, SOLVING, partial(self._at_price, rule, price))

    def _at(self, rule: str, sparsity: float) -> RuleReport:
        return self.report.at(rule, self.report.nearest(rule, sparsity))

    def _at_price(self, rule: str, price: float) -> RuleReport:
        if rule != "cett":
            return self.report.at_perplexity(rule, price)
        found = measure_sparsity(self.model, self.text.evaluation, "cett-ppl", price, self.text.calibration)
        return self.report.evaluated(found.thresholds)

    def _kept(self, rule: str, setting: str, passes: int, measure: Callable[[], RuleReport]) -> Setting:
        """The setting, from its piece; `passes` over the calibration text are expected to solve it."""

        def frames() -> Frames:
            report = measure()
            about = {"rule": report.thresholds.rule, "sparsity": report.sparsity, "ppl_ratio": report.ppl_ratio}
            return {"thresholds": pd.DataFrame({"value": report.thresholds.values}), "report": pd.DataFrame([about])}

        calibration, evaluation = self.text.tokens
        name = f"thresholds {rule} {setting}".replace(" ", "-")
        kept = self.pieces.kept(name, passes * calibration + evaluation, frames)
        about = kept["report"].iloc[0]
        thresholds = Thresholds(about["rule"], tuple(map(float, kept["thresholds"]["value"])))
        return Setting(rule, setting, thresholds, float(about["sparsity"]), float(about["ppl_ratio"]))
