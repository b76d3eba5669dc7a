"""The reference: an FFN run densely, with every neuron that a rule calls inactive set to zero.

Names follow arXiv 2411.02335, section 3. A gated FFN computes g = W_gate x, s = act(g), u = W_up x, h = s * u and
y = W_down h; a plain one (w_up is None) h = s. A neuron is inactive for a token

- under the rule "gate" where |s_i| <= t_i: known before u, so a kernel reads W_up and W_down for active neurons alone;
- under the rule "neuron" (CETT) where |h_i| < t_i or h_i = 0: a kernel reads W_up wherever s_i is not zero.

Comparisons are made in float32 or wider. A threshold below zero leaves every neuron active under the rule "gate". A
neuron whose g_i is infinite or NaN is always active, under "neuron" also one whose h_i is. So broken numbers reach the
output as they do in a dense FFN, unless they are in weights that the rule does not read.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.selection import kth_largest

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda g: F.relu(g).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
}
RULES = ("gate", "neuron")


def sparse_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down_t: Tensor,
    threshold: Tensor | float,
    act: str = "relu",
    rule: str = "gate",
    *,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """As `kernels.sparse_ffn`, in the dtype of `x`, with any number of tokens, on any device."""
    g = F.linear(x, w_gate, b_gate)  # (tokens, d_ff)
    s = ACTIVATIONS[act](g)
    h = s if w_up is None else s * F.linear(x, w_up, b_up)
    h = torch.where(active_neurons(g, s, h, threshold, rule), h, torch.zeros((), dtype=h.dtype, device=h.device))
    return F.linear(h, w_down_t.t(), b_down)


def active_neurons(g: Tensor, s: Tensor, h: Tensor, threshold: Tensor | float, rule: str) -> Tensor:
    """Which neurons a rule leaves active, bool, (tokens, d_ff)."""
    wide = torch.promote_types(h.dtype, torch.float32)
    broken = ~g.isfinite()
    if rule == "gate":
        return (s.to(wide).abs() > threshold) | broken
    broken |= (s != 0) & ~h.isfinite()
    return ((h.to(wide).abs() >= threshold) & (h != 0)) | broken


def active_inputs(x: Tensor, limits: Tensor | None, keep: tuple[int, ...] | None, norms: Tensor | None) -> Tensor:
    """Which inputs of linear maps are active, bool, (maps, tokens, d), by the rules of `kernels.linear.SparseLinear`.

    x (tokens, d); limits or norms (maps, d), or keep, a number for each map.
    """
    if limits is not None:
        size = x.to(torch.promote_types(x.dtype, torch.float32)).abs()  # (tokens, d)
        return (size > limits[:, None]) | ~x.isfinite()
    scores = input_scores(x, len(keep or ()), norms)
    return (scores >= least_kept(scores, keep or ())) & (x != 0)


def input_scores(x: Tensor, maps: int, norms: Tensor | None) -> Tensor:
    """|x_j| n_j in float32 or wider, (maps, tokens, d), infinite where x is infinite or NaN."""
    size = x.to(torch.promote_types(x.dtype, torch.float32)).abs().expand(maps, *x.shape)
    return (size if norms is None else size * norms[:, None]).masked_fill(~x.isfinite(), torch.inf)


def least_kept(scores: Tensor, keep: tuple[int, ...]) -> Tensor:
    """The smallest of the `keep` largest scores of each map and token, (maps, tokens, 1)."""
    return torch.stack([kth_largest(score, k) for score, k in zip(scores, keep, strict=True)])
