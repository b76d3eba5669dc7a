"""The command line: `python -m sparsity_utils COMMAND --help`."""

import argparse
import logging
import sys
from pathlib import Path

from sparsity_utils import paths
from sparsity_utils.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a problem with the input is one sentence on standard error and exit status 2."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would print the traceback of the stopped kernel
        print("\nInterrupted. Finished runs are kept: the same command continues from here.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparsity_utils", description="Reproduce findings on activation sparsity."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, about: str, *, profile: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        if profile:
            sub.add_argument(
                "--profile", default=default_profile(), help="a shipped profile or a .yaml file (default: %(default)s)"
            )
        return sub

    command("corpus", _corpus, "build the text of a profile: documents, tokenizer, token files")
    command("study", _study, "train and measure every run of a profile, without notebooks")
    command("reproduce", _reproduce, "execute all notebooks on a profile's own runs and print the verdicts")
    command("record", _record, "copy a finished study of a profile into results/")
    command("notebooks", _notebooks, "refresh the stored outputs of the notebooks", profile=False)
    figures = command("figures", _figures, "draw the figures of a recorded study", profile=False)
    figures.add_argument(
        "--from",
        dest="folder",
        type=Path,
        default=paths.ROOT,
        help="the folder that holds results/, such as build/laptop (default: the recorded study)",
    )
    return parser


def default_profile() -> str:
    """`gpu` where there is a GPU, else `laptop`."""
    import torch

    return "gpu" if torch.cuda.is_available() else "laptop"


def _corpus(options: argparse.Namespace) -> None:
    from sparsity_utils.study import Study

    corpus = Study.from_profile(options.profile).corpus
    counts = ", ".join(
        f"{name}: {split['tokens']:,} tokens of {split['documents']:,} documents"
        for name, split in corpus.manifest["splits"].items()
    )
    print(f"{corpus.folder}\n{counts}")


def _study(options: argparse.Namespace) -> None:
    from sparsity_utils.study import QUESTIONS, Study

    study = Study.from_profile(options.profile)
    for question in filter(study.configs, QUESTIONS):
        print(f"{question}: {len(study.table(question))} rows in {study.folder}")


def _reproduce(options: argparse.Namespace) -> int:
    from sparsity_utils.notebooks import reproduce

    return reproduce(options.profile)


def _record(options: argparse.Namespace) -> None:
    from sparsity_utils.record import record

    for file in record(options.profile):
        print(file.relative_to(paths.ROOT))


def _notebooks(options: argparse.Namespace) -> None:
    from sparsity_utils.notebooks import NotebookFailed, refresh

    try:
        refresh()
    except NotebookFailed as failure:
        raise InputError(str(failure)) from failure


def _figures(options: argparse.Namespace) -> None:
    from sparsity_utils.plots import draw_all
    from sparsity_utils.study import Study

    for file in draw_all(Study.recorded(options.folder / "results"), options.folder / "figures"):
        print(file)


if __name__ == "__main__":
    sys.exit(main())
