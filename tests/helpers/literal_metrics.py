"""Sparsity metrics of a Granite model written out slowly from their definitions (arXiv 2411.02335, section 3, App. E).

Shares no code with the package: FFN inputs are taken from the model, everything after them is computed here, in
float64, and a sparse run replaces the FFNs' forward. Bisections are plain ones and run to rounding.
"""

import math
from contextlib import contextmanager
from itertools import pairwise

import torch

ACTIVATIONS = {
    "relu": lambda x: x * (x > 0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "relu2": lambda x: x * x * (x > 0),
}


def neurons(mlp, act, x):
    """s, h (tokens, d_ff) and the neuron outputs n (tokens, d_ff, d) of FFN inputs x (tokens, d)."""
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    if mlp.gate_proj.bias is not None:
        gate, up = gate + mlp.gate_proj.bias, up + mlp.up_proj.bias
    s = ACTIVATIONS[act](gate)
    h = s * up
    return s, h, h[:, :, None] * mlp.down_proj.weight.T[None]


def inactive(rule, value, s, h, n):
    """The set D as a bool array (tokens, d_ff), neuron by neuron."""
    tokens, d_ff = s.shape
    out = torch.zeros(tokens, d_ff, dtype=torch.bool)
    for t in range(tokens):
        sizes = sorted((abs(float(v)) for v in s[t]), reverse=True)
        for i in range(d_ff):
            s_i, h_i = float(s[t, i]), float(h[t, i])
            if rule == "relu":
                out[t, i] = s_i == 0
            elif rule == "top-k":
                out[t, i] = abs(s_i) < sizes[value - 1] or s_i == 0
            elif rule == "top-k-norm":
                norms = sorted((float(v) for v in n[t].norm(dim=-1)), reverse=True)
                out[t, i] = float(n[t, i].norm()) < norms[value - 1] or h_i == 0
            elif rule == "fat":
                out[t, i] = abs(s_i) < value or s_i == 0
            else:
                out[t, i] = math.sqrt(sum(float(v) ** 2 for v in n[t, i])) < value or h_i == 0
    return out


def truncation_error(n, dropped):
    """Token mean of ||sum_{i in D} n_i|| / ||sum_i n_i||, and the number of tokens skipped for a zero output."""
    errors, skipped = [], 0
    for n_t, dropped_t in zip(n, dropped, strict=True):
        whole = n_t.sum(0).norm()
        if whole == 0:
            skipped += 1
        else:
            errors.append(float(n_t[dropped_t].sum(0).norm() / whole))
    return (sum(errors) / len(errors) if errors else math.nan), skipped


def alone(batch):
    """Each text of a batch without its padding: {"input_ids": (1, tokens)}, and labels likewise if there are any."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    names = [name for name in ("input_ids", "labels") if name in batch]
    return [{name: batch[name][row, mask[row]][None] for name in names} for row in range(len(mask))]


def ffn_inputs(model, batch):
    """Inputs of each FFN in a dense run, at the tokens where attention_mask is 1: one (tokens, d) per layer."""
    seen, handles = [[] for _ in model.model.layers], []
    for inputs, block in zip(seen, model.model.layers, strict=True):
        handles.append(block.mlp.register_forward_pre_hook(lambda m, a, inputs=inputs: inputs.append(a[0][0])))
    with torch.no_grad():
        for text in alone(batch):
            model(input_ids=text["input_ids"])
    for handle in handles:
        handle.remove()
    return [torch.cat(inputs) for inputs in seen]


def all_neurons(model, act, batches):
    """(s, h, n) of each layer over all real tokens of all batches."""
    inputs = [ffn_inputs(model, batch) for batch in batches]
    with torch.no_grad():
        return [neurons(b.mlp, act, torch.cat([x[i] for x in inputs])) for i, b in enumerate(model.model.layers)]


@contextmanager
def skipping(model, act, rule, values):
    """The model with the neurons in D left out of every FFN's sum."""
    saved = []
    for block, value in zip(model.model.layers, values, strict=True):

        def forward(x, mlp=block.mlp, value=value):
            s, h, n = neurons(mlp, act, x.flatten(0, 1))
            fast = rule == "cett"  # as in `inactive`, in one line, for the many runs of a bisection
            dropped = (n.norm(dim=-1) < value) | (h == 0) if fast else inactive(rule, value, s, h, n)
            y = (n * ~dropped[:, :, None]).sum(1)
            if mlp.down_proj.bias is not None:
                y = y + mlp.down_proj.bias
            return y.view_as(x)

        saved.append(block.mlp)
        block.mlp.forward = forward
    try:
        yield
    finally:
        for mlp in saved:
            del mlp.forward


def loss(model, batches):
    """Next-token cross-entropy, token by token, averaged over all predicted tokens of all batches."""
    total, count = 0.0, 0
    for text in (text for batch in batches for text in alone(batch)):
        ids, labels = text["input_ids"][0], text.get("labels", text["input_ids"])[0]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        for z, label in zip(logits[:-1], labels[1:].tolist(), strict=True):
            if label != -100:
                total += float(torch.log(torch.exp(z - z.max()).sum()) + z.max() - z[label])
                count += 1
    return total / count


def ppl_ratio(model, act, rule, values, batches):
    """exp(loss_sparse - loss_dense)."""
    with skipping(model, act, rule, values):
        sparse = loss(model, batches)
    return math.exp(sparse - loss(model, batches))


def error_below(n, eps):
    """`truncation_error` of D = {||n_i|| < eps} in three lines, for the many steps of a search."""
    tail, whole = (n * (n.norm(dim=-1) < eps)[:, :, None]).sum(1).norm(dim=-1), n.sum(1).norm(dim=-1)
    return float((tail / whole)[whole > 0].mean())


def threshold(n, cett):
    """Bisection for the eps at which the truncation error of one layer crosses `cett`."""
    low, high = 0.0, float(n.norm(dim=-1).max()) * 1.0001
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if error_below(n, middle) <= cett else (low, middle)
    return low


def crossings(n, cett):
    """How many times the truncation error passes `cett` between eps = 0 and infinity; every step is looked at."""
    steps = [*n.norm(dim=-1).flatten().unique().tolist(), math.inf]
    above = [error_below(n, eps) > cett for eps in steps]
    return sum(before != after for before, after in pairwise(above))


def thresholds(layers, cett):
    """One threshold per layer for a shared CETT; `layers` from `all_neurons`."""
    return tuple(threshold(n, cett) for _, _, n in layers)


def mean_ppl_ratio(models, act, batches):
    """The function CETT -> mean PPL ratio of `models`, thresholds solved on `batches` themselves."""
    layers = [all_neurons(model, act, batches) for model in models]
    dense = [loss(model, batches) for model in models]

    def ratio(cett):
        ratios = []
        for model, of_model, dense_loss in zip(models, layers, dense, strict=True):
            with skipping(model, act, "cett", thresholds(of_model, cett)):
                ratios.append(math.exp(loss(model, batches) - dense_loss))
        return sum(ratios) / len(ratios)

    return ratio


def solve_cett(ratio, p):
    """Bisection for the CETT at which `ratio`, from `mean_ppl_ratio`, crosses 1 + p/100."""
    low, high = 0.0, 1.0
    for _ in range(44):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) <= 1 + p / 100 else (low, middle)
    return low


def is_only_solution(ratio, p, cett):
    """Whether `ratio` stays on its side of 1 + p/100 below and above `cett`, on a grid that is finer close to it."""
    steps = [10.0 ** (-k / 2) for k in range(2, 13, 2)]  # 0.1 to 1e-6 of the CETT away, and coarsely further
    near = [cett * (1 + side * step) for step in steps for side in (-1, 1)]
    far = [cett * k / 4 for k in range(1, 4)] + [cett + (1 - cett) * k / 4 for k in range(1, 4)]
    return all((ratio(c) > 1 + p / 100) == (c > cett) for c in (*near, *far))


def measure(model, act, rule, values, batches):
    """Per layer (activation ratio, cett, skipped tokens), and the PPL ratio, of `batches` under given thresholds."""
    rows = []
    for (s, h, n), value in zip(all_neurons(model, act, batches), values, strict=True):
        dropped = inactive(rule, value, s, h, n)
        rows.append((1 - float(dropped.double().mean()), *truncation_error(n, dropped)))
    return rows, ppl_ratio(model, act, rule, values, batches)
