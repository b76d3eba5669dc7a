"""How well designs and data laws predict what they were not fitted to.

A design predicts runs that were left out of its fit, by shape, by size or by seed. A data law that was fitted to the
first half of a run's tokens forecasts the second half, beside the simplest forecast: that nothing changes any more. The
forecasts of one curve share their points, so the unit of a test on forecasts is a curve.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from sparsity_utils.laws.data_law import FORMS, RIVAL_FORMS, fit_data_law
from sparsity_utils.laws.design import NEAR, Design, fit_design
from sparsity_utils.laws.limits import SHAPE, check_checkpoints, fit_points, published_form
from sparsity_utils.laws.outcome_law import LOSS, RATIO
from sparsity_utils.laws.published import PUBLISHED_LAWS, TOKENS_PER_PARAMETER
from sparsity_utils.models.shapes import non_embedding_parameters

SMALLER = 0.5  # a size is predicted from runs of at most this part of it
# What tells runs apart; two with the same seed and shape may differ in tokens.
RUN = ("activation", "d_model", "n_layers", "parameters", "width_depth_ratio", "seed", "tokens")
COLUMNS = [
    *("split", "quantity", *RUN),
    *("predicted", "low", "high", "measured", "inside", "mean_of_others", "extrapolates"),
]
LAST_VALUE = "last value"  # the forecast that nothing changes any more
FORECAST = ["form", "fitted", "predicted", "rmse", "bias", "reason"]


def held_out(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """Every run of a study, predicted by designs that were fitted without it.

    The split "shape" leaves out all runs of a shape. "size" fits runs of at most half a size and predicts those runs of
    the size whose width-depth ratio lies among theirs. "seed" leaves out all runs of a seed, and predicts those whose
    shape and activation function have another: new runs of known shapes.
    Where the runs left determine no fit, there is no row.

    One row per split, run and quantity (activation ratio, loss in nats per token). Columns: split, quantity,
    activation, d_model, n_layers, parameters, width_depth_ratio, seed, tokens (of training, its decay
    included), predicted with its 90% interval low to high, measured, inside (whether in the interval), mean_of_others
    (mean of the fitted runs of that activation function: a prediction that knows nothing of size, data and shape),
    extrapolates (in words). Raises InputError as `design.fit_design` does.
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

    Columns: split, quantity, activation, runs, inside (how many runs lie in their 90% interval), error (mean of
    |predicted - measured|) and error_of_mean (the same of mean_of_others), both in the units of `errors`.
    """
    sizes = errors(held).abs()
    table = held[["split", "quantity", "activation", "inside"]].assign(**sizes)
    groups = table.groupby(["split", "quantity", "activation"], sort=True)
    found = groups.agg(runs=("inside", "size"), inside=("inside", "sum"), **{c: (c, "mean") for c in sizes})
    return found.reset_index()


def errors(held: pd.DataFrame) -> pd.DataFrame:
    """error = predicted - measured and error_of_mean = mean_of_others - measured of each row of `held_out`.

    Both are in points for the activation ratio (times 100), in percent for the loss (times 100 / measured).
    """
    unit = np.where(held["quantity"] == "loss", 100 / held["measured"], 100.0)
    guesses = {"error": held["predicted"], "error_of_mean": held["mean_of_others"]}
    return pd.DataFrame({name: unit * (guess - held["measured"]) for name, guess in guesses.items()})


def against_published(design: Design) -> pd.DataFrame:
    """The activation ratios that arXiv 2411.02335 reports, predicted by `design`.

    The published models have other sizes, text and tokenizer. One row per model: activation, model,
    published (its fitted curve at 190 tokens per parameter), predicted with the 90% interval low to high, inside,
    extrapolates (in words). Models of activation functions that were not fitted are left out.
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
    """Yield the name of each split, which runs are held out, and which are fitted: (runs,) of bool each."""
    shapes = runs[["d_model", "n_layers"]].apply(tuple, axis=1)
    for shape in dict.fromkeys(shapes):
        yield "shape", shapes == shape, shapes != shape
    for size in sorted(set(runs["parameters"])):
        fitted = runs["parameters"] <= SMALLER * size
        known = runs["width_depth_ratio"].between(
            runs["width_depth_ratio"][fitted].min() / NEAR, runs["width_depth_ratio"][fitted].max() * NEAR
        )
        yield "size", (runs["parameters"] == size) & known, fitted
    pairs = runs[SHAPE].apply(tuple, axis=1)
    for seed in sorted(set(runs["seed"])):
        fitted = runs["seed"] != seed
        yield "seed", ~fitted & pairs.isin(pairs[fitted]), fitted


def _rows(split: str, run: dict, design: Design) -> Iterator[dict]:
    expected = design.predict(run["parameters"], run["tokens"], run["width_depth_ratio"], run["activation"])
    others = design.runs[design.runs["activation"] == run["activation"]]
    for quantity, (column, estimate) in {
        "activation ratio": (RATIO.column, expected.activation_ratio),
        "loss": (LOSS.column, expected.loss),
    }.items():
        yield {name: run[name] for name in RUN} | {
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


def forecast_errors(
    tokens: ArrayLike, activation_ratio: ArrayLike, forms: Iterable[str] = tuple(FORMS)
) -> pd.DataFrame:
    """Fit each form to the points up to half of the last tokens and predict those beyond.

    tokens, activation_ratio: as for `data_law.fit_data_law`, in any order. The first row is the reference "last value",
    the last fitted one. Columns: form, fitted and predicted (number of points), rmse and bias (root mean square and
    mean of predicted less measured) in activation ratio, reason (why there is no forecast; the errors are then NaN).
    Checkpoints spaced evenly in log tokens leave few points beyond the half: read `predicted` beside the errors.
    Raises InputError as `fit_data_law` does.
    """
    known = fit_data_law(tokens, activation_ratio, "constant")  # checks the input
    d, a = known.tokens, known.activation_ratio
    early = d <= d.max(initial=0.0) / 2
    last = a[early][np.argmax(d[early])] if early.any() else np.nan
    rows = [_row(LAST_VALUE, np.full((~early).sum(), last), a[~early], early, "no fitted point")]
    for form in forms:
        fit = fit_data_law(d[early], a[early], form)
        rows.append(_row(form, fit.predict(d[~early]), a[~early], early, fit.reason))
    return pd.DataFrame(rows, columns=FORECAST)


def forecast_table(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """`forecast_errors` of every run of a study: the published form of its activation, its rivals, the last value.

    checkpoints: a table such as that of relu_vs_silu; warm-up and decay are left out, as for every fit. Columns: run,
    activation, d_model, n_layers, seed, then those of `forecast_errors`. Raises InputError for missing columns,
    duplicates and NaN.
    """
    check_checkpoints(checkpoints)
    tables = []
    for about, curve in fit_points(checkpoints).groupby(["run", *SHAPE, "seed"], sort=True):
        named = dict(zip(["run", *SHAPE, "seed"], about, strict=True))
        forms = (published_form(named["activation"]), *RIVAL_FORMS)
        tables.append(forecast_errors(curve["tokens"], curve["activation_ratio"], forms).assign(**named))
    columns = ["run", *SHAPE, "seed", *FORECAST]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _row(form: str, predicted: NDArray, measured: NDArray, early: NDArray, reason: str) -> dict[str, object]:
    row = {"form": form, "fitted": int(early.sum()), "predicted": measured.size, "rmse": np.nan, "bias": np.nan}
    if measured.size == 0:
        return row | {"reason": "no point lies beyond half of the last tokens"}
    errors = predicted - measured
    if np.isnan(errors).any():
        return row | {"reason": reason}
    return row | {"rmse": float(np.sqrt(np.mean(errors**2))), "bias": float(errors.mean()), "reason": ""}
