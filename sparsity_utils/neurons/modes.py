"""Change a model for the length of a `with` block: set evaluation mode, or replace the forward of a module."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


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
