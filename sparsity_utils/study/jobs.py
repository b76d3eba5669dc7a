"""What a study has to do: a job is a run to train and to measure; what it costs, whether it is done, in which order."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from sparsity_utils import paths
from sparsity_utils.models.training import Schedule, saved_step
from sparsity_utils.study.measurements import EFFORT, decided_by, measurement
from sparsity_utils.study.profiles import MeasureConfig
from sparsity_utils.study.runs import Run, RunConfig, find_run, train_run, working_folder
from sparsity_utils.text.corpus import open_corpus


@dataclass(frozen=True)
class Job:
    """A run to train, if need be, and to measure."""

    config: RunConfig
    corpus: Path
    measure: MeasureConfig
    what: tuple[str, ...]  # keys of MEASUREMENTS; none: nothing but the losses of training
    weights: bool = False  # whether those after the decay are wanted too, which a run that was brought may lack

    def measuring(self) -> float:
        """Expected seconds on one CPU core to measure all of `what`."""
        return self.measuring_tokens() * self.config.token_cost()

    def measuring_tokens(self) -> float:
        """The training tokens that cost what measuring all of `what` costs."""
        calibration, evaluation = map(sum, zip((0.0, 0.0), *(EFFORT[what] for what in self.what), strict=True))
        return calibration * self.measure.calibration_tokens + evaluation * self.measure.evaluation_tokens

    def cost(self) -> float:
        """Expected seconds on one CPU core of what is left, as far as the run's folder shows it."""
        return self.measuring() + (0.0 if self.trained() else self.config.cost())

    def trained(self) -> bool:
        """Whether the checkpoints that are to be measured are here."""
        return (paths.runs() / self.config.key / "checkpoints").exists()

    def done(self) -> bool:
        """Whether nothing is left to compute."""
        run = find_run(self.config)
        if run is None or run.diverged:
            return run is not None
        if self.weights and not run.last_weights.exists():
            return False
        return all(run.has_measured(what, decided_by(self.measure)) for what in self.what)

    def do(self, on_progress: Callable[[float], None] = lambda share: None) -> None:
        """Train and measure what is missing; on_progress is called with the share of that which is done."""
        training = 1 - self.measuring() / max(self.cost(), 1e-9)  # as a share of what is left
        corpus = open_corpus(self.corpus)
        run = train_run(self.config, corpus, lambda share: on_progress(training * share))
        for number, what in enumerate(self.what if not run.diverged else (), start=1):
            measurement(run, corpus, self.measure, what)
            on_progress(training + (1 - training) * number / len(self.what))
        on_progress(1.0)

    def share(self) -> float:
        """The share of the job that is done, as the store shows it, whichever machine does it; 1.0 once all is there.

        Files are not compared with their hashes, as `done` does, so that it can be asked often.
        """
        folder, measuring, training = paths.runs() / self.config.key, self.measuring(), self.config.cost()
        try:
            run = Run(folder, json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, json.JSONDecodeError):
            step = saved_step(working_folder(self.config))
            return training * step / Schedule(self.config.train).steps / (training + measuring)
        missing = sum(not run.has_measured(what, decided_by(self.measure)) for what in self.what)
        return 1.0 if run.diverged or not missing else 1 - measuring * missing / len(self.what) / (training + measuring)


class OutOfTime(RuntimeError):
    """The deadline has passed; finished runs are kept, runs under way resume from their last state."""


def longest_first(jobs: Iterable[Job]) -> list[Job]:
    """The order in which the last worker is alone for the shortest time."""
    return sorted(jobs, key=Job.cost, reverse=True)
