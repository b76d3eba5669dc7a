"""The names that readers import, kept stable: each loads, from the module that defines it."""

import pytest

import kernels
import sparsity_utils

PROMISED = [
    "measure_sparsity",
    "find_ffns",
    "observe_neurons",
    "sparse_neurons",
    "sparse_kernels",
    "open_checkpoint",
    "Study",
    "Thresholds",
    "InputError",
    "read_documents",
    "text_batches",
    "split_documents",
    "activation_patterns",
    "transfer_matrix",
    "apply_thresholds",
]


@pytest.mark.parametrize("name", sorted({*PROMISED, *sparsity_utils.__all__}))
def test_a_public_name_loads_from_where_it_is_defined(name):
    assert name in sparsity_utils.__all__
    found = getattr(sparsity_utils, name)
    assert found.__module__ == f"sparsity_utils.{sparsity_utils.PUBLIC[name]}" and found.__doc__


@pytest.mark.parametrize("name", kernels.__all__)
def test_so_does_one_of_the_kernels(name):
    assert getattr(kernels, name) is not None


@pytest.mark.parametrize("package", [sparsity_utils, kernels])
def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018
