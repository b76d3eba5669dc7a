"""Files of a checkpoint that tests write."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def tokenizer_file(folder: Path, entries: int = 29) -> None:
    """A tokenizer.json of single-letter words a, b, ..."""
    vocabulary = {chr(ord("a") + number): number for number in range(entries)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(folder / "tokenizer.json"))
