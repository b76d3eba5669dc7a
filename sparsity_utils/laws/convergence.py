"""How early in a run its activation ratio has made half of its change, so that sizes can be compared (Fig. 8).

The change is that of the curve A(D) fitted to a run's checkpoints, within a window from D1 to D2 tokens. Nothing is
extrapolated to the limit A0. The half-way point is the D at which

    (A(D) - A(D1)) / (A(D2) - A(D1)) = 0.5.

For sizes to be comparable, the window is the same for all runs in tokens per parameter: it is the range over which
every run has fitted checkpoints. The runs of one study nearly share it already, since all have equally many tokens per
parameter, and checkpoints that are log-spaced from a fixed share of them on. On such a window the half-way point
depends on the shape of the curve alone: it is the geometric mean of the window where the ratio is linear in log tokens,
at every size, and lies earlier where the ratio flattens inside the window. It does not tell what happened before the
window (in the first tenth of a run), nor how large the change was.
"""

import numpy as np
import pandas as pd

from sparsity_utils.laws.data_law import Fit, fit_data_law
from sparsity_utils.laws.limits import SHAPE, Curves, fit_points

SHARES = {"halfway": 0.5, "ninety": 0.9}  # of the change within the window
GRID = 1001  # log-spaced points between which the fitted curve is interpolated


def convergence_table(curves: Curves) -> pd.DataFrame:
    """One row per run: the tokens at which it has made half, and 90%, of its change in the common window.

    Columns: run, activation, d_model, n_layers, parameters, width_depth_ratio, seed, first and last (ends of the
    window, tokens per parameter), halfway and ninety (training tokens), halfway_per_parameter and ninety_per_parameter,
    reason (empty, or why the numbers are NaN: no trend, too few points, or no window that all runs share).
    """
    checkpoints = curves.checkpoints
    about = ["run", *SHAPE, "parameters", "width_depth_ratio", "seed"]
    points = fit_points(checkpoints)
    seen = (points["tokens"] / points["parameters"]).groupby(points["run"]).agg(["min", "max"])
    first, last = seen["min"].max(), seen["max"].min()  # tokens per parameter; NaN without any fitted point
    rows = []
    for run in checkpoints[about].drop_duplicates().sort_values(about[1:]).to_dict("records"):
        fit = curves.runs[run["run"]]
        reason = _no_change(fit) if first < last else "no window of tokens per parameter that all runs share"
        ends = np.array([first, last]) * run["parameters"]
        tokens = dict.fromkeys(SHARES, float("nan")) if reason else _tokens_at(fit, *ends)
        per_parameter = {f"{name}_per_parameter": value / run["parameters"] for name, value in tokens.items()}
        rows.append({**run, "first": first, "last": last, **tokens, **per_parameter, "reason": reason})
    return pd.DataFrame(rows)


def _no_change(fit: Fit) -> str:
    """Why a curve has no half-way point: it has too few points, or a constant fits as well. Else empty."""
    constant = fit_data_law(fit.tokens, fit.activation_ratio, "constant")
    return "" if fit.aicc < constant.aicc else fit.reason


def _tokens_at(fit: Fit, first: float, last: float) -> dict[str, float]:
    """Tokens at which the fitted curve has made SHARES of its change. Every published form is monotone."""
    grid = np.geomspace(first, last, GRID)
    curve = fit.predict(grid)
    done = (curve - curve[0]) / (curve[-1] - curve[0])  # 0 to 1, rising
    return {name: float(np.exp(np.interp(share, done, np.log(grid)))) for name, share in SHARES.items()}
