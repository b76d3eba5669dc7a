"""Images of handwritten digits that come with scikit-learn, split by seed, with noise in labels or in pixels.

There are 1,797 images of 8 x 8 pixels, whose brightness is a whole number from 0 to 16. Everything random about a seed
comes from generators of its own, one for each purpose, so that it is the same for every network and every arm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TRAINING, VALIDATION = 600, 200  # images of each; all others test
SIDE, BRIGHTEST, CLASSES = 8, 16, 10
PURPOSES = ("split", "labels", "pixels", "initialisation", "order")
# Fixed before any network was tested. As in ImageNet-C (arXiv 1903.12261), accuracy is the mean over the levels.
LEVELS = {
    "gaussian": (2.0, 4.0, 6.0),  # standard deviation, where the brightest pixel is 16
    "impulse": (0.1, 0.2, 0.3),  # share of the pixels that become black or brightest
    "shot": (8.0, 4.0, 2.0),  # mean number of photons that the brightest pixel receives
}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Parts:
    """The images and labels of some seeds, stacked; brightness from 0 to 1."""

    seeds: tuple[int, ...]
    training: Tensor  # (seeds, TRAINING, 64)
    training_labels: Tensor  # (seeds, TRAINING), with noise
    validation: Tensor  # (seeds, VALIDATION, 64)
    validation_labels: Tensor  # (seeds, VALIDATION), with noise
    test: Tensor  # (seeds, others, 64)
    test_labels: Tensor  # (seeds, others), true ones


@cache
def loaded() -> tuple[Array, NDArray[np.int64]]:
    """All images (1797, 64), brightness from 0 to 16, and their labels."""
    from sklearn.datasets import load_digits  # with scipy, which an image that only trains need not have

    images, labels = load_digits(return_X_y=True)
    return images, labels.astype(np.int64)


def generator(seed: int, purpose: str) -> np.random.Generator:
    """The random numbers of a seed for one of PURPOSES."""
    return np.random.default_rng([seed, PURPOSES.index(purpose)])


def parts_of(seeds: Sequence[int], label_noise: float) -> Parts:
    """The parts of the images for each seed; they share no image.

    label_noise: share of the labels of training and validation that is redrawn, see `redrawn`.
    """
    images, labels = loaded()
    orders = np.stack([generator(seed, "split").permutation(len(images)) for seed in seeds])  # (seeds, 1797)
    known = TRAINING + VALIDATION
    noisy = np.stack([
        redrawn(labels[order[:known]], label_noise, generator(seed, "labels"))
        for order, seed in zip(orders, seeds, strict=True)
    ])  # fmt: skip
    scaled = _scaled(images[orders])
    training, validation, test = scaled.split([TRAINING, VALIDATION, len(images) - known], dim=1)
    training_labels, validation_labels = torch.from_numpy(noisy).split([TRAINING, VALIDATION], dim=1)
    true = torch.from_numpy(labels[orders[:, known:]])
    return Parts(tuple(seeds), training, training_labels, validation, validation_labels, test, true)


def redrawn(labels: NDArray[np.int64], share: float, random: np.random.Generator) -> NDArray[np.int64]:
    """The labels with `share` of them, rounded to whole ones, redrawn uniformly from all ten classes.

    A redrawn label may be the true one. With the same random numbers, what a small share redraws a larger one does too.
    """
    chosen = random.permutation(len(labels))[: round(share * len(labels))]
    drawn = random.integers(CLASSES, size=len(labels))
    noisy = labels.copy()
    noisy[chosen] = drawn[chosen]
    return noisy


def noisy_tests(seeds: Sequence[int]) -> dict[str, list[Tensor]]:
    """The test images of each seed under each kind of pixel noise, one tensor (seeds, others, 64) for each level."""
    images, _ = loaded()
    tests = [images[generator(seed, "split").permutation(len(images))[TRAINING + VALIDATION :]] for seed in seeds]
    randoms = [generator(seed, "pixels") for seed in seeds]
    return {
        kind: [
            _scaled(np.stack([corrupted(one, kind, level, random) for one, random in zip(tests, randoms, strict=True)]))
            for level in levels
        ]
        for kind, levels in LEVELS.items()
    }


def corrupted(images: Array, kind: str, level: float, random: np.random.Generator) -> Array:
    """Images with pixel noise of a kind and level of LEVELS, clipped to the range of brightness, 0 to 16."""
    if kind == "gaussian":
        noisy = images + level * random.normal(size=images.shape)
    elif kind == "impulse":
        hit, value = random.random(images.shape) < level, BRIGHTEST * random.integers(2, size=images.shape)
        noisy = np.where(hit, value, images)
    else:
        noisy = random.poisson(images / BRIGHTEST * level) / level * BRIGHTEST
    return np.clip(noisy, 0, BRIGHTEST)


def _scaled(images: Array) -> Tensor:
    return torch.from_numpy((images / BRIGHTEST).astype(np.float32))
