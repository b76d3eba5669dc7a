"""Opening checkpoints: which models open, and what is refused in one sentence each."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_files import IDS, tokenizer_file
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    BertConfig,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.models import pretrained as checkpoints
from sparsity_utils.models.pretrained import load_weights, open_checkpoint
from sparsity_utils.models.weights import description


def edit(folder: Path, **changes) -> None:
    """Change entries of config.json; None takes one out."""
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


TEXT = {"vocab_size": 29, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 14}
MODELS = {
    "decoder": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, **SMALL)),
    "tied": lambda: GPT2LMHeadModel(GPT2Config(**TEXT, n_embd=8, n_layer=2, n_head=2)),
    "encoder": lambda: BertForPreTraining(BertConfig(**TEXT, **SMALL)),
    "encoder-decoder": lambda: T5ForConditionalGeneration(
        T5Config(**TEXT, d_model=8, d_kv=4, d_ff=14, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ),
    "vision": lambda: ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4)),
}


def saved(folder: Path, kind: str = "decoder", **options) -> tuple[transformers.PreTrainedModel, Path]:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    model.save_pretrained(folder, **options)
    if kind != "vision":
        tokenizer_file(folder)
    return model, folder


# What opens


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_opens_as_it_was(kind: str, tmp_path: Path) -> None:
    wanted, folder = saved(tmp_path, kind)
    model, tokenizer = open_checkpoint(folder)
    assert type(model) is type(wanted) and not model.training
    assert model.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu(), tensor), name
    assert (tokenizer is None) == (kind == "vision")


def test_the_recorded_models_open_with_their_tokenizer() -> None:
    folder = paths.RECORDED_MODELS / "relu"
    model, tokenizer = open_checkpoint(str(folder))
    alone = load_weights(folder).state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name].cpu(), tensor) and torch.equal(alone[name], tensor)
    text = "def f(x):\n    return x\n"
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert tokenizer(text)["input_ids"] == expected and len(expected) > 5


def test_shards_open_like_one_file_and_dtype_is_as_stored_unless_asked_for(tmp_path: Path) -> None:
    wanted, folder = saved(tmp_path, max_shard_size="2KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    model, _ = open_checkpoint(folder)
    assert model.dtype == torch.float32
    half, _ = open_checkpoint(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu(), tensor)
        assert torch.equal(half.state_dict()[name].cpu(), tensor.bfloat16())


def test_a_tokenizer_with_a_configuration_keeps_its_special_tokens(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "b", "pad_token": "c"})
    )
    _, tokenizer = open_checkpoint(folder)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (1, 2)


def test_heads_of_another_task_are_left_out(tmp_path: Path) -> None:
    """Encoders are often stored with pooler and next-sentence head, and named as models of masked words."""
    wanted, folder = saved(tmp_path, "encoder")
    edit(folder, architectures=["BertForMaskedLM"])
    model, _ = open_checkpoint(folder)
    logits = wanted(input_ids=IDS).prediction_logits
    torch.testing.assert_close(model.cpu()(input_ids=IDS).logits, logits)


def test_nothing_is_printed_and_transformers_speaks_as_before(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    _, folder = saved(tmp_path, "encoder")
    edit(folder, architectures=["BertForMaskedLM"])
    logging.enable_progress_bar()
    before = logging.get_verbosity()
    capfd.readouterr()
    open_checkpoint(folder)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (before, True)


def test_a_folder_is_read_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setattr("httpx.Client.send", lambda *_, **__: pytest.fail("used the network"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    open_checkpoint("owner/name")


def test_a_hub_model_is_downloaded_without_code_and_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(tmp_path)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *names, **options: asked.append((names, options)) or str(folder)
    )
    model, _ = open_checkpoint("owner/no-such-folder", revision="v1")
    assert isinstance(model, LlamaForCausalLM)
    from huggingface_hub.utils import filter_repo_objects

    ((names, options),) = asked
    assert names == ("owner/no-such-folder",) and options.pop("revision") == "v1"
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    wanted += ["adapter_config.json", "adapter_model.safetensors"]
    others = ["modeling.py", "pytorch_model.bin", "onnx/model.onnx", "original/model.safetensors", "a.pt", "a.pkl"]
    others += ["adapter_model.bin"]
    assert list(filter_repo_objects(wanted + others, **options)) == wanted


def test_without_architectures_the_class_is_the_one_for_text_generation(tmp_path: Path) -> None:
    wanted, folder = saved(tmp_path)
    edit(folder, architectures=None)
    model, _ = open_checkpoint(folder)
    assert type(model) is LlamaForCausalLM
    torch.testing.assert_close(model.cpu()(input_ids=IDS).logits, wanted(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder", "vision"])
def test_without_architectures_another_model_is_not_guessed(kind: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path, kind)
    edit(folder, architectures=None)
    with pytest.raises(InputError, match=r'names no model class .*; add the right one, such as "architectures": \["'):
        open_checkpoint(folder)


def test_a_revision_is_of_the_hub(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    with pytest.raises(InputError, match=r"A revision was given, and .* is on this machine: leave the revision out\."):
        open_checkpoint(folder, revision="main")


def test_a_folder_with_a_gguf_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "b.gguf").touch()
    with pytest.raises(InputError, match=r"There is no config\.json in .*; to open b\.gguf, name that file\."):
        open_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"b\.gguf cannot be opened \(.*\); copy it again"):
        open_checkpoint(tmp_path / "b.gguf")


def test_a_line_says_what_was_opened(tmp_path: Path) -> None:
    wanted, folder = saved(tmp_path)
    model, _ = open_checkpoint(folder, dtype=torch.bfloat16)
    assert description(wanted) == "LlamaForCausalLM, 1.69k parameters, float32"
    assert description(model) == "LlamaForCausalLM, 1.69k parameters, bfloat16"


# Bad input


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    edit(folder, transformers_weights="adapter_model.bin")
    open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"no weights as safetensors in .*\(\.bin\) are never opened.*; convert them to"
    ):
        open_checkpoint(folder)


def test_code_that_comes_with_a_model_is_never_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    _, folder = saved(tmp_path)
    (folder / "own.py").write_text("raise SystemExit('code of the checkpoint was run')\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit('code of the checkpoint was run')\n")
    edit(folder, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    model, _ = open_checkpoint(folder)  # by the native class, which config.json names
    assert type(model) is LlamaForCausalLM
    tokenizer = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"The tokenizer in .* custom code .*a model whose tokenizer needs no code"):
        open_checkpoint(folder)
    (folder / "tokenizer_config.json").unlink()
    edit(folder, architectures=["OwnForCausalLM"])
    with pytest.raises(InputError, match=r"names the model class OwnForCausalLM, which transformers .* is never run"):
        open_checkpoint(folder)
    edit(folder, model_type="own")
    with pytest.raises(InputError, match=r"names the model type own, which transformers .* is never run"):
        open_checkpoint(folder)


def damaged(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "damaged config":
        (folder / "config.json").write_text("{")
    elif kind == "another class":
        edit(folder, architectures=["GPT2LMHeadModel"])
    elif kind == "wrong value":
        edit(folder, num_hidden_layers="two")
    elif kind == "unknown activation":
        edit(folder, hidden_act="fatrelu")
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "damaged tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif kind == "no weights":
        weights.write_bytes(b"")
    elif kind == "missing shard":
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        weights.unlink()
    else:
        tensors = load_file(weights)
        if kind == "missing weight":
            del tensors["model.layers.1.mlp.up_proj.weight"]
        elif kind == "unknown bias":
            tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(14)
        elif kind == "more layers":
            tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(14, 8)
        elif kind == "other shape":
            tensors["model.norm.weight"] = torch.ones(9)
        save_file(tensors, weights)


DAMAGES = {
    "no config": r"There is no config\.json in .*; name a folder that holds a model",
    "damaged config": r"config\.json cannot be used \(.*\); copy it again",
    "another class": r"GPT2LMHeadModel, which is not of its model type llama",
    "wrong value": r"config\.json cannot be used \(.*num_hidden_layers.*\); copy it again",
    "unknown activation": r"The weights in .* cannot be read \(.*fatrelu.*\)",
    "no tokenizer": r"There is no tokenizer in .*, neither tokenizer_config\.json nor tokenizer\.json; put the one",
    "damaged tokenizer": r"The tokenizer in .* cannot be opened \(.*\); copy its files again",
    "cut weights": r"The weights in .* cannot be read \(.*\); copy them again",
    "no weights": r"The weights in .* cannot be read \(.*\); copy them again",
    "missing shard": r"The weights in .* cannot be read \(.*model-00001-of-00001\.safetensors.*\); copy them again",
    "missing weight": r"do not fit its config\.json \(model\.layers\.1\.mlp\.up_proj\.weight is missing\); copy both",
    "unknown bias": r"\(model\.layers\.1\.mlp\.up_proj\.bias is not of this model\); copy both",
    "more layers": r"\(model\.layers\.2\.mlp\.up_proj\.weight is not of this model\); copy both",
    "other shape": r"\(model\.norm\.weight has the shape \(9,\), not \(8,\)\); copy both",
}


def test_a_tokenizer_may_have_more_ids_than_the_model(tmp_path: Path) -> None:
    """Gemma 3 1B has one for images; `passes.checked` refuses those that occur."""
    _, folder = saved(tmp_path)
    tokenizer_file(folder, 30)
    model, tokenizer = open_checkpoint(folder)
    assert max(tokenizer.get_vocab().values()) == model.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_checkpoint_that_does_not_fit_itself_is_one_sentence(kind: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    open_checkpoint(folder)
    damaged(folder, kind)
    with pytest.raises(InputError, match=DAMAGES[kind]) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_sentencepiece_tokenizer_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(tmp_path)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    monkeypatch.setattr(checkpoints, "_reads_sentencepiece", lambda: False)
    with pytest.raises(
        InputError, match=r"tokenizer\.model is read by the packages sentencepiece and protobuf; install"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["no-such-model", "./no/such", "/no/such", Path("owner/name"), "owner/name/more"])
def test_what_is_neither_a_folder_nor_a_hub_name(name: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=r"There is no folder .*; name one that holds a model, or owner/name of one"):
        open_checkpoint(name)


def test_a_file_and_a_model_that_the_hub_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise OSError("404 Client Error: Repository Not Found")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(InputError, match=r"model\.safetensors is a file; name the folder that holds it"):
        open_checkpoint(file)
    with pytest.raises(InputError, match=r"no folder owner/nothing, nor can the hub .* \(.*\); check the name"):
        open_checkpoint("owner/nothing")


def test_no_source_opens_pickles_or_trusts_code() -> None:
    files = [*(paths.ROOT / "sparsity_utils").rglob("*.py"), *paths.NOTEBOOKS.rglob("*.ipynb")]
    assert len(files) > 30
    for file in files:
        text = file.read_text(encoding="utf-8").replace(" ", "")
        for word in ("trust_remote_code=True", "torch.load(", "pickle.load"):
            assert word not in text, f"{file.name} has {word}"
