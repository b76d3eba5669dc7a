"""A long measurement of one model, cut into pieces that are kept as they finish: a killed one goes on where it was."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsity_utils import paths
from sparsity_utils.study.tables import read_table

Frames = dict[str, pd.DataFrame]


def measurement_key(decides: Any, model: nn.Module, ids: Iterable[Tensor]) -> str:
    """Name of the folder for the pieces of one measurement, of all that decides its numbers.

    decides: settings and version, of what JSON can hold. ids: the token ids of the texts, in order.
    """
    found = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    for tensor in (*model.parameters(), *ids):
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


class Pieces:
    """The pieces of one measurement in a folder of its own, behind one bar."""

    def __init__(self, folder: Path, about: str, seconds: float) -> None:
        """about: what is measured. seconds: that one unit of cost takes."""
        self.folder, self.about, self.seconds = folder, about, seconds
        self.bar, self.due, self.told = tqdm(disable=True), 0, False

    def kept(self, name: str, cost: int, measure: Callable[[], Frames]) -> Frames:
        """The tables of a piece, measured once. cost: units that are expected to pass the model."""
        folder = self.folder / name
        if folder.exists():
            self.bar.total = (self.bar.total or 0) - cost
        else:
            self._tell()
            frames = measure()
            with paths.written_aside(folder) as aside:
                aside.mkdir()
                for part, frame in frames.items():
                    frame.to_csv(aside / f"{part}.csv", index=False)
            self.due += cost
            self.bar.update(self.due - self.bar.n)
        return {file.stem: read_table(file) for file in folder.glob("*.csv")}

    def _tell(self) -> None:
        """One line before the first piece that is measured: how long it should take, where a bar counts it."""
        left = self.bar.total or 0  # below zero where pieces were found and nothing is `shown`
        minutes = f"about {left * self.seconds / 60:.0f} min on two quiet cores; " if left > 0 else ""
        if not self.told:
            print(f"Measuring {self.about}: {minutes}finished pieces are kept.", flush=True)
        self.told = True

    @contextmanager
    def shown(self, model: nn.Module, cost: int, each_pass: int = 0) -> Iterator[None]:
        """Inside the block a bar counts the tokens that pass `model`, whoever sends them there.

        cost: of all pieces. each_pass: tokens that take as long as reading the weights does, counted with every pass.
        """

        def seen(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if "input_ids" in kwargs:
                self.bar.update(each_pass + kwargs["input_ids"].numel())

        handle = model.register_forward_pre_hook(seen, with_kwargs=True)
        try:
            hidden, name = bool(os.environ.get("CI")), self.about.partition(",")[0]
            with tqdm(total=cost, desc=name, unit="tok", unit_scale=True, disable=hidden) as self.bar:
                yield
        finally:
            handle.remove()
