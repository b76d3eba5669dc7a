"""Refuse a model of which not all FFNs, or not all that their neurons do, would be measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from sparsity_utils.console import InputError, check
from sparsity_utils.neurons.flow import Stray
from sparsity_utils.neurons.trace import Use
from sparsity_utils.neurons.vectors import Frames

if TYPE_CHECKING:
    from sparsity_utils.neurons.find import FFN


def check_in_place(model: nn.Module) -> None:
    """Raises `InputError` unless all weights of `model` are in the memory of one device."""
    kind, devices = type(model).__name__, set()
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise InputError(
                f"The weight {name} of {kind} is not in memory (it is offloaded, or on the meta device), so that its "
                f"FFNs cannot all be measured: load the model whole, without device_map."
            )
        check(
            not hasattr(parameter, "placements"),
            f"The weight {name} of {kind} is split over processes, so that its FFNs cannot all be measured: "
            f"load the model whole, on one device.",
        )
        devices.add(str(parameter.device))
    check(
        len(devices) < 2,
        f"The weights of {kind} lie on several devices ({', '.join(sorted(devices))}): "
        f"move it to one, such as model.to('{min(devices, default='cpu')}').",
    )


def check_followed(model: nn.Module, uses: list[Use], strays: list[Stray]) -> None:
    """Raises `InputError` when more than a down projection reads h, or its weight is no parameter of the model.

    Masks take effect in the down projection alone: where an unmerged adapter or a skip connection reads h too, a neuron
    that is masked would still act, and ||n_i|| would not be |h_i| * ||W_out[:, i]||.
    """
    followed: dict[int, Use] = {}
    for use in uses:
        first = followed.setdefault(id(use.h), use)
        if use.gathered is None and use.operation != first.operation and use.matrix != first.matrix:
            raise InputError(_also_read(first, use.frames))  # rows of routed experts are another matter
    for stray in strays:
        where = stray.frames[-1] or type(model).__name__
        if id(stray.source) in followed:
            raise InputError(_also_read(followed[id(stray.source)], stray.frames))
        if stray.maps_back:
            raise InputError(
                f"The down projection in {where} has a weight that is no parameter of {type(model).__name__} as it is "
                f"(quantised, pruned by a mask, or computed anew in each pass): dequantise it, or make the change "
                f"permanent."
            )


def _also_read(use: Use, frames: Frames) -> str:
    return (
        f"The neurons of {use.frames[-1] or 'the model'} are also read in {frames[-1] or 'the model'}, beside their "
        f"down projection: merge adapters into the weights first (of peft: model = model.merge_and_unload()); models "
        f"that use neurons twice cannot be measured."
    )


def check_none_left_out(model: nn.Module, ffns: list[FFN]) -> None:
    """Raises `InputError` when a module of a list holds an FFN that was found, and its like in the list does not."""
    names = {module: name for name, module in model.named_modules()}
    found = {id(ffn.parameter) for ffn in ffns}
    checked: set[tuple[str, str]] = set()
    for ffn in ffns:
        parts = f"{names[ffn.holder]}.{ffn.parameter_name}".split(".")
        for end in range(1, len(parts) - 1):
            place = ".".join(parts[:end]), ".".join(parts[end + 1 :])
            entries = model.get_submodule(place[0])
            if isinstance(entries, nn.ModuleList) and place not in checked:
                checked.add(place)
                _check_alike(entries, parts[end], place, found)


def _check_alike(entries: nn.ModuleList, child: str, place: tuple[str, str], found: set[int]) -> None:
    """`place`: the name of `entries`, and that of W_out inside its entry `child`."""
    parameters = dict(entries.named_parameters(remove_duplicate=False))
    like = parameters[f"{child}.{place[1]}"]
    for name, module in entries.named_children():
        own = parameters.get(f"{name}.{place[1]}")
        alike = type(module) is type(entries.get_submodule(child)) and own is not None and own.shape == like.shape
        if alike and id(own) not in found:
            raise InputError(
                f"An FFN was found in {place[0]}.{child} and none in {place[0]}.{name}, which has the same parts: its "
                f"vectors could not be followed. Merge adapters and dequantise weights of that layer first."
            )
