"""Tables of runs that follow a planted law of shape and data."""

from itertools import product

import numpy as np
import pandas as pd
from scipy.special import expit

from sparsity_utils.study.plan import planned

LINE = ((16, 1), (32, 2), (48, 3), (64, 4))  # ratio 16, 2.9k to 188k parameters


SECOND = ((16, 2), (24, 3), (32, 4))  # ratio 8


SHAPES = ((80, 2), (64, 3), (40, 7))  # ReLU alone, about 150k parameters


DATA = 100.0  # tokens per parameter


SLOPES = {"relu": (-1.8, -0.3, -0.1), "silu": (-0.5, 0.2, 0.15)}  # log odds at the reference, per decade of N and D / N


def truth(activation, parameters, tokens, ratio):
    """Activation ratio and loss of the planted laws."""
    n, t, r = np.log10(parameters / 1e5), np.log10(tokens / parameters / 100), np.log10(ratio / 10)
    level, by_size, by_data = SLOPES[activation]
    loss = 3.2 * np.exp(-0.3 * n - 0.15 * t - 0.05 * r + 0.08 * r**2)
    return expit(level + by_size * n + by_data * t + 0.6 * r), loss


def study(noise=0.0, seeds=(0, 1), relu=(*LINE, *SECOND, *SHAPES), silu=(*LINE, *SECOND), seed=0):
    """Checkpoints of runs that follow the planted laws; a run's error is one number, on log odds and log loss."""
    rng, runs = np.random.default_rng(seed), []
    for activation, shapes in {"relu": relu, "silu": silu}.items():
        for shape, run_seed in product(shapes, seeds):
            runs.append(run(activation, shape, run_seed, DATA * size(shape), noise * rng.normal(size=2)))
    return pd.concat(runs, ignore_index=True)


def designed(profile, questions, noise=0.0, seed=0):
    """Checkpoints of the runs that a profile plans for `questions`; each table has its own, as a study's tables do."""
    rng, tables = np.random.default_rng(seed), []
    for question in questions:
        for model, train in planned(profile, question):
            shape, off = (model.d_model, model.n_layers), noise * rng.normal(size=2)
            tables.append(run(model.activation, shape, train.seed, train.tokens, off))
    return pd.concat(tables, ignore_index=True)


def size(shape):
    d_model, n_layers = shape
    return int(11.5 * n_layers * d_model**2)


def run(activation, shape, seed, trained, off):
    """Checkpoints of one run of so many tokens; `off` are its errors on log odds and log loss."""
    (d_model, n_layers), parameters = shape, size(shape)
    shares = np.append(np.geomspace(0.02, 0.85, 10), np.linspace(0.88, 1.0, 5))  # of the stable stage
    tokens = trained / 1.1 * np.append(shares, 1.1)
    ratios, loss = truth(activation, parameters, tokens, d_model / n_layers)
    odds = np.log(ratios / (1 - ratios)) + off[0]
    loss *= np.exp(0.1 * off[1]) * np.append(np.ones(15), 0.95)
    role = ["stable"] * 15 + ["final"]
    about = {"activation": activation, "d_model": d_model, "n_layers": n_layers, "seed": seed}
    frame = pd.DataFrame({"step": range(16), "role": role, "tokens": tokens, "activation_ratio": expit(odds)})
    frame = frame.assign(fit=np.append(shares > 0.1, False), validation_loss=loss, **about)
    frame["nonzero_share"] = expit(odds + 1) if activation == "relu" else 1.0
    name = f"{activation}-{d_model}x{n_layers}-{seed}-{trained:.0f}"
    return frame.assign(run=name, parameters=parameters, width_depth_ratio=d_model / n_layers)
