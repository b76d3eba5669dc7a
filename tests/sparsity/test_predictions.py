"""Predictions token by token and activation ratios by document, against the literal version."""

import literal_metrics as literal
import numpy as np
import pytest
import torch
from metric_cases import model_for
from transformers import T5Config, T5ForConditionalGeneration

from sparsity_utils.console import InputError
from sparsity_utils.neurons.hooks import sparse_neurons
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.predictions import by_document, document_activity, fat_thresholds, predictions

RULES = [("top-k", (5, 9)), ("top-k-norm", (7, 3)), ("fat", (0.2, 0.4)), ("cett", (0.3, 0.1))]


def windows(seed=0, shapes=((3, 9), (2, 7))):
    """Batches without padding; documents 0, 1, 0 and then 4, 5: a document may have several windows."""
    generator = torch.Generator().manual_seed(seed)
    documents = (torch.tensor([0, 1, 0]), torch.tensor([4, 5]))
    return [
        {"input_ids": torch.randint(23, shape, generator=generator), "documents": owners}
        for shape, owners in zip(shapes, documents, strict=True)
    ]


def of_each_document(batches):
    """The windows of each document as batches of their own, for the literal version."""
    found = {}
    for batch in batches:
        for ids, document in zip(batch["input_ids"], batch["documents"].tolist(), strict=True):
            found.setdefault(document, []).append({"input_ids": ids[None]})
    return found


def test_each_token_is_predicted_as_the_model_does():
    model, batches = model_for("silu"), windows()
    table = predictions(model, batches)
    assert len(table) == 3 * 8 + 2 * 6
    for document, own in of_each_document(batches).items():
        rows, expected = table[table["document"] == document], []
        for batch in own:
            ids = batch["input_ids"]
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0, :-1].double()
            losses = torch.logsumexp(scores, -1) - scores.gather(1, ids[0, 1:, None])[:, 0]
            expected += zip(ids[0, 1:].tolist(), losses.tolist(), scores.argmax(-1).tolist(), strict=True)
        for row, (target, loss, likeliest) in zip(rows.itertuples(), expected, strict=True):
            assert (row.target, row.likeliest) == (target, likeliest) and row.loss == pytest.approx(loss, abs=1e-9)


def test_sums_over_a_document_are_those_of_its_tokens():
    model, batches = model_for("relu"), windows()
    dense = predictions(model, batches)
    with sparse_neurons(model, Thresholds("top-k", (2, 2))):
        sparse = predictions(model, batches)
    table = by_document(dense, sparse).set_index("document")
    assert table["tokens"].to_dict() == {0: 16, 1: 8, 4: 6, 5: 6}
    for document, row in table.iterrows():
        pairs = list(zip(dense[dense["document"] == document].itertuples(), sparse.itertuples(), strict=False))
        own = sparse[sparse["document"] == document]
        assert (
            row["loss"] == pytest.approx(own["loss"].sum())
            and row["right"] == (own["likeliest"] == own["target"]).sum()
        )
        agreed = (own["likeliest"].to_numpy() == np.array([a.likeliest for a, _ in pairs])).sum()
        assert row["agreed"] == agreed
    assert table["agreed"].sum() < len(dense)


def test_activity_of_a_document_is_the_mean_over_layers_of_its_tokens():
    model, batches = model_for("silu"), windows()
    table = document_activity(model, batches, [Thresholds(rule, values) for rule, values in RULES]).set_index(
        "document"
    )
    for document, own in of_each_document(batches).items():
        layers = literal.all_neurons(model, "silu", own)
        for column, (rule, values) in enumerate(RULES):
            shares = [
                1 - float(literal.inactive(rule, value, s, h, n).double().mean())
                for value, (s, h, n) in zip(values, layers, strict=True)
            ]
            assert table.loc[document, column] == pytest.approx(sum(shares) / 2, abs=1e-12)


def test_fat_meets_a_share_of_all_neurons():
    model, batches = model_for("silu"), windows()
    ratios = (0.1, 0.35, 0.8)
    rules, activity = fat_thresholds(model, batches, ratios)
    sizes = torch.cat([s.abs().flatten() for s, _, _ in literal.all_neurons(model, "silu", batches)]).double()
    for rule, ratio in zip(rules, ratios, strict=True):
        assert len(set(rule.values)) == 1 and float((sizes >= rule.values[0]).double().mean()) == pytest.approx(
            ratio, abs=2e-3
        )
    again = document_activity(model, batches, rules)
    np.testing.assert_allclose(activity.set_index("document"), again.set_index("document"), atol=1e-12)


def test_what_cannot_be_measured_is_refused():
    config = T5Config(vocab_size=23, d_model=8, d_ff=12, num_layers=1, num_heads=2, d_kv=4, decoder_start_token_id=0)
    with pytest.raises(InputError, match="T5ForConditionalGeneration does not predict the next token"):
        predictions(T5ForConditionalGeneration(config), windows())
    with pytest.raises(InputError, match="thresholds are for 3 layers"):
        document_activity(model_for("relu"), windows(), [Thresholds("fat", (0.1,) * 3)])
