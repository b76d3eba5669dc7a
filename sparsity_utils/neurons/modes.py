"""Change a model for the length of a `with` block: set evaluation mode, replace a forward, keep its state."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

NOT_STATE = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, nn.Parameter)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode and without gradients; give every module its own mode back afterwards.

    An autocast that is on outside is off inside, so that the model computes in its own dtype, and FFNs run `unchunked`.
    Inference mode is not used, because tensors that modules cache in the block must serve training later.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), unchunked(model), ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def unchunked(model: nn.Module) -> Iterator[None]:
    """Inside the block each FFN runs on all tokens at once, also where `config.chunk_size_feed_forward` is set.

    Chunks save memory and change nothing else, but rows of a chunk do not tell which tokens they are of.
    """
    chunked = [(module, size) for module in model.modules() if (size := vars(module).get("chunk_size_feed_forward"))]
    for module, _ in chunked:
        module.chunk_size_feed_forward = 0  # type: ignore[assignment]  # an attribute that transformers gives layers
    try:
        yield
    finally:
        for module, size in chunked:
            module.chunk_size_feed_forward = size


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Inside the block flex attention, which runs compiled alone and so under no dispatch mode, is computed eagerly."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    name = "_attn_implementation_internal"  # the public one also sets the configurations inside this one
    flexible = [config for config in configs.values() if getattr(config, name, None) == "flex_attention"]
    for config in flexible:
        setattr(config, name, "eager")
    try:
        yield
    finally:
        for config in flexible:
            setattr(config, name, "flex_attention")


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Inside the block `module` computes `forward`; afterwards again its class's method, or its own."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Run the block, then give `model` its state back: attributes and buffers of all its modules, and its config.

    That is all that can be reached from the model's attributes: objects, dicts, lists, sets and tensors keep their
    identity and get their content back. Only what is written into parameters themselves stays.
    """
    kept = _state(model)
    try:
        yield
    finally:
        for part, content in kept:
            _restore(part, content)


def _state(model: nn.Module) -> list[tuple[Any, Any]]:
    """Everything that can change inside `model`, each with a copy of what it holds."""
    kept: list[tuple[Any, Any]] = []
    seen: set[int] = set()
    ahead: list[Any] = [model]
    while ahead:
        part = ahead.pop()
        if id(part) in seen or isinstance(part, NOT_STATE):
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            if not part.is_inference() and part.device.type != "meta":  # which nothing can write to
                kept.append((part, part.detach().clone()))
            continue
        for kind in (dict, list, set):
            if isinstance(part, kind):
                kept.append((part, kind(part)))
        if isinstance(part, (dict, list, tuple)):
            ahead += part.values() if isinstance(part, dict) else part
        own = getattr(part, "__dict__", None)
        if isinstance(own, dict):
            ahead.append(own)
    return kept


def _restore(part: Any, content: Any) -> None:
    if isinstance(part, Tensor):
        if not torch.equal(part, content):  # batch normalisation writes without counting in `_version`
            with torch.no_grad():
                part.copy_(content)
    elif isinstance(part, list):
        if not _alike(part, content):
            part[:] = content
    elif isinstance(part, set):
        if part != content:
            part.clear()
            part.update(content)
    elif not (_alike(part, content) and _alike(part.values(), content.values())):
        part.clear()
        part.update(content)


def _alike(found: Any, kept: Any) -> bool:
    """Whether both hold the same objects in the same order."""
    return len(found) == len(kept) and all(one is other for one, other in zip(found, kept, strict=True))
