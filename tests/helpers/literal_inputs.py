"""Kept inputs and ternary weights written out entry by entry (arXiv 2407.10969, equations 5 to 13): the slow reference.

Nothing here is shared with `sparsity_utils.models.input_training`, but the settings.
"""

import math

import torch
from torch import Tensor, nn

from sparsity_utils.models.input_training import KeptInputs


def read_row(x: list[float], how: KeptInputs) -> tuple[list[float], list[float]]:
    """What a map reads of one token's vector x, and by how much each entry of it moves with the same entry of x."""
    n = len(x)
    group = how.block or n
    mask = []
    for start in range(0, n, group):
        sizes = [abs(entry) for entry in x[start : start + group]]
        wanted = sorted(sizes, reverse=True)[group * how.keep // 16 - 1]
        mask += [size >= wanted for size in sizes]
    values = list(x)
    if how.quantised:
        step = max(max(abs(entry) for entry in x), 1e-12) / 127
        values = [min(max(round(entry / step), -128), 127) * step for entry in x]
    values = [value if kept else 0.0 for value, kept in zip(values, mask, strict=True)]
    norm = max(math.sqrt(sum(value**2 for value in values)), 1e-12)
    scale = {"none": 1.0, "ratio": math.sqrt(sum(entry**2 for entry in x)) / norm, "unit": math.sqrt(n) / norm}[
        how.rescale
    ]
    slopes = [scale if kept or how.straight_through else 0.0 for kept in mask]
    return [value * scale for value in values], slopes


def read_rows(x: Tensor, how: KeptInputs) -> tuple[Tensor, Tensor]:
    """`read_row` of every vector in x, (..., n): values and slopes, likewise, float64."""
    rows = [read_row(row, how) for row in x.detach().double().reshape(-1, x.shape[-1]).tolist()]
    return tuple(torch.tensor(part, dtype=torch.float64).view(x.shape) for part in zip(*rows, strict=True))


def ternary_entries(weight: Tensor) -> Tensor:
    """Each weight as -1, 0 or 1 times the mean size."""
    entries = weight.detach().double().flatten().tolist()
    mean = max(sum(map(abs, entries)) / len(entries), 1e-12)
    signs = [min(max(round(entry / mean), -1), 1) for entry in entries]
    return mean * torch.tensor(signs, dtype=torch.float64).view(weight.shape)


class LiteralLinear(nn.Module):
    """A linear map that masks its own input, in place of one that is fed what was masked for it."""

    def __init__(self, linear: nn.Linear, how: KeptInputs, ternary: bool):
        super().__init__()
        self.weight, self.bias, self.how, self.ternary = linear.weight, linear.bias, how, ternary
        self.read: Tensor | None = None  # what it read in its last pass

    def forward(self, x: Tensor) -> Tensor:
        self.read = x
        if self.how != KeptInputs():
            values, slopes = (part.to(x.dtype) for part in read_rows(x, self.how))
            self.read = values + slopes * (x - x.detach())
        weight = self.weight
        if self.ternary:
            weight = weight + (ternary_entries(weight).to(weight.dtype) - weight).detach()
        return nn.functional.linear(self.read, weight, self.bias)


def literal_maps(model: nn.Module, how: KeptInputs, ternary: bool = False) -> dict[str, LiteralLinear]:
    """Let each of the seven maps of every layer of an unmodified decoder be a LiteralLinear; returns them by name.

    ternary: whether weights are those of a training, to be made ternary.
    """
    maps = {}
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            maps[name] = LiteralLinear(module, how, ternary)
            parent, _, last = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), last, maps[name])
    return maps
