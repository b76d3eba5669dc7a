"""Curves that follow printed laws, and what a refit makes of them with few resamples."""

from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest

from sparsity_utils.laws import data_law, refit
from sparsity_utils.laws.published import PUBLISHED_LAWS

CHOSEN = [law for law in PUBLISHED_LAWS if law.model in ("0.2B", "0.8B")] + [PUBLISHED_LAWS[5]]
END = {"0.2B": 85e9, "0.8B": 270e9, "2.4B": 300e9}


@contextmanager
def few_resamples():
    """Intervals are tested with the laws; elsewhere they only need to be there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_law, "RESAMPLES", 12)
        patch.setattr(refit, "MOST_DROPPED", 3)
        patch.setattr(refit, "PARTS", {name: refit.PARTS[name] for name in list(refit.PARTS)[:5]})
        yield


def planted(models=CHOSEN, noise=1e-5, early=0.0, points=26):
    """Curves of printed laws; `early` lifts the first two points off them."""
    rng, curves = np.random.default_rng(0), []
    for law in models:
        tokens = np.linspace(END[law.model] / points, END[law.model], points)
        ratio = law.predict(tokens) + noise * rng.normal(size=points) + early * (np.arange(points) < 2)
        about = {"activation": law.activation, "model": law.model}
        curves.append(pd.DataFrame({"tokens": tokens, "activation_ratio": ratio}).assign(**about))
    return pd.concat(curves, ignore_index=True)


def tables(curves):
    return {name: make(curves) for name, make in refit.TABLES.items()}
