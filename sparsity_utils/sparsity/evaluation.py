"""One pass over the evaluation batches: activations and losses under given thresholds, and their standard errors.

Everything is summed while it is read. What is kept of a window are its losses and, on request, its tokens.

Standard errors over documents come from the same pass by a Poisson bootstrap, which keeps no values of single
documents. Each document enters each replicate a Poisson(1) number of times, which for many documents is resampling with
replacement (Hanley & MacGibbon 2006, doi:10.1016/j.cmpb.2006.04.006). These weights follow from the document's
number alone, so that a document may come in several parts, with others between them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsity_utils.console import InputError
from sparsity_utils.neurons.find import FFN, find_ffns, layer_count
from sparsity_utils.neurons.hooks import check_layers, observe_neurons, sparse_neurons
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.error_curve import relative_errors
from sparsity_utils.sparsity.passes import Batch, Losses, run_backbone

REPLICATES = 400  # their spread is known to 3.5%
COVERAGE = (5, 95)  # percentiles: a 90% interval


class DocumentBootstrap:
    """Sums over resampled documents: replicate r is sum_d w_dr * values_d, w_dr ~ Poisson(1)."""

    def __init__(self, columns: int, seed: int = 0) -> None:
        """`columns`: number of quantities that are summed. Bootstraps with one seed give a document equal weights."""
        self.seed, self.replicates = seed, np.zeros((REPLICATES, columns))
        self._seen: set[int] = set()
        self._last: int | None = None
        self._weights: np.ndarray = np.empty(0)

    def add(self, document: int, values: np.ndarray) -> None:
        """Add a part of `document`: `values`, (columns,)."""
        if document != self._last:
            self._weights = np.random.default_rng([self.seed, document]).poisson(1.0, REPLICATES)
            self._last = document
            self._seen.add(document)
        self.replicates += self._weights[:, None] * values

    @property
    def documents(self) -> int:
        """Number of different documents added."""
        return len(self._seen)


def standard_error(replicates: np.ndarray, documents: int) -> float:
    """Standard deviation of an estimate over its replicates, (REPLICATES,); NaN with fewer than two documents."""
    known = replicates[np.isfinite(replicates)]  # with few documents a replicate may be empty
    return float(known.std(ddof=1)) if documents > 1 and len(known) > 1 else math.nan


def interval(replicates: np.ndarray, documents: int, coverage: tuple[float, float] = COVERAGE) -> tuple[float, float]:
    """Percentile interval of an estimate, 90% by default; NaN with fewer than two documents."""
    known = replicates[np.isfinite(replicates)]
    if documents < 2 or len(known) < 2:
        return math.nan, math.nan
    low, high = np.percentile(known, coverage)
    return float(low), float(high)


@dataclass
class LayerTally:
    """Sums over the evaluation tokens of one layer. A row is a token, or a token at one of its routed experts."""

    ffn: FFN  # the layer's only one, or the first of its routed experts
    tokens: int = 0
    rows: int = 0
    active: int = 0  # neurons, over all rows
    nonzero: int = 0  # neurons with s != 0, likewise
    errors: float = 0.0  # sum over rows of ||sum_{i in D} n_i|| / ||FFN(x)||
    skipped: int = 0  # rows with a zero FFN output

    @property
    def activation_ratio(self) -> float:
        """active / (rows * d_ff), the share of active neurons; in a mixture, of the experts that tokens reach."""
        return self.active / (self.rows * self.ffn.d_ff)

    @property
    def ratio_of_all_neurons(self) -> float:
        """active / (tokens * experts * d_ff), the share among all neurons of the layer, in every expert."""
        return self.active / (self.tokens * self.ffn.experts * self.ffn.d_ff)

    @property
    def nonzero_share(self) -> float:
        """nonzero / (rows * d_ff), the share with s != 0 among the same neurons as for `activation_ratio`."""
        return self.nonzero / (self.rows * self.ffn.d_ff)

    @property
    def cett(self) -> float:
        """Mean relative truncation error, errors / (rows - skipped); NaN where every output is zero."""
        counted = self.rows - self.skipped
        return self.errors / counted if counted else math.nan


@dataclass
class Evaluation:
    """The sums that a pass over the evaluation batches makes."""

    model: PreTrainedModel
    thresholds: Thresholds
    per_token: bool = False
    layers: list[LayerTally] = field(init=False)
    dense: Losses = field(default_factory=Losses)
    sparse: Losses = field(default_factory=Losses)
    bootstrap: DocumentBootstrap = field(init=False)  # active and rows of each layer; loss dense, sparse; predicted
    tables: list[pd.DataFrame] = field(default_factory=list)  # with per_token, one per batch

    def __post_init__(self) -> None:
        ffns = find_ffns(self.model)
        check_layers(self.thresholds, ffns)
        firsts = {ffn.layer: ffn for ffn in reversed(ffns)}
        self.layers = [LayerTally(firsts[layer]) for layer in range(layer_count(ffns))]
        self.bootstrap = DocumentBootstrap(2 * len(self.layers) + 3)
        one_text = self.model.main_input_name == "input_ids" and not self.model.config.is_encoder_decoder
        if self.per_token and not one_text:
            raise InputError(
                f"{type(self.model).__name__} does not take one text per row: per-token results are for models that do."
            )

    def run(self, batches: Iterable[Batch], known: tuple[Losses | None, Losses | None]) -> None:
        """Read `batches` once. `known`: dense and sparse losses of these very batches; None: computed here."""
        for place, batch in enumerate(batches):
            windows = _Windows(self, batch)
            with observe_neurons(self.model, windows.add):
                if known[0] is None and batch.targets is not None:
                    self.dense.add(self.model, batch)
                else:
                    run_backbone(self.model, batch)
                    self.dense.copy(known[0], place, batch)
            if known[1] is None and batch.targets is not None:
                with sparse_neurons(self.model, self.thresholds):
                    self.sparse.add(self.model, batch)
            else:
                self.sparse.copy(known[1], place, batch)
            self._add_windows(batch, windows)

    def _add_windows(self, batch: Batch, windows: "_Windows") -> None:
        losses = (self.dense.sums[-1], self.sparse.sums[-1], self.dense.counts[-1])
        columns = torch.cat([windows.active.cpu(), windows.rows.cpu(), torch.stack(losses)]).double().numpy()
        for document, values in zip(batch.documents.tolist(), columns.T, strict=True):
            self.bootstrap.add(document, values)
        if self.per_token:
            self.tables.append(windows.table())

    def mean(self, quantity: str) -> float:
        """Mean over layers of a quantity of `LayerTally`."""
        return math.fsum(getattr(tally, quantity) for tally in self.layers) / len(self.layers)

    def replicates(self) -> tuple[np.ndarray, np.ndarray]:
        """Activation ratio (mean over layers) and PPL ratio of each bootstrap replicate, (REPLICATES,) each.

        Of the sums of a replicate: active / (rows * d_ff), and exp((loss sparse - loss dense) / predicted tokens).
        """
        layers, sums = len(self.layers), self.bootstrap.replicates
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            ratios = sums[:, :layers] / (sums[:, layers : 2 * layers] * [tally.ffn.d_ff for tally in self.layers])
            ppl_ratios = np.exp((sums[:, -2] - sums[:, -3]) / sums[:, -1])
        return ratios.mean(1), ppl_ratios


class _Windows:
    """The sums of one batch, by window."""

    def __init__(self, evaluation: Evaluation, batch: Batch) -> None:
        self.evaluation, self.batch = evaluation, batch
        self.seen: set[int] = set()
        device, layers = next(iter(batch.inputs.values())).device, len(evaluation.layers)
        self.active = torch.zeros(layers, batch.windows, dtype=torch.int64, device=device)
        self.rows = torch.zeros(layers, batch.windows, dtype=torch.int64, device=device)
        positions = batch.inputs["input_ids"].numel() if evaluation.per_token else 0
        self.by_token = torch.zeros(2, layers, positions, dtype=torch.int64, device=device)  # active neurons, rows

    def add(self, ffn: FFN, s: Tensor, h: Tensor, tokens: Tensor) -> None:
        """One observation: `s` and `h` (rows, d_ff), `tokens` (rows,)."""
        tally, real = self.evaluation.layers[ffn.layer], self.batch.real(ffn, tokens)
        if ffn.layer not in self.seen:  # once, however many of its experts ran
            self.seen.add(ffn.layer)
            tally.tokens += self.batch.real_tokens(ffn, tokens)
        s, h, tokens = s[real], h[real], tokens[real]
        active = self.evaluation.thresholds.active(ffn, s, h)
        errors, zero = relative_errors(ffn, h, active)
        counts, window = active.sum(1), self.batch.window(ffn, tokens)
        tally.rows += len(h)
        tally.active += int(counts.sum())
        tally.nonzero += int(torch.count_nonzero(s))
        tally.errors += float(errors.sum(dtype=torch.float64))
        tally.skipped += int(zero.sum())
        self.active[ffn.layer].index_add_(0, window, counts)
        self.rows[ffn.layer].index_add_(0, window, torch.ones_like(window))
        if self.evaluation.per_token:
            self.by_token[0, ffn.layer].index_add_(0, tokens, counts)
            self.by_token[1, ffn.layer].index_add_(0, tokens, torch.ones_like(tokens))

    def table(self) -> pd.DataFrame:
        """One row per real token: document, position in the text, token_id and the activation ratio in each layer."""
        ids, mask = self.batch.inputs["input_ids"], self.batch.mask
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        window, position = real.cpu().nonzero(as_tuple=True)
        d_ff = torch.tensor([tally.ffn.d_ff for tally in self.evaluation.layers])[:, None]
        ratios = (self.by_token[0].cpu() / (self.by_token[1].cpu() * d_ff))[:, real.cpu().flatten()]  # (layers, tokens)
        head = {"document": self.batch.documents[window], "position": position, "token_id": ids[real].cpu()}
        layers = {f"layer_{number}": values for number, values in enumerate(ratios)}
        return pd.DataFrame({name: values.numpy() for name, values in (head | layers).items()})
