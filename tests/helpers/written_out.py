"""Models whose whole forward is one function of x and of their parameters."""

import torch
from torch import nn


def run(body, x, **parameters):
    """A model whose forward is `body(model, x)`, and x itself."""

    class Model(nn.Module):
        def forward(self, x):
            return body(self, x)

    model, generator = Model(), torch.Generator().manual_seed(0)
    for name, shape in parameters.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        model.register_parameter(name, nn.Parameter(value))
    return model.eval(), torch.randn(x, generator=generator, dtype=torch.float64)
