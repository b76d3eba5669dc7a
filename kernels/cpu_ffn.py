"""Sparse FFNs on a CPU: numba, threads over rows of the weights. Needs no compiler.

    select   s = act(W_gate x + b), and which neurons some token needs
    combine  for those alone: u = W_up x + b, h = s * u, y += h W_down row

A call is bound by the weights it reads, so each row is read once for all tokens. Every thread takes a fixed share of
the rows and sums into a y of its own; these are added in a fixed order, so that equal calls with equal numbers of
threads give equal bits.
"""

import math

import numba
import numpy as np
import torch
from llvmlite.ir import FunctionType, HalfType, PointerType, VoidType
from numba import njit, prange, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from torch import Tensor

from kernels import naive
from kernels.ffn import SparseFFN

# torch's own threads and numba's then come from one pool, where both load the same libgomp. With a pool of its own
# numba waits for torch's threads, which spin after each operation: 20 against 32 GB/s on 2 cores.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

ACTIVATIONS = {name: code for code, name in enumerate(naive.ACTIVATIONS)}
RELU, RELU2, SILU, GELU, GELU_TANH = (ACTIVATIONS[name] for name in ("relu", "relu2", "silu", "gelu", "gelu_tanh"))
# Sums may be reordered and fused; unlike with fastmath=True, infinities and NaNs are respected.
MATH = {"reassoc", "contract", "nsz"}
BITS = {torch.float16: torch.uint16, torch.bfloat16: torch.int16}  # numba has neither: their bits, told apart by sign
FETCHED = (
    1024  # bytes of the next row asked for ahead; without, scattered rows of 9 KB came at 0.85 of the speed of a stream
)
BYTES_PER_THREAD = 2**18  # of weights; below, starting a thread costs more than it saves


def run(ffn: SparseFFN, x: Tensor) -> Tensor:
    """y, (tokens, d_out), of `x`, (tokens, d): the backend of `SparseFFN` for tensors on a CPU."""
    wide = x.to(torch.float32).numpy()  # (tokens, d)
    rule = ffn.threshold.numpy(), ffn.rule == "neuron", ACTIVATIONS[ffn.act]
    shares = threads(ffn)
    g = np.empty((ffn.d_ff, len(wide)), np.float32)
    needed = np.empty(ffn.d_ff, np.bool_)
    select(array(ffn.w_gate), vector(ffn.b_gate), wide, *rule, shares, g, needed)
    gated, down = ffn.w_up is not None, array(ffn.w_down_t)
    up = array(ffn.w_up if gated else ffn.w_gate)
    y = np.zeros((shares, len(wide), down.shape[1]), np.float32)
    combine(np.flatnonzero(needed), g, up, vector(ffn.b_up), gated, down, wide, *rule, y)
    total = torch.from_numpy(y).sum(0)
    return (total if ffn.b_down is None else total + ffn.b_down).to(x.dtype)


def threads(ffn: SparseFFN) -> int:
    """How many threads to share the rows among: torch's number, fewer for an FFN that is small."""
    size = ffn.w_gate.nbytes + ffn.w_down_t.nbytes + (0 if ffn.w_up is None else ffn.w_up.nbytes)
    wanted = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, size // BYTES_PER_THREAD)
    count = max(wanted, 1)
    if numba.get_num_threads() != count:
        numba.set_num_threads(count)
    return count


def array(weight: Tensor) -> np.ndarray:
    """The numbers of `weight`, or their bits, shared with it."""
    return weight.view(BITS[weight.dtype]).numpy() if weight.dtype in BITS else weight.numpy()


def vector(bias: Tensor | None) -> np.ndarray:
    """A bias in float32; empty for none."""
    return np.empty(0, np.float32) if bias is None else bias.to(torch.float32).numpy()


@intrinsic
def widened(context, number):
    """float32 of a float32, a small integer, or the bits of a float16 (uint16) or a bfloat16 (int16)."""

    def code(context, builder, signature, arguments):
        (bits,), (kind,) = arguments, signature.args
        ir = context.get_value_type
        if kind == types.uint16:
            half = builder.bitcast(bits, HalfType())
            return builder.fpext(half, ir(types.float32))
        if kind == types.int16:
            shifted = builder.shl(builder.zext(bits, ir(types.uint32)), ir(types.uint32)(16))
            return builder.bitcast(shifted, ir(types.float32))
        return context.cast(builder, bits, kind, types.float32)

    return types.float32(number), code


@intrinsic
def fetch(context, place):
    """Ask for the memory at an address, and go on."""

    def code(context, builder, signature, arguments):
        i32 = context.get_value_type(types.int32)
        pointer = builder.inttoptr(arguments[0], PointerType())
        kind = FunctionType(VoidType(), [pointer.type, i32, i32, i32])
        prefetch = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [pointer, i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(place), code


@njit(cache=True, nogil=True)
def fetch_start(row):
    """Ask for the first part of a row; what follows the processor then fetches ahead by itself."""
    for offset in range(0, min(FETCHED, row.nbytes), 64):
        fetch(row.ctypes.data + offset)


@njit(fastmath=MATH, cache=True, nogil=True)
def activated(g, act):
    """act(g) of one number."""
    if act in (RELU, RELU2):
        s = g if g > 0 or g != g else np.float32(0)
        return s if act == RELU else s * s
    if act == SILU:
        return g / (np.float32(1) + math.exp(-g))
    if act == GELU:
        return np.float32(0.5) * g * (np.float32(1) + math.erf(g * np.float32(math.sqrt(0.5))))
    inner = np.float32(math.sqrt(2 / math.pi)) * (g + np.float32(0.044715) * g * g * g)
    return np.float32(0.5) * g * (np.float32(1) + math.tanh(inner))


@njit(fastmath=MATH, cache=True, nogil=True)
def dots(row, x, tokens, count, bias, out, wide):
    """out[t] = row . x[t] + bias for the first `count` of `tokens`.

    Four at a time, so that one reading of the row serves four. `wide`, (d,), holds the row in float32 meanwhile.
    """
    d, done = x.shape[1], 0
    if count >= 4:
        for j in range(d):
            wide[j] = widened(row[j])
    for k in range(0, count - 3, 4):
        t, u, v, w = tokens[k], tokens[k + 1], tokens[k + 2], tokens[k + 3]
        at = au = av = aw = np.float32(0)
        for j in range(d):
            at += wide[j] * x[t, j]
            au += wide[j] * x[u, j]
            av += wide[j] * x[v, j]
            aw += wide[j] * x[w, j]
        out[t], out[u], out[v], out[w] = at + bias, au + bias, av + bias, aw + bias
        done = k + 4
    for k in range(done, count):
        t = tokens[k]
        a = np.float32(0)
        for j in range(d):
            a += widened(row[j]) * x[t, j]
        out[t] = a + bias


@njit(fastmath=MATH, cache=True, parallel=True)
def select(gate, bias, x, threshold, by_neuron, act, shares, g, needed):
    """Fills g, (d_ff, tokens), and needed, (d_ff,): whether any token needs the neuron's row of W_up or W_down."""
    d_ff, tokens = g.shape
    for share in prange(shares):
        wide, everyone = np.empty(x.shape[1], np.float32), np.arange(tokens)
        for i in range(d_ff * share // shares, d_ff * (share + 1) // shares):
            dots(gate[i], x, everyone, tokens, bias[i] if len(bias) else np.float32(0), g[i], wide)
            limit = np.float32(0) if by_neuron else threshold[i]
            needed[i] = False
            for t in range(tokens):
                if abs(activated(g[i, t], act)) > limit or not math.isfinite(g[i, t]):
                    needed[i] = True


@njit(fastmath=MATH, cache=True, parallel=True)
def combine(neurons, g, up, bias, gated, down, x, threshold, by_neuron, act, y):
    """Adds the output of the given neurons to y, (shares, tokens, d_out)."""
    shares, tokens = y.shape[:2]
    for share in prange(shares):
        wide, needing = np.empty(x.shape[1], np.float32), np.empty(tokens, np.int64)
        s, u = np.empty(tokens, np.float32), np.ones(tokens, np.float32)
        for k in range(len(neurons) * share // shares, len(neurons) * (share + 1) // shares):
            i = neurons[k]
            fetch_start(down[i])
            fetch_start(up[neurons[min(k + 1, len(neurons) - 1)]])
            limit = np.float32(0) if by_neuron else threshold[i]
            count = 0
            for t in range(tokens):
                s[t] = activated(g[i, t], act)
                if abs(s[t]) > limit or not math.isfinite(g[i, t]):
                    needing[count] = t
                    count += 1
            if gated:
                dots(up[i], x, needing, count, bias[i] if len(bias) else np.float32(0), u, wide)
            for k in range(count):
                t = needing[k]
                h = s[t] * u[t]
                kept = not by_neuron or (abs(h) >= threshold[i] and h != 0)
                if kept or not math.isfinite(g[i, t]):
                    for j in range(down.shape[1]):
                        y[share, t, j] += h * widened(down[i, j])
