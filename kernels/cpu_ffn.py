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
from llvmlite.ir import HalfType
from numba import njit, prange, types
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
def dots(row, x, bias, out):
    """out[t] = row . x[t] + bias, of each token; four tokens at a time, so that one reading of the row serves four."""
    tokens, d = x.shape
    whole = tokens - tokens % 4
    for t in range(0, whole, 4):
        a = b = c = e = np.float32(0)
        for j in range(d):
            w = widened(row[j])
            a += w * x[t, j]
            b += w * x[t + 1, j]
            c += w * x[t + 2, j]
            e += w * x[t + 3, j]
        out[t], out[t + 1], out[t + 2], out[t + 3] = a + bias, b + bias, c + bias, e + bias
    for t in range(whole, tokens):
        a = np.float32(0)
        for j in range(d):
            a += widened(row[j]) * x[t, j]
        out[t] = a + bias


@njit(fastmath=MATH, cache=True, nogil=True)
def passes(magnitude, threshold, by_neuron):
    """Whether a rule keeps a neuron, given what it compares: |s| under the rule "gate", |h| under "neuron"."""
    return magnitude > 0 and (magnitude >= threshold if by_neuron else magnitude > threshold)


@njit(fastmath=MATH, cache=True, parallel=True)
def select(gate, bias, x, threshold, by_neuron, act, shares, g, needed):
    """Fills g, (d_ff, tokens), and needed, (d_ff,): whether any token needs the neuron's row of W_up or W_down."""
    d_ff = gate.shape[0]
    for share in prange(shares):
        for i in range(d_ff * share // shares, d_ff * (share + 1) // shares):
            dots(gate[i], x, bias[i] if len(bias) else np.float32(0), g[i])
            limit = np.float32(0) if by_neuron else threshold[i]
            needed[i] = False
            for t in range(len(x)):
                if abs(activated(g[i, t], act)) > limit or not math.isfinite(g[i, t]):
                    needed[i] = True


@njit(fastmath=MATH, cache=True, parallel=True)
def combine(neurons, g, up, bias, gated, down, x, threshold, by_neuron, act, y):
    """Adds the output of the given neurons to y, (shares, tokens, d_out)."""
    shares = len(y)
    for share in prange(shares):
        u = np.ones(len(x), np.float32)
        for k in range(len(neurons) * share // shares, len(neurons) * (share + 1) // shares):
            i = neurons[k]
            if gated:
                dots(up[i], x, bias[i] if len(bias) else np.float32(0), u)
            for t in range(len(x)):
                s = activated(g[i, t], act)
                if s == 0 and math.isfinite(g[i, t]):
                    continue
                h = s * u[t]
                if passes(abs(h if by_neuron else s), threshold[i], by_neuron) or not math.isfinite(g[i, t]):
                    for j in range(down.shape[1]):
                        y[share, t, j] += h * widened(down[i, j])
