"""How often neurons are active, how many a token activates, and whether thresholds carry over to other kinds of text.

Text of any length is streamed through the dense model. Activity is judged by fixed `Thresholds` on the
activations of the dense run (arXiv 2411.02335, section 3). Only counts are kept, one per neuron and domain and one per
layer and vocabulary token, so memory does not grow with the text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsity_utils.console import InputError
from sparsity_utils.models.shapes import representative_layers
from sparsity_utils.neurons.find import FFN, find_ffns, layer_count
from sparsity_utils.neurons.hooks import check_layers, observe_neurons
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.metrics import Batches, apply_thresholds, measure_sparsity
from sparsity_utils.sparsity.passes import Batch, checked, run_backbone

DEAD = 1e-3  # a neuron active on a smaller share of tokens is dead (arXiv 2411.02335)
NEURON = ["layer", "expert", "neuron"]


@dataclass(frozen=True, eq=False)
class Patterns:
    """What `activation_patterns` counted.

    frequencies: one row per domain and neuron: domain, layer, expert, neuron, frequency (share of `tokens` on which it
        is active; NaN without any), tokens (seen by its FFN: in a mixture of experts those routed to its expert).
    vocabulary: one row per vocabulary token that occurs, over all domains: token_id, count, activation_ratio
        (mean over its occurrences and all layers), first, middle and last (the same in one layer each, as
        `representative_layers` names them; NaN where the model has no such layer).
    """

    frequencies: pd.DataFrame
    vocabulary: pd.DataFrame


def activation_patterns(model: PreTrainedModel, domains: Mapping[str, Batches], thresholds: Thresholds) -> Patterns:
    """Activation frequency of every neuron in every domain, activation ratio of every vocabulary token.

    Args:
        model: a transformers model of one text per row; left as it was.
        domains: batches of each kind of text, as `measure_sparsity` takes them; each is read once. Tokens count where
            attention_mask is 1.
        thresholds: one value per layer, such as the `thresholds` of a `SparsityReport` of this model.

    Raises `InputError` without domains, for encoder-decoders and models of no text, for thresholds of another number of
    layers, and for unusable batches.
    """
    if not domains:
        raise InputError("No domain was given: pass a mapping from a name to its batches, such as {'code': batches}.")
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise InputError(
            f"{type(model).__name__} does not read one text per row: activation patterns are of models that do."
        )
    ffns = find_ffns(model)
    layers = layer_count(ffns)
    check_layers(thresholds, ffns)
    tokens = _TokenCounts(layers, model.get_input_embeddings().num_embeddings, model.device)
    frequencies = []
    with evaluating(model):
        for domain, batches in domains.items():
            neurons = _NeuronCounts(ffns, model.device)
            for batch in checked(model, batches, domain):
                tokens.add_occurrences(batch)
                with observe_neurons(model, partial(_count, thresholds, batch, neurons, tokens)):
                    run_backbone(model, batch)
            frequencies.append(neurons.table().assign(domain=domain))
    table = pd.concat(frequencies, ignore_index=True)
    return Patterns(table[["domain", *NEURON, "frequency", "tokens"]], tokens.table())


def over_domains(frequencies: pd.DataFrame) -> pd.DataFrame:
    """The `frequencies` of all domains together, each weighted by its tokens: layer, expert, neuron, frequency, tokens.

    A neuron whose expert saw no token has frequency NaN.
    """
    active = (frequencies["frequency"] * frequencies["tokens"]).rename("active")
    sums = pd.concat([frequencies[[*NEURON, "tokens"]], active], axis=1).groupby(NEURON, sort=True).sum()
    return sums.assign(frequency=sums["active"] / sums["tokens"])[["frequency", "tokens"]].reset_index()


def dead_neurons(frequencies: pd.DataFrame) -> pd.DataFrame:
    """Neurons active on less than 0.1% of the tokens of all domains together: layer, neurons, dead, dead_share.

    Neurons of an expert that saw no token are not counted at all.
    """
    seen = over_domains(frequencies).dropna(subset="frequency")
    counts = seen.assign(dead=seen["frequency"] < DEAD).groupby("layer")["dead"].agg(["size", "sum", "mean"])
    return counts.set_axis(["neurons", "dead", "dead_share"], axis=1).reset_index()


def _count(
    thresholds: Thresholds,
    batch: Batch,
    neurons: "_NeuronCounts",
    tokens: "_TokenCounts",
    ffn: FFN,
    s: Tensor,
    h: Tensor,
    rows: Tensor,
) -> None:
    """The callback of one FFN and batch: s, h (rows, d_ff); `rows` tells which token each is of, (rows,)."""
    real = batch.real(ffn, rows)
    active = thresholds.active(ffn, s[real], h[real])  # (real rows, d_ff)
    neurons.add(ffn, active)
    tokens.add(ffn, batch.inputs["input_ids"].flatten()[rows[real]], active)


class _NeuronCounts:
    """How often each neuron of each FFN was active, and on how many tokens it could have been."""

    def __init__(self, ffns: list[FFN], device: torch.device) -> None:
        self.active = {(ffn.layer, ffn.expert): torch.zeros(ffn.d_ff, dtype=torch.long, device=device) for ffn in ffns}
        self.tokens = dict.fromkeys(self.active, 0)

    def add(self, ffn: FFN, active: Tensor) -> None:
        self.active[ffn.layer, ffn.expert] += active.sum(0)
        self.tokens[ffn.layer, ffn.expert] += len(active)

    def table(self) -> pd.DataFrame:
        """layer, expert, neuron, frequency, tokens."""
        tables = []
        for (layer, expert), active in self.active.items():
            tokens = self.tokens[layer, expert]
            frequency = active.double().div(tokens).cpu().numpy()  # (d_ff,), NaN without tokens
            columns = {"layer": layer, "expert": expert, "neuron": range(len(frequency))}
            tables.append(pd.DataFrame({**columns, "frequency": frequency, "tokens": tokens}))
        return pd.concat(tables)


class _TokenCounts:
    """How many neurons each vocabulary token activated in each layer."""

    def __init__(self, layers: int, vocabulary: int, device: torch.device) -> None:
        self.occurrences = torch.zeros(vocabulary, dtype=torch.long, device=device)
        # A token counts once in each FFN that sees it: once per layer, or once per expert it is routed to.
        self.active = torch.zeros(layers, vocabulary, dtype=torch.long, device=device)
        self.neurons = torch.zeros_like(self.active)

    def add_occurrences(self, batch: Batch) -> None:
        ids = batch.inputs["input_ids"]
        ids = ids.flatten() if batch.mask is None else ids[batch.mask]
        self.occurrences += torch.bincount(ids, minlength=len(self.occurrences))

    def add(self, ffn: FFN, ids: Tensor, active: Tensor) -> None:
        """`ids` (rows,): the vocabulary token of each row of `active` (rows, d_ff)."""
        self.active[ffn.layer].index_add_(0, ids, active.sum(1))
        self.neurons[ffn.layer] += torch.bincount(ids, minlength=len(self.occurrences)) * ffn.d_ff

    def table(self) -> pd.DataFrame:
        """token_id, count, activation_ratio, first, middle, last; only tokens that occurred."""
        ratios = pd.DataFrame((self.active.double() / self.neurons).cpu().numpy().T)  # (vocabulary, layers)
        picked = representative_layers(ratios.shape[1])
        table = pd.DataFrame(
            {"token_id": ratios.index, "count": self.occurrences.cpu().numpy(), "activation_ratio": ratios.mean(axis=1)}
            | {part: ratios[picked[part]] if part in picked else float("nan") for part in ("first", "middle", "last")}
        )
        return table[table["count"] > 0].reset_index(drop=True)


def transfer_matrix(model: nn.Module, domains: Mapping[str, tuple[Batches, Batches]], p: float = 1.0) -> pd.DataFrame:
    """CETT-PPL-p% solved on one domain's calibration batches and applied to every domain's evaluation batches.

    Args:
        model: as `measure_sparsity` takes it.
        domains: (calibration, evaluation) batches of each kind of text, of different documents. The evaluation batches
            are read once per domain: give lists.
        p: accepted increase of perplexity in percent.

    Returns: one row per ordered pair of domains: calibrated_on, applied_to, activation_ratio, ppl_ratio and cett, as
        `SparsityReport` defines them, on the evaluation batches; note (empty, or how the solution should be read).

    Raises `InputError` without domains and where `measure_sparsity` does.
    """
    if not domains:
        raise InputError(
            "No domain was given: pass a mapping from a name to its (calibration, evaluation) batches, "
            "such as {'code': (calibration, evaluation)}."
        )
    solved = {
        domain: measure_sparsity(model, evaluation, "cett-ppl", p, calibration)
        for domain, (calibration, evaluation) in domains.items()
    }
    rows = []
    for calibrated_on, own in solved.items():
        for applied_to, (_, evaluation) in domains.items():
            report = own
            if applied_to != calibrated_on:
                report = apply_thresholds(model, evaluation, own.thresholds, dense=solved[applied_to].dense)
            rows.append(
                {
                    "calibrated_on": calibrated_on,
                    "applied_to": applied_to,
                    "activation_ratio": report.activation_ratio,
                    "ppl_ratio": report.ppl_ratio,
                    "cett": report.cett,
                    "note": own.note,
                }
            )
    return pd.DataFrame(rows)
