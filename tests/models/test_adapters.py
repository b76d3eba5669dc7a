"""LoRA adapters: merged as the equation says, found beside their model, and refused where they do not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import IDS, tokenizer_file
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparsity_utils.console import InputError
from sparsity_utils.models.pretrained import open_checkpoint
from sparsity_utils.models.weights import description

CONFIG = LlamaConfig(
    vocab_size=29, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=14, pad_token_id=0
)
RANK, ALPHA = 3, 12  # scaling is their ratio


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model in a folder `base`, its adapter for two matrices of each FFN in `adapter` beside it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    model.save_pretrained(tmp_path / "base")
    tokenizer_file(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["up_proj", "down_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(tmp_path / "adapter")
    settings(tmp_path / "adapter", base_model_name_or_path="owner/base")
    return tmp_path / "base"


def settings(folder: Path, **changes) -> None:
    """Change entries of adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def by_hand(base: Path) -> dict[str, torch.Tensor]:
    """W + alpha / r B A."""
    weights, adapter = (
        load_file(base.parent / file) for file in ("base/model.safetensors", "adapter/adapter_model.safetensors")
    )
    for name in list(adapter):
        if "lora_A" in name:
            target = name.removeprefix("base_model.model.").replace("lora_A.", "")
            weights[target] = weights[target] + ALPHA / RANK * adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
    return weights


def test_the_merged_weights_are_those_of_the_equation(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("httpx.Client.send", lambda *_, **__: pytest.fail("used the network"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    wanted = by_hand(base)
    model, tokenizer = open_checkpoint(base.parent / "adapter")
    found = model.state_dict()
    assert type(model) is LlamaForCausalLM and not model.training and tokenizer is not None
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].cpu(), tensor, rtol=1e-6, atol=1e-6)
    assert not torch.equal(
        found["model.layers.1.mlp.up_proj.weight"].cpu(),
        load_file(base / "model.safetensors")["model.layers.1.mlp.up_proj.weight"],
    )
    assert description(model) == "LlamaForCausalLM, 1.69k parameters, float32, with the adapter adapter merged"
    model.save_pretrained(base.parent / "saved")
    assert all(weight.requires_grad for weight in model.parameters())


def test_where_the_model_of_an_adapter_is_looked_for(base: Path) -> None:
    adapter, moved = base.parent / "adapter", base.parent / "elsewhere" / "model"
    shutil.move(base, moved)
    with pytest.raises(InputError, match=r"is for owner/base, which is no folder here; put the folder of that model"):
        open_checkpoint(adapter)
    settings(adapter, base_model_name_or_path=str(moved))
    by_name, _ = open_checkpoint(adapter)
    for file in adapter.iterdir():
        shutil.copy(file, moved)
    together, _ = open_checkpoint(moved)
    torch.testing.assert_close(together(input_ids=IDS).logits, by_name(input_ids=IDS).logits)


def test_a_model_alone_stays_itself_beside_an_adapter(base: Path) -> None:
    model, _ = open_checkpoint(base)
    assert all(
        torch.equal(model.state_dict()[name].cpu(), weight)
        for name, weight in load_file(base / "model.safetensors").items()
    )


def damage(adapter: Path, kind: str) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    if kind == "pickled":
        file.rename(adapter / "adapter_model.bin")
        return
    if kind == "another method":
        settings(adapter, peft_type="PREFIX_TUNING")
    elif kind == "damaged":
        (adapter / "adapter_config.json").write_text("{")
    elif kind == "a part is missing":
        del tensors[name]
    elif kind == "a part too many":
        tensors[name.replace("layers.1", "layers.2")] = tensors[name].clone()
    elif kind == "another shape":
        tensors[name] = torch.ones(RANK, 9)
    elif kind == "not a number":
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, file)


DAMAGES = {
    "pickled": r"no adapter_model\.safetensors in .*, and pickled weights \(\.bin\) are never opened",
    "another method": "is of the type PREFIX_TUNING; only LORA can be merged",
    "damaged": r"adapter_config\.json cannot be used",
    "a part is missing": r"does not fit its model \(see .*layers\.1\.mlp\.up_proj\.lora_A\.weight\); copy it again",
    "a part too many": r"does not fit its model \(see .*layers\.2\.mlp\.up_proj\.lora_A\.weight\); copy it again",
    "another shape": r"cannot be merged \(.*\); copy it again, and put the model beside it",
    "not a number": r"cannot be merged \(.*\); copy it again",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_an_adapter_that_does_not_fit_is_one_sentence(kind: str, base: Path) -> None:
    damage(base.parent / "adapter", kind)
    with pytest.raises(InputError, match=DAMAGES[kind]) as caught:
        open_checkpoint(base.parent / "adapter")
    assert "\n" not in str(caught.value)
