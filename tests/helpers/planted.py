"""Tables of checkpoints that follow laws planted in them, for the tests of verdicts and of what they rest on."""

import numpy as np
import pandas as pd

AT_SECOND = ", at a second width-depth ratio"  # what a claim says of the second line of sizes
SHAPES = ((40, 2), (60, 3), (80, 4), (100, 5))


def study(
    shapes=SHAPES, activations=("relu", "silu"), seeds=(0, 1), limit=lambda activation, ratio, size: None, **kwargs
):
    """A table of checkpoints that follows the published laws; `limit(activation, ratio, parameters)` plants A0."""
    settings = {"noise": 2e-4, "silu_loss": 1.0, "points": 20, "optimum": 20.0, "end": 42e6} | kwargs
    rng, runs = np.random.default_rng(0), []
    for activation in activations:
        for d_model, n_layers in shapes:
            for seed in seeds:
                parameters, ratio = int(11.5 * n_layers * d_model**2), d_model / n_layers
                planted = limit(activation, ratio, parameters) or {"relu": 0.2, "silu": 0.45}[activation]
                tokens = np.geomspace(0.5e6, settings["end"], settings["points"])
                law = {"relu": 0.06 * np.exp(-0.4 * (tokens / 3e6) ** 0.7), "silu": -0.03 * (tokens / 3e6) ** -0.8}
                ratios = planted + law[activation] + settings["noise"] * rng.normal(size=tokens.size)
                loss = 3 + 0.05 * np.log(ratio / settings["optimum"]) ** 2 + 1e-3 * rng.normal()
                run = pd.DataFrame({"tokens": tokens, "activation_ratio": ratios, "step": range(tokens.size)})
                run = pd.concat([run, run.tail(1).assign(tokens=1.1 * tokens[-1], step=99)], ignore_index=True)
                run["role"] = ["stable"] * tokens.size + ["final"]
                run["fit"] = (run["role"] == "stable") & (run["tokens"] > 0.7e6)
                runs.append(run.assign(
                    run=f"{activation}-{d_model}x{n_layers}-{seed}", activation=activation, d_model=d_model, seed=seed,
                    n_layers=n_layers, parameters=parameters, width_depth_ratio=ratio, nonzero_share=0.3, cett=0.2,
                    ppl_ratio=1.01, validation_loss=loss * (settings["silu_loss"] if activation == "silu" else 1.0),
                ))  # fmt: skip
    return pd.concat(runs, ignore_index=True)


def with_d_ff(table):
    """`study` with the FFN of the profiles, two and a half times as wide as the model."""
    return table.assign(d_ff=5 * table["d_model"] // 2)


def by_claim(rows):
    """Verdicts by the sentence they judge."""
    return {row.claim.claim: row for row in rows}


def check_stated(finding, rows):
    """What a notebook prints first is word for word what its verdicts are judged by."""
    stated, claims = finding.claims(), [row.claim for row in rows]
    assert stated["question"].tolist() == [claim.claim for claim in claims]
    assert stated["threshold"].tolist() == [claim.threshold for claim in claims]
    assert stated["published"].tolist() == [claim.published for claim in claims]
    assert stated["test"].tolist() == [claim.test for claim in claims]
    name = finding.__name__.rpartition(".")[2]
    assert {claim.question for claim in claims} == {name} and len({claim.key for claim in claims}) == len(claims)
