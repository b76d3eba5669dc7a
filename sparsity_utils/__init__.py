"""Measure, train, fit: the helper package of the activation-sparsity notebooks."""

import warnings

# Text progress bars are wanted: tqdm would complain, with an absolute path, that ipywidgets is not installed.
warnings.filterwarnings("ignore", message="IProgress not found")

from sparsity_utils.checkpoints import open_checkpoint  # noqa: E402
from sparsity_utils.decode import sparse_kernels  # noqa: E402
from sparsity_utils.errors import InputError  # noqa: E402
from sparsity_utils.hooks import find_ffns, observe_neurons, sparse_neurons  # noqa: E402
from sparsity_utils.metrics import SparsityReport, apply_thresholds, measure_sparsity  # noqa: E402
from sparsity_utils.patterns import activation_patterns  # noqa: E402
from sparsity_utils.study import Study  # noqa: E402
from sparsity_utils.transfer import transfer_matrix  # noqa: E402

__all__ = [
    "InputError",
    "SparsityReport",
    "Study",
    "activation_patterns",
    "apply_thresholds",
    "find_ffns",
    "measure_sparsity",
    "observe_neurons",
    "open_checkpoint",
    "sparse_kernels",
    "sparse_neurons",
    "transfer_matrix",
]
