"""Files of a checkpoint that tests write."""

from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def tokenizer_file(folder: Path, entries: int = 29) -> None:
    """A tokenizer.json of single-letter words a, b, ..."""
    vocabulary = {chr(ord("a") + number): number for number in range(entries)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(folder / "tokenizer.json"))


MERGES = ("a b", "Ġ Ġ", "1 2", "Ġ 1")
TOKENS = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
HEADS = {"q_proj": 4, "k_proj": 2}
LLAMA = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=HEADS["q_proj"],
    num_key_value_heads=HEADS["k_proj"],
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=len(TOKENS) - 1,
)


def tiny_gguf(
    file: Path, quantised: bool = True, split: str = "smollm", extra: str = "", **settings
) -> LlamaForCausalLM:
    """Write a tiny Llama with a tokenizer of bytes as llama.cpp would, its matrices in Q8_0; return it, dequantised.

    split: how text is split before merges. extra: the name of one more tensor, of 4 numbers. settings: further keys of
    the header, strings or numbers.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).eval()
    writer = gguf.GGUFWriter(str(file), "llama")
    _write_header(writer, split)
    for key, value in settings.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint16)(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LLAMA.num_hidden_layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            kind = gguf.GGMLQuantizationType.Q8_0 if quantised and weight.dim() == 2 else gguf.GGMLQuantizationType.F32
            heads = HEADS.get(name.split(".")[-2])
            packed = gguf.quantize((interleaved(weight, heads) if heads else weight).numpy(), kind)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), packed, raw_dtype=kind)
            stored = torch.from_numpy(gguf.dequantize(packed, kind))
            weight.copy_(_in_halves(stored, heads) if heads else stored)
    if extra:
        writer.add_tensor(extra, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _write_header(writer: gguf.GGUFWriter, split: str) -> None:
    writer.add_block_count(LLAMA.num_hidden_layers)
    writer.add_context_length(LLAMA.max_position_embeddings)
    writer.add_embedding_length(LLAMA.hidden_size)
    writer.add_feed_forward_length(LLAMA.intermediate_size)
    writer.add_head_count(LLAMA.num_attention_heads)
    writer.add_head_count_kv(LLAMA.num_key_value_heads)
    writer.add_layer_norm_rms_eps(LLAMA.rms_norm_eps)
    writer.add_rope_dimension_count(LLAMA.hidden_size // LLAMA.num_attention_heads)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3])  # words, and one that controls
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(LLAMA.eos_token_id)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix as GGUF has them: the two rows that rotate together are neighbours."""
    first, second = weight.view(heads, 2, -1, weight.shape[1]).unbind(1)  # each (heads, size / 2, d)
    return torch.stack([first, second], 2).reshape(weight.shape)


def _in_halves(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return torch.cat([pairs[:, :, 0], pairs[:, :, 1]], 1).reshape(weight.shape)
