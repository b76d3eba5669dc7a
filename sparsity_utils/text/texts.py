"""Text to measure a model on: documents from files, windows of tokens, calibration and evaluation apart.

A batch is a dict of input_ids and attention_mask, (windows, length), and documents, (windows,): which document each
window is of. All are int64.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsity_utils.console import InputError
from sparsity_utils.text.batches import evenly_spaced
from sparsity_utils.text.config import CorpusConfig
from sparsity_utils.text.sources import SUFFIXES, open_source

LEAST = 2  # tokens: the first is never predicted


def read_documents(path: Path) -> list[str]:
    """The documents of a file or folder of .txt, .md, .jsonl and .parquet, in a fixed order.

    A text file is one document, a row of a table too, in its field `text`. A file of any other kind is read as text
    when it is named itself. Empty documents are left out, and what is not UTF-8.

    Raises `InputError` when there is no such path, no text in it, or a table that cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        try:
            found = [path.read_bytes().decode("utf-8-sig")]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as text in UTF-8 ({error}); give a text file.") from error
    else:
        found = [document.text for document in open_source(CorpusConfig("path", str(path))).documents]
    documents = [text for text in found if text.strip()]
    if not documents:
        raise InputError(f"{path} holds no text; give a file or folder with text in UTF-8.")
    return documents


def text_batches(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int, batch_windows: int = 8
) -> list[dict[str, Tensor]]:
    """Batches of windows of `length` tokens, in reading order, each window of one document alone.

    Each document is tokenised whole, with the special tokens that the tokenizer itself adds to a text, so once. Its
    last, shorter window is padded on the right with attention_mask 0; one of a single token is left out.

    Args:
        tokenizer: the model's own.
        documents: texts; in the batches each is known by its position among them.
        length: tokens of a window, at least 2 and at most the model's context.
        batch_windows: windows of a batch; the last may have fewer.

    Raises `InputError` without documents, without two tokens in any of them, and for lengths out of range.
    """
    if length < LEAST or batch_windows < 1:
        raise InputError(
            f"Windows of {length} tokens, {batch_windows} to a batch, cannot be made; choose at least {LEAST} tokens "
            f"and one window."
        )
    if not documents:
        raise InputError("There is no document to measure on; give at least one text.")
    windows: list[list[int]] = []
    owners: list[int] = []
    for number, document in enumerate(documents):
        tokens = tokenizer(document, verbose=False)["input_ids"]
        cut = [tokens[start : start + length] for start in range(0, len(tokens) - LEAST + 1, length)]
        windows += cut
        owners += [number] * len(cut)
    if not windows:
        raise InputError(f"No document has {LEAST} tokens, so that there is nothing to predict; give a longer text.")
    padding = tokenizer.pad_token_id or 0
    ids = torch.tensor([window + [padding] * (length - len(window)) for window in windows])
    lengths = torch.tensor([len(window) for window in windows])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return _batches({"input_ids": ids, "attention_mask": mask, "documents": torch.tensor(owners)}, batch_windows)


def split_documents(
    batches: Sequence[Mapping[str, Tensor]], share: float = 1 / 3
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """(calibration, evaluation): about `share` of the documents, spread evenly over all of them, and the others.

    A single document is divided instead: its first windows calibrate, the rest evaluate. Batches are of the size of
    the first one given.

    Raises `InputError` when there are not two documents or two windows to divide, or `share` is not within (0, 1).
    """
    if not 0 < share < 1:
        raise InputError(f"The share {share} of the documents for calibration is not between 0 and 1; correct it.")
    rows = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]} if batches else {}
    if not rows or len(rows["documents"]) < 2:
        raise InputError(
            "There is too little text to calibrate and to evaluate on; give two windows of tokens or more."
        )
    owners = rows["documents"]
    present = owners.unique()
    if len(present) > 1:
        chosen = evenly_spaced(_part(len(present), share), len(present), centred=True)
        calibrates = torch.isin(owners, present[chosen])
    else:
        calibrates = torch.arange(len(owners)) < _part(len(owners), share)
    size = len(batches[0]["documents"])
    calibration, evaluation = (
        _batches({key: tensor[chosen] for key, tensor in rows.items()}, size) for chosen in (calibrates, ~calibrates)
    )
    return calibration, evaluation


def _part(total: int, share: float) -> int:
    """`share` of `total`, at least one and not all."""
    return min(max(round(total * share), 1), total - 1)


def _batches(rows: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """`rows`, tensors with one entry per window, cut into batches of `size` windows."""
    parts = {key: tensor.split(size) for key, tensor in rows.items()}
    return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)]
