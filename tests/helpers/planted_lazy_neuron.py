"""A table of the experiment lazy_neuron whose shares are planted, for the tests of its verdicts and figures."""

import numpy as np
import pandas as pd

SHAPE = {"d_model": 32, "n_layers": 4, "d_ff": 80}
OTHER_SHAPES = {
    "depth_2": {"n_layers": 2},
    "depth_8": {"n_layers": 8},
    "d_ff_40": {"d_ff": 40},
    "d_ff_160": {"d_ff": 160},
}
RANDOM = ("uniform", "uniform_no_decay", "unigram", "unigram_no_decay", "random_text", "fresh_pairs")
ARMS = ("plain", "gated", "ten_passes", *RANDOM, *OTHER_SHAPES)
FALLS = dict.fromkeys(ARMS, 0.2)


def planted(falls=FALLS, start=0.5, seeds=3, noise=0.002, rates=(0.01, 0.02), best=0.01):
    """One row per run and layer of the arms in `falls`.

    falls: {arm: fall of the share}, one number for all layers, or one for each. start: likewise, for all arms.
    best: the rate with the lower validation loss.
    """
    random, rows = np.random.default_rng(0), []
    for arm, fall in falls.items():
        shape = SHAPE | OTHER_SHAPES.get(arm, {})
        for rate in rates:
            for seed in range(seeds):
                layers = shape["n_layers"]
                initial = np.broadcast_to(start, layers) + noise * random.normal(size=layers)
                final = np.broadcast_to(start, layers) - fall + noise * random.normal(size=layers)
                final = final if rate == best else final + 0.05  # so that the wrong rate shows
                run = {"run": f"{arm}-{rate}-{seed}", "arm": arm, "learning_rate": rate, "seed": seed, **shape}
                run |= {"parameters": 30_000, "tokens": 2_000_000, "validation_loss": 3.0 + (rate != best)}
                run["activation_ratio"] = np.nan if arm in RANDOM else final.mean() / 2
                rows += [
                    {**run, "layer": layer, "initial_share": initial[layer], "final_share": final[layer]}
                    for layer in range(layers)
                ]
    return pd.DataFrame(rows)
