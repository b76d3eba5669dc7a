"""Open a GGUF file, the format of llama.cpp: its weights dequantised, its tokenizer rebuilt.

transformers does both, but passes over what it does not know without a word. What would change a number is refused.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from sparsity_utils.console import InputError, check, explained, progress
from sparsity_utils.models.weights import misfits, set_origin

PLAIN = ("F32", "F16", "BF16", "F64")
# How llama.cpp splits text before byte-level merges, by the name in the file (src/llama-vocab.cpp).
AS_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4")
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def open_gguf(
    file: Path, dtype: torch.dtype | None = None, device_map: Any = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a GGUF file, the model in evaluation mode, by default in float32.

    Raises `InputError` when the file is damaged or a part of several, of an architecture or with a tokenizer that
    transformers does not know, and when it holds weights or settings that transformers leaves out.
    """
    from gguf import GGUFReader

    with explained(f"{file} cannot be opened", "copy it again, or choose a model of another architecture"):
        reader = GGUFReader(file)
        _refuse_what_is_left_out(reader, file)
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        check(model_class is not None, f"{file} holds a {config.model_type}, which does not predict the next token.")
        with _bar():
            model, loaded = model_class.from_pretrained(
                file.parent,
                config=config,
                gguf_file=file.name,
                dtype=dtype,
                device_map=device_map,
                quantization_config=GgufConfig(dequantize=True),
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    _check_complete(model, misfits(loaded), reader, file)
    set_origin(model, _origin(reader))
    return model, _tokenizer(reader, file)


@contextmanager
def _bar() -> Iterator[None]:
    """Inside the block the bar that transformers shows while it dequantises is one of ours."""
    before = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = lambda tensors, desc: progress(tensors, "dequantising")
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = before


def _refuse_what_is_left_out(reader: Any, file: Path) -> None:
    """Refuse the settings of a file that transformers does not read and that change what the model computes."""
    parts = _setting(reader, "split.count") or 1
    check(parts == 1, f"{file} is one of {parts} parts; join them with llama.cpp's gguf-split --merge.")
    architecture = _setting(reader, "general.architecture")
    scaling = _setting(reader, f"{architecture}.rope.scaling.type") or "none"
    scaled = any(tensor.name.startswith("rope_") for tensor in reader.tensors)
    if (scaling != "none" and architecture != "gpt-oss") or scaled:
        raise InputError(
            f"{file} scales its rotary embedding, which transformers does not read from GGUF; open the safetensors of "
            f"the same model."
        )


def _check_complete(model: PreTrainedModel, faults: list[str], reader: Any, file: Path) -> None:
    """Refuse a model that lacks a weight of the file, or has one that is not there."""
    held = sum(int(tensor.n_elements) for tensor in reader.tensors)
    taken = sum(parameter.numel() for parameter in model.parameters())
    if held != taken:
        faults = [*faults, f"it holds {held:,} numbers and the {type(model).__name__} has {taken:,}"]
    if faults:
        raise InputError(
            f"The weights in {file} do not fit the architecture that transformers makes of it ({min(faults)}); open "
            f"the safetensors of the same model."
        )


def _origin(reader: Any) -> str:
    """How the file holds most of its weights, for `description`."""
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    kind = sizes.most_common(1)[0][0]
    return f"read from {kind} (GGUF)" if kind in PLAIN else f"dequantised from {kind} (GGUF)"


def _tokenizer(reader: Any, file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a file; one with merges of bytes splits text first as llama.cpp does.

    Raises `InputError` for a way to split that neither of us knows: tokens would be others than in training.
    """
    with explained(f"The tokenizer in {file} cannot be opened", "open the safetensors of the same model"):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        if _setting(reader, "tokenizer.ggml.model") != "gpt2":
            return tokenizer
        split = _setting(reader, "tokenizer.ggml.pre")
        if split in DIGITS_APART:
            apart = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(apart)
        elif split not in (*AS_GPT2, *GGUF_PRE_TOKENIZER_SPLITS):
            raise InputError(
                f"{file} splits text before tokenizing it in a way ({split or 'without a name'}) that is not known "
                f"here, and tokens would be wrong; open the safetensors of the same model."
            )
    return tokenizer


def _setting(reader: Any, name: str) -> Any:
    """The value of a key in the header of a file, None where there is none."""
    field = reader.get_field(name)
    return None if field is None else field.contents()
