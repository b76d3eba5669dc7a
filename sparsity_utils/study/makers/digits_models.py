"""Two small networks for images of digits whose FFN keeps all ReLU neurons or the k largest (arXiv 2210.06313).

The FFN is V Top_k(ReLU(K x)), or V ReLU(K x) where all neurons stay. The networks of several seeds are computed side by
side: every parameter has the seeds as its first dimension, and nothing passes from one seed to another.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsity_utils.study.makers.digits_images import CLASSES, SIDE, generator

ALL, TOP_K = "all", "top-k"
ARMS = (ALL, TOP_K)
NEURONS, K = 512, 21  # 4% of the neurons
PATCH, WIDTH, HEADS = 2, 16, 2  # of the transformer: pixels along a patch, dimensions of a token, attention heads
TOKENS = (SIDE // PATCH) ** 2
# Inputs and outputs of each matrix; each has a bias. A patch is its pixels and which of the TOKENS places it has.
SHAPES = {
    "mlp": {"key": (SIDE**2, NEURONS), "value": (NEURONS, CLASSES)},
    "transformer": {
        "embed": (PATCH**2 + TOKENS, WIDTH),
        "attend": (WIDTH, 3 * WIDTH),  # queries, keys and values
        "join": (WIDTH, WIDTH),
        "key": (WIDTH, NEURONS),
        "value": (NEURONS, WIDTH),
        "classify": (WIDTH, CLASSES),
    },
}

Parameters = dict[str, Tensor]


def initial(model: str, seeds: Sequence[int]) -> Parameters:
    """Parameters of the network `model` (a key of SHAPES): entries of variance 1 / inputs, biases of zero.

    Matrices are (seeds, inputs, outputs), biases (seeds, 1, outputs).
    """
    randoms, found = [generator(seed, "initialisation") for seed in seeds], {}
    for name, shape in SHAPES[model].items():
        drawn = np.stack([random.normal(size=shape) for random in randoms]) / math.sqrt(shape[0])
        found[name] = torch.from_numpy(drawn.astype(np.float32)).requires_grad_()
        found[f"{name} bias"] = torch.zeros(len(randoms), 1, shape[1], requires_grad=True)
    return found


def outputs(model: str, parameters: Parameters, images: Tensor, arm: str) -> tuple[Tensor, Tensor]:
    """Logits (seeds, images, 10), and what the neurons pass on: (seeds, images or tokens, NEURONS).

    images: (seeds, images, 64). arm: one of ARMS.
    """
    return (_mlp if model == "mlp" else _transformer)(parameters, images, arm)


def top_k(active: Tensor) -> Tensor:
    """The K largest of the last dimension, zero in place of the others; further ones that equal the K-th stay too."""
    values = active.detach().numpy()
    place = values.shape[-1] - K
    least = np.partition(values, place, axis=-1)[..., place, None]  # quicker than torch.topk on a CPU
    return active * torch.from_numpy(values >= least)


def _mlp(parameters: Parameters, images: Tensor, arm: str) -> tuple[Tensor, Tensor]:
    active = _neurons(parameters, images, arm)
    return _linear(parameters, "value", active), active


def _transformer(parameters: Parameters, images: Tensor, arm: str) -> tuple[Tensor, Tensor]:
    """One layer; the norm before attention, FFN and classifier has no gain, which the matrix behind it holds anyway."""
    seeds, count = images.shape[:2]
    x = _linear(parameters, "embed", _patches(images))  # (seeds, count * TOKENS, WIDTH)
    parts = _linear(parameters, "attend", _normed(x)).view(seeds * count, TOKENS, 3, HEADS, WIDTH // HEADS)
    query, key, value = parts.permute(2, 0, 3, 1, 4)  # (seeds * count, HEADS, TOKENS, WIDTH / HEADS) each
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
    x = x + _linear(parameters, "join", attended)
    active = _neurons(parameters, _normed(x), arm)
    x = x + _linear(parameters, "value", active)
    pooled = _normed(x).view(seeds, count, TOKENS, WIDTH).mean(2)
    return _linear(parameters, "classify", pooled), active


def _neurons(parameters: Parameters, x: Tensor, arm: str) -> Tensor:
    active = _linear(parameters, "key", x).relu_()
    return top_k(active) if arm == TOP_K else active


def _linear(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    return torch.baddbmm(parameters[f"{name} bias"], x, parameters[name])


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _patches(images: Tensor) -> Tensor:
    """The patches of images (seeds, count, 64), each beside its place: (seeds, count * TOKENS, PATCH**2 + TOKENS)."""
    seeds, count = images.shape[:2]
    side = SIDE // PATCH
    cut = images.view(seeds, count, side, PATCH, side, PATCH).transpose(3, 4).reshape(seeds, count, TOKENS, PATCH**2)
    places = torch.eye(TOKENS).expand(seeds, count, TOKENS, TOKENS)
    return torch.cat([cut, places], dim=-1).flatten(1, 2)
