"""Corrected decoding written out: no cache, every pass over the whole text, each position sparse or dense by a flag."""

from contextlib import contextmanager

import torch


@contextmanager
def masked(model, flags, active):
    """Inside the block neurons are zeroed at flagged positions. active(layer, s, h): which stay, (length, d_ff)."""
    seen, handles = {}, []
    for number, layer in enumerate(model.model.layers):

        def keep(module, args, output, number=number):
            seen[number] = output

        def mask(module, args, number=number):
            stays = active(number, seen[number][0], args[0][0]) | ~torch.tensor(flags)[:, None]
            return (args[0] * stays,)

        handles.append(layer.mlp.act_fn.register_forward_hook(keep))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(mask))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def top_k(k):
    """FSparse by sorting."""

    def active(layer, s, h):
        kept = torch.zeros_like(s, dtype=torch.bool)
        for row, order in enumerate(s.abs().argsort(dim=-1, descending=True)):
            kept[row, order[:k]] = True
        return kept

    return active


def logits_of(model, tokens, flags, active):
    with torch.no_grad(), masked(model, flags, active):
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def literal(model, prompt, active, correction, new_tokens):
    """(tokens, kinds, advances) of one prompt, a list of ids; trees of width 1."""
    drafts = correction.period - 1
    dense = [False] * len(prompt)
    tokens = [*prompt, int(logits_of(model, prompt, dense, active)[-1].argmax())]
    flags, kinds, advances = dense, ["first"], []  # flags: of all tokens but the last
    while len(tokens) - len(prompt) < new_tokens:
        path, sparse = list(tokens), list(flags)
        for _ in range(drafts):
            sparse.append(True)
            path.append(int(logits_of(model, path, sparse, active)[-1].argmax()))
        checked = [*flags, *[False] * correction.period]
        logits = logits_of(model, path, checked, active)[len(tokens) - 1 :]
        right = [accepts(correction, row, token) for row, token in zip(logits, path[len(tokens) :], strict=False)]
        prefix = right.index(False) if False in right else drafts
        kept = prefix if correction.rollback else drafts
        if not correction.interleave:
            kept = max(kept, 1)
        added = path[len(tokens) : len(tokens) + kept]
        kinds += ["accepted" if one else "rejected" for one in right[:kept]]
        if correction.interleave:
            added.append(int(logits[kept].argmax()))
            kinds.append("interleaved" if kept == drafts else "corrected")
        after = checked if correction.rewrite else [*sparse, False]
        tokens, advances = tokens + added, [*advances, len(added)]
        flags = after[: len(tokens) - 1]
    end = len(prompt) + new_tokens
    return tokens[len(prompt) : end], kinds[:new_tokens], advances


def accepts(correction, logits, token):
    if correction.threshold is None:
        return int(logits.argmax()) == token
    weights = [float(value) for value in (logits / correction.temperature).exp()]
    return weights[token] / sum(weights) >= correction.threshold
