"""Sequences that are decoded side by side, with one key-value cache from whose end each can take tokens back."""

import inspect

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sparsity_utils.console import InputError, check
from sparsity_utils.models.context import context_length

Entries = list[tuple[Tensor, Tensor]]  # keys and values of each layer, (sequences, heads, tokens, size of a head)


def check_decoder(model: PreTrainedModel, prompts: Tensor, new_tokens: int, more: int = 0) -> None:
    """Raises `InputError` unless `model` decodes text and has the context for `prompts`, (sequences, length).

    new_tokens: decoded after the prompts. more: tokens beyond them that may pass the model.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise InputError(f"{type(model).__name__} does not decode text token by token; give a decoder.")
    check(
        prompts.dim() == 2 and prompts.numel() > 0 and new_tokens >= 1,
        f"Prompts of shape {tuple(prompts.shape)} and {new_tokens} new tokens cannot be decoded; give token ids, "
        f"(sequences, length), and at least one new token.",
    )
    context, length = context_length(model), prompts.shape[1] + new_tokens + more
    parts = f", {new_tokens} new ones and {more} drafted beyond them" if more else f" and {new_tokens} new ones"
    check(
        context is None or length <= context,
        f"Prompts of {prompts.shape[1]} tokens{parts} are longer than the model's context of "
        f"{context}: shorten either.",
    )


def wait(x: Tensor) -> None:
    """Wait for the device of `x`, so that a clock can be read."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


class KeptText:
    """The cache of a model after some texts, one row each; rows have unequal lengths and end at the same place."""

    def __init__(self, model: PreTrainedModel, prompts: Tensor) -> None:
        """Run `model` on `prompts`, (rows, length). Raises `InputError` for another cache than a growing one."""
        self.model = model
        out = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        self.cache = _checked(model, getattr(out, "past_key_values", None))
        self.padding = torch.zeros(len(prompts), dtype=torch.long, device=prompts.device)  # entries that are no tokens
        self.likeliest = out.logits[:, -1].argmax(dim=-1)  # (rows,)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def __len__(self) -> int:
        """Entries of each row, padding included."""
        return self.cache.get_seq_length()

    def run(self, tokens: Tensor) -> Tensor:
        """Logits after each of `tokens`, (rows, count), which are added: (rows, count, vocabulary)."""
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, **self._places(tokens.shape[1]))
        return out.logits

    def _places(self, count: int) -> dict[str, Tensor]:
        """What tells the model where texts begin, where they do not all begin at the first entry."""
        if not self.padding.any():
            return {}
        entries = torch.arange(len(self) + count, device=self.padding.device) - self.padding[:, None]
        places = {"attention_mask": (entries >= 0).long()}  # (rows, entries)
        return places | ({"position_ids": entries[:, -count:]} if self.takes_positions else {})

    def drop(self, counts: Tensor) -> None:
        """Take back the last `counts` tokens of the rows, (rows,)."""
        size = len(self)
        if bool((counts == counts[0]).all()):
            self._replace(lambda entries: entries[:, :, : size - int(counts[0])])
            return
        lengths = size - self.padding - counts
        longest = int(lengths.max())
        index = (size - counts - longest)[:, None] + torch.arange(longest, device=counts.device)  # (rows, longest)
        index = index.clamp(min=0)[:, None, :, None]
        self._replace(lambda entries: entries.gather(2, index.expand(-1, entries.shape[1], -1, entries.shape[3])))
        self.padding = longest - lengths

    def select(self, rows: Tensor) -> None:
        """Keep the `rows`, in that order; one may come several times."""
        self._replace(lambda entries: entries[rows])
        self.padding = self.padding[rows]

    def last(self, count: int) -> Entries:
        """The entries of the last `count` tokens."""
        size = len(self)
        return [
            (layer.keys[:, :, size - count :].clone(), layer.values[:, :, size - count :].clone())
            for layer in self.cache.layers
        ]

    def put(self, entries: Entries) -> None:
        """Write `entries` over those of the tokens before the last one."""
        end = len(self) - 1
        for layer, (keys, values) in zip(self.cache.layers, entries, strict=True):
            layer.keys[:, :, end - keys.shape[2] : end] = keys
            layer.values[:, :, end - values.shape[2] : end] = values

    def _replace(self, change) -> None:
        for layer in self.cache.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)


def _checked(model: PreTrainedModel, cache: object) -> DynamicCache:
    plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
    if not plain:
        kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [cache])} - {DynamicLayer.__name__}
        raise InputError(
            f"{type(model).__name__} keeps {', '.join(sorted(kinds))} and not keys and values of all tokens, so that "
            f"tokens cannot be taken back: give a model without sliding windows and recurrent layers."
        )
    return cache
