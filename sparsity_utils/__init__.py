"""Measure, train, fit: the helper package of the activation-sparsity notebooks.

The public names below load when they are first used: importing torch and transformers takes seconds, which neither
`import sparsity_utils` nor a help text needs.
"""

import importlib
import warnings
from typing import Any

# Text progress bars are wanted: tqdm would complain, with an absolute path, that ipywidgets is not installed.
warnings.filterwarnings("ignore", message="IProgress not found")

PUBLIC = {  # name: the module that it lives in
    "InputError": "console",
    "SparsityReport": "sparsity.metrics",
    "Study": "study.study",
    "Thresholds": "neurons.thresholds",
    "TrainingFree": "sparsity.training_free",
    "activation_patterns": "sparsity.patterns",
    "apply_thresholds": "sparsity.metrics",
    "find_ffns": "neurons.find",
    "find_linears": "neurons.linears",
    "measure_sparsity": "sparsity.metrics",
    "observe_inputs": "neurons.linears",
    "observe_neurons": "neurons.hooks",
    "open_checkpoint": "models.pretrained",
    "read_documents": "text.windows",
    "sparse_inputs": "neurons.linears",
    "sparse_kernels": "decoding.decode",
    "sparse_neurons": "neurons.hooks",
    "split_documents": "text.windows",
    "text_batches": "text.windows",
    "transfer_matrix": "sparsity.patterns",
}
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    """Load a public name at its first use (PEP 562)."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"{__name__}.{PUBLIC[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
