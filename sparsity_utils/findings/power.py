"""How likely each verdict is before any run: the tests of the verdicts on simulated values of a planned design.

    value of a run = effect + effect of its size, N(0, sd_fit) + effect of its seed, N(0, sd_seed)

The first effect is a mean, or a slope times x. The values are averaged, fitted and judged by the same functions that
the verdicts call. Claims of equivalence are also simulated at their margin, where "supported" must come up in at most
5% of the draws. Values of sizes stand for measured means, which verdicts rest on unless every fitted limit is sound.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparsity_utils import paths
from sparsity_utils.console import InputError, progress
from sparsity_utils.findings import one_dimension, relu_vs_silu, scale_insensitivity
from sparsity_utils.findings.claims import SLOPE_MARGIN, Claim
from sparsity_utils.findings.relu_vs_silu import LOSS_EQUAL, LOSS_MARGIN, RELU_FALLS, RELU_SPARSER, SILU_RISES
from sparsity_utils.findings.width_depth_ratio import RATIO_RISES, ratio_slope
from sparsity_utils.laws.lines import MAIN, SECOND, pooled_means, pooled_slopes, size_means
from sparsity_utils.laws.power_inputs import OUTCOMES, RATIO_OUTCOME, Spread
from sparsity_utils.laws.published import PUBLISHED_LAWS, TOKENS_PER_PARAMETER
from sparsity_utils.laws.trends import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, fit_two_segments
from sparsity_utils.models.shapes import d_ff, non_embedding_parameters
from sparsity_utils.study.plan import Settings, planned
from sparsity_utils.study.profiles import Profile

DRAWS, SEED = 2000, 0
REACHED = "power_reached.csv"  # of `power_reached`
LINES = {"relu_vs_silu": MAIN, "second_line": SECOND}
SIZE = ("line", "d_model", "n_layers", "d_ff")
# Parameters grow as n_layers^3 at one width-depth ratio. If depth alone moves an outcome, then its slope per decade of
# depth is three times its slope per decade of parameters along such a line.
DEPTH_PER_LINE = 3
DEPTH_LINE = 8.0  # the width-depth ratio of that line
ZERO, AS_PUBLISHED, FIRST, MARGIN = "zero", "published", "first study", "margin"
COLUMNS = [
    *("question", "claim", "rank", "effect", "value", "unit"),
    *("supported", "not_supported", "inconclusive", "runs", "sizes"),
]

Array = NDArray[np.float64]
Effect = float | dict[str, float]  # one for all lines, or by line
Judge = Callable[[Array, Array], dict[Claim, str]]  # (values of sizes, values of runs) -> verdicts


class Truth(NamedTuple):
    """A simulated effect: its name, what each claim estimates without noise (NaN: not known), what it adds to runs."""

    name: str
    values: dict[Claim, float]
    planted: Array  # (runs,)


@dataclass(frozen=True)
class Simulation:
    """Claims that are judged from the same simulated runs."""

    runs: pd.DataFrame  # line, d_model, n_layers, d_ff, parameters, width_depth_ratio, seed
    spread: Spread
    truths: list[Truth]
    judge: Judge

    def rows(self, draws: int) -> list[tuple]:
        """One row of the table for each truth and claim; every truth sees the same random numbers."""
        rng = np.random.default_rng(SEED)
        seed, fit = self.spread.deviations(rng, draws)
        sizes = self.runs.groupby(list(SIZE)).ngroup().to_numpy()
        noise = fit * rng.normal(size=(draws, sizes.max() + 1))[:, sizes] + seed * rng.normal(size=(draws, sizes.size))
        rows = []
        for truth in self.truths:
            asked = [claim for claim, value in truth.values.items() if np.isfinite(value)]
            values = noise + np.nan_to_num(truth.planted)  # (draws, runs)
            means = size_means(self.runs.join(pd.DataFrame(values.T)), SIZE)[list(range(draws))].to_numpy().T
            found = [self.judge(*pair) for pair in zip(means, values, strict=True)] if asked else []
            rows += [self._row(claim, truth, [words[claim] for words in found]) for claim in asked]
        return rows

    def _row(self, claim: Claim, truth: Truth, words: list[str]) -> tuple:
        shares = [words.count(word) / len(words) for word in (SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE)]
        about = (claim.question, claim.claim, claim.rank, truth.name, claim.scale * truth.values[claim], claim.unit)
        return (*about, *shares, len(self.runs), self.runs.groupby(list(SIZE)).ngroups)


def write_power(profile: Profile, folder: Path) -> Path:
    """Write power.csv of a profile's design into `folder`; returns the file. The same design gives the same table."""
    target = folder / "power.csv"
    with paths.written_aside(target) as aside:
        power_table(profile).to_csv(aside, index=False, float_format="%.6g")
    return target


def shown_power(question: str) -> pd.DataFrame:
    """The recorded power.csv of a question, as notebooks show it: one row per claim and effect, verdicts in percent.

    Where the recorded study has the power that it reached (`power_reached`), its percentages follow those that were
    promised. They are empty where another effect was simulated, as of a study whose lines have other ratios.
    """
    shown = _in_percent("power.csv", question)
    if (paths.RESULTS / REACHED).exists():
        reached = _in_percent(REACHED, question).drop(columns=["rank", "unit"])
        shown = shown.merge(reached, on=["claim", "effect"], how="left", suffixes=(" promised", " reached"))
        same = np.isclose(shown["value promised"], shown["value reached"], rtol=1e-4)
        of_reached = [name for name in shown if name.endswith(" reached")]
        shown.loc[~same, of_reached] = np.nan
        shown = shown.drop(columns="value reached").rename(columns={"value promised": "value"})
    effects = [f"{row.effect}: {row.value:.3g} {row.unit}" for row in shown.itertuples()]
    shown = shown.assign(effect=effects).drop(columns=["value", "unit"])
    return shown.sort_values("claim", kind="stable", ignore_index=True)


def _in_percent(file: str, question: str) -> pd.DataFrame:
    """Claim, rank, effect, value, unit and the verdicts in percent, of a table of power in results/."""
    table = pd.read_csv(paths.RESULTS / file).query("question == @question")
    verdicts_in_percent = (100 * table[["supported", "not_supported", "inconclusive"]]).round().astype(int)
    names = {name: f"{name.replace('_', ' ')} %" for name in verdicts_in_percent}
    about = table[["claim", "rank", "effect", "value", "unit"]]
    return about.join(verdicts_in_percent.rename(columns=names)).reset_index(drop=True)


def power_table(profile: Profile) -> pd.DataFrame:
    """Probability of each verdict of every primary claim, and of some others, for the runs that a profile plans.

    Columns: question, claim, rank, effect (zero, published, first study, margin and what else is simulated), value (of
    the effect, in unit), unit, supported, not_supported, inconclusive (shares of DRAWS simulated studies), runs and
    sizes (that the test uses).
    """
    questions = (*LINES, "width_depth_ratio", "one_dimension")
    designs = {question: planned(profile, question) for question in questions}
    return simulated(designs, pd.read_csv(paths.RESULTS / "power_inputs.csv"), DRAWS)


def simulated(designs: dict[str, list[Settings]], inputs: pd.DataFrame, draws: int) -> pd.DataFrame:
    """`power_table` of designs {question: what its runs are trained with} and of `power_inputs.power_inputs`."""
    lines = _runs({line: designs.get(question, []) for question, line in LINES.items()})
    ratios, dimensions = (_runs({"": designs.get(name, [])}) for name in ("width_depth_ratio", "one_dimension"))
    spread = {name: Spread(rows) for name, rows in inputs.groupby("outcome")}
    made = simulations(lines, ratios, dimensions, spread)
    rows = [row for simulation in progress(made, "simulated tests") for row in simulation.rows(draws)]
    return pd.DataFrame(rows, columns=COLUMNS)


def simulations(
    lines: pd.DataFrame, ratios: pd.DataFrame, dimensions: pd.DataFrame, spread: dict[str, Spread]
) -> list[Simulation]:
    """The claims that ReLU runs decide, with the columns of `Simulation.runs`: those of lines of sizes, of shapes of
    one size, and of shapes in which one dimension varies at a time. A frame without rows leaves its claims out.

    spread: by outcome. Raises InputError for one that lacks an outcome.
    """
    unknown = [name for name in (*OUTCOMES, RATIO_OUTCOME) if name not in spread]
    if unknown:
        raise InputError(
            f"The power inputs have no row for {', '.join(unknown)}; make them from a recorded study again."
        )
    made = (
        (_of_means, lines),
        (_of_slopes, lines),
        (_of_tail, lines),
        (_of_ratio, ratios),
        (_of_depth, dimensions),
        (_of_doublings, dimensions),
    )
    return [simulation for make, runs in made if len(runs) for simulation in make(runs, spread)]


def _runs(lines: dict[str, list[Settings]]) -> pd.DataFrame:
    """One row per ReLU run of every line."""
    rows = []
    for line, settings in lines.items():
        for model, train in settings:
            if model.activation == "relu":
                size = (model.d_model, model.n_layers, d_ff(model.d_model, model.ffn_ratio))
                parameters = non_embedding_parameters(model.d_model, model.n_layers, model.ffn_ratio)
                rows.append((line, *size, parameters, model.d_model / model.n_layers, train.seed))
    return pd.DataFrame(rows, columns=[*SIZE, "parameters", "width_depth_ratio", "seed"])


def _per_line(runs: pd.DataFrame, spread: Spread) -> dict[str, float]:
    """The effect that was found on each line."""
    return {line: spread.effect(line, rows["width_depth_ratio"].median()) for line, rows in runs.groupby("line")}


def _of_means(runs: pd.DataFrame, spread: dict[str, Spread]) -> list[Simulation]:
    """The claims on ReLU beside SiLU at the sizes of each line."""
    lines = _sizes(runs)["line"]
    published = {LOSS_EQUAL: 0.0, RELU_SPARSER: 0.321}
    published |= {RELU_FALLS: _published_change("relu"), SILU_RISES: _published_change("silu")}
    simulations = []
    for claim, outcome in relu_vs_silu.ON_LINES.items():
        own = spread[outcome.__name__]
        effects: dict[str, Effect] = {ZERO: 0.0, AS_PUBLISHED: published[claim], FIRST: _per_line(runs, own)}
        effects |= {MARGIN: LOSS_MARGIN} if claim == LOSS_EQUAL else {}
        stated = {line: claim.on(line) for line in lines.unique()}

        def judge(means: Array, _: Array, stated: dict[str, Claim] = stated) -> dict[Claim, str]:
            found = pooled_means(means, lines)
            return {stated[line]: stated[line].decide(estimate) for line, estimate in found.items()}

        truths = [_truth(name, effect, stated, runs) for name, effect in effects.items()]
        simulations.append(Simulation(runs, own, truths, judge))
    return simulations


def _of_slopes(runs: pd.DataFrame, spread: dict[str, Spread]) -> list[Simulation]:
    """The claims that a quantity does not depend on scale, at the sizes of each line."""
    sizes = _sizes(runs)
    decades, lines = np.log10(sizes["parameters"]), sizes["line"]
    published, simulations = {"relu_ratio": 0.016, "silu_ratio": -0.026}, []
    outcomes = {"relu": "relu_ratio", "silu": "silu_ratio", "nonzero": "nonzero_share", "gap": "metric_gap"}
    for name, outcome in outcomes.items():
        own = spread[outcome]
        stated = {line: scale_insensitivity.ON_LINES[name].on(line) for line in lines.unique()}
        effects: dict[str, Effect] = {ZERO: 0.0, AS_PUBLISHED: published.get(outcome, np.nan)}
        effects |= {FIRST: _per_line(runs, own), MARGIN: SLOPE_MARGIN}

        def judge(means: Array, _: Array, stated: dict[str, Claim] = stated) -> dict[Claim, str]:
            found = pooled_slopes(decades, means, lines)
            return {claim: claim.decide(found[line]) for line, claim in stated.items()}

        truths = [_truth(name, effect, stated, runs, _decades(runs)) for name, effect in effects.items()]
        simulations.append(Simulation(runs, own, truths, judge))
    return simulations


def _of_tail(runs: pd.DataFrame, spread: dict[str, Spread]) -> list[Simulation]:
    """The weak tail at sizes of two layers or more on both lines: the gap of the two metrics with its sign reversed."""
    runs = runs[runs["n_layers"] >= 2].reset_index(drop=True)
    if runs["line"].nunique() < 2:
        return []
    sizes, own, claim = _sizes(runs), spread["metric_gap"], one_dimension.TAIL_SHRINKS
    first = {line: -effect for line, effect in _per_line(runs, own).items()}
    nearest = float(np.max(list(first.values())))  # as the verdict shows it; NaN unless both lines are known

    def judge(means: Array, _: Array) -> dict[Claim, str]:
        found = pooled_slopes(np.log10(sizes["parameters"]), means, sizes["line"])
        return {claim: claim.judged_all(found, "sizes").verdict}

    planted = runs["line"].map(first).to_numpy(dtype=float) * _decades(runs)
    truths = [Truth(ZERO, {claim: 0.0}, np.zeros(len(runs))), Truth(FIRST, {claim: nearest}, planted)]
    return [Simulation(runs, own, truths, judge)]


def _of_ratio(runs: pd.DataFrame, spread: dict[str, Spread]) -> list[Simulation]:
    """The claim that the limit rises with the width-depth ratio at one size."""
    own, claim = spread[RATIO_OUTCOME], RATIO_RISES
    first = float(own.rows["first_effect"].iloc[0])

    def judge(_: Array, values: Array) -> dict[Claim, str]:
        found = fit_two_segments(runs["width_depth_ratio"], values, runs["seed"]).breakpoint
        return {claim: claim.decide(ratio_slope(runs.assign(value=values), found)[0])}

    truths = [
        Truth(name, {claim: slope}, slope * runs["width_depth_ratio"].to_numpy())
        for name, slope in ((ZERO, 0.0), (FIRST, first))
    ]
    return [Simulation(runs, own, truths, judge)]


def _of_depth(runs: pd.DataFrame, spread: dict[str, Spread]) -> list[Simulation]:
    """The claim that depth drives the trend of non-zeros, on shapes that vary one dimension at a time."""
    sizes, own, claim = _sizes(runs), spread["nonzero_share"], one_dimension.DEPTH_DRIVES
    middle, depth = one_dimension.centre(sizes), _slope_of_depth(own)
    decades = np.log10(runs["parameters"] / middle["parameters"])
    wider, deeper = (np.where(runs[name] != middle[name], decades, 0) for name in ("d_model", "n_layers"))

    def judge(means: Array, _: Array) -> dict[Claim, str]:
        return {claim: one_dimension.depth_drives(one_dimension.parameter_slopes(sizes.assign(value=means)))[0]}

    width_margin, depth_margin = one_dimension.WIDTH_MARGIN, one_dimension.DEPTH_MARGIN
    slopes = {  # of width and of depth; the slope shown
        ZERO: (0.0, 0.0, 0.0),
        f"{FIRST}: depth alone": (0.0, depth, depth),
        f"{MARGIN} of depth, width 0": (0.0, depth_margin, depth_margin),
        f"{MARGIN} of width, depth as in the first study": (width_margin, depth, width_margin),
    }
    truths = [
        Truth(name, {claim: shown}, width * wider + deep * deeper)
        for name, (width, deep, shown) in slopes.items()
        if np.isfinite(deep)  # the first study may have had no such line
    ]
    return [Simulation(runs, own, truths, judge)]


def _of_doublings(runs: pd.DataFrame, spread: dict[str, Spread]) -> list[Simulation]:
    """The claims per doubling of depth and of d_ff, on shapes that vary one dimension at a time."""
    sizes, own = _sizes(runs), spread["nonzero_share"]
    middle, mean = one_dimension.centre(sizes), own.at_ratio(DEPTH_LINE, "mean")
    if not np.isfinite(mean):
        return []
    deeper, more = (np.log2(runs[name] / middle[name]).to_numpy() for name in ("n_layers", "d_ff"))

    def judge(means: Array, _: Array) -> dict[Claim, str]:
        found = one_dimension.doubling_verdicts(sizes.assign(value=means))
        return {claim: word for claim, (_, word) in found.items()}

    def truth(name: str, deep: float, wide: float) -> Truth:
        share = mean + deep * deeper + wide * more
        without_noise = one_dimension.doubling_verdicts(_sizes(runs.assign(value=share)))
        count = without_noise[one_dimension.COUNT_RISES][0].value
        return Truth(name, dict(zip(one_dimension.DOUBLINGS, (deep, wide, count), strict=True)), share)

    fall, per_doubling = one_dimension.FALL, _slope_of_depth(own) * np.log10(2)
    truths = [
        truth(ZERO, 0.0, 0.0),
        truth(f"{MARGIN}: -2 points", fall, fall),
        truth(f"{FIRST}: depth alone; d_ff twice the margin", per_doubling, 2 * fall),
    ]
    return [Simulation(runs, own, truths, judge)]


def _slope_of_depth(spread: Spread) -> float:
    """Slope per decade of depth if depth alone explains the first study's line; NaN where it had no such line.

    At fixed width a decade of depth is a decade of parameters.
    """
    return DEPTH_PER_LINE * spread.at_ratio(DEPTH_LINE)


def _sizes(runs: pd.DataFrame) -> pd.DataFrame:
    """The sizes of the runs in the order of their means."""
    return size_means(runs, SIZE)


def _decades(runs: pd.DataFrame) -> Array:
    """log10 parameters less its mean on the line of each run."""
    decades = np.log10(runs["parameters"])
    return (decades - decades.groupby(runs["line"]).transform("mean")).to_numpy()


def _truth(
    name: str,
    effect: Effect,
    stated: dict[str, Claim],
    runs: pd.DataFrame,
    along: Array | None = None,
) -> Truth:
    """`effect`, one for all lines or {line: effect}, as the mean of the runs or, with `along`, as their slope on it."""
    by_line = effect if isinstance(effect, dict) else dict.fromkeys(stated, effect)
    per_run = runs["line"].map(by_line).to_numpy(dtype=float)
    values = {claim: by_line[line] for line, claim in stated.items()}
    return Truth(name, values, per_run if along is None else per_run * along)


def _published_change(activation: str) -> float:
    """Change of the activation ratio, in the published direction, over the last decade of tokens of the printed laws.

    Mean over the published models: from 19 to 190 tokens per parameter; a fall for ReLU, a rise for SiLU.
    """
    sign, changes = {"relu": -1, "silu": 1}[activation], []
    for law in PUBLISHED_LAWS:
        if law.activation == activation:
            end = TOKENS_PER_PARAMETER * non_embedding_parameters(law.d_model, law.n_layers)
            changes.append(sign * float(law.predict(end) - law.predict(end / 10)))
    return float(np.mean(changes))
