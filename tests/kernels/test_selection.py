"""The k-th largest size, against a sort."""

import numpy as np
import pytest
import torch

from kernels.selection import kth_largest

BROKEN = (0.0, 1e-45, 1e-40, torch.finfo(torch.float32).max, torch.inf)


@pytest.fixture(params=[1, 2, 7, 64, 129])
def sizes(request) -> torch.Tensor:
    """Rows of sizes: all different, many ties, zeros alone, numbers at the ends of the range; (4, n) float32."""
    random = torch.Generator().manual_seed(request.param)
    n = request.param
    ends = torch.tensor(BROKEN)[torch.randint(len(BROKEN), (n,), generator=random)]
    ties = torch.randint(3, (n,), generator=random).float()
    return torch.stack([torch.rand(n, generator=random), ties, torch.zeros(n), ends])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_kth_largest_is_that_of_a_sort(sizes, dtype):
    rows = sizes.to(dtype).view(2, 2, -1)
    ranked = rows.sort(dim=-1, descending=True).values
    for k in {1, (rows.shape[-1] + 1) // 2, rows.shape[-1]}:
        found = kth_largest(rows, k)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(found, ranked[..., k - 1 : k].to(found.dtype))


def test_the_compiled_selection_keeps_what_a_sort_keeps(sizes):
    least_bits = pytest.importorskip("kernels.cpu_linear").least_bits
    for row in sizes.numpy():
        for k in {1, (len(row) + 1) // 2, len(row)}:
            kept = row.view(np.int32) >= least_bits(row.view(np.int32), k)
            assert (kept == (row >= np.sort(row)[-k])).all()
