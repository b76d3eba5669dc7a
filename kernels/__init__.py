"""FFNs that read only the weights of active neurons: one call, computed on the device that its tensors are on.

naive       the reference: the same rule run densely
ffn         the call: inputs checked once, backend chosen by device
cpu_ffn     numba
triton_ffn  Triton, on a CUDA GPU
certified   an 8-bit copy of the gate that proves neurons inactive (CPU)
reading     which bytes a call needs, counted by its rule
shapes      of published FFNs
timing      several ways of one job, timed in turn
bench       speeds beside dense FFNs and beside memory, on the FFNs of bench_cases
"""

from typing import Any

__all__ = ["MAX_TOKENS", "SparseFFN", "sparse_ffn"]


def __getattr__(name: str) -> Any:
    """A public name, at its first use (PEP 562): torch takes seconds to load, which `kernels.shapes` does not need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kernels import ffn

    globals()[name] = getattr(ffn, name)
    return globals()[name]
