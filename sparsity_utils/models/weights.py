"""Read the weights of a checkpoint into a model of transformers: all of them, dequantised, or none.

Weights are read from safetensors. Whatever is missing, of another shape, or left over where it could matter is refused.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from sparsity_utils.console import InputError, explained, short_number

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
DEQUANTISED_AT_LOADING = ("fp8", "mxfp8", "mxfp4", "compressed-tensors")
DEQUANTISED_AFTER = ("bitsandbytes", "higgs")
NO_ADAPTER = {"subfolder": "no adapter"}  # transformers would add one that lies in the folder, unmerged
ROUNDING = 5e-3  # relative: constants may be stored in half precision


def read_weights(
    folder: Path,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    dtype: torch.dtype | None = None,
    weights: str | None = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """The model of `config` with the weights of `folder`, in evaluation mode; where `device_map` says or on the CPU.

    Raises `InputError` when they are pickled, cannot be read, do not fit, or are quantised for good.
    """
    config.transformers_weights = weights  # whatever config.json names: it could be a pickled file
    if not any((folder / file).is_file() for file in ([weights] if weights else WEIGHTS)):
        raise InputError(
            f"There are no weights as safetensors in {folder}, and pickled ones (.bin) are never opened, because they "
            f"can run code; convert them to model.safetensors in a place you trust."
        )
    quantised = _prepare_to_dequantise(config, folder)
    with explained(
        f"The weights in {folder} cannot be read", "copy them again, with the config.json of the same model"
    ):
        model, loaded = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            local_files_only=True,
            adapter_kwargs=NO_ADAPTER,
            ignore_mismatched_sizes=True,  # they come back in `loaded`
            output_loading_info=True,
        )
        if quantised in DEQUANTISED_AFTER:
            model = model.dequantize()
    stored = Stored(folder, weights)
    refuse_faults(folder, [*misfits(loaded), *stored.leftovers(model, loaded["unexpected_keys"])])
    set_origin(model, f"dequantised from {quantised}" if quantised else "")
    return model


def set_origin(model: PreTrainedModel, how: str) -> None:
    """Note on the model what `description` says of it besides class, size and dtype."""
    model.origin = ", ".join(part for part in (getattr(model, "origin", ""), how) if part)


def description(model: PreTrainedModel) -> str:
    """A model in one line: class, parameters, dtype, and what its weights were made from where `open_checkpoint` knows.

    For example `LlamaForCausalLM, 135M parameters, float32, dequantised from Q4_1 (GGUF)`.
    """
    count = short_number(sum(parameter.numel() for parameter in model.parameters()))
    parts = [type(model).__name__, f"{count} parameters", str(model.dtype).removeprefix("torch.")]
    return ", ".join([*parts, *filter(None, [getattr(model, "origin", "")])])


@contextmanager
def quiet() -> Iterator[None]:
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


def misfits(loaded: dict[str, Any]) -> list[str]:
    """What transformers reports as missing or of another shape after loading."""
    shapes = [
        f"{name} has the shape {tuple(was)}, not {tuple(wanted)}" for name, was, wanted in loaded["mismatched_keys"]
    ]
    return shapes + [f"{name} is missing" for name in loaded["missing_keys"]]


def refuse_faults(source: Path, faults: list[str]) -> None:
    """Raise `InputError` with the first of the faults, if there are any."""
    if faults:
        raise InputError(
            f"The weights in {source} do not fit its config.json ({min(faults)}); copy both from the same model."
        )


def _prepare_to_dequantise(config: PreTrainedConfig, folder: Path) -> str | None:
    """The method that weights are quantised with, None if plain; has transformers undo it where it does so at loading.

    Raises `InputError` for a method that transformers cannot undo.
    """
    settings = next(
        (found for part in (config, config.get_text_config()) if (found := getattr(part, "quantization_config", None))),
        None,
    )
    if not settings:
        return None
    method = settings.get("quant_method") or "bitsandbytes"
    if method in DEQUANTISED_AT_LOADING:
        settings["dequantize"] = True
    elif method not in DEQUANTISED_AFTER:
        raise InputError(
            f"The weights in {folder} are quantised by {method}, which transformers cannot undo, and neurons are "
            f"measured with plain weights; choose the model that it was made from."
        )
    return method


class Stored:
    """The tensors of a folder's safetensors files, read when asked for."""

    def __init__(self, folder: Path, weights: str | None) -> None:
        single, index = (folder / name for name in WEIGHTS)
        if weights or single.is_file():
            self.files = {folder / weights if weights else single}
        else:
            self.files = {
                folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            }

    def leftovers(self, model: PreTrainedModel, unexpected: set[str]) -> list[str]:
        """Faults: tensors that the model has no place for and that may matter, and frequencies unlike the model's.

        unexpected: their names as transformers gives them, which may lack or have a prefix more than in the file.
        """
        faults = {name for name in unexpected if _matters(name, model)}
        rotary = any(name.endswith("inv_freq") for name, _ in model.named_buffers())
        constants, frequencies = set(), set()
        for file in self.files:
            with safe_open(file, "pt") as tensors:
                for stored in tensors.keys():  # noqa: SIM118 (not a dictionary)
                    names = {name for name in faults if _same_name(name, stored)}
                    of_rotary = rotary and stored.endswith("inv_freq")
                    if not (names or of_rotary):
                        continue
                    if is_constant(stored, tensors.get_tensor(stored), model):
                        constants |= names
                    elif of_rotary:
                        frequencies.add(stored)
        told = [f"{name} is not of this model" for name in faults - constants - frequencies]
        return told + [f"{name} holds other frequencies than its rotary embedding" for name in frequencies]


def _same_name(one: str, other: str) -> bool:
    """Whether two names of a tensor differ by a prefix at most."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def is_constant(name: str, value: Tensor, model: PreTrainedModel) -> bool:
    """Whether a stored tensor is one that code computes, as it is in `model`: versions of old saved these with weights.

    Causal masks, banded ones too, and the number that masked scores were set to; positions and token types; rotary
    frequencies; and whatever is a buffer of the same name in the model today.
    """
    last, buffers = name.rpartition(".")[2], dict(model.named_buffers())
    if last == "inv_freq":
        return any(_same(value, buffer) for known, buffer in buffers.items() if known.endswith("inv_freq"))
    if value.numel() == 1 and last in ("masked_bias", "version"):  # the latter of fairseq's positions
        return last == "version" or value.item() <= -1e4
    if any(_same_name(known, name) and _same(value, buffer) for known, buffer in buffers.items()):
        return True
    if last in ("position_ids", "token_type_ids"):
        expected = torch.arange(value.shape[-1]) if last == "position_ids" else torch.zeros(value.shape[-1])
        return _same(value.reshape(-1), expected)
    return _is_causal_mask(value)


def _same(value: Tensor, expected: Tensor) -> bool:
    return value.shape == expected.shape and torch.allclose(
        value.double().cpu(), expected.double().cpu(), rtol=ROUNDING, atol=1e-6
    )


def _is_causal_mask(value: Tensor) -> bool:
    """Whether `value`, (1, ..., n, n), allows each position itself and those before, all or the nearest few."""
    n = value.shape[-1] if value.dim() else 0
    if n < 2 or value.numel() != n * n:
        return False
    mask = value.reshape(n, n).double()
    window = int(mask[-1].sum())
    return window > 0 and torch.equal(mask, torch.ones_like(mask).tril().triu(1 - window))


def _matters(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight that the model has no place for hints at another architecture.

    It does inside a layer or a module of the model, and does not as part of a head for another task, with which
    checkpoints of encoders are often stored.
    """
    module = name.rpartition(".")[0]
    return any(part.isdigit() for part in name.split(".")) or module in dict(model.named_modules())
