"""Tables of training-free rules in which every answer is planted."""

from itertools import product

import numpy as np
import pandas as pd

# Excess in nats per token at half sparsity; at another one it is that times (s / 0.5)^4.
EXCESS = {
    ("teal", "uniform"): 0.06, ("teal-top-k", "uniform"): 0.06, ("wina-threshold", "uniform"): 0.05,
    ("wina", "uniform"): 0.05, ("wina-released", "uniform"): 0.055, ("was", "uniform"): 0.052,
    ("cats", "uniform"): 0.01, ("teal", "greedy"): 0.05, ("gate", "top-k"): 0.020, ("gate", "shared"): 0.019,
    ("gate", "cett"): 0.018, ("h", "top-k"): 0.008, ("h", "shared"): 0.008, ("h", "cett"): 0.007,
    ("n", "top-k"): 0.006, ("n", "shared"): 0.006, ("n", "cett"): 0.005,
}  # fmt: skip
ROTATED = ("wina", "uniform", True)
DOWN = ("gate", "h", "n")


def settings(sparsities):
    """(method, allocation, rotated, by, level) of every setting."""
    for level in sparsities:
        for method, allocation in EXCESS:
            yield method, allocation, False, "sparsity", level
        yield *ROTATED, "weights", 1 - level
    for price in (1.0, 5.0):
        yield "teal", "uniform", False, "perplexity", price


def tables(excess=None, rotated=0.045, errors=0.9, violations=0, identity=1e-14, tokens=1100, documents=100, seeds=5,
           shift=0.0, real=True):  # fmt: skip
    """The four tables: excess of a setting at half sparsity as planted, the decoders' a tenth of it.

    shift: how much more TEAL with uniform thresholds skips than asked for.
    """
    known = EXCESS | (excess or {})
    rng, rows, by_document = np.random.default_rng(0), [], []
    dense = tokens * rng.normal(3, 0.3, documents)

    def planted(method, allocation, turned, by, level):
        if by == "perplexity":
            return np.log1p(level / 100)
        share = 1 - level if by == "weights" else level
        return (rotated if turned else known[method, allocation]) * (share / 0.5) ** 4

    def add(model, seed, setting, value):
        method, allocation, turned, by, level = setting
        share = {"weights": 1 - level, "sparsity": level, "perplexity": 0.3}[by]
        share += shift * (method == "teal" and allocation == "uniform" and by == "sparsity")
        part = {"cats": 0.5, **dict.fromkeys(DOWN, 0.25)}.get(method, 1.0)  # of all weights that the rule is on
        low, high = value * 0.98, value * 1.02
        rows.append(
            {
                "method": method, "allocation": allocation, "by": by, "level": level, "rotated": turned,
                "calibrated_sparsity": share, "sparsity": share * part, "skipped": share, "maps_weights": 1000,
                "maps_read": 1000 * (1 - share * part), "rotation_weights": 100 * turned, "head_weights": 200,
                "embedding_weights": 10, "weights_read": 1 - share * part, "model_read": 0.8,
                "tokens": tokens * documents, "documents": documents, "loss_dense": 3.0, "loss": 3 + value,
                "excess": value, "low": low, "high": high, "accuracy_dense": 0.4, "accuracy": 0.39, "agreement": 0.9,
                "note": np.nan, "model": model, "seed": seed,
            }
        )  # fmt: skip

    for setting in settings((0.25, 0.4, 0.5, 0.65)) if real else ():
        value = planted(*setting)
        add("planted", 0, setting, value)
        for document in range(documents):
            loss = dense[document] + tokens * value * (1 + rng.normal(0, 0.05))
            sums = {"document": document, "tokens": tokens, "loss_dense": dense[document], "loss": loss}
            names = dict(zip(("method", "allocation", "rotated", "by", "level"), setting, strict=True))
            counts = {"right_dense": 400, "right": 390, "agreed": 900}
            by_document.append({**sums, **counts, **names, "model": "planted", "seed": 0})
    for seed, setting in product(range(seeds), settings((0.25, 0.5, 0.625))):
        if setting[3] != "perplexity":
            add("32x4 silu", seed, setting, planted(*setting) / 10 * (1 + rng.normal(0, 0.02)))
    return {
        "training_free": pd.DataFrame(rows),
        "training_free_documents": pd.DataFrame(by_document, columns=_documents()),
        "training_free_blocks": _blocks(rng, errors, seeds, real),
        "training_free_theory": _theory(violations, identity, real),
    }


def _documents():
    sums = ["document", "tokens", "loss_dense", "loss", "right_dense", "right", "agreed"]
    return [*sums, "method", "allocation", "rotated", "by", "level", "model", "seed"]


def _blocks(rng, errors, seeds, real):
    models = [("planted", 0, 30)] * real + [("32x4 silu", seed, 4) for seed in range(seeds)]
    shares = {"q": 0.5, "k": 0.5, "v": 0.3, "o": 0.6, "gate": 0.5, "up": 0.45, "down": 0.6}
    rows = [
        {"uniform": 0.2, "greedy": 0.2 * errors + rng.normal(0, 0.001), "sparsity": 0.5, "layer": layer, **shares,
         "model": model, "seed": seed}
        for model, seed, layers in models for layer in range(layers)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _theory(violations, identity, real):
    rows = [{"model": "example", "check": "stack", "draws": 4, "violations": 0, "beaten": 4, "errs_less": 4}]
    for model, layers in (("planted", 30 * real), ("32x4 silu", 4)):
        for layer, check in product(range(layers), ("lemma k", "lemma gate")):
            found = {"draws": 1024, "identity": identity, "violations": violations}
            rows.append({"model": model, "seed": 0, "layer": layer, "check": check, **found})
    return pd.DataFrame(rows)
