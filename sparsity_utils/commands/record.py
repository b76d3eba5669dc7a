"""Copy a finished study into results/, with a manifest of how it came about and two trained models."""

import json
import os
import shutil
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from sparsity_utils import paths
from sparsity_utils.commands.kept import kept_notebooks, kept_tables, kept_verdicts
from sparsity_utils.console import InputError
from sparsity_utils.findings.deciding import FILE as DECIDING
from sparsity_utils.findings.deciding import cannot_tell, write_deciding
from sparsity_utils.findings.power import REACHED
from sparsity_utils.findings.power_reached import write_reached
from sparsity_utils.study.plan import OF_MODELS, QUESTIONS, SCHEMA
from sparsity_utils.study.runs import RECIPE, find_run
from sparsity_utils.study.study import MAKERS, Study

# Settings of a profile that may be files or folders
FOLDERS = (("corpus", "path"), ("pretrained", "english"), ("pretrained", "model"), ("correction", "model"))


def record(profile: str, keep: Iterable[str] = ()) -> Iterator[Path]:
    """Record the study of `profile` into results/ as `make reproduce` left it; yield the files written.

    Nothing is trained or measured anew, so that tables are those from which the verdicts came; a table that no notebook
    asked for is made of what was measured. Tables of questions that this study leaves out are removed, so that none of
    the study recorded before stands there.
    The models are the largest size, first seed, after the decay, one per activation function.

    keep: numbers of notebooks that were not reproduced (see `kept`); their verdicts and tables stay as they are.

    Raises InputError when `make reproduce` has not left the verdicts of every other notebook, when the profile asks
    for other runs since, and for a notebook that cannot be kept.
    """
    study = Study.from_profile(profile)
    stay = kept_notebooks(keep)
    staying, verdicts = kept_tables(study, stay), _verdicts(study, profile, stay)
    own = [question for question in filter(study.answers, QUESTIONS) if question not in OF_MODELS]
    questions = {QUESTIONS[question].file: question for question in own}
    _check_done(study, questions, f"run make reproduce PROFILE={profile} again")
    left = {file.name for file in map(study.file, OF_MODELS) if file.exists()} - staying  # as notebooks left them
    for file in sorted({*questions, *left}):
        if not (study.folder / file).exists():
            study.table(questions[file])
        yield _copy(study.folder / file, paths.RESULTS / file)
    yield _write(paths.RESULTS / "verdicts.csv", verdicts.to_csv(index=False))
    yield _write(paths.RESULTS / "manifest.json", json.dumps(_manifest(study) | {"kept": stay}, indent=1) + "\n")
    for activation in study.profile.study.activations:
        yield from _models(study, activation)
    before = {DECIDING, REACHED, *(question.file for question in QUESTIONS.values())}
    for file in before - {*questions, *left, *staying}:
        (paths.RESULTS / file).unlink(missing_ok=True)
    if not cannot_tell(study):
        yield write_deciding(paths.RESULTS)
        yield write_reached(paths.RESULTS)


def _verdicts(study: Study, profile: str, stay: list[str]) -> pd.DataFrame:
    """All verdicts in reading order: those of `make reproduce`, and the recorded ones of notebooks that `stay`."""
    file = study.output / "verdicts.csv"
    if not file.exists():
        raise InputError(
            f"There is no {file.name} of profile {study.name}; run make reproduce PROFILE={profile} first."
        )
    judged = pd.read_csv(file, dtype=str, keep_default_na=False)
    judged = judged[~judged["notebook"].isin(stay)]
    if judged["verdict"].isin(["failed", "none"]).any():
        raise InputError(f"{file.name} of profile {study.name} has failed notebooks; reproduce it again.")
    others = [notebook for notebook in paths.collection() if notebook.stem not in stay]
    if left_out := [notebook.stem for notebook in others if not _judged(notebook, study.output, judged)]:
        raise InputError(f"{file.name} of profile {study.name} lacks {left_out[0]}; reproduce all notebooks.")
    return pd.concat([judged, kept_verdicts(stay, judged.columns)]).sort_values("notebook", kind="stable")


def _check_done(study: Study, questions: dict[str, str], advice: str) -> None:
    """Every run that the profile asks for is done, tables that notebooks left are of these runs and no others, and what
    is not measured on runs one by one is there.

    questions: by the file of their table.
    """
    jobs = study.jobs(*questions.values(), models=study.profile.study.activations)
    undone = [job.config.title for job in jobs if not job.done()]
    if undone:
        raise InputError(f"{len(undone)} runs of profile {study.name} are not done, such as {undone[0]}; {advice}.")
    for file, question in questions.items():
        if question in MAKERS and not study.file(question).exists():
            raise InputError(f"{file} of profile {study.name} is not measured; {advice}.")
        runs = {config.key for config in study.configs(question) if not find_run(config).diverged}
        kept = study.kept(question)
        if kept is not None and "run" in kept and runs and set(kept["run"]) != runs:
            raise InputError(f"{file} is not of the runs that profile {study.name} asks for; {advice}.")


def _judged(notebook: Path, folder: Path, judged: pd.DataFrame) -> bool:
    """Whether the verdicts that a notebook stored are in the table of all."""
    own = folder / "verdicts" / f"{notebook.stem}.csv"
    return own.exists() and set(pd.read_csv(own)["question"]) <= set(judged["question"])


def _manifest(study: Study) -> dict:
    """What the numbers depend on: profile, text, machine, versions."""
    run = find_run(study.configs("relu_vs_silu")[0])
    corpus = study.corpus.manifest
    return {
        "schema": SCHEMA,
        "recipe": RECIPE,
        "device": run.manifest["device"],
        "cores": os.cpu_count(),
        "versions": run.manifest["versions"],
        "training": _training(study),
        "profile": _without_folders(asdict(study.profile)),
        "corpus": {"tokens_sha256": study.corpus.hash, "tokenizer_sha256": study.corpus.tokenizer_hash}
        | {key: corpus[key] for key in ("source", "splits", "duplicates_removed", "skipped")},
    }


def _without_folders(profile: dict) -> dict:
    """The settings of a profile, with files and folders of this machine by their last name alone."""
    for section, key in FOLDERS:
        place = Path(profile[section][key] or "")
        if place.is_absolute():
            profile[section][key] = place.name
    speeds = profile["input_speeds"]
    speeds["models"] = [Path(name).name if Path(name).is_absolute() else name for name in speeds["models"]]
    return profile


def _training(study: Study) -> dict:
    """What training took, over all runs of the study, each counted once."""
    configs = {config.key: config for question in QUESTIONS for config in study.configs(question)}
    ends = [run.checkpoints.iloc[-1] for run in map(find_run, configs.values()) if not run.diverged]
    hours = sum(end["tokens"] / end["tokens_per_second"] for end in ends) / 3600
    return {
        "runs": len(configs),
        "diverged": len(configs) - len(ends),
        "parameters": [int(pick(end["parameters"] for end in ends)) for pick in (min, max)],
        "tokens": int(sum(end["tokens"] for end in ends)),
        "run_hours": round(hours, 2),  # of training steps, each run on its own threads
        "median_flops_utilisation": round(statistics.median(end["flops_utilisation"] for end in ends), 3),
    }


def _models(study: Study, activation: str) -> Iterator[Path]:
    """The last checkpoint of the run that stands for an activation, in the form that transformers loads."""
    (run,), folder = study.trained_runs([study.largest_config(activation)]), paths.RECORDED_MODELS / activation
    last, weights = run.checkpoint(run.last_step)
    yield _copy(last / "config.json", folder / "config.json")
    yield _copy(last / weights, folder / "model.safetensors")
    yield _copy(study.corpus.folder / "tokenizer.json", folder / "tokenizer.json")


def _copy(source: Path, target: Path) -> Path:
    with paths.written_aside(target) as aside:
        shutil.copyfile(source, aside)
    return target


def _write(target: Path, text: str) -> Path:
    with paths.written_aside(target) as aside:
        aside.write_text(text, encoding="utf-8")
    return target
