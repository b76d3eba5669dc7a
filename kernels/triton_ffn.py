"""The sparse FFN on a GPU, in two launches that read the rows of active neurons only.

`hidden_kernel` reads W_gate, decides which neurons are needed and reads their rows of W_up. Each program owns BLOCK_N
neighbouring neurons and packs the active ones, in order, at the front of its own BLOCK_N slots. `down_kernel` sums the
packed neurons' rows of W_down; each program owns BLOCK_D outputs and every SPLIT-th block of neurons. Launches and
memory do not depend on the data and nothing waits for the GPU, so that a CUDA graph can capture a call.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ffn import SparseFFN

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 4):  # the first with triton.knobs
    raise ImportError(f"Triton {triton.__version__} is installed; the kernels need 3.4 or later")

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PROGRAMS = 512  # of `down_kernel`: about four for each of an H100's 132 multiprocessors


@dataclass(frozen=True)
class Sizes:
    """Block sizes of both kernels. All but `split` and the stages are powers of two."""

    t: int  # rows of x that are computed: 1, or 16 for tensor cores
    block_n: int  # neurons of one program of `hidden_kernel`
    block_k: int  # inputs of one step along a row of W_gate
    group: int  # rows of W_up read together
    up_block_k: int  # inputs of one step along a row of W_up
    stages: int  # pipeline stages of both, where the sum is a tl.dot
    warps: int
    block_d: int  # outputs of one program of `down_kernel`
    rows: int  # rows of W_down read together
    row_stages: int  # pipeline stages of that; each tile in flight takes two, for it waits for the indices of its rows
    split: int  # programs of `down_kernel` that share one column of outputs
    row_warps: int = 4


def sizes_for(ffn: SparseFFN, tokens: int) -> Sizes:
    """Block sizes for an FFN of any shape.

    One token: the fastest of 90 on an H100 for the published 2.4B shape, half and 90% of the neurons inactive, float32
    and bfloat16 (within 8% of the best of each case; those chosen by reasoning before were up to 32% slower). At 90%
    they take 0.035 and 0.024 ms, where torch's dense FFN takes 0.072 and 0.043.

    More tokens: most neurons are active for some token, so W_up is read as W_gate is. Each program reads x again, from
    L2, so it takes 32 neurons, and loads are pipelined. Chosen by reasoning: on an H100 they are 0.8 to 1.1 times as
    fast as the faster of torch and reading all rows; than torch, 1.6 to 1.7 times with 8 tokens in float32.
    """
    d, d_out, kb = ffn.w_gate.shape[1], ffn.w_down_t.shape[1], 1024 // ffn.w_gate.element_size()
    longest = max(triton.next_power_of_2(d), 16)
    if tokens == 1:
        hidden = {"t": 1, "block_n": 16, "block_k": kb, "group": 4, "up_block_k": 4 * kb, "stages": 1, "warps": 4}
        down = {"block_d": 64, "rows": 64, "row_stages": 1}
    else:
        hidden = {"t": 16, "block_n": 32, "block_k": kb // 4, "group": 32, "up_block_k": kb // 4}
        hidden |= {"stages": 4, "warps": 4}
        down = {"block_d": kb // 4, "rows": 32, "row_stages": 7}
    hidden |= {name: min(hidden[name], longest) for name in ("block_k", "up_block_k")}
    columns, blocks = triton.cdiv(d_out, down["block_d"]), triton.cdiv(ffn.d_ff, hidden["block_n"])
    return Sizes(**hidden, **down, split=min(blocks, max(PROGRAMS // columns, 1)))


def run(ffn: SparseFFN, x: Tensor) -> Tensor:
    """FFN(x) of the active neurons, (tokens, d_out), in the dtype of `x`, (tokens, d), contiguous, of 1 to 16 tokens.

    Raises `ValueError` when `x` is not on a GPU, unless Triton's interpreter runs the kernels.
    """
    if not x.is_cuda and isinstance(hidden_kernel, triton.JITFunction):
        raise ValueError(
            f"x is on {x.device}; the Triton kernels need a GPU, or TRITON_INTERPRET=1 in the environment."
        )
    with torch.cuda.device_of(x):
        return launch(ffn, x, sizes_for(ffn, len(x)))


def launch(ffn: SparseFFN, x: Tensor, sizes: Sizes) -> Tensor:
    """`run` with chosen block sizes."""
    tokens, d = x.shape
    d_out = ffn.w_down_t.shape[1]
    blocks, columns = triton.cdiv(ffn.d_ff, sizes.block_n), triton.cdiv(d_out, sizes.block_d)

    def memory(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    h = memory(blocks * sizes.block_n, sizes.t, dtype=torch.float32)
    neurons = memory(blocks * sizes.block_n, dtype=torch.int32)
    counts = memory(blocks, dtype=torch.int32)
    arrived = memory(columns, dtype=torch.int32)
    parts = memory(sizes.split, tokens, d_out, dtype=torch.float32) if sizes.split > 1 else None
    y = memory(tokens, d_out, dtype=x.dtype)
    packed = (h, neurons, counts, arrived)
    hidden_kernel[(blocks,)](
        *(x, ffn.w_gate, ffn.w_up, ffn.b_gate, ffn.b_up, ffn.threshold, *packed, tokens, d, ffn.d_ff),
        ACT=ffn.act,
        RULE=ffn.rule,
        T=sizes.t,
        BLOCK_N=sizes.block_n,
        BLOCK_K=sizes.block_k,
        GROUP=sizes.group,
        UP_BLOCK_K=sizes.up_block_k,
        STAGES=sizes.stages,
        COLUMNS=columns,
        COLUMNS_PADDED=triton.next_power_of_2(columns),
        num_warps=sizes.warps,
    )
    down_kernel[(columns, sizes.split)](
        *(ffn.w_down_t, ffn.b_down, *packed, parts, y, tokens, d_out, blocks),
        T=sizes.t,
        BLOCK_N=sizes.block_n,
        SPLIT=sizes.split,
        OWN=triton.next_power_of_2(triton.cdiv(blocks, sizes.split)),
        ROWS=sizes.rows,
        BLOCK_D=sizes.block_d,
        STAGES=sizes.row_stages,
        num_warps=sizes.row_warps,
    )
    return y


@triton.jit(do_not_specialize=["tokens"])
def hidden_kernel(
    x_ptr,  # (tokens, d)
    w_gate_ptr,  # (d_ff, d)
    w_up_ptr,  # (d_ff, d), or None
    b_gate_ptr,  # (d_ff,), or None
    b_up_ptr,  # (d_ff,), or None
    threshold_ptr,  # (d_ff,), float32
    h_ptr,  # out: (blocks * BLOCK_N, T), float32, packed within each block
    neurons_ptr,  # out: (blocks * BLOCK_N,), int32, which neuron a slot holds
    counts_ptr,  # out: (blocks,), int32, how many slots of a block are filled
    arrived_ptr,  # out: (COLUMNS,), int32, zeroed for `down_kernel`
    tokens,
    d,
    d_ff,
    ACT: tl.constexpr,
    RULE: tl.constexpr,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    UP_BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr,
):
    block = tl.program_id(0)
    if block == 0:
        column = tl.arange(0, COLUMNS_PADDED)
        tl.store(arrived_ptr + column, tl.zeros((COLUMNS_PADDED,), tl.int32), mask=column < COLUMNS)

    row = tl.arange(0, T)[:, None]
    own = block * BLOCK_N + tl.arange(0, BLOCK_N)
    g = products(x_ptr, w_gate_ptr, b_gate_ptr, own, own < d_ff, tokens, d, T, BLOCK_N, BLOCK_K, STAGES)
    threshold = tl.load(threshold_ptr + own, mask=own < d_ff, other=0.0)
    needed = needs_up(g, activation(g, ACT), threshold[None, :], RULE) & (own < d_ff)[None, :] & (row < tokens)
    needed = tl.max(needed.to(tl.int32), axis=0)  # (BLOCK_N,)
    rank = tl.cumsum(needed) - needed
    total = tl.sum(needed)
    kept = total * 0
    for first in range(0, total, GROUP):
        wanted = first + tl.arange(0, GROUP)
        read = wanted < total
        found = (rank[None, :] == wanted[:, None]) & (needed[None, :] > 0)  # (GROUP, BLOCK_N)
        at = tl.sum(tl.where(found, tl.arange(0, BLOCK_N)[None, :], 0), axis=1)  # (GROUP,)
        neuron = block * BLOCK_N + at
        g_here = tl.gather(g, tl.broadcast_to(at[None, :], (T, GROUP)), axis=1)  # (T, GROUP)
        s = activation(g_here, ACT)
        h = s
        if w_up_ptr is not None:
            h = s * products(x_ptr, w_up_ptr, b_up_ptr, neuron, read, tokens, d, T, GROUP, UP_BLOCK_K, STAGES)
        limit = tl.load(threshold_ptr + neuron, mask=read, other=0.0)
        active = is_active(g_here, s, h, limit[None, :], RULE) & read[None, :] & (row < tokens)
        keep = tl.max(active.to(tl.int32), axis=0)  # (GROUP,)
        slot = block * BLOCK_N + kept + tl.cumsum(keep) - keep
        tl.store(neurons_ptr + slot, neuron, mask=keep > 0)
        tl.store(h_ptr + slot[None, :] * T + row, tl.where(active, h, 0.0), mask=(keep > 0)[None, :])
        kept += tl.sum(keep)
    tl.store(counts_ptr + block, kept)


@triton.jit(do_not_specialize=["tokens"])
def down_kernel(
    w_down_ptr,  # (d_ff, d_out)
    b_down_ptr,  # (d_out,), or None
    h_ptr,  # as `hidden_kernel` wrote these four
    neurons_ptr,
    counts_ptr,
    arrived_ptr,
    parts_ptr,  # (SPLIT, tokens, d_out), float32; None where SPLIT is 1
    y_ptr,  # out: (tokens, d_out)
    tokens,
    d_out,
    blocks,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.arange(0, T)[:, None]
    out = column * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    place = row * d_out + out  # (T, BLOCK_D)
    inside = (row < tokens) & (out < d_out)
    y = packed_sum(w_down_ptr, h_ptr, neurons_ptr, counts_ptr, split, out, d_out, blocks,
                   T, BLOCK_N, SPLIT, OWN, ROWS, BLOCK_D, STAGES)  # fmt: skip
    last = True
    if SPLIT > 1:
        # The program that comes last adds all parts in their order, so that the bits do not depend on which that is.
        tl.store(parts_ptr + split * tokens * d_out + place, y, mask=inside)
        tl.debug_barrier()
        last = tl.atomic_add(arrived_ptr + column, 1, sem="acq_rel") == SPLIT - 1
    if last:
        if SPLIT > 1:
            y = sum_of_parts(parts_ptr + place, inside, tokens * d_out, T, SPLIT, BLOCK_D)
        if b_down_ptr is not None:
            y += tl.load(b_down_ptr + out, mask=out < d_out, other=0.0).to(tl.float32)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_of_parts(ptr, inside, stride, T: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """SPLIT parts of outputs, `stride` numbers apart, added in their order, (T, BLOCK_D), float32."""
    y = tl.zeros((T, BLOCK_D), tl.float32)
    for part in tl.range(0, SPLIT, loop_unroll_factor=4):
        y += tl.load(ptr + part * stride, mask=inside, other=0.0, cache_modifier=".cg")
    return y


@triton.jit
def products(
    x_ptr,
    w_ptr,
    b_ptr,
    neuron,
    read,
    tokens,
    d,
    T: tl.constexpr,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x times the rows `neuron` of w, plus b, (T, N), float32; undefined where `read` is false: no row is read."""
    row = tl.arange(0, T)[:, None]
    w_rows = w_ptr + neuron.to(tl.int64)[:, None] * d
    if T == 1:
        terms = tl.zeros((N, BLOCK_K), tl.float32)
        for start in range(0, d, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)[None, :]
            x = tl.load(x_ptr + k, mask=k < d, other=0.0)
            w = tl.load(w_rows + k, mask=read[:, None] & (k < d), other=0.0, eviction_policy="evict_first")
            terms += w.to(tl.float32) * x.to(tl.float32)
        sums = tl.sum(terms, axis=1)[None, :]
    else:
        sums = tl.zeros((T, N), tl.float32)
        for start in tl.range(0, d, BLOCK_K, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_K)[None, :]
            x = tl.load(x_ptr + row * d + k, mask=(row < tokens) & (k < d), other=0.0)
            w = tl.load(w_rows + k, mask=read[:, None] & (k < d), other=0.0, eviction_policy="evict_first")
            if INTERPRETED:  # the interpreter's tl.dot takes bfloat16 for integers
                x, w = x.to(tl.float32), w.to(tl.float32)
            sums = tl.dot(x, tl.trans(w), sums, input_precision="tf32x3")
    if b_ptr is not None:
        sums += tl.load(b_ptr + neuron, mask=read, other=0.0).to(tl.float32)[None, :]
    return sums


@triton.jit
def packed_sum(
    w_down_ptr,
    h_ptr,
    neurons_ptr,
    counts_ptr,
    split,
    out,
    d_out,
    blocks,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h times W_down over the active neurons of the blocks split, split + SPLIT, ..., (T, BLOCK_D), float32."""
    row = tl.arange(0, T)[:, None]
    own = split + SPLIT * tl.arange(0, OWN)
    counts = tl.load(counts_ptr + own, mask=own < blocks, other=0)
    ends = tl.cumsum(counts)
    total = tl.sum(counts)
    terms = tl.zeros((ROWS if T == 1 else T, BLOCK_D), tl.float32)
    for first in tl.range(0, total, ROWS, num_stages=STAGES):
        rank = first + tl.arange(0, ROWS)
        earlier = ends[None, :] <= rank[:, None]  # (ROWS, OWN): the blocks that end before this neuron
        block = split + SPLIT * tl.sum(earlier.to(tl.int32), axis=1)
        slot = block * BLOCK_N + rank - tl.max(tl.where(earlier, ends[None, :], 0), axis=1)
        read = rank < total
        neuron = tl.load(neurons_ptr + slot, mask=read, other=0)
        w = tl.load(
            w_down_ptr + neuron.to(tl.int64)[:, None] * d_out + out,
            mask=read[:, None] & (out < d_out),
            other=0.0,
            eviction_policy="evict_first",
        )
        if T == 1:
            h = tl.load(h_ptr + slot, mask=read, other=0.0)
            terms += h[:, None] * w.to(tl.float32)
        else:
            h = tl.load(h_ptr + slot[None, :] * T + row, mask=read[None, :], other=0.0)  # (T, ROWS)
            if w.dtype == tl.float32:
                terms = tl.dot(h, w, terms, input_precision="tf32x3")
            else:  # weights of 16 bits are exact in tf32
                terms = tl.dot(nearest_tf32(h), w.to(tl.float32), terms, input_precision="tf32")
    return tl.sum(terms, axis=0)[None, :] if T == 1 else terms


@triton.jit
def nearest_tf32(h):
    """float32 rounded to the 10 bits of a tf32 mantissa, which tensor cores would cut off, towards zero."""
    bits = (h.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(tl.abs(h) < float("inf"), bits.to(tl.float32, bitcast=True), h)


@triton.jit
def activation(g, ACT: tl.constexpr):
    """naive.ACTIVATIONS[ACT] of g, float32. A NaN stays NaN."""
    if ACT == "relu":
        s = tl.where(g <= 0, 0.0, g)
    elif ACT == "relu2":
        s = tl.where(g <= 0, 0.0, g * g)
    elif ACT == "silu":
        s = g * tl.sigmoid(g)
    elif ACT == "gelu":
        s = 0.5 * g * (1 + tl.erf(g * 0.7071067811865476))
    else:  # gelu_tanh: (1 + tanh(z)) / 2 is sigmoid(2 z)
        s = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    return s


@triton.jit
def needs_up(g, s, threshold, RULE: tl.constexpr):
    """Whether a neuron may be active, as far as g and s tell."""
    loud = tl.abs(s) > threshold if RULE == "gate" else s != 0
    return loud | ~(tl.abs(g) < float("inf"))


@triton.jit
def is_active(g, s, h, threshold, RULE: tl.constexpr):
    """As naive.active_neurons."""
    loud = tl.abs(s) > threshold
    if RULE == "neuron":
        loud = ((tl.abs(h) >= threshold) & (h != 0)) | ((s != 0) & ~(tl.abs(h) < float("inf")))
    return loud | ~(tl.abs(g) < float("inf"))
