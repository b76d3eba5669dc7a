"""Count the weights that a sparse FFN reads for given tokens: those its rule asks for, whatever the kernel does."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import naive
from kernels.ffn import SparseFFN


@dataclass(frozen=True)
class Reading:
    """Shares of the rows of W_gate, W_up and W_down that one call needs: all that at least one of its tokens needs."""

    gate: float  # 1, or with a certificate the rows that it leaves undecided
    up: float  # 0 of a plain FFN
    active: float  # of W_down
    sparsity: float  # share of pairs of token and neuron that are inactive
    nbytes: int  # of weights and of the certificate's 8-bit copy
    dense_nbytes: int  # of all weights


@torch.no_grad()
def reading(ffn: SparseFFN, x: Tensor) -> Reading:
    """What `ffn` reads for `x`, (tokens, d)."""

    def linear(weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())

    g = linear(ffn.w_gate, ffn.b_gate)  # (tokens, d_ff)
    s = naive.ACTIVATIONS[ffn.act](g)
    h = s if ffn.w_up is None else s * linear(ffn.w_up, ffn.b_up)
    active = naive.active_neurons(g, s, h, ffn.threshold, ffn.rule)
    gate, copied = 1.0, 0
    if ffn.certificate is not None:
        gate, copied = share(~ffn.certificate.certain(x, ffn.b_gate)), ffn.certificate.nbytes
    up = 0.0 if ffn.w_up is None else share(s.abs() > ffn.gate_limit)
    down = share(active)
    up_size = 0 if ffn.w_up is None else ffn.w_up.nbytes
    return Reading(
        gate=gate,
        up=up,
        active=down,
        sparsity=1 - active.float().mean().item(),
        nbytes=round(copied + gate * ffn.w_gate.nbytes + up * up_size + down * ffn.w_down_t.nbytes),
        dense_nbytes=ffn.w_gate.nbytes + up_size + ffn.w_down_t.nbytes,
    )


def share(rows: Tensor) -> float:
    """Share of neurons for which `rows`, bool, (tokens, d_ff), is true for at least one token."""
    return rows.any(dim=0).float().mean().item()
