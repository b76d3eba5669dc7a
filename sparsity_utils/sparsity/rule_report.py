"""What one training-free rule costs on the evaluation text, and what it saves."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sparsity_utils.console import check
from sparsity_utils.neurons.input_rules import INPUT_RULES
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.down_masks import DownMask
from sparsity_utils.sparsity.evaluation import interval

COVERAGE = (2.5, 97.5)  # percentiles: a 95% interval


@dataclass(frozen=True, eq=False)
class RuleReport:
    """What one rule costs on the evaluation text, and what it saves. Losses are in nats per predicted token."""

    rule: str
    maps_weights: int  # weights of the linear maps of all blocks
    maps_read: float  # of these, read per token, mean over all real tokens
    rotation_weights: int  # read per token beside them, where vectors are rotated
    head_weights: int  # of the output head, read per token
    embedding_weights: int  # of one row of the embeddings, read per token
    loss_dense: float
    loss_sparse: float
    accuracy_dense: float  # share of next tokens that are the most likely one
    accuracy_sparse: float
    tokens: int  # predicted ones
    documents: int
    by_document: pd.DataFrame  # sums over each document, as `predictions.by_document` gives them
    excess_replicates: np.ndarray  # loss_sparse - loss_dense in each bootstrap replicate, (REPLICATES,)
    maps: pd.DataFrame  # one row per linear map: layer, role, weights, share read
    thresholds: Thresholds | DownMask
    calibrated_sparsity: float | None = None  # at which the thresholds were set; None: they were given

    @property
    def sparsity(self) -> float:
        """Realised: share of the weights of the linear maps that a token does not read."""
        return 1 - self.maps_read / self.maps_weights

    @property
    def skipped(self) -> float:
        """Realised: share that is skipped of what the rule judges, inputs of all maps by weight, or neurons."""
        return skipped(self.maps, self.rule)

    @property
    def weights_read(self) -> float:
        """(maps read + rotations) / weights of the maps."""
        return (self.maps_read + self.rotation_weights) / self.maps_weights

    @property
    def model_read(self) -> float:
        """The same of the whole model, with the head and one row of the embeddings on both sides."""
        others = self.head_weights + self.embedding_weights
        return (self.maps_read + self.rotation_weights + others) / (self.maps_weights + others)

    @property
    def agreement(self) -> float:
        """Share of tokens for which the sparse model finds the same token likeliest as the dense one."""
        return float(self.by_document["agreed"].sum()) / self.tokens

    @property
    def excess(self) -> float:
        """loss_sparse - loss_dense."""
        return self.loss_sparse - self.loss_dense

    @property
    def excess_interval(self) -> tuple[float, float]:
        """95% interval of the excess, from a bootstrap over documents; NaN where there is only one."""
        return interval(self.excess_replicates, self.documents, COVERAGE)

    @property
    def ppl_ratio(self) -> float:
        """exp(excess)."""
        return math.exp(min(self.excess, 700.0))

    def compared(self, other: "RuleReport") -> tuple[float, float, float]:
        """excess / excess of `other` - 1, and its 95% interval from the same resampled documents for both.

        Raises `InputError` when `other` is of other text.
        """
        same = (self.tokens, self.documents, self.loss_dense) == (other.tokens, other.documents, other.loss_dense)
        check(same, "The two reports are of different text or models; compare reports of one `TrainingFree`.")
        with np.errstate(invalid="ignore", divide="ignore"):
            replicates = self.excess_replicates / other.excess_replicates - 1
        return (
            self.excess / other.excess - 1 if other.excess else math.nan,
            *interval(replicates, self.documents, COVERAGE),
        )


def skipped(maps: pd.DataFrame, rule: str) -> float:
    """`RuleReport.skipped` of a rule, from the weights and the share read of each map."""
    judged = maps if rule in INPUT_RULES else maps[maps["role"] == "down"]
    return 1 - float((judged["weights"] * judged["share_read"]).sum() / judged["weights"].sum())
