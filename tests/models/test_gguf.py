"""GGUF files: the numbers are those of the dequantised tensors, and what transformers leaves out is refused."""

from pathlib import Path

import pytest
import torch
from checkpoint_files import IDS, tiny_gguf
from gguf import GGUFReader, dequantize

from sparsity_utils.console import InputError
from sparsity_utils.models.pretrained import open_checkpoint
from sparsity_utils.models.weights import description


def test_the_weights_are_those_that_the_gguf_package_reads(tmp_path: Path) -> None:
    wanted = tiny_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = open_checkpoint(tmp_path / "tiny.gguf")
    found = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    assert found.keys() == wanted.state_dict().keys() and not model.training
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found[name], tensor), name
    for tensor in GGUFReader(tmp_path / "tiny.gguf").tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        layer, _, part = tensor.name.removeprefix("blk.").partition(".ffn_")
        if part and part != "norm.weight":
            assert torch.equal(found[f"model.layers.{layer}.mlp.{part.split('.')[0]}_proj.weight"], values)
    torch.testing.assert_close(model.cpu()(input_ids=IDS).logits, wanted(input_ids=IDS).logits)
    assert description(model) == "LlamaForCausalLM, 36.2k parameters, float32, dequantised from Q8_0 (GGUF)"
    assert tokenizer.eos_token_id == 260


def test_numbers_are_float32_unless_asked_for_and_plain_ones_say_so(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "plain.gguf", quantised=False)
    model, _ = open_checkpoint(str(tmp_path / "plain.gguf"), dtype=torch.bfloat16)
    assert description(model) == "LlamaForCausalLM, 36.2k parameters, bfloat16, read from F32 (GGUF)"


def test_it_is_saved_and_opened_like_any_other(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = open_checkpoint(tmp_path / "tiny.gguf")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, tokens = open_checkpoint(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert tokens("ab  12")["input_ids"] == tokenizer("ab  12")["input_ids"]


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    open_checkpoint(tmp_path / "tiny.gguf")
    assert capfd.readouterr() == ("", "")


def test_text_is_split_before_its_digits(tmp_path: Path) -> None:
    """SmolLM was trained on digits apart: neither " 1" nor "12" is a word, whatever the merges say."""
    tiny_gguf(tmp_path / "tiny.gguf")
    _, tokenizer = open_checkpoint(tmp_path / "tiny.gguf")
    assert tokenizer.tokenize("ab  12") == ["ab", "ĠĠ", "1", "2"]
    tiny_gguf(tmp_path / "other.gguf", split="gpt-2")
    _, tokenizer = open_checkpoint(tmp_path / "other.gguf")
    assert tokenizer.tokenize("ab  12") == ["ab", "Ġ", "Ġ", "12"]


REFUSED = {
    "scaled rotary embedding": (
        {"llama.rope.scaling.type": "linear"},
        "scales its rotary embedding, which transformers does",
    ),
    "part of several": ({"split.count": 2}, "is one of 2 parts; join them"),
    "frequencies": ({"extra": "rope_freqs.weight"}, "scales its rotary embedding, which transformers does"),
    "an unknown weight": (
        {"extra": "blk.0.ffn_up.bias"},
        r"\(it holds 36,228 numbers and the LlamaForCausalLM has 36,224\)",
    ),
    "unknown split of text": ({"split": "own-words"}, r"splits text before tokenizing it in a way \(own-words\) that"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_transformers_would_leave_out_is_refused(kind: str, tmp_path: Path) -> None:
    settings, sentence = REFUSED[kind]
    tiny_gguf(tmp_path / "tiny.gguf", **settings)
    with pytest.raises(InputError, match=sentence):
        open_checkpoint(tmp_path / "tiny.gguf")
