"""FFNs that read only the weights of active neurons: one call, computed on the device that its tensors are on.

naive       the reference: the same rule run densely
cpu_ffn     numba
triton_ffn  Triton, on a CUDA GPU
"""

from kernels.ffn import MAX_TOKENS, SparseFFN, sparse_ffn

__all__ = ["MAX_TOKENS", "SparseFFN", "sparse_ffn"]
