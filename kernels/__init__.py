"""FFNs, linear maps and heads that read only the weights that matter: computed where their tensors are.

naive                      the reference: the same rules run densely
selection                  which size the k largest of a row have at least
ffn                        an FFN that reads active neurons: inputs checked once, backend chosen by device
cpu_ffn, triton_ffn        its backends, in numba and in Triton
linear                     linear maps that read active inputs, and a gated FFN of them
cpu_linear, triton_linear  their backends
layer, cpu_layer           a decoder layer for one token of each sequence, all in one call (CPU)
head, cpu_head             an output head that reads the full rows of words that could still win (CPU)
eight_bits                 a matrix in 8 bits, with a proven bound on its products
certified                  the gate in 8 bits, which proves neurons inactive (CPU)
cpu_threads                threads of the kernels for CPUs
compiled                   machine code of the kernels for CPUs, forgotten when one of them changed
pages                      weights in memory of large pages
reading                    which bytes a call needs, counted by its rule
shapes                     the shapes of published FFNs
timing                     several ways of one job, timed in turn
bench                      speeds compared with dense FFNs and with memory, on the FFNs of `bench_cases`
linear_bench               speeds of linear maps compared with those that skip nothing
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
