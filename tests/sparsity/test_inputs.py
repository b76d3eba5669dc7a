"""Which rows of a batch are which tokens, and what a model is given, against each text alone without padding."""

import families
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    FunnelConfig,
    FunnelForMaskedLM,
    LongformerConfig,
    LongformerForMaskedLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    RobertaConfig,
    RobertaForMaskedLM,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from sparsity_utils.console import InputError
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.hooks import observe_neurons
from sparsity_utils.sparsity.metrics import measure_sparsity

IGNORED, LENGTHS = -100, (8, 5, 2)
ENCODER = {
    "vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
BOTH = {
    "vocab_size": 41, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 40,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip


def padded(side, padding=1):
    """Three texts of LENGTHS tokens, padded on one side, with the tokens themselves as labels."""
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, 40, (length,), generator=generator) for length in LENGTHS]
    batch = {name: torch.full((3, 8), fill) for name, fill in
             (("input_ids", padding), ("attention_mask", 0), ("labels", IGNORED))}  # fmt: skip
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(8 - len(text), 8)
        for name, value in (("input_ids", text), ("attention_mask", 1), ("labels", text)):
            batch[name][row, place] = value
    return batch


def alone(batch):
    """Each text of a batch without its padding, (1, tokens)."""
    rows = batch["attention_mask"].bool()
    return [{name: value[row, rows[row]][None] for name, value in batch.items()} for row in range(len(rows))]


def expected(model, batch):
    """Loss as the model itself computes it and share of non-zero neurons by layer, of each text alone."""
    total, count, shifted = 0.0, 0, model.can_generate() and not model.config.is_encoder_decoder
    shares = [[] for _ in find_ffns(model)]
    for text in alone(batch):
        length = text["input_ids"].shape[1]  # a model may pad inside, behind the text

        def keep(ffn, s, h, tokens, length=length):
            shares[ffn.layer].append(s[:length].abs() > 0.3)

        with torch.no_grad(), observe_neurons(model, keep):
            total += float(model(**text).loss) * (length - shifted)
            count += length - shifted
    return total / count, [float(torch.cat(share).double().mean()) for share in shares]


def assert_measured_right(model, batch):
    loss, shares = expected(model, batch)
    report = measure_sparsity(model, [batch], "fat", eps=0.3)
    assert report.loss_dense == pytest.approx(loss, abs=1e-5)
    assert report.layers.activation_ratio.tolist() == pytest.approx(shares, abs=1e-9)


def model_of(kind, config):
    return families.randomised(kind(config))


ENCODER_DECODERS = {
    "bart": lambda: model_of(BartForConditionalGeneration, BartConfig(**BOTH)),
    "m2m100": lambda: model_of(M2M100ForConditionalGeneration, M2M100Config(**BOTH)),
    "mbart": lambda: model_of(MBartForConditionalGeneration, MBartConfig(**BOTH)),
    "blenderbot": lambda: model_of(BlenderbotForConditionalGeneration, BlenderbotConfig(**BOTH)),
}
DECODERS = sorted(set(families.FAMILIES) - {"t5", "t5-gated", "vit", "bert"})


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_padded_text_is_measured_as_it_is_alone(family, side):
    assert_measured_right(families.build(family), padded(side, padding=0))


@pytest.mark.parametrize("side", ["right", "left"])
def test_so_is_one_of_a_masked_language_model(side):
    for kind, config in ((BertForMaskedLM, BertConfig(**ENCODER)), (RobertaForMaskedLM, RobertaConfig(**ENCODER))):
        assert_measured_right(model_of(kind, config), padded(side))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_so_are_both_texts_of_an_encoder_decoder(name, side):
    assert_measured_right(ENCODER_DECODERS[name](), padded(side))


@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "decoder mask"])
def test_the_two_texts_may_be_padded_on_different_sides(mask):
    model, left, right = ENCODER_DECODERS["bart"](), padded("left"), padded("right")
    loss, shares = expected(model, right)
    for first, second in ((left, right), (right, left)):
        batch = {**first, "labels": second["labels"]}
        if mask:
            batch["decoder_attention_mask"] = second["attention_mask"]
        report = measure_sparsity(model, [batch], "fat", eps=0.3)
        assert report.loss_dense == pytest.approx(loss, abs=1e-5)
        assert report.layers.activation_ratio.tolist() == pytest.approx(shares, abs=1e-9)


def test_other_inputs_move_with_the_tokens_that_they_are_of():
    model = model_of(BertForMaskedLM, BertConfig(**ENCODER))
    batch = padded("left")
    batch["token_type_ids"] = (torch.arange(8) > 5).long().expand(3, 8)
    assert_measured_right(model, batch)


def test_labels_on_padding_do_not_count():
    model = families.build("gpt2")
    for side in ("right", "left"):
        batch = padded(side, padding=0)
        measured = measure_sparsity(model, [{**batch, "labels": batch["input_ids"]}], "relu").loss_dense
        assert measured == pytest.approx(expected(model, batch)[0], abs=1e-5)


def test_padding_may_be_an_id_that_the_model_does_not_have():
    model = families.build("gpt2")
    outside = padded("right", padding=families.VOCABULARY)
    assert_measured_right(model, outside)
    outside["attention_mask"][:] = 1
    with pytest.raises(InputError, match="token ids outside the model's vocabulary of 41"):
        measure_sparsity(model, [outside], "relu")


@pytest.mark.parametrize("chunk", [1, 4])
def test_an_ffn_computed_in_chunks_is_measured_as_one_computed_at_once(chunk):
    models = [model_of(BertForMaskedLM, BertConfig(**ENCODER, chunk_size_feed_forward=size)) for size in (0, chunk)]
    batch = padded("right")
    whole, chunked = (measure_sparsity(model, [batch], "cett", cett=0.2) for model in models)
    assert chunked.layers.equals(whole.layers) and chunked.loss_dense == whole.loss_dense
    assert [layer.chunk_size_feed_forward for layer in models[1].bert.encoder.layer] == [chunk, chunk]
    assert_measured_right(models[1], batch)


def test_a_model_that_pads_inside_is_measured_where_it_need_not():
    config = LongformerConfig(**{**ENCODER, "max_position_embeddings": 42}, attention_window=[4, 4])
    model = model_of(LongformerForMaskedLM, config)
    assert_measured_right(model, padded("right"))
    cut = {name: value[:, :7] for name, value in padded("right").items()}
    with pytest.raises(InputError, match=r"applied to 24 vectors for 21 tokens \(3 windows of 7\).*attention window"):
        measure_sparsity(model, [cut], "relu")


def test_a_model_that_pools_is_refused():
    config = FunnelConfig(vocab_size=41, d_model=16, n_head=2, d_head=8, d_inner=24, block_sizes=[1, 1],
                          num_decoder_layers=1)  # fmt: skip
    with pytest.raises(InputError, match=r"applied to \d+ vectors for 24 tokens .* pools"):
        measure_sparsity(model_of(FunnelForMaskedLM, config), [padded("right")], "relu")


@pytest.mark.parametrize("rows", [slice(None), slice(1)], ids=["three texts", "one text"])
def test_a_model_that_orders_vectors_by_position_is_refused(rows):
    model = model_of(XLNetLMHeadModel, XLNetConfig(vocab_size=41, d_model=16, n_layer=2, n_head=2, d_inner=24))
    batch = {name: value[rows] for name, value in padded("right").items()}
    with pytest.raises(InputError, match="XLNetLMHeadModel orders its vectors by position and then by text"):
        measure_sparsity(model, [batch], "relu")


def test_speech_is_measured_with_the_text_that_is_written_down():
    config = WhisperConfig(**BOTH, num_mel_bins=8, max_source_positions=10, max_target_positions=20)
    model = families.randomised(WhisperForConditionalGeneration(config), torch.float32)
    sounds = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    find_ffns(model, {"input_features": sounds, "decoder_input_ids": padded("right")["input_ids"]})
    batch = {"input_features": sounds, "labels": padded("right")["labels"]}
    report = measure_sparsity(model, [batch], "relu")
    with torch.no_grad():
        assert report.loss_dense == pytest.approx(float(model(**batch).loss), abs=1e-5)
    assert report.tokens == sum(LENGTHS)  # of the last layer, which is the decoder's
    with pytest.raises(InputError, match="an encoder-decoder needs its second text"):
        measure_sparsity(model, [{"input_features": sounds}], "relu")
    with pytest.raises(InputError, match="windows of 21 tokens and the model's context is 20"):
        measure_sparsity(model, [{**batch, "labels": torch.full((3, 21), 5)}], "relu")


def test_padded_sounds_are_refused():
    config = Wav2Vec2Config(vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                            num_attention_heads=2, conv_dim=(8,), conv_stride=(4,), conv_kernel=(4,),
                            num_feat_extract_layers=1, num_conv_pos_embeddings=4,
                            num_conv_pos_embedding_groups=2)  # fmt: skip
    model = families.randomised(Wav2Vec2ForCTC(config), torch.float32)
    sounds = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    find_ffns(model, {"input_values": sounds})
    mask = torch.ones(2, 40, dtype=torch.long)
    assert measure_sparsity(model, [{"input_values": sounds, "attention_mask": mask}], "relu").tokens == 20
    mask[1, 20:] = 0
    with pytest.raises(InputError, match=r"batch 0 is padded \(attention_mask\).*Wav2Vec2ForCTC is not known"):
        measure_sparsity(model, [{"input_values": sounds, "attention_mask": mask}], "relu")


@pytest.mark.parametrize("labels", [torch.full((3, 8), 41), torch.full((3, 41), 5)], ids=["id", "length"])
def test_labels_that_a_decoder_cannot_read_are_refused(labels):
    with pytest.raises(InputError, match=r"labels outside the model's vocabulary of 41|the model's context is 40"):
        measure_sparsity(ENCODER_DECODERS["bart"](), [{**padded("right"), "labels": labels}], "relu")


def test_what_a_model_raises_is_told_in_a_sentence():
    batch = padded("right")
    batch["token_type_ids"] = torch.full((3, 8), 9)  # of two types
    with pytest.raises(InputError, match=r"BertModel did not run on input_ids \(4, 8\).*token_type_ids.*index out"):
        measure_sparsity(model_of(BertForMaskedLM, BertConfig(**ENCODER)), [batch], "relu")


def test_an_autocast_outside_changes_no_number():
    model, batch = families.build("llama", dtype=torch.float32), padded("right")
    report = measure_sparsity(model, [batch], "cett", cett=0.2)
    fresh = families.build("llama", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = measure_sparsity(fresh, [batch], "cett", cett=0.2)
        assert torch.is_autocast_enabled("cpu")
    assert inside.layers.equals(report.layers) and inside.loss_dense == report.loss_dense


def test_flex_attention_stands_in_no_way_of_finding_ffns():
    model = families.build("llama")
    names = [ffn.name for ffn in find_ffns(families.build("llama"))]
    model.set_attn_implementation("flex_attention")
    assert [ffn.name for ffn in find_ffns(model)] == names
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [5, 20])
def test_a_model_that_sees_what_it_should_predict_is_refused(dtype, length):
    xlm = {"vocab_size": 41, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 40, "pad_index": 1}
    pairs = [
        (BertLMHeadModel, BertConfig(**ENCODER), BertConfig(**ENCODER, is_decoder=True)),
        (XLMWithLMHeadModel, XLMConfig(**xlm), XLMConfig(**xlm, causal=True)),
    ]
    ids = torch.randint(3, 41, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    for kind, encoder, decoder in pairs:
        batch = [{"input_ids": ids, "attention_mask": mask}]
        with pytest.raises(InputError, match=f"{kind.__name__} sees the tokens that it should predict"):
            measure_sparsity(kind(encoder).to(dtype).eval(), batch, "relu")
        assert measure_sparsity(kind(decoder).to(dtype).eval(), batch, "relu").tokens == int(mask.sum())


@pytest.mark.parametrize("first", [0, 1])
def test_a_first_text_of_nothing_or_of_one_token_is_no_reason_to_refuse(first):
    """Which texts come first does not decide whether a model looks ahead: the next one tells."""
    ids = torch.randint(3, 41, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, first:] = 0
    batch = [{"input_ids": ids, "attention_mask": mask}]
    decoder = BertLMHeadModel(BertConfig(**ENCODER, is_decoder=True)).eval()
    assert measure_sparsity(decoder, batch, "relu").tokens > 0
    with pytest.raises(InputError, match="sees the tokens that it should predict"):
        measure_sparsity(BertLMHeadModel(BertConfig(**ENCODER)).eval(), batch, "relu")
