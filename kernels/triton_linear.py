"""Sparse linear maps on a GPU, in one launch that reads the rows of active inputs only.

Each program owns BLOCK_D outputs of one map and OWN neighbouring inputs. It lists those that are active for some token
and then reads their rows of weights, so that no load waits to know whether its row is needed. The program that comes
last adds all parts in their order, so that the bits do not depend on which that is. Launches and memory do not depend
on the data, so that a CUDA graph can capture a call.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import naive
from kernels.ffn import MAX_TOKENS
from kernels.linear import SparseLinear, dense
from kernels.triton_ffn import INTERPRETED, nearest_tf32, sum_of_parts

PROGRAMS = 1024
CHUNK = 64  # inputs that are looked at together


def run(linear: SparseLinear, x: Tensor) -> Tensor:
    """y, (tokens, outputs), in the dtype of `x`, (tokens, d), contiguous; more than MAX_TOKENS are computed by `dense`.

    Raises `ValueError` when `x` is not on a GPU, unless Triton's interpreter runs the kernel.
    """
    if not x.is_cuda and isinstance(linear_kernel, triton.JITFunction):
        raise ValueError(
            f"x is on {x.device}; the Triton kernel needs a GPU, or TRITON_INTERPRET=1 in the environment."
        )
    if len(x) > MAX_TOKENS:
        return dense(linear, x)
    with torch.cuda.device_of(x):
        return launch(linear, x)


def launch(linear: SparseLinear, x: Tensor) -> Tensor:
    """`run` on the device in use.

    Block sizes are near the fastest of 18 on an H100, at half of the inputs, in bfloat16: gate and up of a Llama-2-7B
    take 0.042 ms (18 sizes: 0.041 to 0.103) where torch's dense product takes 0.073; query, key and value of a
    Llama-3-8B 0.018 ms (0.016 to 0.062) where it takes 0.021.
    """
    tokens, d = x.shape
    block_d = min((512 if tokens == 1 else 256) // linear.weight_t.element_size(), 256)
    blocks = linear.blocks(block_d)  # (columns, 3)
    split = max(min(triton.cdiv(d, CHUNK), PROGRAMS // len(blocks)), 1)
    own = CHUNK * triton.cdiv(d, CHUNK * split)  # neighbouring inputs of one program
    split = triton.cdiv(d, own)
    active = torch.empty(len(blocks), split, own, dtype=torch.int32, device=x.device)
    y = torch.empty(tokens, sum(linear.widths), dtype=x.dtype, device=x.device)
    parts = torch.empty(split, *y.shape, dtype=torch.float32, device=x.device)
    arrived = torch.zeros(len(blocks), dtype=torch.int32, device=x.device)
    least = None  # score that each map keeps of each token, (maps, tokens, 1)
    if linear.keep is not None:
        least = naive.least_kept(naive.input_scores(x, len(linear.keep), linear.norms), linear.keep)
    linear_kernel[(len(blocks), split)](
        *(x, linear.weight_t, linear.bias, linear.limits, linear.norms, least, linear.scale),
        *(blocks, active, arrived, parts, y, tokens, d, y.shape[1]),
        T=1 if tokens == 1 else 16,
        SPLIT=split,
        OWN=own,
        ALIGNED=all(width % 16 == 0 for width in linear.widths),
        CHUNK=CHUNK,
        ROWS=16 if tokens == 1 else 32,  # inputs whose rows are read together
        BLOCK_D=block_d,
        num_warps=2 if tokens == 1 else 4,
    )
    return y


@triton.jit(do_not_specialize=["tokens"])
def linear_kernel(
    x_ptr,  # (tokens, d)
    w_ptr,  # (d, outputs)
    b_ptr,  # (outputs,), or None
    limits_ptr,  # (maps, d), or None
    norms_ptr,  # (maps, d), or None
    least_ptr,  # (maps, tokens), None with limits
    scale_ptr,  # (maps, d), or None
    blocks_ptr,  # (columns, 3)
    active_ptr,  # (columns, SPLIT, OWN), int32: room for the active inputs of each program
    arrived_ptr,  # (columns,), int32, zeros
    parts_ptr,  # (SPLIT, tokens, outputs), float32
    y_ptr,  # out: (tokens, outputs)
    tokens,
    d,
    outputs,
    T: tl.constexpr,
    SPLIT: tl.constexpr,
    OWN: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column = tl.program_id(0)
    split = tl.program_id(1)
    number = tl.load(blocks_ptr + column * 3)
    start = tl.load(blocks_ptr + column * 3 + 1)
    end = tl.load(blocks_ptr + column * 3 + 2)
    if ALIGNED:  # so that weights are loaded 128 bits at a time
        start, end = tl.multiple_of(start, 16), tl.multiple_of(end, 16)
    out = start + tl.arange(0, BLOCK_D)[None, :]
    row = tl.arange(0, T)[:, None]
    own = active_ptr + (column * SPLIT + split) * OWN
    count = 0
    for first in range(0, OWN, CHUNK):
        j = split * OWN + first + tl.arange(0, CHUNK)
        x = masked(x_ptr, limits_ptr, norms_ptr, least_ptr, number, row, j, tokens, d)  # (T, CHUNK)
        active = tl.max((x != 0).to(tl.int32), axis=0)
        tl.store(own + count + tl.cumsum(active) - active, j, mask=active > 0)
        count += tl.sum(active)
    tl.debug_barrier()
    terms = tl.zeros((ROWS if T == 1 else T, BLOCK_D), tl.float32)
    for first in range(0, count, ROWS):
        rank = first + tl.arange(0, ROWS)
        j = tl.load(own + rank, mask=rank < count, other=d)
        x = masked(x_ptr, limits_ptr, norms_ptr, least_ptr, number, row, j, tokens, d)  # (T, ROWS)
        w = tl.load(
            w_ptr + j.to(tl.int64)[:, None] * outputs + out,
            mask=(j < d)[:, None] & (out < end),
            other=0.0,
            eviction_policy="evict_first",
        )
        if scale_ptr is not None:
            x *= tl.load(scale_ptr + number * d + j, mask=j < d, other=0.0)[None, :]
        if T == 1:
            terms += tl.sum(x, axis=0)[:, None] * w.to(tl.float32)
        elif w.dtype == tl.float32 or INTERPRETED:
            terms = tl.dot(x, w.to(tl.float32), terms, input_precision="tf32x3")
        elif scale_ptr is None:
            terms = tl.dot(x.to(w.dtype), w, terms)  # x was of this dtype
        else:  # integers are exact in tf32; x times its scale is two numbers of tf32
            near = nearest_tf32(x)
            terms = tl.dot(near, w.to(tl.float32), terms, input_precision="tf32")
            terms = tl.dot(nearest_tf32(x - near), w.to(tl.float32), terms, input_precision="tf32")
    y = tl.sum(terms, axis=0)[None, :] if T == 1 else terms
    place, inside = row * outputs + out, (row < tokens) & (out < end)
    tl.store(parts_ptr + split * tokens * outputs + place, y, mask=inside)
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + column, 1, sem="acq_rel") == SPLIT - 1:
        y = sum_of_parts(parts_ptr + place, inside, tokens * outputs, T, SPLIT, BLOCK_D)
        if b_ptr is not None:
            y += tl.load(b_ptr + out, mask=out < end, other=0.0).to(tl.float32)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def masked(x_ptr, limits_ptr, norms_ptr, least_ptr, number, row, j, tokens, d):
    """x of the inputs j where they are active for a map, else zero, (T, ROWS), float32."""
    x = tl.load(x_ptr + row * d + j[None, :], mask=(row < tokens) & (j < d)[None, :], other=0.0).to(tl.float32)
    size = tl.abs(x)
    if limits_ptr is not None:
        active = size > tl.load(limits_ptr + number * d + j, mask=j < d, other=float("inf"))[None, :]
    else:
        least = tl.load(least_ptr + number * tokens + row, mask=row < tokens, other=float("inf"))  # (T, 1)
        if norms_ptr is not None:
            size *= tl.load(norms_ptr + number * d + j, mask=j < d, other=0.0)[None, :]
        active = size >= least
    return tl.where(active | ~(tl.abs(x) < float("inf")), x, 0.0)
