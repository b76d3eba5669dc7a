"""What a report says of documents, tokens and losses, on models that predict the next token and on others."""

import math

import families
import literal_metrics as literal
import numpy as np
import pytest
import torch
from metric_cases import EXACT, model_for, padded_batches
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    OlmoeConfig,
    OlmoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from sparsity_utils.console import InputError
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity import metrics
from sparsity_utils.sparsity.evaluation import REPLICATES
from sparsity_utils.sparsity.metrics import apply_thresholds, measure_sparsity
from sparsity_utils.sparsity.passes import checked, joined


def text(windows, length=12, seed=0, vocabulary=23):
    return torch.randint(vocabulary, (windows, length), generator=torch.Generator().manual_seed(seed))


def test_the_standard_error_is_that_of_documents_measured_one_by_one():
    model, ids = model_for("silu"), text(40)
    rule = Thresholds("fat", (0.15, 0.15))
    report = apply_thresholds(model, [{"input_ids": part} for part in ids.split(7)], rule)
    shares = [apply_thresholds(model, [{"input_ids": row[None]}], rule).activation_ratio for row in ids]
    assert report.documents == 40 and report.metric == "fat"
    assert report.activation_ratio == pytest.approx(np.mean(shares), abs=1e-12)
    assert report.standard_error == pytest.approx(np.std(shares) / math.sqrt(40), rel=0.12)
    low, high = report.interval
    assert low < report.activation_ratio < high
    assert report.ppl_ratio_interval[0] < report.ppl_ratio < report.ppl_ratio_interval[1]


def test_windows_of_one_document_are_resampled_together():
    model, ids = model_for("silu"), text(24).repeat_interleave(2, 0)
    rule = Thresholds("fat", (0.15, 0.15))
    apart = apply_thresholds(model, [{"input_ids": ids}], rule)
    together = apply_thresholds(model, [{"input_ids": ids, "documents": torch.arange(48) // 2}], rule)
    assert (apart.documents, together.documents) == (48, 24)
    assert together.activation_ratio == apart.activation_ratio
    assert together.standard_error == pytest.approx(apart.standard_error * math.sqrt(2), rel=0.15)
    alone = apply_thresholds(model, [{"input_ids": ids, "documents": torch.zeros(48, dtype=torch.long)}], rule)
    assert math.isnan(alone.standard_error) and math.isnan(alone.interval[0])


def test_the_interval_is_one_of_shares(monkeypatch):
    monkeypatch.setattr(metrics, "_shift", lambda *_: np.linspace(-3, 3, REPLICATES))
    report = measure_sparsity(model_for("gelu"), [{"input_ids": text(8)}], p=5.0)
    assert report.interval == (0.0, 1.0) and report.standard_error < 0.5


@pytest.mark.parametrize("own", [True, False], ids=["same text", "other text"])
def test_the_error_of_cett_ppl_covers_the_choice_of_documents(own):
    """Against the whole measurement, the CETT solved anew, repeated on many draws of documents."""
    model = model_for("gelu")
    with torch.no_grad():
        pool = text(400, 16)
        pool[:, 1:] = model(input_ids=pool).logits.argmax(-1)[:, :-1]  # so that the model predicts it

    def drawn(seed):
        rows = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
        sides = [[{"input_ids": pool[rows[:24]]}], [{"input_ids": pool[rows[24:48]]}]]
        return measure_sparsity(model, sides[0], p=5.0, calibration=None if own else sides[1])

    reports = [drawn(seed) for seed in range(24)]
    spread = np.std([report.activation_ratio for report in reports], ddof=1)
    claimed = np.median([report.standard_error for report in reports])
    held = apply_thresholds(model, [{"input_ids": pool[:24]}], reports[0].thresholds).standard_error
    assert 0.6 < claimed / spread < 1.7
    assert held < claimed  # with the thresholds held, a part of the error is missing


def test_every_token_is_reported_on_request():
    model, batches = model_for("relu"), padded_batches(1)
    report = measure_sparsity(model, batches, "relu", per_token=True)
    table, place = report.per_token, 0
    assert list(table) == ["document", "position", "token_id", "layer_0", "layer_1"]
    assert len(table) == report.tokens and measure_sparsity(model, batches, "relu").per_token is None
    for index, batch in enumerate(batches):
        counts = [(s != 0).double().mean(1) for s, _, _ in literal.all_neurons(model, "relu", [batch])]
        texts = [text["input_ids"][0].tolist() for text in literal.alone(batch)]
        tokens = [(row, *token) for row, text in enumerate(texts) for token in enumerate(text)]
        for number, (row, position, token_id) in enumerate(tokens):
            wanted = [row + 3 * index, position, token_id, *(float(c[number]) for c in counts)]
            assert table.iloc[place].tolist() == pytest.approx(wanted)
            place += 1
    assert table[["layer_0", "layer_1"]].mean().tolist() == pytest.approx(report.layers.activation_ratio.tolist())


def test_a_masked_language_model_needs_labels_for_its_perplexity():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=23, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2)
    model, ids = BertForMaskedLM(config).eval(), text(5)
    bare = measure_sparsity(model, [{"input_ids": ids}], "cett", cett=0.2)
    assert math.isnan(bare.loss_dense) and math.isnan(bare.ppl_ratio) and 0 < bare.activation_ratio < 1
    with pytest.raises(InputError, match="nothing to predict"):
        measure_sparsity(model, [{"input_ids": ids}], p=1.0)
    labels = ids.masked_fill(torch.arange(12) % 3 != 0, -100)
    report = measure_sparsity(model, [{"input_ids": ids, "labels": labels}], "cett", cett=0.2)
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=labels).loss)
    assert report.loss_dense == pytest.approx(expected, abs=1e-5)
    assert report.activation_ratio == bare.activation_ratio
    headless = BertModel(config).eval()
    with pytest.raises(InputError, match="BertModel was given nothing to predict"):
        measure_sparsity(headless, [{"input_ids": ids}], p=1.0)


def test_other_inputs_of_a_text_model_reach_it_and_those_it_does_not_take_are_left_out():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=23, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2)
    model, ids = BertForMaskedLM(config).eval(), text(5)
    batch = {"input_ids": ids, "labels": ids, "token_type_ids": (torch.arange(12) > 4).long().expand_as(ids)}
    with torch.no_grad():
        expected, without = float(model(**batch).loss), float(model(input_ids=ids, labels=ids).loss)
    assert abs(expected - without) > 1e-4
    assert measure_sparsity(model, [batch], "relu").loss_dense == pytest.approx(expected, abs=1e-5)
    decoder = model_for("silu")
    same = [measure_sparsity(decoder, [dict(batch, **more)], "relu") for more in ({}, {"token_type_ids": None})]
    assert same[0].loss_dense == same[1].loss_dense


def test_an_encoder_decoder_is_measured_on_both_its_texts():
    torch.manual_seed(0)
    config = T5Config(vocab_size=23, d_model=12, d_kv=6, d_ff=20, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model, ids, labels = T5ForConditionalGeneration(config).eval(), text(3, 7), text(3, 5, seed=1)
    labels[0, 3:] = -100
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    report = measure_sparsity(model, [batch], "relu")
    with torch.no_grad():
        expected = float(model(**batch).loss)
    assert report.loss_dense == pytest.approx(expected, abs=1e-5) and len(report.layers) == 4
    alone = {"input_ids": ids[1:2, :4], "labels": labels[1:2]}  # without its padding
    one = measure_sparsity(model, [{key: value[1:2] for key, value in batch.items()}], "relu")
    cut = measure_sparsity(model, [alone], "relu")
    assert one.layers.activation_ratio.tolist() == pytest.approx(cut.layers.activation_ratio.tolist(), abs=1e-6)
    with pytest.raises(InputError, match="an encoder-decoder needs its second text"):
        measure_sparsity(model, [{"input_ids": ids}], "relu")
    with pytest.raises(InputError, match="per-token results are for models that do"):
        measure_sparsity(model, [batch], "relu", per_token=True)


def test_an_image_classifier_is_measured_on_its_patches():
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=8,
                  patch_size=4, num_labels=3)
    ).eval()  # fmt: skip
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    report = measure_sparsity(model, [{"pixel_values": images, "labels": labels}], "cett", cett=0.2, tolerance=EXACT)
    assert report.tokens == 6 * 5 and report.documents == 6
    with torch.no_grad():
        expected = float(model(pixel_values=images, labels=labels).loss)
    assert report.loss_dense == pytest.approx(expected, abs=1e-5)
    assert report.cett == pytest.approx(0.2, abs=1e-2)
    with pytest.raises(InputError, match="per-token results are for models that do"):
        measure_sparsity(model, [{"pixel_values": images}], "relu", per_token=True)


@pytest.mark.parametrize("metric, options", [("relu", {}), ("cett", {"cett": 0.2})])
def test_nan_activations_are_refused_also_without_a_loss(metric, options):
    model, batch = families.build("bert"), families.inputs("bert")
    model.bert.encoder.layer[1].intermediate.dense.weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match=r"The outputs of bert\.encoder\.layer\.1 are NaN or infinite"):
        measure_sparsity(model, [batch], metric, **options)


def test_documents_must_be_one_number_for_each_row():
    model, ids = model_for("relu"), text(4)
    for wrong in (torch.arange(3), torch.tensor([0, 1, 2, -1]), torch.arange(4) / 2, [0, 1, 2, 3]):
        with pytest.raises(InputError, match="unusable documents"):
            measure_sparsity(model, [{"input_ids": ids, "documents": wrong}], "relu")
    assert REPLICATES >= 100


@pytest.mark.parametrize("family, name", [("bert", "token_type_ids"), ("llama", "position_ids")])
def test_whatever_else_a_model_takes_beside_its_tokens_reaches_it(family, name):
    model, batch = families.build(family), families.inputs(family)
    batch |= {"labels": batch["input_ids"], name: torch.arange(7).expand(3, 7) % 2}
    model.config.use_cache = False  # as when measured: positions that restart are packed texts, which a cache hides
    with torch.no_grad():
        expected = float(model(**batch).loss)
    assert measure_sparsity(model, [batch], "relu").loss_dense == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match="batch 0 has inputs_embeds beside input_ids: leave them out"):
        measure_sparsity(model, [{**batch, "inputs_embeds": torch.zeros(3, 7, 16)}], "relu")


@pytest.mark.parametrize(
    "labels, sentence",
    [
        (torch.tensor([0, 1, 7]), r"Labels of shape \(3,\) up to 7 do not fit logits of ViT.*, \(3, 2\)"),
        (torch.zeros(3, 5, dtype=torch.long), r"Labels of shape \(3, 5\)"),
        (torch.tensor([0, 1]), "evaluation batch 0 has unusable labels.*3 rows"),
        (torch.tensor([0.0, 1, 1]), "unusable labels"),
        ([0, 1, 1], "unusable labels"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, sentence):
    model = families.randomised(ViTForImageClassification(families.config("vit", 16, 24)))
    batch = families.inputs("vit")
    with pytest.raises(InputError, match=sentence):
        measure_sparsity(model, [{**batch, "labels": labels}], "relu")
    batch["labels"] = torch.tensor([0, 1, 1], dtype=torch.int32)
    assert measure_sparsity(model, [batch], "relu").loss_dense > 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_windows_longer_than_the_context_are_refused(family):
    with pytest.raises(InputError, match="windows of 40 tokens and the model's context is 32"):
        measure_sparsity(families.build(family), [{"input_ids": text(2, 40)}], "relu")


@pytest.mark.parametrize("layers", [1, 3])
def test_thresholds_for_another_number_of_layers_are_refused(layers):
    with pytest.raises(InputError, match=f"for {layers} layers and the model has 2"):
        apply_thresholds(model_for("relu"), [{"input_ids": text(4)}], Thresholds("fat", (0.1,) * layers))


def test_known_losses_of_other_batches_are_refused():
    model, ids = model_for("relu"), text(6)
    of_two, of_three = ([{"input_ids": part} for part in ids.split(size)] for size in (3, 2))
    known = measure_sparsity(model, of_two, "relu").dense
    for other in (of_three, [*of_two, *of_two]):
        with pytest.raises(InputError, match="dense losses given are of other batches"):
            measure_sparsity(model, other, "relu", dense=known)


def test_a_mixture_of_experts_counts_routed_experts_and_all_neurons():
    """Against a loop over tokens and their experts, in float64."""
    torch.manual_seed(0)
    config = OlmoeConfig(vocab_size=23, hidden_size=12, intermediate_size=10, num_hidden_layers=2, num_experts=5,
                         num_experts_per_tok=2, num_attention_heads=2, pad_token_id=None, eos_token_id=None,
                         experts_implementation="eager")  # fmt: skip
    model, batches = OlmoeForCausalLM(config).double().eval(), padded_batches(1)
    report = measure_sparsity(model, batches, "cett", cett=0.3, tolerance=EXACT)
    book = [_routed_rows(model, layer, batches) for layer in range(2)]
    for rows, value, (_, layer) in zip(book, report.thresholds.values, report.layers.iterrows(), strict=True):
        least = value * (1 - 1e-9)  # the threshold is one of these sizes, of a sum in another order
        active = [(n.norm(dim=-1) >= least) & (h != 0) for h, n in rows]
        counted = sum(int(one.sum()) for one in active)
        errors = [float(n[~one].sum(0).norm() / n.sum(0).norm()) for one, (_, n) in zip(active, rows, strict=True)]
        assert layer.experts == 5 and len(rows) == 2 * report.tokens
        assert layer.activation_ratio == pytest.approx(counted / (len(rows) * 10), abs=1e-12)
        assert layer.ratio_of_all_neurons == pytest.approx(counted / (report.tokens * 50), abs=1e-12)
        assert layer.cett == pytest.approx(np.mean(errors), abs=1e-9) and layer.cett == pytest.approx(0.3, abs=0.02)
    assert report.ratio_of_all_neurons == pytest.approx(report.activation_ratio * 2 / 5, abs=1e-12)
    ppl = measure_sparsity(model, batches, p=5.0)
    assert 0 < ppl.target_cett <= 1 and len(ppl.thresholds.values) == 2


def _routed_rows(model, layer, batches):
    """(h (d_ff,), n (d_ff, d)) of every real token at each expert that its router chose."""
    block, rows = model.model.layers[layer].mlp, []
    seen = []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            for x in seen.pop()[batch["attention_mask"].bool()]:
                _, _, chosen = block.gate(x[None])
                for expert in chosen[0].tolist():
                    gate, up = (block.experts.gate_up_proj[expert] @ x).chunk(2)
                    h = gate / (1 + torch.exp(-gate)) * up
                    rows.append((h, h[:, None] * block.experts.down_proj[expert].T))
    handle.remove()
    return rows


def test_thresholds_of_another_model_are_refused():
    with pytest.raises(InputError, match="for 3 layers and the model has 2: use thresholds solved on a model of this"):
        apply_thresholds(model_for("relu"), [{"input_ids": text(4)}], Thresholds("cett", (0.1, 0.1, 0.1)))


def test_what_a_model_caches_while_measured_serves_training_later():
    model, ids, cache = model_for("silu"), text(3), {}

    def scaled(module, args, output):
        return output * cache.setdefault("scale", torch.ones(16, dtype=torch.float64))

    model.model.norm.register_forward_hook(scaled)
    with evaluating(model):
        model(input_ids=ids)
    model(input_ids=ids, labels=ids).loss.backward()


def test_token_ids_may_be_of_32_bits():
    model, both = model_for("silu"), (text(3), text(3).int())
    wide, narrow = (measure_sparsity(model, [{"input_ids": ids}], "relu") for ids in both)
    assert narrow.loss_dense == wide.loss_dense


def test_joined_batches_are_the_same_windows():
    model, ids = model_for("relu"), text(5)
    mask = torch.ones(2, 9, dtype=torch.long)
    batches = [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}, {"input_ids": ids[:2, :9]}]
    batches += [{"input_ids": ids[3:, :9], "attention_mask": mask}, {"input_ids": ids[:2, :9], "attention_mask": mask}]
    read = list(checked(model, batches, "test"))
    whole = joined(read)
    assert [batch.windows for batch in whole] == [5, 2, 4]
    assert torch.equal(whole[0].inputs["input_ids"], ids) and whole[0].documents.tolist() == list(range(5))
    assert torch.equal(whole[2].targets, torch.cat([read[3].targets, read[4].targets]))
    assert whole[2].mask.shape == (4, 9) and whole[1].mask is None
