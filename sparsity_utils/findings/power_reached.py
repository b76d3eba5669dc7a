"""The power that a recorded study reached, beside what was promised before it.

results/power.csv was simulated before any run of the second study, from what the runs of the first study vary by. Here
the same tests at the same effects, for the runs that were trained, with what these runs vary by. Where the two differ
the plan was wrong about the spread, or runs are missing. What the study found of an effect does not enter.
"""

from pathlib import Path

import pandas as pd

from sparsity_utils import paths
from sparsity_utils.console import check, progress
from sparsity_utils.findings.deciding import cannot_tell, lines_and_shapes, relu_runs
from sparsity_utils.findings.power import COLUMNS, DRAWS, REACHED, simulations
from sparsity_utils.laws.lines import Lines
from sparsity_utils.laws.power_inputs import Spread, spreads
from sparsity_utils.study.tables import Tables

VARIES = ["sd_seed", "sd_fit"]  # columns of a spread


def write_reached(folder: Path) -> Path:
    """Write power_reached.csv of the study recorded in `folder`; returns the file. See `reached_table`."""
    study = Tables.recorded(folder)
    check(not (why := cannot_tell(study)), why)
    dimensions = study.table("one_dimension") if study.answers("one_dimension") else pd.DataFrame()
    inputs = pd.read_csv(paths.RESULTS / "power_inputs.csv")
    with paths.written_aside(folder / REACHED) as aside:
        reached_table(*lines_and_shapes(study), dimensions, inputs).to_csv(aside, index=False, float_format="%.6g")
    return folder / REACHED


def reached_table(
    tables: Lines, shapes: pd.DataFrame, dimensions: pd.DataFrame, inputs: pd.DataFrame, draws: int = DRAWS
) -> pd.DataFrame:
    """`power.simulated` for the runs of a study, with the effects of `inputs` and what these runs vary by.

    tables: checkpoints of a study by line. shapes: its checkpoints of ReLU shapes at one size. dimensions: those of
    shapes in which one dimension varies at a time; none leaves their claims out. inputs: as results/power_inputs.csv.

    Raises InputError for inputs that lack an outcome. The study must tell what its seeds and sizes vary by
    (`deciding.cannot_tell`).
    """
    found = spreads(tables, shapes)
    spread = {name: _varying_as(rows, found[name]) for name, rows in inputs.groupby("outcome")}
    lines = pd.concat([relu_runs(table).assign(line=line) for line, table in tables.items()], ignore_index=True)
    ratios, one_by_one = (relu_runs(table).assign(line="") if len(table) else table for table in (shapes, dimensions))
    made = simulations(lines, ratios, one_by_one, spread)
    rows = [row for simulation in progress(made, "simulated tests") for row in simulation.rows(draws)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _varying_as(effects: pd.DataFrame, found: Spread) -> Spread:
    """The effects of one outcome, with what the runs of another study vary by."""
    return Spread(effects.assign(**{name: float(found.rows[name].iloc[0]) for name in VARIES}))
