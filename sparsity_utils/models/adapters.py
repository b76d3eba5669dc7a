"""LoRA adapters: a folder with adapter_config.json and adapter_model.safetensors, merged into the model it is for.

Merged, W + scaling B A stands where W stood (arXiv 2106.09685, section 4.1), so that the model has FFNs like any other.
"""

import json
import warnings
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel

from sparsity_utils.console import InputError, explained
from sparsity_utils.models.weights import WEIGHTS as MODEL_WEIGHTS
from sparsity_utils.models.weights import set_origin

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def base_folder(folder: Path) -> Path:
    """Where the model is that the adapter in `folder` is for: there too, beside it, or where its configuration says.

    A folder without an adapter is its own. Raises `InputError` for an adapter that is none of LoRA, has no safetensors,
    or whose model is not on this machine.
    """
    if not (folder / CONFIG).is_file():
        return folder
    with explained(f"{folder / CONFIG} cannot be used", "copy it again from where the adapter is"):
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, name = content.get("peft_type"), content.get("base_model_name_or_path") or ""
    if kind != "LORA":
        raise InputError(f"The adapter in {folder} is of the type {kind}; only LORA can be merged into a model.")
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"There is no {WEIGHTS} in {folder}, and pickled weights (.bin) are never opened.")
    named = [Path(name).expanduser(), folder / name, folder.parent / Path(name).name] if name else []
    for place in (folder, *named):
        if any((place / file).is_file() for file in MODEL_WEIGHTS):
            return place
    raise InputError(
        f"The adapter in {folder} is for {name or 'a model without a name'}, which is no folder here; put the "
        f"folder of that model beside it."
    )


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` with the adapter in `folder` added to its weights, in their dtype; changed in place.

    Raises `InputError` when the adapter is not for this model: a part of it has no place, or one lacks.
    """
    from peft import PeftModel, get_peft_model_state_dict

    remedy = "copy it again, and put the model beside it that it was trained on"
    with explained(f"The adapter in {folder} cannot be merged", remedy), warnings.catch_warnings(action="ignore"):
        adapted = PeftModel.from_pretrained(model, str(folder))
        with safe_open(folder / WEIGHTS, "pt") as tensors:
            odd = set(tensors.keys()) ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if odd:
            raise InputError(f"The adapter in {folder} does not fit its model (see {min(odd)}); {remedy}.")
        whole = adapted.merge_and_unload(safe_merge=True)
    set_origin(whole, f"with the adapter {folder.name} merged")
    return whole.requires_grad_(True).eval()
