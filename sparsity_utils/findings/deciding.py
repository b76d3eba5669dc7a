"""What would decide a claim that the recorded study leaves open: more seeds, or more sizes.

The tests are those of `findings.power`, here on runs that vary as those of the recorded study, with the effects that it
found. On the lines both are of sizes of two layers or more; the shapes of one size keep their single layer. Simulated
are its own sizes and seeds, several times its seeds, and larger sizes at the end of every line. Seeds make the mean of
a size exact; what a size deviates by itself stays, and only more sizes average it out.

A few runs tell poorly what seeds and sizes vary by, so every simulated study draws both from what its runs leave
possible (`power_inputs.Squares.drawn`). An effect that was found is no truth either: a share says what more runs would
decide if it were. Where the effect lies on the margin of a claim no number of runs decides it.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from sparsity_utils import paths
from sparsity_utils.console import check, note, progress
from sparsity_utils.findings.power import FIRST, SIZE, Simulation, simulations
from sparsity_utils.laws.lines import MAIN, SECOND, Lines
from sparsity_utils.laws.power_inputs import OUTCOMES, RATIO_OUTCOME, Spread, spreads
from sparsity_utils.laws.trends import INCONCLUSIVE
from sparsity_utils.models.shapes import non_embedding_parameters
from sparsity_utils.study.tables import Tables

DRAWS = 500  # a share is then within 4 points
ENOUGH = 0.8  # of the simulated studies decide a claim, one way or the other
FILE = "deciding.csv"
TABLES = ("relu_vs_silu", "second_line", "width_depth_ratio")  # that the study must have
COLUMNS = [
    *("question", "claim", "effect", "unit", "plan", "runs", "sizes", "training"),
    *("supported", "not_supported", "inconclusive"),
]


class Plan(NamedTuple):
    """More runs than a study has."""

    name: str
    seeds: int = 1  # times those of every size
    sizes: int = 0  # larger ones that continue each line by its last step, with the seeds of its largest


PLANS = (
    Plan("as recorded"),
    Plan("2 times the seeds", seeds=2),
    Plan("4 times the seeds", seeds=4),
    Plan("8 times the seeds", seeds=8),
    Plan("1 larger size", sizes=1),
    Plan("2 larger sizes", sizes=2),
    Plan("2 larger sizes, 4 times the seeds", seeds=4, sizes=2),
    Plan("4 larger sizes", sizes=4),
)


def cannot_tell(study: Tables) -> str:
    """Why the tables of a study do not allow `deciding_table`, a sentence; empty where they do."""
    lacking = [name for name in TABLES if not study.answers(name)]
    if lacking:
        return f"The study has no table for {lacking[0]}."
    return _unknown(spreads(*lines_and_shapes(study)))


def write_deciding(folder: Path) -> Path:
    """Write deciding.csv of the study recorded in `folder`; returns the file. See `deciding_table`."""
    table = deciding_table(*lines_and_shapes(Tables.recorded(folder)))
    with paths.written_aside(folder / FILE) as aside:
        table.to_csv(aside, index=False, float_format="%.6g")
    return folder / FILE


def lines_and_shapes(study: Tables) -> tuple[Lines, pd.DataFrame]:
    """The checkpoints of a study by line of sizes, and those of its shapes of one size."""
    main, second, shapes = map(study.table, TABLES)
    return {MAIN: main, SECOND: second}, shapes


def deciding_table(tables: Lines, shapes: pd.DataFrame, draws: int = DRAWS) -> pd.DataFrame:
    """How often each plan would decide the claims on lines of sizes and on the shapes of one size.

    tables: checkpoints of a study by line. shapes: its checkpoints of ReLU shapes at one size.

    Returns columns COLUMNS, a row for each plan and claim. `effect` is what the study found, in `unit`. `training` is
    the operations of the plan, in times those of the study's lines, with equally many tokens per parameter. The last
    three are shares of the simulated studies. Plans of more sizes leave out the shapes of one size. Raises InputError
    for a study that does not tell what seeds and sizes vary by.
    """
    spread = spreads(tables, shapes)
    check(not (why := _unknown(spread)), why)
    lines = pd.concat([relu_runs(table).assign(line=line) for line, table in tables.items()], ignore_index=True)
    lines = lines[lines["n_layers"] >= 2].reset_index(drop=True)
    one_size = relu_runs(shapes).assign(line="")
    rows: list[tuple] = []
    for plan in progress(PLANS, "simulated plans", len(PLANS)):
        more, none = _planned(lines, plan), one_size.iloc[:0]
        shapes_too = none if plan.sizes else _more_seeds(one_size, plan.seeds)
        training = _operations(more) / _operations(lines)
        for simulation in simulations(more, shapes_too, none, spread):
            rows += _rows(simulation, plan, training, draws)
    return pd.DataFrame(rows, columns=COLUMNS)


def _unknown(spread: dict[str, Spread]) -> str:
    """Why it is not known what runs vary by in each outcome, a sentence; empty where it is."""
    advice = "give ReLU and SiLU runs of three sizes or more on each line, some of them with several seeds"
    if lacking := [name for name in (*OUTCOMES, RATIO_OUTCOME) if name not in spread]:
        return f"The study has no runs for {', '.join(lacking)}; {advice}."
    columns = ["degrees_seed", "degrees_fit"]
    if few := [name for name, one in spread.items() if (one.rows[columns] == 0).any(axis=None)]:
        return f"The study has too few runs to tell seeds from sizes in {', '.join(few)}; {advice}."
    return ""


def shown_deciding(question: str) -> pd.DataFrame:
    """Of the recorded claims of a question that are inconclusive, what would decide them; as notebooks show it.

    Columns: claim, found, the percentage of decided studies for each plan that there is, and the cheapest plan with
    which four in five are decided. Without deciding.csv there are no rows.
    """
    if not (paths.RESULTS / FILE).exists():
        note(f"The recorded study has no {FILE}: its runs do not tell what more of them would decide.")
        return pd.DataFrame()
    table = pd.read_csv(paths.RESULTS / FILE).query("question == @question")
    verdicts = pd.read_csv(paths.RESULTS / "verdicts.csv", keep_default_na=False)
    still = verdicts.loc[verdicts["verdict"] == INCONCLUSIVE, "question"]
    rows = []
    for claim, plans in table[table["claim"].isin(still)].groupby("claim", sort=False):
        decided = 1 - plans["inconclusive"]
        cheapest = plans[decided >= ENOUGH].nsmallest(1, "training")
        enough = [f"{plan.plan}: {plan.training:.2g} times the training" for plan in cheapest.itertuples()]
        found = f"{plans['effect'].iloc[0]:.3g} {plans['unit'].iloc[0]}"
        shares = {f"{plan} %": round(100 * share) for plan, share in zip(plans["plan"], decided, strict=True)}
        rows.append({"claim": claim, "found": found, **shares, "enough": "".join(enough) or "none of these"})
    return pd.DataFrame(rows)


def _rows(simulation: Simulation, plan: Plan, training: float, draws: int) -> Iterator[tuple]:
    """The rows of one plan for the claims of a simulation."""
    found = [truth for truth in simulation.truths if truth.name == FIRST]
    for row in replace(simulation, truths=found).rows(draws):
        question, claim, _, _, effect, unit, supported, against, open_, runs, sizes = row
        yield question, claim, effect, unit, plan.name, runs, sizes, training, supported, against, open_


def _operations(runs: pd.DataFrame) -> float:
    """What runs cost with equally many tokens per parameter, up to a factor: parameters times tokens."""
    return float((runs["parameters"].astype(float) ** 2).sum())


def relu_runs(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """One row per ReLU run, with the columns of `Simulation.runs` but its line."""
    runs = checkpoints[checkpoints["activation"] == "relu"].drop_duplicates("run")
    return runs[[*SIZE[1:], "parameters", "width_depth_ratio", "seed"]].reset_index(drop=True)


def _planned(lines: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """The runs of a plan on every line."""
    longer = [_longer(runs, plan.sizes) for _, runs in lines.groupby("line", sort=False)]
    return _more_seeds(pd.concat(longer, ignore_index=True), plan.seeds)


def _more_seeds(runs: pd.DataFrame, times: int) -> pd.DataFrame:
    """Every run `times` times, each copy with a seed of its own."""
    step = runs["seed"].max() + 1 if len(runs) else 0
    return pd.concat([runs.assign(seed=runs["seed"] + turn * step) for turn in range(times)], ignore_index=True)


def _longer(runs: pd.DataFrame, more: int) -> pd.DataFrame:
    """A line with `more` sizes at its end, at the distance of its two largest and with the seeds of the largest."""
    found, step = [runs], _step(runs)
    largest = runs[runs["parameters"] == runs["parameters"].max()]
    for place in range(1, more + 1):
        size = {name: largest[name] + place * step[name] for name in SIZE[1:]}
        one = largest.assign(**size)
        ffn_ratio = one["d_ff"].iloc[0] / one["d_model"].iloc[0]
        parameters = non_embedding_parameters(int(one["d_model"].iloc[0]), int(one["n_layers"].iloc[0]), ffn_ratio)
        found.append(one.assign(parameters=parameters))
    return pd.concat(found, ignore_index=True)


def _step(runs: pd.DataFrame) -> pd.Series:
    """By how much the dimensions of a line grow from its second largest size to its largest; zero where they do not."""
    sizes = runs.sort_values("parameters").drop_duplicates("parameters")[list(SIZE[1:])]
    return sizes.diff().iloc[-1].fillna(0).clip(lower=0).astype(int)
