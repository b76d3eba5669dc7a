"""A decoder layer on a CPU, in numba: the loops between those of `cpu_linear` and `cpu_ffn`, all in one call."""

import math
from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange
from numba.extending import overload
from torch import Tensor

from kernels.cpu_ffn import ACTIVATIONS, MATH, Quantised, Rows, computed, size
from kernels.cpu_linear import ffn_mapped, mapped
from kernels.cpu_threads import BYTES_PER_THREAD, on_threads
from kernels.ffn import SparseFFN, forked
from kernels.layer import DecoderLayer
from kernels.linear import SparseInputFFN


class InputFFN(NamedTuple):
    """The arrays of a `SparseInputFFN`."""

    gate_up: tuple  # `cpu_linear.Maps`
    down: tuple
    act: int


class NeuronFFN(NamedTuple):
    """The arrays of a `SparseFFN`."""

    gate: Rows
    up: Rows
    down: Rows
    quantised: Quantised
    limits: np.ndarray
    threshold: np.ndarray
    by_neuron: bool
    act: int


class Layer(NamedTuple):
    """The arrays and numbers of a `DecoderLayer`."""

    gains: np.ndarray
    eps: tuple[float, float]
    qkv: tuple  # `cpu_linear.Maps`
    o: tuple
    ffn: InputFFN | NeuronFFN
    scale: np.float32
    residual: np.float32


def arrays(layer: DecoderLayer) -> tuple[Layer, int]:
    """The layer as numba takes it, which shares the memory of its weights, and the bytes of these."""
    linears = [layer.qkv, layer.o]
    ffn: InputFFN | NeuronFFN
    if isinstance(layer.ffn, SparseInputFFN):
        ffn = InputFFN(layer.ffn.gate_up.arrays, layer.ffn.down.arrays, ACTIVATIONS[layer.ffn.act])
        linears += [layer.ffn.gate_up, layer.ffn.down]
    else:
        ffn = _neuron_ffn(layer.ffn)
    nbytes = sum(linear.weight_t.nbytes for linear in linears)
    nbytes += size(layer.ffn) if isinstance(layer.ffn, SparseFFN) else 0
    numbers = np.float32(layer.scale), np.float32(layer.residual)
    return Layer(layer.gains.numpy(), layer.eps, layer.qkv.arrays, layer.o.arrays, ffn, *numbers), nbytes


def _neuron_ffn(ffn: SparseFFN) -> NeuronFFN:
    gate, up, down, quantised, limits = ffn.arrays
    by_neuron = ffn.rule == "neuron"
    return NeuronFFN(gate, up, down, quantised, limits, ffn.threshold.numpy(), by_neuron, ACTIVATIONS[ffn.act])


def run(layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
    """y, (sequences, d), of `x`, (sequences, d): the backend of `DecoderLayer`.

    Raises `ValueError` in a forked process, which has none of the threads.
    """
    if forked():
        raise ValueError("A layer in one call does not run in a forked process: start it with spawn, or use its maps.")
    parts, nbytes = layer.arrays
    with on_threads(nbytes) as count:
        turn = cos.numpy(), sin.numpy()
        y = layered(x.numpy(), turn, keys.numpy(), values.numpy(), length, parts, count)
    return torch.from_numpy(y)


@njit(cache=True)
def layered(x, turn, keys, values, length, layer, shares):
    """y, (sequences, d)."""
    made = mapped(normed(x, layer.gains[0], layer.eps[0]), layer.qkv, shares)
    keep(made, turn, keys, values, length)
    mixed = attended(made, keys, values, length + 1, layer.scale, shares)
    a = x + layer.residual * mapped(mixed, layer.o, shares)
    return a + layer.residual * ffn_of(normed(a, layer.gains[1], layer.eps[1]), layer.ffn, shares)


def ffn_of(x, ffn, shares):
    """The FFN's output, (sequences, d), by the kernel of its kind."""


@overload(ffn_of)
def _ffn_of(x, ffn, shares):
    if ffn.instance_class is InputFFN:
        return lambda x, ffn, shares: ffn_mapped(x, ffn.gate_up, ffn.down, ffn.act, shares)
    return lambda x, ffn, shares: computed(
        x, ffn.gate, ffn.up, ffn.down, ffn.quantised, ffn.limits, ffn.threshold, ffn.by_neuron, ffn.act, shares
    )


@njit(fastmath=MATH, cache=True)
def normed(x, gain, eps):
    """gain x / sqrt(mean of x^2 + eps), for each row of `x`, (rows, d)."""
    y = np.empty_like(x)
    for t in range(len(x)):
        squares = np.float32(0)
        for j in range(x.shape[1]):
            squares += x[t, j] * x[t, j]
        factor = np.float32(1 / math.sqrt(squares / x.shape[1] + eps))
        for j in range(x.shape[1]):
            y[t, j] = gain[j] * (x[t, j] * factor)
    return y


@njit(cache=True)
def keep(made, turn, keys, values, length):
    """Turns queries and keys of `made`, (sequences, q + k + v), in place; writes keys and values after `length`."""
    groups, head_size = keys.shape[1], keys.shape[3]
    q = made.shape[1] - 2 * groups * head_size
    for b in range(len(made)):
        cos, sin = turn[0][b % len(turn[0])], turn[1][b % len(turn[1])]
        for first in range(0, q + groups * head_size, head_size):
            turned(made[b, first : first + head_size], cos, sin)
        for g in range(groups):
            first = q + g * head_size
            keys[b, g, length] = made[b, first : first + head_size]
            first += groups * head_size
            values[b, g, length] = made[b, first : first + head_size]


@njit(cache=True)
def turned(head, cos, sin):
    """head = head cos + (the halves of head swapped, the first negative) sin, in place."""
    half = len(head) // 2
    for j in range(half):
        first, second = head[j], head[half + j]
        head[j] = first * cos[j] - second * sin[j]
        head[half + j] = second * cos[half + j] + first * sin[half + j]


@njit(fastmath=MATH, cache=True, parallel=True)
def attended(made, keys, values, length, scale, shares):
    """What attention mixes, (sequences, heads of queries times their size), of queries, the first part of `made`."""
    sequences, groups, _, head_size = keys.shape
    heads = made.shape[1] // head_size - 2 * groups
    y = np.zeros((sequences, heads * head_size), np.float32)
    nbytes = 8 * sequences * groups * length * head_size
    parts = min(shares, max(nbytes // BYTES_PER_THREAD, 1))
    for part in prange(parts):
        scores = np.empty(length, np.float32)
        for n in range(sequences * heads * part // parts, sequences * heads * (part + 1) // parts):
            b, h = n // heads, n % heads
            g, own = h * groups // heads, slice(h * head_size, (h + 1) * head_size)
            weigh(made[b, own], keys[b, g], length, scale, scores)
            for t in range(length):
                blend(scores[t], values[b, g, t], y[b, own])
    return y


@njit(fastmath=MATH, cache=True)
def weigh(query, keys, length, scale, scores):
    """scores = the softmax of scale query . key over the first `length` keys, (room, head_size)."""
    most = np.float32(-np.inf)
    for t in range(length):
        score = np.float32(0)
        for j in range(len(query)):
            score += query[j] * keys[t, j]
        scores[t] = score * scale
        most = max(most, scores[t])
    total = np.float32(0)
    for t in range(length):
        scores[t] = math.exp(scores[t] - most)
        total += scores[t]
    for t in range(length):
        scores[t] /= total


@njit(fastmath=MATH, cache=True)
def blend(weight, value, y):
    """y += weight value."""
    for j in range(len(y)):
        y[j] += weight * value[j]
