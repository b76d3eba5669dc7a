"""Top-k activation on images of digits: accuracy with noise in labels or pixels, and calibration: the table digits.

Small versions of Table 1 of arXiv 2210.06313, which compares vision transformers. Both arms of a seed have the same
split, noise, initialisation and order of batches; the learning rate is chosen for each arm by validation loss. Since
each seed splits the images anew, an image that validates one seed may test another; a rate is one of a few for all
seeds, so little of the test reaches it, and of both arms alike. Everything is computed in float32 on the CPU.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsity_utils.console import progress
from sparsity_utils.study.digits_config import DigitsConfig
from sparsity_utils.study.makers.digits_images import TRAINING, Parts, generator, noisy_tests, parts_of
from sparsity_utils.study.makers.digits_models import ARMS, SHAPES, Parameters, initial, outputs
from sparsity_utils.study.makers.maker import Asked, Maker
from sparsity_utils.study.makers.pieces import Frames, Pieces
from sparsity_utils.study.plan import DIGITS
from sparsity_utils.study.profiles import Profile
from sparsity_utils.study.runs import digest

VERSION = 1  # raise it when the same settings would measure something else
LABEL_NOISE = (0.0, 0.4, 0.8)  # shares of the labels that are redrawn
BATCHES = {"mlp": 30, "transformer": 10}  # images; the transformer makes fewer passes, so that it needs more steps each
AT_ONCE = 25  # images of each seed that are tested at once, which bounds memory
BINS = 10  # of the confidence, from 0 to 1


@dataclass(frozen=True)
class Condition:
    """What the runs of all seeds have in common."""

    model: str
    arm: str
    label_noise: float

    @property
    def name(self) -> str:
        return f"{self.model}-{self.arm}-{100 * self.label_noise:g}"


def digits(settings: DigitsConfig, folder: Path) -> pd.DataFrame:
    """The table digits (results/columns.csv): a row for each network, arm, label noise and seed.

    Finished conditions are kept in `folder`, so that a killed measurement goes on where it was.
    """
    pieces = Pieces(folder / digest({**asdict(settings), "version": VERSION}), "networks on digits", 0.0)
    conditions = [Condition(*one) for one in product(SHAPES, ARMS, LABEL_NOISE)]
    tables = []
    for condition in progress(conditions, "digits", len(conditions)):
        measure = partial(_measured, condition, settings)
        tables.append(pieces.kept(condition.name, 1, measure)["runs"])
    return pd.concat(tables, ignore_index=True)


def _measured(condition: Condition, settings: DigitsConfig) -> Frames:
    seeds = range(settings.seeds)
    rate = chosen_rate(condition, settings)
    parts = parts_of(seeds, condition.label_noise)
    parameters = trained(condition, parts, rate, settings)
    about = {**asdict(condition), "seed": parts.seeds, "learning_rate": rate}
    return {"runs": pd.DataFrame({**about, **tested(condition, parameters, parts)})}


def chosen_rate(condition: Condition, settings: DigitsConfig) -> float:
    """The rate of the lowest validation loss, mean over the tuning seeds; one whose loss is not finite is never it."""
    parts = parts_of(range(settings.tuning_seeds), condition.label_noise)
    losses = {}
    for rate in settings.rates:
        loss = validation_losses(condition, trained(condition, parts, rate, settings), parts).mean().item()
        losses[rate] = loss if math.isfinite(loss) else math.inf
    return min(losses, key=lambda rate: losses[rate])


def trained(condition: Condition, parts: Parts, rate: float, settings: DigitsConfig) -> Parameters:
    """The parameters of each seed after training with Adam, whose rate falls from `rate` to zero along a line."""
    parameters = initial(condition.model, parts.seeds)
    epochs = settings.epochs if condition.model == "mlp" else settings.transformer_epochs
    size = BATCHES[condition.model]
    optimizer = torch.optim.Adam(parameters.values(), lr=rate)
    rows = torch.arange(len(parts.seeds))[:, None]  # (seeds, 1)
    batches = [batch for order in _orders(parts.seeds, epochs) for batch in order.split(size, dim=1)]
    for step, batch in enumerate(batches):  # (seeds, size)
        optimizer.param_groups[0]["lr"] = rate * (1 - step / len(batches))
        logits, _ = outputs(condition.model, parameters, parts.training[rows, batch], condition.arm)
        # The sum over seeds of each one's mean loss: no seed's gradient depends on how many there are.
        loss = _losses(logits, parts.training_labels[rows, batch]).mean(dim=1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in parameters.items()}


def _orders(seeds: Sequence[int], epochs: int) -> list[Tensor]:
    """The order of the training images in each epoch, (seeds, TRAINING)."""
    randoms = [generator(seed, "order") for seed in seeds]
    return [torch.from_numpy(np.stack([one.permutation(TRAINING) for one in randoms])) for _ in range(epochs)]


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (seeds, images)


def validation_losses(condition: Condition, parameters: Parameters, parts: Parts) -> Tensor:
    """Mean loss on the validation images with their noisy labels, (seeds,)."""
    return _losses(predicted(condition, parameters, parts.validation), parts.validation_labels).mean(dim=1)


@torch.no_grad()
def predicted(condition: Condition, parameters: Parameters, images: Tensor) -> Tensor:
    """Logits (seeds, images, 10)."""
    some = images.split(AT_ONCE, dim=1)
    return torch.cat([outputs(condition.model, parameters, one, condition.arm)[0] for one in some], dim=1)


@torch.no_grad()
def nonzero_shares(condition: Condition, parameters: Parameters, images: Tensor) -> Tensor:
    """Share of the neurons that are not zero, mean over images and tokens, (seeds,)."""
    shares = [
        (outputs(condition.model, parameters, one, condition.arm)[1] > 0).double().mean(dim=(1, 2)) * one.shape[1]
        for one in images.split(AT_ONCE, dim=1)
    ]
    return torch.stack(shares).sum(dim=0) / images.shape[1]


def tested(condition: Condition, parameters: Parameters, parts: Parts) -> dict[str, Any]:
    """The measured columns of the table, one value for each seed.

    Pixel noise is for networks that were trained on true labels; for others its columns are empty (NaN).
    """
    logits = predicted(condition, parameters, parts.test)
    found = {
        "validation_loss": validation_losses(condition, parameters, parts),
        "accuracy": _accuracy(logits, parts.test_labels),
    }
    for kind, levels in noisy_tests(parts.seeds).items():
        accuracy = torch.full((len(parts.seeds),), math.nan)
        if condition.label_noise == 0:
            each = [_accuracy(predicted(condition, parameters, one), parts.test_labels) for one in levels]
            accuracy = torch.stack(each).mean(dim=0)
        found[f"accuracy_{kind}"] = accuracy
    gaps = gap_sums(logits.softmax(dim=-1), parts.test_labels)
    columns = {name: value.tolist() for name, value in found.items()}
    return {
        **columns,
        "images": parts.test.shape[1],
        **{f"gap_{number}": gap.tolist() for number, gap in enumerate(gaps.unbind(dim=1))},
        "nonzero_share": nonzero_shares(condition, parameters, parts.test).tolist(),
    }


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=-1) == labels).double().mean(dim=1)  # (seeds,)


def gap_sums(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Sum over the images in each bin of confidence of (confidence - 1 if correct else 0), (seeds, BINS).

    The confidence is the largest probability; bin b holds those from b / BINS up to (b + 1) / BINS, the last one 1 too.
    The expected calibration error of any union of seeds is sum over bins |sum of gaps| / images.

    Args:
        probabilities: (seeds, images, 10). labels: (seeds, images).
    """
    confidence, predicted_label = probabilities.double().max(dim=-1)
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = confidence - (predicted_label == labels).double()
    return torch.zeros(len(gap), BINS, dtype=torch.float64).scatter_add(1, place, gap)


def _tables(study: Asked) -> Frames:
    return {DIGITS: digits(study.profile.digits, study.output / DIGITS)}


def _missing(profile: Profile) -> str:
    if find_spec("sklearn") is None:
        return "The images of digits come with scikit-learn, which is not installed; pip install scikit-learn."
    return ""


MAKERS = [Maker((DIGITS,), _tables, _missing)]
