"""Sparse FFNs on a CPU, in numba; threads share the rows of the weights. No C++ compiler is needed.

    select   s = act(W_gate x + b), and which neurons some token needs
    combine  for those alone: u = W_up x + b, h = s * u, y += h W_down row

A call takes as long as reading its weights, so each row is read once for all tokens. Every thread takes a fixed share
of the rows and sums into a y of its own. These are added in a fixed order, so that equal calls with equal numbers of
threads give equal bits.
"""

import math
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from llvmlite.ir import FunctionType, HalfType, PointerType, VoidType
from numba import njit, prange, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from torch import Tensor

from kernels import naive
from kernels.compiled import forget_old_code
from kernels.cpu_threads import alone, on_threads
from kernels.eight_bits import EightBits
from kernels.ffn import SparseFFN, forked, run_dense

ACTIVATIONS = {name: code for code, name in enumerate(naive.ACTIVATIONS)}
RELU, RELU2, SILU, GELU, GELU_TANH = (ACTIVATIONS[name] for name in ("relu", "relu2", "silu", "gelu", "gelu_tanh"))
# Sums may be reordered and fused; unlike with fastmath=True, infinities and NaNs are respected.
MATH = {"reassoc", "contract", "nsz"}
BITS = {torch.float16: torch.uint16, torch.bfloat16: torch.int16}  # numba has neither: their bits, told apart by sign
# Bytes of the next row to prefetch; the processor fetches what follows by itself. At d = 2304 in float32, half and
# nine tenths of 5,760 neurons inactive: 2.38 and 1.19 ms, against 2.54 and 1.35 without and 2.71 and 1.37 with 4,096.
FETCHED = 256


def run(ffn: SparseFFN, x: Tensor) -> Tensor:
    """y, (tokens, d_out), of `x`, (tokens, d): the backend of `SparseFFN` for tensors on a CPU."""
    if forked():
        return alone(lambda: run_dense(ffn, x))
    wide = x.to(torch.float32).numpy()  # (tokens, d)
    gate, up, down, quantised, limits = ffn.arrays
    rule = limits, ffn.threshold.numpy(), ffn.rule == "neuron", ACTIVATIONS[ffn.act]
    with on_threads(size(ffn)) as count:
        y = computed(wide, gate, up, down, quantised, *rule, count)
    return torch.from_numpy(y).to(x.dtype)


class Rows(NamedTuple):
    """A matrix with one row per neuron, in half precision its bits, and the float32 bias; empty where there is none."""

    weight: np.ndarray
    bias: np.ndarray


class Quantised(NamedTuple):
    """The arrays of a `CertifiedGate`, those of its copy first; they have no rows where an FFN has none."""

    bits: np.ndarray
    scale: np.ndarray
    radius: np.ndarray
    fixed: np.ndarray
    most: np.ndarray
    region: np.ndarray


NOT_QUANTISED = Quantised(np.empty((0, 0), np.int8), *(np.empty(0),) * 4, np.empty((0, 0)))


def arrays(ffn: SparseFFN) -> tuple[Rows, Rows, Rows, Quantised, np.ndarray]:
    """Gate, up, down, the quantised gate and the limits as numba takes them; weights share the FFN's memory."""
    gate = Rows(array(ffn.w_gate), vector(ffn.b_gate))
    up = Rows(gate.weight[:0] if ffn.w_up is None else array(ffn.w_up), vector(ffn.b_up))
    quantised = NOT_QUANTISED
    if ffn.certificate is not None:
        quantised = Quantised(*(*numbers(ffn.certificate.copy), ffn.certificate.region.numpy()))
    return gate, up, Rows(array(ffn.w_down_t), vector(ffn.b_down)), quantised, ffn.gate_limit.numpy()


def numbers(copy: EightBits) -> tuple[np.ndarray, ...]:
    """The arrays of an 8-bit copy, in the order of its fields."""
    return tuple(getattr(copy, field.name).numpy() for field in fields(copy))


def size(ffn: SparseFFN) -> int:
    """Bytes of all weights."""
    return ffn.w_gate.nbytes + ffn.w_down_t.nbytes + (0 if ffn.w_up is None else ffn.w_up.nbytes)


def array(weight: Tensor) -> np.ndarray:
    """The numbers of `weight`, or their bits, shared with it."""
    return weight.view(BITS[weight.dtype]).numpy() if weight.dtype in BITS else weight.numpy()


def vector(bias: Tensor | None) -> np.ndarray:
    """A bias in float32; empty for none."""
    return np.empty(0, np.float32) if bias is None else bias.to(torch.float32).numpy()


@intrinsic
def widened(context, number):
    """The float32 value of a float32, a small integer, or the bits of a float16 (uint16) or a bfloat16 (int16)."""

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
    """Prefetch: ask the processor to load the memory at an address into its cache, without waiting for it."""

    def code(context, builder, signature, arguments):
        i32 = context.get_value_type(types.int32)
        pointer = builder.inttoptr(arguments[0], PointerType())
        kind = FunctionType(VoidType(), [pointer.type, i32, i32, i32])
        prefetch = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [pointer, i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(place), code


@njit(cache=True)
def fetch_start(row):
    """Prefetch the first part of a row; the processor then fetches what follows by itself."""
    for offset in range(0, min(FETCHED, row.nbytes), 64):
        fetch(row.ctypes.data + offset)


@njit(fastmath=MATH, cache=True)
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


@njit(fastmath=MATH, cache=True)
def dots(row, x, tokens, count, bias, out, wide):
    """out[t] = row . x[t] + bias for the first `count` of `tokens`.

    Four tokens at a time, so that the row is read once for four. `wide`, (d,), holds the row in float32 meanwhile.
    """
    d = x.shape[1]
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
    for k in range(count - count % 4, count):
        t = tokens[k]
        a = np.float32(0)
        for j in range(d):
            a += widened(row[j]) * x[t, j]
        out[t] = a + bias


@njit(cache=True)
def indices(chosen):
    """The numbers of the neurons that are chosen, bool (d_ff,), in increasing order."""
    return np.flatnonzero(chosen)


@njit(cache=True)
def computed(x, gate, up, down, quantised, limits, threshold, by_neuron, act, shares):
    """y, (tokens, d_out), in float32; a plain FFN has no rows of `up`."""
    g = np.empty((len(limits), len(x)), np.float32)
    chosen = np.ones(len(limits), np.bool_)
    if len(quantised.bits):
        undecided(x, gate.bias, quantised, shares, chosen)
    select(x, gate, indices(chosen), limits, act, shares, g, chosen)
    y = np.zeros((shares, len(x), down.weight.shape[1]), np.float32)
    combine(x, indices(chosen), g, up, down.weight, limits, threshold, by_neuron, act, y)
    for share in range(1, shares):
        y[0] += y[share]
    return y[0] + down.bias if len(down.bias) else y[0]


@njit(fastmath=MATH, cache=True, parallel=True)
def undecided(x, bias, quantised, shares, chosen):
    """Sets chosen, (d_ff,), to False where the 8-bit copy proves the neuron inactive for all tokens, else to True."""
    bits, scale, radius, fixed, most, region = quantised
    sizes = np.sqrt((x.astype(np.float64) ** 2).sum(axis=1))  # ||x|| of each token
    for share in prange(shares):
        wide, everyone = np.empty(x.shape[1], np.float32), np.arange(len(x))
        estimate = np.empty(len(x), np.float32)
        for i in range(len(bits) * share // shares, len(bits) * (share + 1) // shares):
            dots(bits[i], x, everyone, len(x), np.float32(0), estimate, wide)
            b = bias[i] if len(bias) else np.float32(0)
            chosen[i] = False
            for t in everyone:
                middle, reach = scale[i] * estimate[t] + b, radius[i] * sizes[t] + fixed[i]
                tail, low, high = region[0, i], region[1, i], region[2, i]
                inside = middle + reach <= tail or (middle - reach >= low and middle + reach <= high)
                if not (inside and sizes[t] <= most[i]):
                    chosen[i] = True


@njit(fastmath=MATH, cache=True, parallel=True)
def select(x, gate, neurons, limits, act, shares, g, needed):
    """Fills g, (d_ff, tokens), and needed, (d_ff,), of the given neurons: whether any token has |s_i| > limit_i."""
    weight, bias = gate
    for share in prange(shares):
        wide, everyone = np.empty(x.shape[1], np.float32), np.arange(len(x))
        first, end = len(neurons) * share // shares, len(neurons) * (share + 1) // shares
        for k in range(first, end):
            i = neurons[k]
            fetch_start(weight[neurons[min(k + 1, end - 1)]])
            dots(weight[i], x, everyone, len(x), bias[i] if len(bias) else np.float32(0), g[i], wide)
        for k in range(first, end):
            i = neurons[k]
            needed[i] = False
            for t in everyone:
                if abs(activated(g[i, t], act)) > limits[i] or not math.isfinite(g[i, t]):
                    needed[i] = True


@njit(fastmath=MATH, cache=True, parallel=True)
def combine(x, neurons, g, up, down, limits, threshold, by_neuron, act, y):
    """Adds the output h_i W_down[i] of the given neurons to y, (shares, tokens, d_out), one y for each thread."""
    weight, bias = up
    gated = len(weight) > 0
    shares, tokens = y.shape[:2]
    for share in prange(shares):
        wide, needing = np.empty(x.shape[1], np.float32), np.empty(tokens, np.int64)
        s, u = np.empty(tokens, np.float32), np.ones(tokens, np.float32)
        first, end = len(neurons) * share // shares, len(neurons) * (share + 1) // shares
        for k in range(first, end):
            i = neurons[k]
            fetch_start(down[i])
            if gated:
                fetch_start(weight[neurons[min(k + 1, end - 1)]])
            count = 0
            for t in range(tokens):
                s[t] = activated(g[i, t], act)
                if abs(s[t]) > limits[i] or not math.isfinite(g[i, t]):
                    needing[count] = t
                    count += 1
            if gated:
                dots(weight[i], x, needing, count, bias[i] if len(bias) else np.float32(0), u, wide)
            for place in range(count):
                t = needing[place]
                h = s[t] * u[t]
                kept = not by_neuron or (abs(h) >= threshold[i] and h != 0)
                if kept or not math.isfinite(h) or not math.isfinite(g[i, t]):
                    for j in range(down.shape[1]):
                        y[share, t, j] += h * widened(down[i, j])


# Before the first call of a kernel: the modules of the other kernels import this one.
forget_old_code(Path(__file__).parent, Path(computed.stats.cache_path))
