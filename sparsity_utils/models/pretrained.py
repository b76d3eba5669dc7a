"""Open a trained model and its tokenizer: a folder or a GGUF file on this machine, or a model of the Hugging Face hub.

Weights are read from safetensors or GGUF alone, and no code that comes with a checkpoint is ever run: a model opens
only if transformers has its architecture, or if it is of the MiniCPM format, which has a native counterpart.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoTokenizer,
    GraniteForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from sparsity_utils.console import InputError, check, explained
from sparsity_utils.models.adapters import CONFIG as ADAPTER
from sparsity_utils.models.adapters import base_folder, merged
from sparsity_utils.models.decoder import default_device
from sparsity_utils.models.gguf_file import open_gguf
from sparsity_utils.models.input_training import attach_as_trained
from sparsity_utils.models.minicpm import granite_config, is_minicpm
from sparsity_utils.models.weights import quiet, read_weights

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ("*.json", "*.txt", "*.model", "model*.safetensors", "adapter_model.safetensors")  # no code, no pickles
TOKENIZER = ("tokenizer_config.json", "tokenizer.json")


def open_checkpoint(
    name: str | Path, *, dtype: torch.dtype | None = None, revision: str | None = None, device_map: Any = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model and the tokenizer of a checkpoint, the model in evaluation mode, on the GPU where there is one.

    Args:
        name: a folder with config.json, model.safetensors (or its shards and their index) and a tokenizer; a folder
            with a LoRA adapter, which is merged into its model (`adapters.base_folder` says where that is looked for);
            a .gguf file. All are read without any network. Or, where there is no such folder, the `owner/name` of a
            model of the hub, which is downloaded once into the hub's cache.
        dtype: of the weights; by default the one they are stored in, of a GGUF file float32.
        revision: branch, tag or commit of a model of the hub; by default its newest.
        device_map: where each part goes, as for `from_pretrained`, such as "auto".

    Returns the model, of the class that config.json names or else of its type's class for text generation, quantised
    weights dequantised, and its tokenizer; None for a model that takes no text. `description(model)` says in a line
    what was opened.

    Raises `InputError` when there is no such checkpoint, when it needs code of its own or pickled weights, when a file
    is missing, damaged or does not fit the others.
    """
    place = _place(name, revision)
    check(torch.get_default_device().type != "meta", f"Open {name} outside of torch.device('meta'): it has no weights.")
    with quiet():
        if place.is_file():
            model, tokenizer = open_gguf(place, dtype, device_map)
        else:
            model, tokenizer = _open_folder(place, dtype, device_map)
    return (model if device_map else model.to(default_device())), tokenizer


def load_weights(folder: Path, weights: str | None = None, as_trained: bool = True) -> PreTrainedModel:
    """The model alone of a checkpoint's folder, in evaluation mode, on the CPU; errors as of `open_checkpoint`.

    weights: the safetensors file in it; by default model.safetensors or its shards.
    as_trained: False: its linear maps read all of their inputs, also those of a model that was trained to read a part.
    """
    with quiet():
        model = read_weights(folder, *_architecture(folder), weights=weights)
    return attach_as_trained(model) if as_trained else model


def _place(name: str | Path, revision: str | None) -> Path:
    """The folder or the .gguf file that a name means, downloaded if it is of the hub."""
    place = Path(name).expanduser()
    if place.exists():
        check(revision is None, f"A revision was given, and {place} is on this machine: leave the revision out.")
        if place.is_file() and place.suffix != ".gguf":
            raise InputError(f"{place} is a file; name the folder that holds it, with config.json and a tokenizer.")
        return place
    if isinstance(name, Path) or not HUB_NAME.fullmatch(name):
        raise InputError(f"There is no folder {place}; name one that holds a model, or owner/name of one on the hub.")
    from huggingface_hub import snapshot_download

    with explained(f"There is no folder {name}, nor can the hub give such a model", "check the name and the network"):
        patterns, folders = list(HUB_FILES), "*/*"
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=folders))


def _open_folder(
    folder: Path, dtype: torch.dtype | None, device_map: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    base = base_folder(folder)
    config, model_class = _architecture(base)
    tokenizer = None
    if model_class.main_input_name == "input_ids":
        tokenizer = _tokenizer(folder if any((folder / file).is_file() for file in TOKENIZER) else base)
    model = attach_as_trained(read_weights(base, config, model_class, dtype, device_map=device_map))
    return (merged(model, folder) if (folder / ADAPTER).is_file() else model), tokenizer


def _architecture(folder: Path) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The configuration of the model in `folder` and the class of transformers that it names."""
    file = folder / "config.json"
    if not file.is_file():
        gguf = "".join(f"; to open {found.name}, name that file" for found in sorted(folder.glob("*.gguf"))[:1])
        raise InputError(f"There is no config.json in {folder}; name a folder that holds a model{gguf}.")
    with explained(f"{file} cannot be used", "copy it again from where the weights are"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if is_minicpm(content):
            return granite_config(content, file), GraniteForCausalLM
        kind = content.get("model_type")
        if kind not in CONFIG_MAPPING:
            raise _not_native(file, f"the model type {kind}")
        config = CONFIG_MAPPING[kind].from_pretrained(folder, local_files_only=True)
    if not config.architectures:
        return config, _default_class(config, file)
    name = config.architectures[0]
    model_class = getattr(transformers, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise _not_native(file, f"the model class {name}")
    if not isinstance(config, getattr(model_class, "config_class", None) or ()):
        raise InputError(f"{file} names the model class {name}, which is not of its model type {kind}; correct it.")
    return config, model_class


def _default_class(config: PreTrainedConfig, file: Path) -> type[PreTrainedModel]:
    """The class for text generation of a configuration that names no class.

    Raises `InputError` where there is none, or the type is also one of masked words, as of BERT: weights do not tell.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None or type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise InputError(
            f"{file} names no model class and its type {config.model_type} has several; add the right one, such as "
            f'"architectures": ["{config.model_type.title()}Model"].'
        )
    return model_class


def _not_native(file: Path, what: str) -> InputError:
    return InputError(
        f"{file} names {what}, which transformers {transformers.__version__} does not have, and code that comes with a "
        f"model is never run; choose a model that transformers has."
    )


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    json_file, sentencepiece_file = folder / "tokenizer.json", folder / "tokenizer.model"
    if not json_file.is_file() and sentencepiece_file.is_file() and not _reads_sentencepiece():
        raise InputError(f"{sentencepiece_file} is read by the packages sentencepiece and protobuf; install them.")
    remedy = "copy its files again, or choose a model whose tokenizer needs no code of its own"
    with explained(f"The tokenizer in {folder} cannot be opened", remedy):
        if (folder / "tokenizer_config.json").is_file():
            # False, because without it a tokenizer with code of its own asks at the terminal whether to run it.
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if json_file.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(json_file))
    raise InputError(
        f"There is no tokenizer in {folder}, neither tokenizer_config.json nor tokenizer.json; put the one there that "
        f"the model was trained with."
    )


def _reads_sentencepiece() -> bool:
    return is_sentencepiece_available() and is_protobuf_available()
