"""Forward passes over batches: checked inputs, token-mean losses, a model that is left as it was."""

import inspect
import math
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsity_utils.console import InputError, check, explained
from sparsity_utils.models.config import RANDOM_TARGETS
from sparsity_utils.neurons.find import FFN, widened
from sparsity_utils.neurons.hooks import observe_neurons
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.sparsity.inputs import IGNORED, other_parts, predicts_next_token, text_parts

ORDER_TOKENS = 16  # of the text on which the order of vectors is seen
SAME = 1e-5  # relative distance of vectors that are computed alike from the same numbers


@dataclass(frozen=True, eq=False)
class Batch:
    """One checked batch on the model's device. A window is one row of it."""

    inputs: dict[str, Tensor]  # what the model is called with; first dimension: windows
    targets: Tensor | None  # what each position predicts, or IGNORED, (windows, length); None: nothing to predict
    documents: Tensor  # number of the document each window comes from, (windows,) int64, on the CPU
    mask: Tensor | None  # True at real tokens, (windows, length); of the encoder in an encoder-decoder
    decoder_mask: Tensor | None = None  # the same of the decoder

    @property
    def windows(self) -> int:
        """Number of rows."""
        return len(self.documents)

    @property
    def length(self) -> int | None:
        """Tokens of the longer text of a window, padding included; None of an image."""
        lengths = [self.inputs[name].shape[1] for name in ("input_ids", "decoder_input_ids") if name in self.inputs]
        return max(lengths, default=None)

    def usable(self, with_loss: bool) -> list[int]:
        """The windows that have a real token (no padding) and, if `with_loss`, a token to predict."""
        usable = torch.ones(self.windows, dtype=torch.bool) if self.mask is None else self.mask.any(1).cpu()
        if with_loss and self.targets is not None:
            usable &= (self.targets != IGNORED).reshape(self.windows, -1).any(1).cpu()
        return usable.nonzero().flatten().tolist()

    def real(self, ffn: FFN, tokens: Tensor) -> Tensor | slice:
        """Which of the rows that `ffn` was observed on are of real tokens; `tokens` (rows,) is the token of each."""
        mask = self._mask(ffn)
        self._check_rows(ffn, tokens)
        return slice(None) if mask is None else mask.flatten()[tokens]

    def real_tokens(self, ffn: FFN, tokens: Tensor) -> int:
        """Number of real tokens that reach the layer of `ffn`; a routed expert sees only some of them, `tokens`."""
        mask = self._mask(ffn)
        return self.windows * self._length(ffn, tokens) if mask is None else int(mask.sum())

    def window(self, ffn: FFN, tokens: Tensor) -> Tensor:
        """The window of each token, (rows,)."""
        return tokens // self._length(ffn, tokens)

    def rows(self, chosen: Tensor) -> "Batch":
        """The batch of the chosen windows alone. `chosen`: indices, (windows kept,)."""
        on_device = chosen.to(next(iter(self.inputs.values())).device)
        parts = {
            name: None if (value := getattr(self, name)) is None else value[on_device]
            for name in ("targets", "mask", "decoder_mask")
        }
        inputs = {name: value[on_device] for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, documents=self.documents[chosen], **parts)

    def _mask(self, ffn: FFN) -> Tensor | None:
        return self.mask if self.decoder_mask is None or ffn.in_encoder else self.decoder_mask

    def _length(self, ffn: FFN, tokens: Tensor) -> int:
        length = self._known_length(ffn)
        return (int(tokens.max()) + 1) // self.windows if length is None else length

    def _known_length(self, ffn: FFN) -> int | None:
        """Tokens of a window; None for the patches of an image, which no input shows."""
        mask = self._mask(ffn)
        if mask is not None:
            return mask.shape[1]
        return self.inputs["input_ids"].shape[1] if "input_ids" in self.inputs else None

    def _check_rows(self, ffn: FFN, tokens: Tensor) -> None:
        length = self._known_length(ffn)
        if length is None:
            return
        # A routed expert sees some of the tokens, any other FFN all of them.
        seen = len(tokens) if ffn.experts == 1 else int(tokens.amax()) + 1 if len(tokens) else 0
        whole = self.windows * length
        if seen > whole or (ffn.experts == 1 and seen < whole):
            raise InputError(
                f"{ffn.name} was applied to {seen} vectors for {whole} tokens ({self.windows} windows of {length}), so "
                f"the model pads, pools or adds tokens inside, and which vector is of which token is not known: give "
                f"windows that it takes as they are (such as a multiple of an attention window), or another model."
            )


def joined(batches: list[Batch]) -> list[Batch]:
    """Join neighbouring batches of one shape: small batches waste most of their time."""
    result: list[Batch] = []
    for batch in batches:
        if result and _shapes(result[-1]) == _shapes(batch):
            one, names = result[-1], ("targets", "mask", "decoder_mask", "documents")
            parts = {name: [getattr(side, name) for side in (one, batch)] for name in names}
            inputs = {name: torch.cat([one.inputs[name], batch.inputs[name]]) for name in batch.inputs}
            whole = {name: None if pair[0] is None else torch.cat(pair) for name, pair in parts.items()}
            result[-1] = Batch(inputs=inputs, **whole)
        else:
            result.append(batch)
    return result


def _shapes(batch: Batch) -> dict[str, tuple | None]:
    """What has to agree for two batches to be one: all shapes but the number of windows."""
    parts = {**batch.inputs, "targets": batch.targets, "mask": batch.mask, "decoder_mask": batch.decoder_mask}
    return {name: None if value is None else tuple(value.shape[1:]) for name, value in parts.items()}


def checked(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], role: str) -> Iterator[Batch]:
    """Check each of `batches` and move it to the model's device, one at a time.

    A batch is what the transformers model takes, one row per window, plus

    - labels: for a model that generates text, the tokens themselves with IGNORED where nothing is predicted (without
      labels, every real token that follows a real token is predicted); for an encoder-decoder the decoder's text; for
      any other model the label of each position or of the whole row, and optional: without, there is no loss;
    - documents (windows,): numbers that rows of one document share. Default: every row is a document of its own.

    What a tokenizer adds and a text model does not take, such as token_type_ids for most decoders, is left out. Padding
    counts for nothing, on whichever side it is: texts are moved to the left, and labels on padding ignored.

    Raises `InputError`, naming the `role` of the batches, for empty batches, texts shorter than two tokens or longer
    than the model's context, shapes that differ, token ids outside the vocabulary, batches without any token to
    predict, padded images or sounds, and models that order their vectors by position.
    """
    check(
        not getattr(model.config, RANDOM_TARGETS, False),
        f"This model was trained on random data ({RANDOM_TARGETS} in its config.json), so that its loss on a text "
        "would say nothing; measure another one.",
    )
    main, fresh, predicted, seen = getattr(model, "main_input_name", "input_ids"), count(), 0, 0
    for index, batch in enumerate(batches):
        where = f"{role} batch {index}"
        if not isinstance(batch, Mapping):
            raise InputError(
                f"{where} is of type {type(batch).__name__}: give a list, or a generator, of dicts of tensors."
            )
        parts = text_parts(model, batch, where) if main == "input_ids" else other_parts(model, batch, main, where)
        windows = len(parts["inputs"][main])
        documents = batch.get("documents")
        if documents is None:
            documents = torch.tensor([next(fresh) for _ in range(windows)])
        elif _unusable(documents, windows):
            raise InputError(f"{where} has unusable documents: give one whole number, zero or larger, for each row.")
        device = model.device
        moved = {name: None if value is None else value.to(device) for name, value in parts.items() if name != "inputs"}
        inputs = {name: value.to(device) for name, value in parts["inputs"].items()}
        seen += 1
        predicted += 0 if parts["targets"] is None else int((parts["targets"] != IGNORED).sum())
        result = Batch(inputs=inputs, documents=documents.cpu(), **moved)
        if main == "input_ids" and model not in _in_order:
            _check_vectors(model, result)
        yield result
    if predicted == 0 and (seen == 0 or parts["targets"] is not None):
        raise InputError(f"The {role} batches hold no token to predict: give at least one text of two tokens.")


_in_order: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose vectors lie text by text


def _check_vectors(model: PreTrainedModel, batch: Batch) -> None:
    """Raises `InputError` when the FFNs of `model` see the first tokens of all texts before the second ones.

    It raises it too when a model that predicts the next token sees it beforehand, as an encoder with such a head does.

    It runs on a text, the same backwards, the text with another last token, and the text again. A quarter of the
    vectors is then that of the last quarter or, in the other order, each fourth vector is the one three further on. And
    what precedes the last token is the same in the first text and the third. A text among images is not turned round,
    nor tells one of a single token or the same backwards anything: the next batch may.
    """
    lengths = torch.full((batch.windows,), ORDER_TOKENS) if batch.mask is None else batch.mask.sum(1).cpu()
    four = batch.rows(lengths.clamp(max=2).argmax().expand(4))  # the first text of two tokens, if there is one
    inputs = {name: value[:, :ORDER_TOKENS] if value.dim() > 1 else value for name, value in four.inputs.items()}
    four = replace(four, inputs=inputs)
    ids = inputs["input_ids"]
    last = (ids.shape[1] if four.mask is None else int(four.mask[0, :ORDER_TOKENS].sum())) - 1  # real token
    mixed = any(value.is_floating_point() for value in inputs.values())
    if mixed or last < 1 or torch.equal(ids[0], ids[0].flip(0)):
        return
    ids[2, last] = ids[0][ids[0] != ids[0, last]][0]
    for name in ("input_ids", "decoder_input_ids"):
        if name in inputs:
            inputs[name][1] = inputs[name][1].flip(0)
    ahead = predicts_next_token(model)

    def compare(ffn: FFN, s: Tensor, h: Tensor, tokens: Tensor) -> None:
        quarter, kind = len(h) // 4, type(model).__name__
        if ffn.experts == 1 and not _alike(h[:quarter], h[-quarter:]) and _alike(h[::4], h[3::4]):
            raise InputError(
                f"{kind} orders its vectors by position and then by text, which is not supported: choose a model that "
                f"orders them by text."
            )
        before, changed = h[:last], h[2 * quarter : 2 * quarter + last]
        same = max(SAME, torch.finfo(h.dtype).eps / 10)
        if ahead and ffn.experts == 1 and before.isfinite().all() and not _alike(before, changed, same):
            raise InputError(
                f"{kind} sees the tokens that it should predict, as encoders do, so that its loss on a text means "
                f"nothing: open it as a decoder (in most configs is_decoder, in some causal)."
            )

    with evaluating(model), observe_neurons(model, compare):
        run_backbone(model, four)
    _in_order.add(model)


def _alike(one: Tensor, other: Tensor, rounding: float = 0.01) -> bool:
    """Whether two tensors of h are equal but for rounding."""
    return one.shape == other.shape and bool((one - other).norm() <= rounding * one.norm())


def _unusable(documents: Any, windows: int) -> bool:
    is_whole = isinstance(documents, Tensor) and not documents.is_floating_point()
    return not is_whole or documents.shape != (windows,) or int(documents.min()) < 0


class Losses:
    """Cross-entropy in nats, summed over the predicted tokens of each window: in the order they were added."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []  # one (windows,) float64 per batch
        self.counts: list[Tensor] = []  # one (windows,) int64 per batch: predicted tokens

    def add(self, model: nn.Module, batch: Batch) -> None:
        """Run `model` on `batch`. Raises `InputError` when a loss is not a finite number or nothing is predicted."""
        logits = getattr(forward(model, batch), "logits", None)
        if logits is None or batch.targets is None:
            raise InputError(
                f"{type(model).__name__} was given nothing to predict, so its perplexity is unknown: load it with its "
                f"prediction head, and give labels in the batches unless it predicts the next token."
            )
        if logits.shape[:-1] != batch.targets.shape or int(batch.targets.max()) >= logits.shape[-1]:
            raise InputError(
                f"Labels of shape {tuple(batch.targets.shape)} up to {int(batch.targets.max())} do not fit logits of "
                f"{type(model).__name__}, {tuple(logits.shape)}: give one class below {logits.shape[-1]} for each."
            )
        sums = []
        for scores, target in zip(logits, batch.targets, strict=True):  # a window at a time: float32 logits are large
            losses = nn.functional.cross_entropy(
                widened(scores.view(-1, scores.shape[-1])), target.view(-1), ignore_index=IGNORED, reduction="none"
            )  # (length,), zero where ignored
            sums.append(losses.sum(dtype=torch.float64))
        self.sums.append(torch.stack(sums).cpu())
        self.counts.append(_predicted(batch))
        if not bool(self.sums[-1].isfinite().all()):
            raise InputError("The model's logits give a loss that is NaN or infinite: check its weights.")

    def copy(self, other: "Losses | None", place: int, batch: Batch) -> None:
        """Take over what `other` holds of its batch number `place`, which is `batch`; None: nothing is predicted.

        Raises `InputError` when that batch of `other` did not have as many tokens to predict in each window.
        """
        counts = _predicted(batch)
        if other is not None and not (place < len(other.counts) and torch.equal(other.counts[place], counts)):
            raise InputError(
                "The dense losses given are of other batches: give the `dense` of a report on these very ones."
            )
        self.sums.append(torch.zeros(batch.windows, dtype=torch.float64) if other is None else other.sums[place])
        self.counts.append(counts)

    @property
    def value(self) -> float:
        """Mean loss in nats, sum of losses / number of predicted tokens; NaN where none is predicted."""
        count = sum(int(part.sum()) for part in self.counts)
        return math.fsum(float(part.sum()) for part in self.sums) / count if count else math.nan


def ppl_ratio(sparse: Losses, dense: Losses) -> float:
    """exp(loss_sparse - loss_dense), infinite where that is beyond floating point; NaN where nothing is predicted."""
    increase = sparse.value - dense.value
    return math.inf if increase > math.log(sys.float_info.max) else math.exp(increase)


def _predicted(batch: Batch) -> Tensor:
    """Tokens to predict of each window, (windows,) int64, on the CPU."""
    if batch.targets is None:
        return torch.zeros(batch.windows, dtype=torch.int64)
    return (batch.targets != IGNORED).reshape(batch.windows, -1).sum(1).cpu()


def mean_losses(model: nn.Module, batches: Iterable[Batch]) -> Losses:
    """The losses of `model` on `batches`."""
    losses = Losses()
    for batch in batches:
        losses.add(model, batch)
    return losses


def forward(model: nn.Module, batch: Batch) -> object:
    """The model's output on `batch`, without a cache of keys and values."""
    no_cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.inputs.items())
    with explained(f"{type(model).__name__} did not run on {shapes}", "correct the batches, or choose another model"):
        return model(**batch.inputs, **no_cache)


def run_backbone(model: PreTrainedModel, batch: Batch) -> None:
    """Run all layers but not the language-model head, for hooks to see the activations."""
    forward(model.base_model, batch)
