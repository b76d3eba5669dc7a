"""How good a design is on runs that it was not fitted to: by shape, by size, by seed."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from sparsity_utils.laws.design import LOSS, NEAR, RATIO, Design, fit_design
from sparsity_utils.laws.published_laws import PUBLISHED_LAWS, TOKENS_PER_PARAMETER
from sparsity_utils.models.decoder import non_embedding_parameters

SMALLER = 0.5  # a size is predicted from runs of at most this part of it
COLUMNS = [
    *("split", "quantity", "activation", "d_model", "n_layers", "parameters", "width_depth_ratio", "seed"),
    *("predicted", "low", "high", "measured", "inside", "mean_of_others", "extrapolates"),
]


def held_out(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """Every run of a study, predicted by designs that were fitted without it.

    Splits: "shape", all runs of a shape left out; "size", fitted to runs of at most half the size, the shape's ratio
    among theirs; "seed", all runs of a seed left out: new runs of known shapes. Where what is left determines no fit,
    there is no row. One row per split, run and quantity (activation ratio, loss in nats per token): its identity,
    predicted with the 90% interval low to high, measured, inside (the interval), mean_of_others (of the fitted runs of
    that activation function: a prediction that knows nothing of size, data and shape), extrapolates (in words).
    Raises InputError as `design.fit_design` does.
    """
    runs, rows = fit_design(checkpoints).runs, []
    for split, held, fitted in _splits(runs):
        if not fitted.any():
            continue
        design = fit_design(checkpoints[checkpoints["run"].isin(runs.loc[fitted, "run"])])
        if not design.reason:
            known = runs[held & runs["activation"].isin(design.activations)]
            rows += [row for run in known.to_dict("records") for row in _rows(split, run, design)]
    return pd.DataFrame(rows, columns=COLUMNS)


def accuracy(held: pd.DataFrame) -> pd.DataFrame:
    """What `held_out` found, per split, quantity and activation function.

    runs, inside (their 90% interval), error (mean size of predicted - measured) and error_of_mean (of mean_of_others),
    in points of activation ratio and in percent of the loss.
    """
    sizes = errors(held).abs()
    table = held[["split", "quantity", "activation", "inside"]].assign(**sizes)
    groups = table.groupby(["split", "quantity", "activation"], sort=True)
    found = groups.agg(runs=("inside", "size"), inside=("inside", "sum"), **{c: (c, "mean") for c in sizes})
    return found.reset_index()


def errors(held: pd.DataFrame) -> pd.DataFrame:
    """Predicted - measured of each row: error, and error_of_mean; points of activation ratio, percent of the loss."""
    unit = np.where(held["quantity"] == "loss", 100 / held["measured"], 100.0)
    guesses = {"error": held["predicted"], "error_of_mean": held["mean_of_others"]}
    return pd.DataFrame({name: unit * (guess - held["measured"]) for name, guess in guesses.items()})


def against_published(design: Design) -> pd.DataFrame:
    """The activation ratios that arXiv 2411.02335 reports, predicted by `design`: other sizes, text and tokenizer.

    One row per published model: activation, model, published (its fitted curve at 190 tokens per parameter), predicted
    with the 90% interval low to high, inside, extrapolates (in words). Models of activation functions that were not
    fitted are left out.
    """
    rows = []
    for law in PUBLISHED_LAWS:
        if law.activation in design.activations:
            parameters = non_embedding_parameters(law.d_model, law.n_layers)
            tokens = TOKENS_PER_PARAMETER * parameters
            expected = design.predict(parameters, tokens, law.d_model / law.n_layers, law.activation)
            share, published = expected.activation_ratio, float(law.predict(tokens))
            inside = share.low <= published <= share.high
            numbers = (published, share.value, share.low, share.high, inside, "; ".join(expected.extrapolates))
            rows.append((law.activation, law.model, *numbers))
    names = ["activation", "model", "published", "predicted", "low", "high", "inside", "extrapolates"]
    return pd.DataFrame(rows, columns=names)


def _splits(runs: pd.DataFrame) -> Iterator[tuple[str, pd.Series, pd.Series]]:
    """Name of a split, which runs are held out, and which are fitted. (runs,) each"""
    shapes = runs[["d_model", "n_layers"]].apply(tuple, axis=1)
    for shape in dict.fromkeys(shapes):
        yield "shape", shapes == shape, shapes != shape
    for size in sorted(set(runs["parameters"])):
        fitted = runs["parameters"] <= SMALLER * size
        known = runs["width_depth_ratio"].between(
            runs["width_depth_ratio"][fitted].min() / NEAR, runs["width_depth_ratio"][fitted].max() * NEAR
        )
        yield "size", (runs["parameters"] == size) & known, fitted
    for seed in sorted(set(runs["seed"])):
        yield "seed", runs["seed"] == seed, runs["seed"] != seed


def _rows(split: str, run: dict, design: Design) -> Iterator[dict]:
    expected = design.predict(run["parameters"], run["tokens"], run["width_depth_ratio"], run["activation"])
    others = design.runs[design.runs["activation"] == run["activation"]]
    for quantity, (column, estimate) in {
        "activation ratio": (RATIO.column, expected.activation_ratio),
        "loss": (LOSS.column, expected.loss),
    }.items():
        yield {name: run[name] for name in COLUMNS[2:8]} | {
            "split": split,
            "quantity": quantity,
            "predicted": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
            "measured": run[column],
            "inside": estimate.low <= run[column] <= estimate.high,
            "mean_of_others": others[column].mean(),
            "extrapolates": "; ".join(expected.extrapolates),
        }
