"""What a model predicts token by token, dense or with neurons left out: perplexity is not all that a user may lose.

Each window belongs to one document.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsity_utils.console import check
from sparsity_utils.neurons.find import FFN, find_ffns, layer_count, widened
from sparsity_utils.neurons.hooks import check_layers, observe_neurons
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.inputs import IGNORED, predicts_next_token
from sparsity_utils.sparsity.metrics import Batches
from sparsity_utils.sparsity.passes import Batch, checked, forward, run_backbone

SIZES = (-8.0, 4.0, 12_000)  # of the histogram of log10 |s|: its ends and bins, each 0.23% wide


class WindowPredictions(NamedTuple):
    """What is predicted of one window, a number for each token that is predicted, on the model's device."""

    target: Tensor  # ids
    loss: Tensor  # nats
    likeliest: Tensor  # the id of the largest logit


def token_predictions(model: PreTrainedModel, batch: Batch) -> Iterator[WindowPredictions]:
    """The predictions of each window of `batch`. Raises InputError for a loss that is NaN or infinite."""
    logits: Tensor = getattr(forward(model, batch), "logits", None)  # (windows, length, vocabulary)
    for scores, targets in zip(logits, batch.targets, strict=True):  # a window at a time: float32 logits are large
        predicted = targets != IGNORED
        scores, targets = widened(scores[predicted]), targets[predicted]
        losses = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
        finite = bool(losses.isfinite().all())
        check(finite, "The model's logits give a loss that is NaN or infinite: check its weights.")
        yield WindowPredictions(targets, losses, scores.argmax(-1))


def predictions(model: PreTrainedModel, batches: Batches) -> pd.DataFrame:
    """One row per predicted token: document, target, loss (nats), likeliest (the id of the largest logit).

    Raises InputError for a model that does not predict the next token, and for batches that cannot be used.
    """
    check(predicts_next_token(model), f"{type(model).__name__} does not predict the next token; give one that does.")
    rows = []
    with evaluating(model):
        for batch in checked(model, batches, "evaluation"):
            for document, found in zip(batch.documents.tolist(), token_predictions(model, batch), strict=True):
                columns = {name: values.cpu().numpy() for name, values in found._asdict().items()}
                rows.append(pd.DataFrame({"document": document, **columns}))
    return pd.concat(rows, ignore_index=True)


def by_document(dense: pd.DataFrame, sparse: pd.DataFrame) -> pd.DataFrame:
    """Two `predictions` of the same tokens as sums over each document.

    One row per document: tokens; loss_dense and loss, in nats; right_dense and right, tokens whose likeliest id is the
    target; agreed, tokens whose likeliest id is the same in both.
    """
    columns = {
        "tokens": 1,
        "loss_dense": dense["loss"].astype(float),
        "loss": sparse["loss"].astype(float),
        "right_dense": dense["likeliest"] == dense["target"],
        "right": sparse["likeliest"] == dense["target"],
        "agreed": sparse["likeliest"] == dense["likeliest"],
    }
    return pd.DataFrame(columns, index=dense.index).groupby(dense["document"]).sum().reset_index()


def document_activity(model: PreTrainedModel, batches: Batches, rules: Sequence[Thresholds]) -> pd.DataFrame:
    """The activation ratio of each document under several thresholds, in one dense pass: document, and a column each.

    Columns are numbered as `rules`. A ratio is the mean over layers of the share of active neurons per token, as
    `SparsityReport.activation_ratio` is. Raises InputError for thresholds of another number of layers.
    """
    ffns = find_ffns(model)
    for rule in rules:
        check_layers(rule, ffns)
    active: dict[tuple[int, int], np.ndarray] = {}  # (document, layer) -> neurons under each rule, and seen: sums

    def add(ffn: FFN, s: Tensor, h: Tensor, document: int) -> None:
        counts = [int(rule.active(ffn, s, h).sum()) for rule in rules] + [s.numel()]
        active[document, ffn.layer] = active.get((document, ffn.layer), 0) + np.array(counts)

    _each_document(model, batches, add)
    index = pd.MultiIndex.from_tuples(active, names=["document", "layer"])
    sums = pd.DataFrame(list(active.values()), index=index)
    ratios = sums.div(sums[len(rules)], axis=0)
    return ratios[list(range(len(rules)))].groupby("document").mean().reset_index()


def fat_thresholds(
    model: PreTrainedModel, batches: Batches, ratios: Sequence[float]
) -> tuple[list[Thresholds], pd.DataFrame]:
    """The eps of FAT that keep given shares of all neurons, and `document_activity` under them, in one dense pass.

    eps is an end of a bin of the histogram SIZES of log10 |s|: it meets a share to about 0.05 points. A size beyond
    the ends counts as one at the end.
    """
    low, high, bins = SIZES
    counts: dict[int, Tensor] = defaultdict(lambda: torch.zeros(bins, dtype=torch.float64))  # of each document, (bins,)

    def add(ffn: FFN, s: Tensor, h: Tensor, document: int) -> None:
        counts[document] += torch.histc(widened(s).abs().log10().clamp(low, high), bins, low, high).double().cpu()

    _each_document(model, batches, add)
    above = {document: found.flip(0).cumsum(0).flip(0) / found.sum() for document, found in counts.items()}
    whole = torch.stack(list(counts.values())).sum(0)
    shares = whole.flip(0).cumsum(0).flip(0) / whole.sum()  # with |s| at or above the lower end of each bin, (bins,)
    places = [int((shares - ratio).abs().argmin()) for ratio in ratios]
    layers = layer_count(find_ffns(model))
    rules = [Thresholds("fat", (10 ** (low + (high - low) * place / bins),) * layers) for place in places]
    rows = [{"document": document, **dict(enumerate(share[places].tolist()))} for document, share in above.items()]
    return rules, pd.DataFrame(rows)


def _each_document(model: PreTrainedModel, batches: Batches, add: Callable[[FFN, Tensor, Tensor, int], None]) -> None:
    """A dense pass that calls `add(ffn, s, h, document)` with the rows of each window at each FFN."""
    with evaluating(model):
        for batch in checked(model, batches, "evaluation"):

            def visit(ffn: FFN, s: Tensor, h: Tensor, tokens: Tensor, batch=batch) -> None:
                window = batch.window(ffn, tokens)
                for place, document in enumerate(batch.documents.tolist()):
                    rows = window == place
                    add(ffn, s[rows], h[rows], document)

            with observe_neurons(model, visit):
                run_backbone(model, batch)
