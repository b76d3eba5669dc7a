"""FFNs that read only the weights of active neurons: one call, computed on the device that its tensors are on.

naive       the reference: the same rule run densely
ffn         the call: inputs checked once, backend chosen by device
cpu_ffn     numba
triton_ffn  Triton, on a CUDA GPU
certified   an 8-bit copy of the gate that proves neurons inactive (CPU)
reading     which bytes a call needs, counted by its rule
bench       speeds beside dense FFNs and beside memory, on the FFNs of bench_cases
"""

from kernels.ffn import MAX_TOKENS, SparseFFN, sparse_ffn

__all__ = ["MAX_TOKENS", "SparseFFN", "sparse_ffn"]
