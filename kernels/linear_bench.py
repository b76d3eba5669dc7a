"""Measure how fast sparse linear maps are, compared with the fastest way that skips nothing.

As in `kernels.bench` all ways of a case take turns, every call uses another copy of the weights, and no speed is
reported where an output is not that of the same rule run densely.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench import AGREE, WEIGHTS, every_copy
from kernels.linear import SparseLinear, dense
from kernels.pages import LargePages
from kernels.timing import alternate, machine, speedups, timed

MAPS = {  # inputs, and outputs of each map of one call; SmolLM2-135M, then the FFN of MiniCPM's 2.4B shape
    "o": (576, (576,)),
    "q, k, v": (576, (576, 192, 192)),
    "gate, up": (576, (1536, 1536)),
    "down": (1536, (576,)),
    "gate, up of 2.4B": (2304, (5760, 5760)),
    "down of 2.4B": (5760, (2304,)),
}
SPARSITIES = (0.25, 0.5, 0.75)
FULL_READS = ("dense", "all rows")  # torch, where weights are float32, and the kernel


def linear_speeds(
    *, rounds: int, megabytes: int | None, device: str, maps: dict[str, tuple[int, tuple[int, ...]]] = MAPS
) -> pd.DataFrame:
    """One row per maps, weights (float32, 8 bits) and sparsity; one token, random weights.

    Columns: maps, d, outputs, weights, sparsity, milliseconds of the sparse kernel, dense_milliseconds (torch),
    all_rows_milliseconds (the kernel with nothing skipped), strict_speedup over the faster of these with its 90%
    interval, ideal_speedup (weights / weights read), of_ideal (strict over ideal), gb_per_s, rounds, and the machine.

    Raises `RuntimeError` when an output does not agree with the same rule run densely.
    """
    size = WEIGHTS[device] if megabytes is None else 10**6 * megabytes
    with torch.inference_mode():
        rows = [row for name, shape in maps.items() for row in _rows(name, *shape, size, rounds, device)]
    return pd.DataFrame(rows).assign(**machine(device))


def _rows(name: str, d: int, widths: tuple[int, ...], size: int, rounds: int, device: str) -> Iterator[dict]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, d, generator=random).to(device)
    weight_t = (torch.randn(d, sum(widths), generator=random) * d**-0.5).to(device)
    wide = SparseLinear(weight_t, widths, torch.full((len(widths), d), -1.0, device=device))
    for weights, whole in (("float32", wide), ("8 bits", wide.quantised())):
        count = max(1, size // whole.weight_t.nbytes)
        pages = LargePages()
        copies = [replace(whole, weight_t=pages.copied(whole.weight_t)) for _ in range(count)]
        ways: dict[str, tuple[Callable, list]] = {"all rows": (lambda linear: linear(x), copies)}
        if weights == "float32":
            stored = [[part.T.contiguous() for part in one.weight_t.split(widths, dim=1)] for one in copies]
            ways["dense"] = (lambda parts: [F.linear(x, part) for part in parts], stored)
        for sparsity in SPARSITIES:
            skipped = round(sparsity * d)
            limits = x.abs().flatten().kthvalue(skipped).values.expand(len(widths), d)
            ways[f"{sparsity:g}"] = (lambda linear: linear(x), [replace(one, limits=limits) for one in copies])
        for way, (run, given) in ways.items():
            if way != "dense":
                _check(f"{name}, {weights}, {way}", run(given[0]), dense(given[0], x))
        works = {way: every_copy(run, given, device) for way, (run, given) in ways.items()}
        seconds = alternate({way: partial(timed, work, device) for way, work in works.items()}, rounds)
        milliseconds = {way: 1e3 * float(np.median(values)) / count for way, values in seconds.items()}
        for sparsity in SPARSITIES:
            way, read = f"{sparsity:g}", 1 - round(sparsity * d) / d
            strict = speedups({"dense": seconds["all rows"], **seconds}, way, FULL_READS)
            yield {
                **{"maps": name, "d": d, "outputs": sum(widths), "weights": weights, "sparsity": 1 - read},
                "milliseconds": milliseconds[way],
                "dense_milliseconds": milliseconds.get("dense", np.nan),
                "all_rows_milliseconds": milliseconds["all rows"],
                **{column: value for column, value in strict.items() if "strict" in column},
                "ideal_speedup": 1 / read,
                "of_ideal": strict["strict_speedup"] * read,
                "gb_per_s": read * whole.weight_t.nbytes / milliseconds[way] / 1e6,
                "rounds": rounds,
            }


def _check(case: str, y: Tensor, expected: Tensor) -> None:
    error, size = ((part.square().mean().sqrt()).item() for part in (y - expected, expected))
    if not error <= size * AGREE[torch.float32]:
        raise RuntimeError(f"No speed is reported: {case} is off by {error:.2g} of {size:.2g}.")
