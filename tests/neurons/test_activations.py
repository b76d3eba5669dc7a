"""Activation functions are told by their values."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from sparsity_utils.neurons.activations import activation_name

NAMES = {
    "relu": ("relu",),
    "relu2": ("relu2",),
    "silu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"),
    None: (
        "tanh", "quick_gelu", "leaky_relu", "sigmoid", "linear", "relu6", "gelu_10", "mish", "hardswish", "laplace",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("known", "name"), [(known, name) for known, names in NAMES.items() for name in names])
def test_the_functions_of_transformers_are_told_apart(known, name):
    assert activation_name(ACT2FN[name]) == known


class TwoArguments(nn.Module):
    def forward(self, x, y):
        return x.relu()


OTHERS = [nn.Identity(), nn.PReLU(init=0), nn.Softmax(-1), nn.GLU(), nn.RReLU(), nn.Linear(6, 6), TwoArguments()]


@pytest.mark.parametrize("module", OTHERS, ids=lambda module: type(module).__name__)
def test_other_modules_have_no_name(module):
    assert activation_name(module) is None


def test_a_module_is_left_as_it_is_and_its_hooks_are_not_called():
    module = nn.ReLU(inplace=True).train()
    module.register_forward_hook(lambda *given: pytest.fail("a hook was called"))
    state = dict(vars(module))
    assert activation_name(module) == "relu" and activation_name(module) == "relu"
    assert vars(module) == state and module.training


def test_the_default_dtype_does_not_matter():
    torch.set_default_dtype(torch.float64)
    try:
        assert activation_name(nn.SiLU()) == "silu"
    finally:
        torch.set_default_dtype(torch.float32)
