"""Tables of a pretrained model in which every answer is planted."""

from itertools import product

import numpy as np
import pandas as pd

TEXTS = ("english", "python")


def pretrained_table(documents=24, tokens=1000):
    """CETT-PPL-1% on each text."""
    numbers = {"activation_ratio": 0.4, "low": 0.39, "high": 0.41, "documents": documents, "window": tokens}
    return pd.DataFrame([{"text": text, "model": "planted", "parameters": 1e8, **numbers} for text in TEXTS])


def prices_table(gap=0.02, documents=24, tokens=1000, crossed=0.012, dtype_shift=0.002):
    """CETT costs p percent; Top-k `gap` nats per token more, FAT twice that, Top-k of the norm half of it.

    Agreement falls by 5 points from CETT to Top-k and FAT. Thresholds of the other text cost `crossed`.
    """
    rng, rows = np.random.default_rng(0), []
    dense = tokens * rng.normal(3, 0.3, documents)

    def add(text, dtype, metric, price, solved_on, added, agreed, ratio):
        for document in range(documents):
            rows.append(
                {
                    "document": document, "tokens": tokens, "loss_dense": dense[document],
                    "loss": dense[document] + tokens * (added + rng.normal(0, 0.002)), "right_dense": 400, "right": 398,
                    "agreed": round(tokens * (agreed + rng.normal(0, 0.01))), "text": text, "dtype": dtype,
                    "metric": metric, "price": price, "solved_on": solved_on, "value": 0.2, "activation_ratio": ratio,
                }
            )  # fmt: skip

    for text, price in product(TEXTS, (1.0, 10.0)):
        cost, ratio = np.log1p(price / 100), 0.4 / price**0.2
        for metric, worse in (("cett-ppl", 0), ("top-k", gap), ("fat", 2 * gap), ("top-k-norm", gap / 2)):
            agreed = 0.95 - price / 100 - (0.05 if metric in ("top-k", "fat") else 0)
            add(text, "float32", metric, price, text, cost + worse, agreed, ratio)
    for text, other in (TEXTS, TEXTS[::-1]):
        add(text, "float32", "cett-ppl", 1.0, other, np.log1p(crossed), 0.9, 0.4)
    add(TEXTS[0], "bfloat16", "cett-ppl", 1.0, TEXTS[0], np.log1p(0.01), 0.9, 0.4 + dtype_shift)
    return pd.DataFrame(rows)


def positions_table(quotient=0.2, ends=0.1, documents=24, layers=10):
    """First tokens have `quotient` times the ratio of others in layers 3 to 6; the ends are `ends` above the rest."""
    rng, rows = np.random.default_rng(0), []
    sizes = {"first": 1, "first delimiter": 1, "delimiter": 20, "early": 3, "other": 975}
    for text, document, layer in product(TEXTS, range(documents), range(layers)):
        base = 0.4 + (ends if layer in (0, layers - 1) else 0.0) + rng.normal(0, 0.02)
        for kind, tokens in sizes.items():
            ratio = base * (quotient if kind == "first" and 3 <= layer <= 6 else 1.0)
            rows.append((text, document, layer, kind, tokens, ratio))
    columns = ["text", "document", "layer", "position", "tokens", "activation_ratio"]
    return pd.DataFrame(rows, columns=columns)
