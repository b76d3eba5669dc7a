"""What a model is called with, made from the batches that a user gives: checked, and padded on the right."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsity_utils.console import InputError, explained
from sparsity_utils.models.context import context_length, vocabulary_size

IGNORED = -100  # the label that counts for nothing, as in transformers
SECOND_TEXT = ("labels", "decoder_")  # how the names of what an encoder-decoder writes begin
PADDING_MASKS = ("attention_mask", "pixel_mask", "padding_mask")


def text_parts(model: PreTrainedModel, batch: Mapping[str, Tensor], where: str) -> dict:
    """The inputs, targets and masks of `passes.Batch` for a model that reads text.

    Texts padded on the left are moved to the left, because most models number positions from the first column and
    only some can be told otherwise: then every model computes what it does for each text alone.
    """
    batch = _left_aligned(batch, where, model.config.is_encoder_decoder)
    ids = _tensor(batch, "input_ids", where)
    mask = _tensor(batch, "attention_mask", where, ids)
    real = None if mask is None else mask.bool()
    ids = _usable_ids(model, ids, real, where)
    inputs = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    inputs |= _other_inputs(model, batch, where)
    if model.config.is_encoder_decoder:
        return _decoder_parts(model, batch, inputs, where) | {"mask": real}
    if predicts_next_token(model):
        targets = _next_tokens(ids, real, _tensor(batch, "labels", where, ids)).long()
        _check_labels(targets, vocabulary_size(model), where)
    else:
        targets = _classes(batch, len(ids), where)
    return {"inputs": inputs, "targets": targets, "mask": real}


def _left_aligned(batch: Mapping[str, Tensor], where: str, two_texts: bool) -> dict[str, Tensor]:
    """`batch` with the padding before each text moved behind it, in all tensors of one entry per token.

    Where there are `two_texts`, the second one has padding of its own: see `_decoder_parts`.
    """
    ids = _tensor(batch, "input_ids", where)
    mask = _tensor(batch, "attention_mask", where, ids)
    if mask is None or ids.dim() != 2 or ids.numel() == 0 or bool(mask[:, 0].all()):
        return dict(batch)
    index = _moved(mask.bool())
    names = {name for name in batch if not (two_texts and name.startswith(SECOND_TEXT))}
    return dict(batch) | _per_token(batch, names, index, ids.shape)


def _per_token(batch: Mapping[str, Tensor], names: Iterable[str], index: tuple, shape: torch.Size) -> dict[str, Tensor]:
    """Those of `names` in `batch` that have one entry per token, moved by `index`."""
    tensors = {name: batch[name] for name in names if isinstance(batch[name], Tensor)}
    return {name: value[index] for name, value in tensors.items() if value.shape[:2] == shape}


def _moved(real: Tensor) -> tuple[Tensor, Tensor]:
    """Index of tensors (rows, length, ...) that moves what precedes the first True of each row behind its end."""
    rows, length = real.shape
    first = real.int().argmax(1, keepdim=True)  # (rows, 1); 0 where all is padding
    return torch.arange(rows, device=real.device)[:, None], (torch.arange(length, device=real.device) + first) % length


def _decoder_parts(
    model: PreTrainedModel, batch: Mapping[str, Tensor], inputs: dict[str, Tensor], where: str
) -> dict[str, Any]:
    """All inputs of an encoder-decoder, its targets and decoder_mask, from `inputs` and the labels of `batch`.

    IGNORED before a second text is padding, and moved behind it.
    """
    labels, rows = batch.get("labels"), len(next(iter(inputs.values())))
    if not isinstance(labels, Tensor) or labels.dim() != 2 or len(labels) != rows or labels.numel() == 0:
        raise InputError(f"{where} has no labels (rows, length): an encoder-decoder needs its second text.")
    _check_labels(labels, vocabulary_size(model, decoder=True), where)
    _check_length(model, labels, where, decoder=True)
    index = _moved(labels != IGNORED)
    others = [name for name in inputs if name.startswith(SECOND_TEXT)]
    inputs = inputs | _per_token(inputs, others, index, labels.shape)
    labels = labels.long()[index]
    inputs["decoder_input_ids"] = _shifted(model, labels)
    return {"inputs": inputs, "targets": labels, "decoder_mask": labels != IGNORED}


def _shifted(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """What the decoder reads to predict `labels`, (rows, length): as the model makes it, or one place to the right."""
    remedy = "set decoder_start_token_id and pad_token_id in its config"
    with explained(f"{type(model).__name__} cannot make the inputs of its decoder from labels", remedy):
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            return model.prepare_decoder_input_ids_from_labels(labels)
        start, padding = model.config.decoder_start_token_id, model.config.pad_token_id
        shifted = labels.roll(1, dims=1)
        shifted[:, 0] = start
        return shifted.masked_fill(shifted == IGNORED, padding)


def _check_labels(labels: Tensor, vocabulary: int, where: str) -> None:
    if bool(((labels != IGNORED) & ((labels < 0) | (labels >= vocabulary))).any()):
        raise InputError(
            f"{where} has labels outside the model's vocabulary of {vocabulary}: "
            f"give token ids, and {IGNORED} where nothing is predicted."
        )


def _other_inputs(model: PreTrainedModel, batch: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """What else in a batch of text the model takes: token_type_ids, position_ids, pixel_values."""
    taken = inspect.signature(model.base_model.forward).parameters.keys() - {"input_ids", "attention_mask"}
    found = {name: batch[name] for name in batch if name in taken and batch[name] is not None}
    if "inputs_embeds" in found:
        raise InputError(f"{where} has inputs_embeds beside input_ids: leave them out.")
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != len(batch["input_ids"]):
            raise InputError(f"{where} has {name} without one row for each of input_ids: make them agree.")
    return found


def other_parts(model: PreTrainedModel, batch: Mapping[str, Tensor], main: str, where: str) -> dict:
    """The same for a model that reads images, sounds and the like: whatever it takes, every position real."""
    values = _tensor(batch, main, where)
    if values.numel() == 0:
        raise InputError(f"{where} has an empty {main}; give at least one row.")
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "documents")}
    for name in inputs:
        if name in PADDING_MASKS and bool((inputs[name] == 0).any()):
            raise InputError(
                f"{where} is padded ({name}), and where padding goes inside {type(model).__name__} is not known: "
                f"give rows of one size in each batch."
            )
    if model.config.is_encoder_decoder:
        return _decoder_parts(model, batch, inputs, where) | {"mask": None}
    return {"inputs": inputs, "targets": _classes(batch, len(values), where), "mask": None}


def _classes(batch: Mapping[str, Tensor], windows: int, where: str) -> Tensor | None:
    """Labels of whole rows, (windows,), or of their positions, (windows, length); int64, or None."""
    labels = batch.get("labels")
    if labels is None:
        return None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape[:1] != (windows,):
        raise InputError(f"{where} has unusable labels: give a tensor of whole numbers with {windows} rows.")
    return labels.long()


def _usable_ids(model: PreTrainedModel, ids: Tensor, real: Tensor | None, where: str) -> Tensor:
    """`ids`, checked; where padding is an id that the model does not have, another one stands for it."""
    if ids.dim() != 2 or ids.numel() == 0 or ids.shape[1] < 2:
        raise InputError(f"{where} has input_ids of shape {tuple(ids.shape)}; give at least one row of two tokens.")
    _check_length(model, ids, where)
    vocabulary = vocabulary_size(model)
    if real is not None and not ids.is_floating_point():
        ids = ids.masked_fill(~real & (ids >= vocabulary), 0)
    if ids.is_floating_point() or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise InputError(
            f"{where} has token ids outside the model's vocabulary of {vocabulary}: "
            f"use the tokenizer that belongs to the model."
        )
    return ids


def _check_length(model: PreTrainedModel, ids: Tensor, where: str, decoder: bool = False) -> None:
    context = context_length(model, decoder)
    if context is not None and context < ids.shape[1]:
        raise InputError(
            f"{where} has windows of {ids.shape[1]} tokens and the model's context is {context}: cut them."
        )


def _next_tokens(ids: Tensor, real: Tensor | None, labels: Tensor | None) -> Tensor:
    """Labels moved to the position that predicts them; the last position predicts nothing. (windows, length)."""
    targets = torch.full_like(ids, IGNORED)
    if labels is not None:
        targets[:, :-1] = labels[:, 1:] if real is None else labels[:, 1:].masked_fill(~real[:, 1:], IGNORED)
    elif real is not None:
        targets[:, :-1] = ids[:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORED)
    else:
        targets[:, :-1] = ids[:, 1:]
    return targets


def _tensor(batch: Mapping[str, Tensor], key: str, where: str, like: Tensor | None = None) -> Tensor | None:
    value = batch.get(key)
    if value is None and like is not None:
        return None
    if not isinstance(value, Tensor):
        raise InputError(f"{where} has no tensor {key}: a batch is a dict with {key} as the model takes it.")
    if like is not None and value.shape != like.shape:
        raise InputError(
            f"{where} has {key} of shape {tuple(value.shape)} and input_ids of shape {tuple(like.shape)}: "
            f"make them agree."
        )
    return value


def predicts_next_token(model: PreTrainedModel) -> bool:
    """Whether position t of the logits predicts token t + 1, as in every decoder that generates text."""
    return model.can_generate() and not model.config.is_encoder_decoder
