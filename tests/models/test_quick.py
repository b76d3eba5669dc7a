"""The quick routines of a CPU core against those of PyTorch and transformers."""

import copy

import pytest
import torch

from sparsity_utils.models import quick
from sparsity_utils.models.config import ModelConfig
from sparsity_utils.models.decoder import build_model
from sparsity_utils.models.quick import QuickAttention, QuickLinear, product, quicken


def loss_and_gradients(model, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("d_model", "head_size", "activation"), [(24, 12, "relu"), (48, 16, "silu"), (32, 32, "relu2")]
)
def test_a_quick_decoder_has_the_loss_and_the_gradients_of_transformers(d_model, head_size, activation):
    config = ModelConfig(d_model, 3, activation, vocabulary=64, context=64, head_size=head_size)
    plain = build_model(config, seed=0)
    fast = quicken(copy.deepcopy(plain))
    kinds = [type(module) for module in fast.modules()]
    assert kinds.count(QuickLinear) == 3 * 7 and kinds.count(QuickAttention) == 3
    ids = torch.randint(64, (3, 40), generator=torch.Generator().manual_seed(1))
    expected, gradients = loss_and_gradients(plain, ids)
    found, quick_gradients = loss_and_gradients(fast, ids)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(quick_gradients, gradients, rtol=1e-4, atol=1e-6)
    assert fast.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("onednn", [quick.ONEDNN, None], ids=["as built", "without oneDNN"])
def test_a_product_is_that_of_the_matrices(dtype, onednn, monkeypatch):
    monkeypatch.setattr(quick, "ONEDNN", onednn)
    x, weight = (torch.randn(shape, generator=torch.Generator().manual_seed(2)) for shape in ((50, 7), (9, 7)))
    x, weight = x.to(dtype), weight.to(dtype)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(product(x, weight).double(), expected, rtol=1e-5, atol=1e-5)
    turned = product(x.t().contiguous().t(), weight.t().contiguous().t())  # columns first in memory
    torch.testing.assert_close(turned.double(), expected, rtol=1e-5, atol=1e-5)
