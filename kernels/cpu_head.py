"""The certified head on a CPU, in numba: estimates from the 8-bit copy, then the full rows of undecided words."""

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit, prange
from torch import Tensor

from kernels.cpu_ffn import MATH, dots, fetch_start, numbers, vector
from kernels.cpu_threads import alone, on_threads
from kernels.ffn import forked
from kernels.head import CertifiedHead


def run(head: CertifiedHead, x: Tensor) -> Tensor:
    """Logits, (tokens, vocabulary), of `x`, (tokens, d)."""
    if forked():
        return alone(lambda: F.linear(x, head.weight, head.bias))
    with on_threads(head.copy.bits.nbytes) as count:
        logits = computed(x.numpy(), head.weight.numpy(), vector(head.bias), numbers(head.copy), head.k, count)
    return torch.from_numpy(logits)


@njit(cache=True)
def computed(x, weight, bias, copy, k, shares):
    """Logits, (tokens, vocabulary), minus infinity where a word is certainly not among the k likeliest."""
    low, high = np.empty((len(x), len(weight))), np.empty((len(x), len(weight)))
    bounds(x, bias, copy, shares, low, high)
    least = np.empty(len(x))
    for t in range(len(x)):
        least[t] = low[t].max() if k == 1 else np.partition(low[t], len(weight) - k)[len(weight) - k]
    logits = np.full((len(x), len(weight)), np.float32(-np.inf))
    exact(x, weight, bias, high, least, shares, logits)
    return logits


@njit(fastmath=MATH, cache=True, parallel=True)
def bounds(x, bias, copy, shares, low, high):
    """The ends between which each logit lies, (tokens, vocabulary); both infinite where the copy proves nothing."""
    bits, scale, radius, fixed, most = copy
    sizes = np.sqrt((x.astype(np.float64) ** 2).sum(axis=1))  # ||x|| of each token
    for share in prange(shares):
        wide, everyone = np.empty(x.shape[1], np.float32), np.arange(len(x))
        estimate = np.empty(len(x), np.float32)
        for v in range(len(bits) * share // shares, len(bits) * (share + 1) // shares):
            dots(bits[v], x, everyone, len(x), np.float32(0), estimate, wide)
            b = bias[v] if len(bias) else np.float32(0)
            for t in everyone:
                middle, reach = scale[v] * estimate[t] + b, radius[v] * sizes[t] + fixed[v]
                trusted = sizes[t] <= most[v]
                low[t, v] = middle - reach if trusted else -np.inf
                high[t, v] = middle + reach if trusted else np.inf


@njit(fastmath=MATH, cache=True, parallel=True)
def exact(x, weight, bias, high, least, shares, logits):
    """Fills the logits of words whose upper end reaches `least`, (tokens,), from their full rows."""
    for share in prange(shares):
        wide, wanting = np.empty(x.shape[1], np.float32), np.empty(len(x), np.int64)
        out = np.empty(len(x), np.float32)
        for v in range(len(weight) * share // shares, len(weight) * (share + 1) // shares):
            count = 0
            for t in range(len(x)):
                if not high[t, v] < least[t]:
                    wanting[count] = t
                    count += 1
            if count:
                fetch_start(weight[v])
                dots(weight[v], x, wanting, count, bias[v] if len(bias) else np.float32(0), out, wide)
                for place in range(count):
                    logits[wanting[place], v] = out[wanting[place]]
