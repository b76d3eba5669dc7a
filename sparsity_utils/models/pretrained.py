"""Open a trained model and its tokenizer: a folder on this machine, or a model of the Hugging Face hub.

Weights are read from safetensors alone, and no code that comes with a checkpoint is ever run: a model opens only if
transformers has its architecture, or if it is of the MiniCPM format, which has a native counterpart.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    GraniteForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_protobuf_available, is_sentencepiece_available, logging

from sparsity_utils.console import InputError, explained
from sparsity_utils.models.decoder import default_device
from sparsity_utils.models.minicpm import granite_config, is_minicpm

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")  # neither code nor pickled weights
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def open_checkpoint(
    name: str | Path, *, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model and the tokenizer of a checkpoint, the model in evaluation mode, on the GPU where there is one.

    Args:
        name: a folder with config.json, model.safetensors (or its shards and their index) and a tokenizer, read
            without any network; or, where there is no such folder, the `owner/name` of a model of the hub, which is
            downloaded once into the hub's cache.
        dtype: of the weights; by default the one they are stored in.

    Returns the model, of the class that config.json names, and its tokenizer; None for a model that takes no text.

    Raises `InputError` when there is no such checkpoint, when it needs code of its own or pickled weights, when a file
    is missing, damaged or does not fit the others, and when the tokenizer is not the model's.
    """
    folder = _folder(name)
    with _quiet():
        config, model_class = _architecture(folder)
        tokenizer = _tokenizer(folder) if model_class.main_input_name == "input_ids" else None
        model = _model(folder, config, model_class, dtype)
    return model.to(default_device()), tokenizer


def load_weights(folder: Path, weights: str | None = None) -> PreTrainedModel:
    """The model alone of a checkpoint's folder, in evaluation mode, on the CPU; errors as of `open_checkpoint`.

    weights: the safetensors file in it; by default model.safetensors or its shards.
    """
    with _quiet():
        config, model_class = _architecture(folder)
        return _model(folder, config, model_class, weights=weights)


def _folder(name: str | Path) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{folder} is a file; name the folder that holds it, with config.json and a tokenizer.")
    if isinstance(name, Path) or not HUB_NAME.fullmatch(name):
        raise InputError(f"There is no folder {folder}; name one that holds a model, or owner/name of one on the hub.")
    from huggingface_hub import snapshot_download

    with explained(f"There is no folder {name}, nor can the hub give such a model", "check the name and the network"):
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES), ignore_patterns="*/*"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block transformers prints no load reports and no bars; what matters of them is raised."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _architecture(folder: Path) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The configuration of the model in `folder` and the class of transformers that it names."""
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"There is no config.json in {folder}; name a folder that holds a model.")
    with explained(f"{file} cannot be used", "copy it again from where the weights are"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if is_minicpm(content):
            return granite_config(content, file), GraniteForCausalLM
        kind = content.get("model_type")
        if kind not in CONFIG_MAPPING:
            raise _not_native(file, f"the model type {kind}")
        config = CONFIG_MAPPING[kind].from_pretrained(folder, local_files_only=True)
    name = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise _not_native(file, f"the model class {name}")
    if not isinstance(config, getattr(model_class, "config_class", None) or ()):
        raise InputError(f"{file} names the model class {name}, which is not of its model type {kind}; correct it.")
    return config, model_class


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


def _model(
    folder: Path,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    dtype: torch.dtype | None = None,
    weights: str | None = None,
) -> PreTrainedModel:
    config.transformers_weights = weights  # whatever config.json names: it could be a pickled file
    if not any((folder / file).is_file() for file in ([weights] if weights else WEIGHTS)):
        raise InputError(
            f"There are no weights as safetensors in {folder}, and pickled ones (.bin) are never opened, because they "
            f"can run code; convert them to model.safetensors in a place you trust."
        )
    with explained(
        f"The weights in {folder} cannot be read", "copy them again, with the config.json of the same model"
    ):
        model, loaded = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they come back in `loaded`
            output_loading_info=True,
        )
    faults = [
        f"{name} has the shape {tuple(was)}, not {tuple(wanted)}" for name, was, wanted in loaded["mismatched_keys"]
    ]
    faults += [f"{name} is missing" for name in loaded["missing_keys"]]
    faults += [f"{name} is not of this model" for name in loaded["unexpected_keys"] if _matters(name, model)]
    if faults:
        raise InputError(
            f"The weights in {folder} do not fit its config.json ({min(faults)}); copy both from the same model."
        )
    return model


def _matters(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight that the model has no place for hints at another architecture.

    It does inside a layer or a module of the model, and does not as part of a head for another task, with which
    checkpoints of encoders are often stored.
    """
    module = name.rpartition(".")[0]
    return any(part.isdigit() for part in name.split(".")) or module in dict(model.named_modules())
