"""One row per run, against the numbers read by hand."""

import numpy as np
import pytest
from planted import study

from sparsity_utils.console import InputError
from sparsity_utils.laws.limits import run_table


def checkpoints(**kwargs):
    table = study(((40, 2), (60, 3)), **kwargs)
    return table.assign(nonzero_share=0.3 + 0.01 * table["step"], validation_loss=3 - 0.01 * table["step"])


def test_a_row_is_what_the_checkpoints_say():
    given = checkpoints()
    table = run_table(given.sample(frac=1, random_state=0)).set_index("run")
    assert len(table) == given["run"].nunique() == 8
    for run, rows in given.groupby("run"):
        stable = rows[rows["role"] == "stable"]
        fitted = stable[stable["fit"]]
        slope = np.polyfit(np.log10(fitted["tokens"]), fitted["activation_ratio"], 1)[0]
        expected = {
            "final_loss": rows.loc[rows["role"] == "final", "validation_loss"].item(),
            "last_five_mean": stable["activation_ratio"].iloc[-5:].mean(),
            "last_five_nonzero": stable["nonzero_share"].iloc[-5:].mean(),
            "slope": slope,
            "checkpoints": len(fitted),
        }
        assert table.loc[run, list(expected)].to_dict() == pytest.approx(expected)


def test_a_run_without_fitted_points_has_no_slope():
    table = run_table(checkpoints().assign(fit=False))
    assert table["slope"].isna().all() and (table["checkpoints"] == 0).all()
    assert table[["final_loss", "last_five_mean"]].notna().all(axis=None)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.drop(columns="nonzero_share"), "lacks the columns nonzero_share"),
        (lambda t: t.assign(nonzero_share=np.nan), "no nonzero_share"),
        (lambda t: t.head(0), "has no rows"),
    ],
)
def test_unusable_tables_are_input_errors(spoil, message):
    with pytest.raises(InputError, match=message):
        run_table(spoil(checkpoints()))
