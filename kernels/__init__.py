"""FFNs that read only the weights of active neurons: one call, computed on the device that its tensors are on.

naive       the reference: the same rule run densely
ffn         the call: inputs checked once, backend chosen by device
cpu_ffn     the backend for CPUs, in numba
triton_ffn  the backend for CUDA GPUs, in Triton
certified   an 8-bit copy of the gate that proves neurons inactive (CPU)
reading     which bytes a call needs, counted by its rule
shapes      the shapes of published FFNs
timing      several ways of one job, timed in turn
bench       speeds compared with dense FFNs and with memory, on the FFNs of `bench_cases`
"""

from typing import Any

__all__ = ["MAX_TOKENS", "SparseFFN", "sparse_ffn"]


def __getattr__(name: str) -> Any:
    """Load a public name at its first use (PEP 562), because loading torch takes seconds and `shapes` needs none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kernels import ffn

    globals()[name] = getattr(ffn, name)
    return globals()[name]
