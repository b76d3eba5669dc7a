"""The MiniCPM format against a slow forward pass written from the definitions; what the mapping refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoint_files import IDS, tokenizer_file
from safetensors.torch import save_file

from sparsity_utils.console import InputError
from sparsity_utils.models.pretrained import open_checkpoint
from sparsity_utils.neurons.find import find_ffns

LAYERS, WIDTH, HEADS, KEY_HEADS, FFN, VOCABULARY = 3, 24, 6, 2, 34, 29
MINICPM = {
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_minicpm.MiniCPMConfig",
        "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "relu",
    "hidden_size": WIDTH,
    "initializer_range": 0.1,
    "intermediate_size": FFN,
    "max_position_embeddings": 4096,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KEY_HEADS,
    "rms_norm_eps": 1e-3,
    "rope_scaling": None,
    "torch_dtype": "float64",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": VOCABULARY,
    "scale_emb": 12,
    "dim_model_base": 16,
    "scale_depth": 1.4,
}


def minicpm_weights(config: dict) -> dict[str, torch.Tensor]:
    """Random weights in float64, under the names of the format."""
    generator = torch.Generator().manual_seed(0)
    key_width = WIDTH // HEADS * config.get("num_key_value_heads", HEADS)
    shapes = {"model.embed_tokens": (VOCABULARY, WIDTH), "model.norm": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "self_attn.q_proj": (WIDTH, WIDTH),
                "self_attn.k_proj": (key_width, WIDTH),
                "self_attn.v_proj": (key_width, WIDTH),
                "self_attn.o_proj": (WIDTH, WIDTH),
                "mlp.gate_proj": (FFN, WIDTH),
                "mlp.up_proj": (FFN, WIDTH),
                "mlp.down_proj": (WIDTH, FFN),
                "input_layernorm": (WIDTH,),
                "post_attention_layernorm": (WIDTH,),
            }.items()
        }
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head"] = (VOCABULARY, WIDTH)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def minicpm_folder(folder: Path, **changes) -> tuple[dict, dict[str, torch.Tensor]]:
    """Write such a checkpoint, its code a file that raises; return its configuration and weights."""
    config = MINICPM | changes
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_minicpm.py", "modeling_minicpm.py"):
        (folder / name).write_text("raise SystemExit('code of the checkpoint was run')\n")
    weights = minicpm_weights(config)
    save_file(weights, folder / "model.safetensors")
    tokenizer_file(folder)
    return config, weights


def literal_logits(config: dict, weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Logits of one text by the definitions, token by token and head by head, (length, vocabulary)."""
    size = WIDTH // HEADS
    heads_per_key = HEADS // config.get("num_key_value_heads", HEADS)
    branch = config["scale_depth"] / math.sqrt(LAYERS)
    activation = {"relu": lambda x: x.clamp(min=0), "silu": lambda x: x / (1 + torch.exp(-x))}[config["hidden_act"]]

    def weight(layer: int, name: str) -> torch.Tensor:
        return weights[f"model.layers.{layer}.{name}.weight"]

    def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x / math.sqrt(float((x * x).mean()) + config["rms_norm_eps"]) * gain

    def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
        turned = torch.empty_like(x)
        for pair in range(size // 2):
            angle = position * config.get("rope_theta", 10000.0) ** (-2 * pair / size)
            a, b = x[pair], x[pair + size // 2]
            turned[pair] = a * math.cos(angle) - b * math.sin(angle)
            turned[pair + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return turned

    xs = [config["scale_emb"] * weights["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(LAYERS):
        normal = [normed(x, weight(layer, "input_layernorm")) for x in xs]
        projected = {p: [weight(layer, f"self_attn.{p}_proj") @ x for x in normal] for p in "qkv"}
        for position in range(len(ids)):
            mixed = []
            for head in range(HEADS):
                own = slice(head * size, (head + 1) * size)
                shared = slice(head // heads_per_key * size, (head // heads_per_key + 1) * size)
                query = rotated(projected["q"][position][own], position)
                past = range(position + 1)
                scores = [float(query @ rotated(projected["k"][t][shared], t)) / math.sqrt(size) for t in past]
                shares = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
                mixed.append(sum(shares[t] * projected["v"][t][shared] for t in past))
            xs[position] = xs[position] + branch * (weight(layer, "self_attn.o_proj") @ torch.cat(mixed))
        for position, x in enumerate(xs):
            normal = normed(x, weight(layer, "post_attention_layernorm"))
            s = activation(weight(layer, "mlp.gate_proj") @ normal)
            h = s * (weight(layer, "mlp.up_proj") @ normal)
            xs[position] = x + branch * (weight(layer, "mlp.down_proj") @ h)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    scale = WIDTH / config["dim_model_base"]
    return torch.stack([head @ normed(x, weights["model.norm.weight"]) / scale for x in xs])


VARIANTS = {
    "published": {},
    "silu": {"hidden_act": "silu", "model_type": "minicpm"},
    "one key per head": {"num_key_value_heads": HEADS, "rope_theta": 500.0, "scale_depth": 0.9, "scale_emb": 3},
    "own head": {"tie_word_embeddings": False, "dim_model_base": 256, "ffn_type": "vanilla", "num_experts": 40},
}


def assert_computes(model: torch.nn.Module, config: dict, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        logits = model.cpu()(input_ids=IDS).logits
    assert logits.dtype == torch.float64 and float(logits.std()) > 0.1
    for row, ids in zip(logits, IDS.tolist(), strict=True):
        # transformers takes norms, the rotation and softmax in float32
        torch.testing.assert_close(row, literal_logits(config, weights, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_minicpm_checkpoint_computes_what_the_definitions_say(variant: str, tmp_path: Path) -> None:
    config, weights = minicpm_folder(tmp_path, **VARIANTS[variant])
    model, tokenizer = open_checkpoint(tmp_path)
    assert_computes(model, config, weights)
    assert len(find_ffns(model)) == LAYERS and tokenizer("c")["input_ids"] == [2]


def test_a_sharded_minicpm_checkpoint(tmp_path: Path) -> None:
    config, weights = minicpm_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {f"model-0000{n + 1}-of-00003.safetensors": names[n::3] for n in range(3)}
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model, _ = open_checkpoint(tmp_path)
    assert_computes(model, config, weights)


def test_a_tied_head_may_be_stored_in_place_of_the_embedding(tmp_path: Path) -> None:
    """As tools that convert to safetensors write it."""
    config, weights = minicpm_folder(tmp_path)
    stored = dict(weights)
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, tmp_path / "model.safetensors")
    model, _ = open_checkpoint(tmp_path)
    assert_computes(model, config, weights)


UNSUPPORTED = [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"sets rope_scaling to .*'linear'.* only None is supported"),
    ({"hidden_act": "fatrelu"}, r"names the activation 'fatrelu', which transformers does not have"),
    ({"hidden_act_param": 0.03}, r"sets hidden_act_param to 0\.03"),
    ({"attention_type": "mla"}, r"sets attention_type to 'mla'.* only 'vanilla' is supported"),
    ({"ffn_type": "moe", "num_experts": 8}, r"sets ffn_type to 'moe'"),
    ({"num_experts": 8}, r"sets num_experts to 8, which may change what the model computes"),
    ({"is_causal": False}, r"sets is_causal to False, which may change"),
    ({"scale_depth": None}, r"has no scale_depth; copy it again"),
    ({"scale_depth": "deep"}, r"config\.json cannot be used \(.*\); copy it again"),
    ({"model_type": "minicpm9"}, r"names the model type minicpm9, which transformers .* does not have"),
    ({"hidden_size": 30}, r"do not fit its config\.json \(.*has the shape"),
]


@pytest.mark.parametrize(("change", "sentence"), UNSUPPORTED, ids=[str(next(iter(c))) for c, _ in UNSUPPORTED])
def test_what_the_mapping_does_not_know_is_refused(change: dict, sentence: str, tmp_path: Path) -> None:
    minicpm_folder(tmp_path, **change)
    with pytest.raises(InputError, match=sentence) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_its_sentencepiece_tokenizer_is_read(tmp_path: Path) -> None:
    import sentencepiece

    text = "Most neurons of a large model stay idle.\nFew matter for one token: 1, 2, or 37 of them.\n" * 20
    (tmp_path / "text.txt").write_text(text)
    options = {"vocab_size": 300, "model_type": "bpe", "normalization_rule_name": "identity", "minloglevel": 2}
    options |= {"remove_extra_whitespaces": False, "byte_fallback": True, "pad_id": -1}
    trained = {"input": str(tmp_path / "text.txt"), "model_prefix": str(tmp_path / "tokenizer")}
    sentencepiece.SentencePieceTrainer.train(**trained, **options)
    minicpm_folder(tmp_path, vocab_size=300)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    weights = minicpm_weights(MINICPM) | {"model.embed_tokens.weight": torch.randn(300, WIDTH, dtype=torch.float64)}
    save_file(weights, tmp_path / "model.safetensors")
    _, tokenizer = open_checkpoint(tmp_path)
    wanted = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(text[:60])
    assert tokenizer(text[:60])["input_ids"] == [tokenizer.bos_token_id, *wanted]
