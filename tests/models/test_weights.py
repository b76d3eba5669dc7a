"""Weights: constants of old versions are passed over by their values, quantised weights dequantised, or refused."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import IDS, tokenizer_file
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from sparsity_utils.console import InputError
from sparsity_utils.models.pretrained import open_checkpoint
from sparsity_utils.models.weights import description

TEXT = {"vocab_size": 29, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 14}
GPT = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
MASK = torch.ones(16, 16).tril()[None, None]
FREQUENCIES = torch.tensor([1.0, 0.01])  # 10000^(-2i/4)
MODELS = {
    "neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            **TEXT,
            hidden_size=8,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=16,
            window_size=4,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**TEXT, **GPT)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**TEXT, **GPT, rotary_dim=4)),
    "gpt": lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(**TEXT, **GPT)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**TEXT, **SMALL, ffn_dim=14, word_embed_proj_dim=8)),
    "bert": lambda: BertForMaskedLM(BertConfig(**TEXT, **SMALL)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, **SMALL)),
}
CONSTANTS = {
    "neo": {
        "transformer.h.0.attn.attention.bias": MASK.bool(),
        "transformer.h.1.attn.attention.bias": MASK.triu(-3).bool(),  # the nearest 4
        "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9),
    },
    "gpt2": {"transformer.h.0.attn.bias": MASK, "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)},
    "gptj": {
        "transformer.h.0.attn.bias": MASK.to(torch.uint8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e9),
    },
    "gpt": {"transformer.h.0.attn.bias": MASK, "transformer.position_ids": torch.arange(16)},
    "opt": {"model.decoder.version": torch.tensor([3.0])},
    "bert": {
        "bert.embeddings.position_ids": torch.arange(512)[None],
        "bert.embeddings.token_type_ids": torch.zeros(1, 512, dtype=torch.long),
    },
    "llama": {
        "model.position_ids": torch.arange(9)[None],
        "model.layers.0.self_attn.rotary_emb.inv_freq": FREQUENCIES,
        "model.layers.1.self_attn.rotary_emb.inv_freq": FREQUENCIES.half(),
    },
}


def saved(folder: Path, kind: str, **extra: torch.Tensor) -> PreTrainedModel:
    """A model in `folder`, further tensors beside its weights."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    model.save_pretrained(folder)
    tokenizer_file(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    return model


def config(folder: Path, **changes) -> None:
    """Change entries of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("kind", CONSTANTS)
def test_constants_that_were_saved_with_weights_are_passed_over(kind: str, tmp_path: Path) -> None:
    wanted = saved(tmp_path, kind, **CONSTANTS[kind])
    model, _ = open_checkpoint(tmp_path)
    torch.testing.assert_close(model.cpu()(input_ids=IDS).logits, wanted(input_ids=IDS).logits)


OTHERS = {
    "a trained bias": ("neo", {"transformer.h.0.attn.attention.bias": torch.ones(8)}),
    "a mask of another kind": ("gpt2", {"transformer.h.0.attn.causal": MASK.flip(-1)}),
    "no large number": ("gpt2", {"transformer.h.0.attn.masked_bias": torch.tensor(-3.0)}),
    "other frequencies": ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": FREQUENCIES / 2}),
    "a norm of q": ("llama", {"model.layers.1.self_attn.q_norm.weight": torch.ones(4)}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_weights_of_another_architecture_are_still_refused(kind: str, tmp_path: Path) -> None:
    model, extra = OTHERS[kind]
    saved(tmp_path, model, **extra)
    sentence = "holds other frequencies than its rotary" if "frequencies" in kind else "is not of this model"
    with pytest.raises(InputError, match=rf"do not fit its config.json \({min(extra)} {sentence}"):
        open_checkpoint(tmp_path)


def test_weights_in_8_bits_are_dequantised(tmp_path: Path) -> None:
    """float8 blocks of 2 times 2 with a scale each, the format of DeepSeek: W = scale * q."""
    wanted = saved(tmp_path, "llama").state_dict()
    weights = load_file(tmp_path / "model.safetensors")
    for name, weight in list(weights.items()):
        if "_proj" in name:
            scale = 1 + torch.rand(weight.shape[0] // 2, weight.shape[1] // 2)
            spread = scale.repeat_interleave(2, 0).repeat_interleave(2, 1)
            weights[name] = (weight / spread).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale
            wanted[name] = weights[name].float() * spread
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    quantisation = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [2, 2]}
    config(tmp_path, quantization_config=quantisation)
    model, _ = open_checkpoint(tmp_path, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.cpu(), wanted[name]), name
    assert description(model).endswith("float32, dequantised from fp8") and not model.is_quantized
    model.save_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("method", ["awq", "gptq", "hqq"])
def test_weights_quantised_for_good_are_refused(method: str, tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    config(tmp_path, quantization_config={"quant_method": method, "bits": 4, "group_size": 4})
    sentence = f"are quantised by {method}, which transformers cannot undo, .*; choose the model that it was made from"
    with pytest.raises(InputError, match=sentence):
        open_checkpoint(tmp_path)


def test_a_package_that_dequantising_needs_is_named(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    config(tmp_path, quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    with pytest.raises(InputError, match=r"The weights in .* cannot be read \(.*bitsandbytes"):
        open_checkpoint(tmp_path)


def test_a_device_for_each_part(tmp_path: Path) -> None:
    wanted = saved(tmp_path, "llama")
    model, _ = open_checkpoint(tmp_path, device_map={"": "cpu"})
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted(input_ids=IDS).logits)


def test_weights_that_stay_unread_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    with torch.device("meta"), pytest.raises(InputError, match=r"Open .* outside of torch.device.'meta'.: it has"):
        open_checkpoint(tmp_path)
