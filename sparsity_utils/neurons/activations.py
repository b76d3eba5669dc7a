"""Which activation function a module computes, told by its values and not by its class."""

from itertools import chain

import torch
from torch import Tensor, nn

from kernels.naive import ACTIVATIONS
from sparsity_utils.neurons.modes import evaluating


def activation_name(module: nn.Module) -> str | None:
    """The one of `kernels.naive.ACTIVATIONS` that `module` computes, element by element; None if it is none of them.

    It is evaluated in float32, without its hooks, and left as it is. A module that holds tensors is none of them: what
    it computes may change.
    """
    if any(True for _ in chain(module.parameters(), module.buffers())):
        return None
    try:
        with evaluating(module):
            values = module.forward(_grid())
    except Exception:  # it takes something else than one tensor of any shape
        return None
    if not isinstance(values, Tensor) or values.shape != _grid().shape:
        return None
    return next((name for name, act in ACTIVATIONS.items() if _same(values, act(_grid()))), None)


def _grid() -> Tensor:
    """Where the functions differ, and far out, where some are cut off; made anew, for modules that work in place."""
    near, far = torch.linspace(-10, 10, 2001), 2.0 ** torch.arange(4, 11)
    return torch.cat([-far, near, far]).to("cpu", torch.float32)


def _same(values: Tensor, expected: Tensor) -> bool:
    """Whether they differ by no more than the rounding of float32 and of constants written with eight digits."""
    return torch.allclose(values.float(), expected, rtol=1e-5, atol=1e-6)
