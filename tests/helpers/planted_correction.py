"""Tables of corrected drafts in which every answer is planted."""

from itertools import product

import numpy as np
import pandas as pd

TEXTS = ("english", "python", "arithmetic")
DENSITY = {"full": 1.0, "fsparse": 0.8, "csparse": 0.7}
TOKENS = 60


def correction_table(documents=24, advance=15.0, recovered=0.8, step=1.0, part=0.05, lost=0.5):
    """The sparse text lacks `lost` nats per token, of which correction gives back `recovered`.

    From each threshold to the next AAL falls by `step` and log-likelihood rises by a hundredth of it; leaving out a
    part costs `part` nats per token.
    """
    rng, rows = np.random.default_rng(0), []
    for text, document in product(TEXTS, range(documents)):
        base = -1 + rng.normal(0, 0.1)

        def add(rule, way, gap, threshold=np.nan, aal=np.nan, text=text, document=document, base=base):
            rounds = np.nan if np.isnan(aal) else 4 + document % 3
            rows.append(
                {
                    "model": "planted", "text": text, "rule": rule, "way": way, "threshold": threshold,
                    "density": DENSITY[rule], "document": document, "tokens": TOKENS, "rounds": rounds,
                    "advance": aal * rounds + rng.normal(0, 0.5), "rejected": rounds // 2,
                    "log_likelihood": TOKENS * (base - gap + rng.normal(0, 0.001)), "agreed": 30, "repeated": 3,
                    "right": (document % 2 == 0) if text == "arithmetic" else np.nan,
                    "place": -1 if way == "lossless" else np.nan, "gap": 0.0, "rounding": 0.0,
                }
            )  # fmt: skip

        add("full", "full", 0.0)
        for rule in ("fsparse", "csparse"):
            add(rule, "alone", lost)
            for number, threshold in enumerate((0.02, 0.1, 0.5)):
                aal, gap = advance + step * (1 - number), lost * (1 - recovered) + 0.01 * step * (1 - number)
                add(rule, "corrected", gap, threshold, aal)
            add(rule, "lossless", 0.0, aal=5.0)
        for name in ("no rewrite", "no interleaving", "no rollback"):
            add("fsparse", name, lost * (1 - recovered) + part, 0.1, 16.0)
    return pd.DataFrame(rows)


def prefixes_table(documents=24, disagreed=0.11, fresh=0.3, repeated=0.05):
    """A share of words on which the models disagree, and rises of perplexity on fresh and on repeated text."""
    rng, rows = np.random.default_rng(1), []
    for text, rule, document in product(TEXTS, ("fsparse", "csparse"), range(documents)):
        row = {"model": "planted", "text": text, "rule": rule, "document": document, "tokens": 100, "predicted": 100}
        row["disagreed"] = round(100 * disagreed + rng.normal(0, 1))
        for name, rise in (("fresh", fresh), ("repeated", repeated)):
            row[f"{name}_full"] = 100 * rng.normal(2, 0.1)
            row[f"{name}_sparse"] = row[f"{name}_full"] + 100 * (np.log1p(rise) + rng.normal(0, 0.005))
        rows.append(row)
    return pd.DataFrame(rows)


def speeds_table():
    """Speeds of one rule."""
    rows = [("full", "full", 20.0), ("csparse", "alone", 30.0), ("csparse", "corrected", 25.0)]
    table = pd.DataFrame(rows, columns=["rule", "way", "tokens_per_second"])
    more = {"low_tokens_per_second": 1.0, "high_tokens_per_second": 99.0, "advance": 14.0, "megabytes": 500.0}
    return table.assign(model="planted", same_tokens=True, density=0.7, **more)


def text_table():
    """A text with every kind of word, line breaks and signs of formulae."""
    kinds = ["first", *["accepted"] * 6, "corrected", "accepted", "interleaved", "accepted"]
    words = ["def", " f", "(x", "):", "\n    ", "return", " $x", "_1$", "\n", " and", " " + 100 * "y"]
    table = pd.DataFrame({"place": range(len(words)), "word": words, "kind": kinds})
    return pd.concat([table.assign(model="planted", text=text, rule="fsparse") for text in TEXTS])
