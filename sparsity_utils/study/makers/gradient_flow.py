"""Gradients of each layer before the first step, of models that read a part of their inputs: the table gradient_flow.

Q-Sparse (arXiv 2407.10969, figure 2) shows that without a straight-through estimator gradients vanish in low layers.
Three ways to train are compared with the same weights and the same batch: only what maps read, and where the gradient
of what they leave out goes, differs.
"""

from collections.abc import Iterator
from itertools import product

import pandas as pd

from sparsity_utils.study.ends import first_gradients, initial_model
from sparsity_utils.study.makers.maker import Asked, Maker
from sparsity_utils.study.makers.pieces import Frames
from sparsity_utils.study.plan import GRADIENT_FLOW, Settings
from sparsity_utils.study.profiles import Profile

WAYS = {  # what differs in ModelConfig
    "dense": {},
    "straight-through": {"keep": 8},
    "no straight-through": {"keep": 8, "straight_through": False},
}


def gradient_flow(study: Asked) -> pd.DataFrame:
    """The table gradient_flow (results/columns.csv): one row per way, seed and layer."""
    rows = []
    for way, settings in _settings(study.profile):
        (config,) = study.configs_of([settings])
        seed = config.train.seed
        norms, loss = first_gradients(initial_model(config.model, seed), config, study.corpus)
        rows += [(way, seed, layer, norm, loss) for layer, norm in enumerate(norms)]
    return pd.DataFrame(rows, columns=["way", "seed", "layer", "norm", "loss"])


def _settings(profile: Profile) -> Iterator[tuple[str, Settings]]:
    """Each way with each seed."""
    for (way, changes), seed in product(WAYS.items(), profile.gradient_flow.seeds):
        yield way, profile.gradient_config(seed, **changes)


def _tables(study: Asked) -> Frames:
    return {GRADIENT_FLOW: gradient_flow(study)}


def _missing(profile: Profile) -> str:
    if profile.arm_runs("q_sparse"):
        return ""
    return f"Profile {profile.name} has no experiment q_sparse, beside which {GRADIENT_FLOW} is measured."


MAKERS = [Maker((GRADIENT_FLOW,), _tables, _missing)]
