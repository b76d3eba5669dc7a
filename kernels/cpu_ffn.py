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
    shares, act, by_neuron = threads(ffn), ACTIVATIONS[ffn.act], ffn.rule == "neuron"
    limits, threshold = ffn.gate_limit.numpy(), ffn.threshold.numpy()
    g = np.empty((ffn.d_ff, len(wide)), np.float32)
    needed = np.empty(ffn.d_ff, np.bool_)
    exact = array(ffn.w_gate), vector(ffn.b_gate), wide, limits, act, shares, g, needed
    if ffn.certificate is None:
        select(*exact)
    else:
        copy = ffn.certificate
        parts = (part.numpy() for part in (copy.bits, copy.scale, copy.radius, copy.fixed, copy.region))
        select_certified(*parts, np.linalg.norm(wide.astype(np.float64), axis=1), *exact)
    gated, down = ffn.w_up is not None, array(ffn.w_down_t)
    up = array(ffn.w_up if gated else ffn.w_gate)
    y = np.zeros((shares, len(wide), down.shape[1]), np.float32)
    neurons = np.flatnonzero(needed)
    combine(neurons, g, up, vector(ffn.b_up), gated, down, wide, limits, threshold, by_neuron, act, y)
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


@njit(fastmath=MATH, cache=True, nogil=True)
def examined(row, x, everyone, bias, limit, act, g, wide):
    """Whether any token needs a neuron, given its row of W_gate; fills its g, (tokens,)."""
    dots(row, x, everyone, len(everyone), bias, g, wide)
    needed = False
    for t in everyone:
        if abs(activated(g[t], act)) > limit or not math.isfinite(g[t]):
            needed = True
    return needed


@njit(fastmath=MATH, cache=True, parallel=True)
def select(gate, bias, x, limits, act, shares, g, needed):
    """Fills g, (d_ff, tokens), and needed, (d_ff,): whether any token has |s_i| above the limit of neuron i."""
    for share in prange(shares):
        wide, everyone = np.empty(x.shape[1], np.float32), np.arange(len(x))
        for i in range(len(g) * share // shares, len(g) * (share + 1) // shares):
            b = bias[i] if len(bias) else np.float32(0)
            needed[i] = examined(gate[i], x, everyone, b, limits[i], act, g[i], wide)


@njit(fastmath=MATH, cache=True, parallel=True)
def select_certified(bits, scale, radius, fixed, region, sizes, gate, bias, x, limits, act, shares, g, needed):
    """As `select`, where rows of `bits` that leave no doubt take the place of those of W_gate; sizes are ||x||."""
    for share in prange(shares):
        wide, everyone = np.empty(x.shape[1], np.float32), np.arange(len(x))
        estimate = np.empty(len(x), np.float32)
        for i in range(len(g) * share // shares, len(g) * (share + 1) // shares):
            b = bias[i] if len(bias) else np.float32(0)
            dots(bits[i], x, everyone, len(x), np.float32(0), estimate, wide)
            tail, low, high = region[0, i], region[1, i], region[2, i]
            doubt = False
            for t in everyone:
                middle, reach = scale[i] * estimate[t] + b, radius[i] * sizes[t] + fixed[i]
                if not (middle + reach <= tail or (middle - reach >= low and middle + reach <= high)):
                    doubt = True
            if doubt:
                needed[i] = examined(gate[i], x, everyone, b, limits[i], act, g[i], wide)
            else:
                needed[i] = False


@njit(fastmath=MATH, cache=True, parallel=True)
def combine(neurons, g, up, bias, gated, down, x, limits, threshold, by_neuron, act, y):
    """Adds the output of the given neurons to y, (shares, tokens, d_out)."""
    shares, tokens = y.shape[:2]
    for share in prange(shares):
        wide, needing = np.empty(x.shape[1], np.float32), np.empty(tokens, np.int64)
        s, u = np.empty(tokens, np.float32), np.ones(tokens, np.float32)
        for k in range(len(neurons) * share // shares, len(neurons) * (share + 1) // shares):
            i = neurons[k]
            fetch_start(down[i])
            fetch_start(up[neurons[min(k + 1, len(neurons) - 1)]])
            count = 0
            for t in range(tokens):
                s[t] = activated(g[i, t], act)
                if abs(s[t]) > limits[i] or not math.isfinite(g[i, t]):
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
