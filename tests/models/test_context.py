"""The context that a configuration states, against the longest text that the model's table of positions allows."""

import pytest
import torch
import transformers

from sparsity_utils.commands.measure import window_length
from sparsity_utils.console import InputError
from sparsity_utils.models.context import context_length

SMALL = {
    "vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 20, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
TABLES = {
    "Bert": 20, "Roberta": 18, "Camembert": 18, "XLMRoberta": 18, "MPNet": 18, "RobertaPreLayerNorm": 18,
    "Data2VecText": 18, "Electra": 20, "Nystromformer": 20, "OPT": 20, "GPT2": 20, "DistilBert": 20,
}  # fmt: skip
OPTIONS = {
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "GPT2": {"n_embd": 16, "n_inner": 24, "n_layer": 1, "n_head": 2, "n_positions": 20},
    "DistilBert": {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2},
}


@pytest.mark.parametrize("name", TABLES)
def test_the_context_is_the_longest_text_that_a_table_of_positions_allows(name):
    own = OPTIONS.get(name, {})
    common = {key: value for key, value in SMALL.items() if name != "GPT2" or not key.startswith(("num", "hid", "max"))}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**common, **own)).eval()
    context = context_length(model)
    assert context == TABLES[name]
    with torch.no_grad():
        model(input_ids=torch.full((1, context), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, context + 1), 5))


def test_a_context_may_have_another_name_or_none():
    mpt = transformers.MptForCausalLM(transformers.MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=41,
                                                             max_seq_len=24))  # fmt: skip
    bloom = {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 41}
    stated = transformers.BloomForCausalLM(transformers.BloomConfig(**bloom, seq_length=28))
    silent = transformers.BloomForCausalLM(transformers.BloomConfig(**bloom))
    assert [context_length(model) for model in (mpt, stated, silent)] == [24, 28, None]
    assert [window_length(model) for model in (mpt, stated, silent)] == [24, 28, 256]
    with pytest.raises(InputError, match="length is 25; choose 2 to 24, the context of the model in tokens"):
        window_length(mpt, 25)


def test_both_texts_of_an_encoder_decoder_have_their_own():
    config = transformers.LEDConfig(vocab_size=41, d_model=16, encoder_layers=1, decoder_layers=1,
                                    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
                                    decoder_ffn_dim=24, attention_window=4, max_encoder_position_embeddings=32,
                                    max_decoder_position_embeddings=12)  # fmt: skip
    model = transformers.LEDForConditionalGeneration(config)
    assert (context_length(model), context_length(model, decoder=True)) == (32, 12)
