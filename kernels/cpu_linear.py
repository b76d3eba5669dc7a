"""Sparse linear maps on a CPU, in numba; threads share the active inputs.

A call takes as long as reading the rows of its active inputs. A row of a small model is short (2 to 12 kB), and the
processor's own prefetching starts anew at each: so four rows are added at a time, in pieces that stay in the nearest
cache, while the same pieces of the next four are fetched. Every thread sums into a y of its own; these are added in a
fixed order, so that equal calls with equal numbers of threads give equal bits.
"""

from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from kernels.cpu_ffn import ACTIVATIONS, MATH, activated, array, fetch, vector, widened
from kernels.cpu_threads import alone, on_threads
from kernels.ffn import forked
from kernels.linear import SparseInputFFN, SparseLinear, dense, dense_ffn

# Bytes of each row that are added at a time. With half of 576 x 3072 inactive one thread took 119, 164 and 170
# microseconds for 256, 512 and 1,024 in float32, and in 8 bits 130, 96 and 87 for 64, 128 and 256.
PIECE = 256
# Tokens of one call, by the dtype of the weights, up to which reading active rows is faster than masking all tokens and
# multiplying in torch, with half of the inputs active for each: 576 x 3072 in float32 took 549 and 753 microseconds for
# 3 and 4 tokens, torch 541 and 654, and 1536 x 576 289 and 370, torch 376 and 295; in 8 bits 451 and 563 for 6 and 8,
# torch 602 and 657, and 241 and 296, torch 215 and 227; in bfloat16 83 and 372 for 1 and 2, torch 158 and 160. Of more
# tokens nearly every input is active for some.
FEW = {torch.float32: 3, torch.float16: 1, torch.bfloat16: 1, torch.int8: 6}
INFINITY = 0x7F800000  # bits of an infinite float32


class Maps(NamedTuple):
    """The arrays of a `SparseLinear`; limits, or norms and keep, are empty, and so are bias and scale if not given."""

    weight: np.ndarray  # (d, outputs), half precision as bits
    starts: np.ndarray  # (maps + 1,), int64: the first output of each map
    limits: np.ndarray  # (maps, d)
    norms: np.ndarray  # (maps, d)
    keep: np.ndarray  # (maps,), int64
    scale: np.ndarray  # (maps, d)
    bias: np.ndarray  # (outputs,)


def arrays(linear: SparseLinear) -> Maps:
    """The maps as numba takes them; weights share the memory of `linear`."""
    none, maps = np.empty((0, 0), np.float32), len(linear.widths)
    ones = none if linear.keep is None else np.ones((maps, linear.d), np.float32)
    limits, scale = (none if part is None else part.numpy() for part in (linear.limits, linear.scale))
    norms = ones if linear.norms is None else linear.norms.numpy()
    starts = np.cumsum([0, *linear.widths])
    keep = np.array(linear.keep or (), np.int64)
    return Maps(array(linear.weight_t), starts, limits, norms, keep, scale, vector(linear.bias))


def run(linear: SparseLinear, x: Tensor) -> Tensor:
    """y, (tokens, outputs), of `x`, (tokens, d): the backend of `SparseLinear` for tensors on a CPU."""
    if forked():
        return alone(lambda: dense(linear, x))
    if many(linear, x):
        return product(linear, x)
    with on_threads(linear.weight_t.nbytes) as count:
        y = mapped(x.to(torch.float32).numpy(), linear.arrays, count)
    return torch.from_numpy(y).to(x.dtype)


def many(linear: SparseLinear, x: Tensor) -> bool:
    """Whether torch computes so many tokens faster."""
    return len(x) > FEW[linear.weight_t.dtype]


def product(linear: SparseLinear, x: Tensor) -> Tensor:
    """y of so many tokens that every weight is read: inputs are masked here, and torch multiplies.

    64 tokens of 576 x 3072 at half of the inputs take 1.47 ms in float32 and 1.88 in 8 bits, `dense` 2.02 and 8.69,
    torch's product without a mask 1.55 (two threads).
    """
    if linear.scale is None and x.dtype != torch.float32:
        return dense(linear, x)  # torch multiplies half precision faster than float32
    wide, weights = x.to(torch.float32).numpy(), linear.weight_t.split(linear.widths, dim=1)
    with on_threads(linear.weight_t.nbytes) as count:
        kept = [torch.from_numpy(masked_many(wide, linear.arrays, m, count)) for m in range(len(weights))]
    y = torch.cat([values @ weight.float() for values, weight in zip(kept, weights, strict=True)], dim=1)
    return (y if linear.bias is None else y + linear.bias).to(x.dtype)


def run_ffn(ffn: SparseInputFFN, x: Tensor) -> Tensor:
    """y, (tokens, d_out), of `x`, (tokens, d)."""
    if forked():
        return alone(lambda: dense_ffn(ffn, x))
    if many(ffn.gate_up, x):
        return dense_ffn(ffn, x)
    with on_threads(ffn.gate_up.weight_t.nbytes + ffn.down.weight_t.nbytes) as count:
        y = ffn_mapped(x.to(torch.float32).numpy(), ffn.gate_up.arrays, ffn.down.arrays, ACTIVATIONS[ffn.act], count)
    return torch.from_numpy(y).to(x.dtype)


@njit(cache=True)
def ffn_mapped(x, gate_up, down, act, shares):
    """y, (tokens, d_out), of a gated FFN, in float32."""
    both = mapped(x, gate_up, shares)  # (tokens, 2 d_ff)
    d_ff = both.shape[1] // 2
    h = np.empty((len(x), d_ff), np.float32)
    for t in range(len(x)):
        for i in range(d_ff):
            h[t, i] = activated(both[t, i], act) * both[t, d_ff + i]
    return mapped(h, down, shares)


@njit(cache=True)
def mapped(x, maps, shares):
    """y, (tokens, outputs), in float32."""
    values, rows, counts = masked(x, maps)
    y = np.zeros((shares, len(x), maps.weight.shape[1]), np.float32)
    accumulate(values, rows, counts, maps.weight, maps.starts, y)
    for share in range(1, shares):
        y[0] += y[share]
    return y[0] + maps.bias if len(maps.bias) else y[0]


@njit(cache=True)
def masked(x, maps):
    """What each row is multiplied by, (maps, tokens, d), zero where inactive; and each map's active rows, counted."""
    tokens, d = x.shape
    count = len(maps.starts) - 1
    values, rows = np.empty((count, tokens, d), np.float32), np.empty((count, d), np.int64)
    counts = np.zeros(count, np.int64)
    for m in range(count):
        for t in range(tokens):
            keep_active(x[t], maps, m, values[m, t])
        for j in range(d):
            used = False
            for t in range(tokens):
                used |= values[m, t, j] != 0
            if used:
                rows[m, counts[m]] = j
                counts[m] += 1
            if len(maps.scale):
                for t in range(tokens):
                    values[m, t, j] *= maps.scale[m, j]
    return values, rows, counts


@njit(cache=True, parallel=True)
def masked_many(x, maps, m, shares):
    """What the rows of map m are multiplied by, (tokens, d), zero where inactive."""
    values = np.empty_like(x)
    for share in prange(shares):
        for t in range(len(x) * share // shares, len(x) * (share + 1) // shares):
            keep_active(x[t], maps, m, values[t])
            if len(maps.scale):
                for j in range(x.shape[1]):
                    values[t, j] *= maps.scale[m, j]
    return values


@njit(cache=True)
def keep_active(x, maps, m, out):
    """out[j] = x[j] where it is active for map m, else 0. A NaN or an infinity is always active."""
    if len(maps.limits):
        for j in range(len(x)):
            out[j] = np.float32(0) if abs(x[j]) <= maps.limits[m, j] and abs(x[j]) < np.inf else x[j]
        return
    for j in range(len(x)):
        size = abs(x[j])
        out[j] = size * maps.norms[m, j] if size < np.inf else np.float32(np.inf)
    bits = out.view(np.int32)
    least = least_bits(bits, maps.keep[m])
    for j in range(len(x)):
        out[j] = x[j] if bits[j] >= least else np.float32(0)


@njit(cache=True)
def least_bits(bits, k):
    """A number that the k largest of `bits`, (d,), and those equal to the k-th, are at or above, and no others.

    `bits` are those of floats >= 0, which have the order of the floats. Halving the range of the answer counts all of
    them in about 15 passes without a branch: 0.5 microseconds for 576 and 1.1 for 1,536, np.partition 7 and 17.
    """
    low, high = np.int32(0), np.int32(INFINITY + 1)
    while high - low > 1:
        middle = low + (high - low) // 2
        count = 0
        for j in range(len(bits)):
            count += bits[j] >= middle
        if count == k:
            return middle
        if count > k:
            low = middle
        else:
            high = middle
    return low


@njit(cache=True, parallel=True)
def accumulate(values, rows, counts, weight, starts, y):
    """Adds the rows of each map, times their values, to its outputs of y, (shares, tokens, outputs)."""
    shares = len(y)
    for share in prange(shares):
        for m in range(len(counts)):
            first, end = counts[m] * share // shares, counts[m] * (share + 1) // shares
            if y.shape[1] == 1:
                add_for_one(values[m, 0], weight, starts[m], starts[m + 1], rows[m, first:end], y[share, 0])
            else:
                add_for_many(values[m], weight, starts[m], starts[m + 1], rows[m, first:end], y[share])


@njit(cache=True)
def four_rows(rows, k):
    """The rows k to k + 3, the last one again where there are fewer."""
    last = len(rows) - 1
    return rows[min(k, last)], rows[min(k + 1, last)], rows[min(k + 2, last)], rows[min(k + 3, last)]


@njit(cache=True)
def fetch_pieces(weight, rows, first, end):
    """Prefetch the weights first to end of four rows."""
    for row in rows:
        place = weight[row].ctypes.data
        for at in range(place + first * weight.itemsize, place + end * weight.itemsize, 64):
            fetch(at)


@njit(fastmath=MATH, cache=True)
def add_for_one(x, weight, start, stop, rows, y):
    """y[start:stop] += sum of x[j] weight[j, start:stop] over the given rows j; x (d,), y (outputs,)."""
    piece = PIECE // weight.itemsize
    for k in range(0, len(rows), 4):
        four, following = four_rows(rows, k), four_rows(rows, k + 4)
        values = four_values(x, four, len(rows) - k)
        for first in range(start, stop, piece):
            end = min(first + piece, stop)
            fetch_pieces(weight, following, first, end)
            wa, wb, wc, wd = (
                weight[four[0], first:end], weight[four[1], first:end],
                weight[four[2], first:end], weight[four[3], first:end],
            )  # fmt: skip
            add(y[first:end], values, wa, wb, wc, wd)


@njit(fastmath=MATH, cache=True)
def add_for_many(x, weight, start, stop, rows, y):
    """The same for several tokens, which share the reading of a piece: x (tokens, d), y (tokens, outputs)."""
    piece = PIECE // weight.itemsize
    pieces = np.empty((4, piece), np.float32)
    for k in range(0, len(rows), 4):
        four, following = four_rows(rows, k), four_rows(rows, k + 4)
        for first in range(start, stop, piece):
            end = min(first + piece, stop)
            fetch_pieces(weight, following, first, end)
            for place in range(4):
                widen(weight[four[place], first:end], pieces[place])
            for t in range(len(x)):
                values = four_values(x[t], four, len(rows) - k)
                add(y[t, first:end], values, pieces[0], pieces[1], pieces[2], pieces[3])


@njit(cache=True)
def four_values(x, four, left):
    """x of four rows, zero for those beyond the last."""
    nothing = np.float32(0)
    return (
        x[four[0]], x[four[1]] if left > 1 else nothing,
        x[four[2]] if left > 2 else nothing, x[four[3]] if left > 3 else nothing,
    )  # fmt: skip


@njit(cache=True)
def widen(row, out):
    """out = row in float32."""
    for i in range(len(row)):
        out[i] = widened(row[i])


@njit(fastmath=MATH, cache=True)
def add(y, values, wa, wb, wc, wd):
    """y += the sum of four values times their pieces of rows. Its indices start at 0, or LLVM would not vectorise."""
    xa, xb, xc, xd = values
    for i in range(len(y)):
        y[i] += xa * widened(wa[i]) + xb * widened(wb[i]) + xc * widened(wc[i]) + xd * widened(wd[i])
