"""What a person sees: one kind of error, one progress bar, numbers with their unit."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
UNATTENDED = "SPARSITY_UNATTENDED"  # set for the kernels that this project starts itself


class InputError(ValueError):
    """Something the reader gave cannot be used: one sentence that says what, where, and what to do."""


def check(condition: bool, sentence: str) -> None:
    """Raise InputError with `sentence` unless the condition holds."""
    if not condition:
        raise InputError(sentence)


@contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """Raise any failure inside the block as an InputError; libraries and the hub raise too many kinds to list.

    An InputError passes as it is.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{what} ({reason}); {remedy}.") from error


def unattended() -> bool:
    """Whether a program, not a person, runs this notebook: `commands.notebooks` started its kernel, or CI is set.

    nbval takes its kernels from Jupyter, so that `make test` and `.ci/run` set CI.
    """
    return bool(os.environ.get(UNATTENDED) or os.environ.get("CI"))


def note(sentence: str) -> None:
    """Say something beside the results, on stderr: a choice that was made for the reader, or what was left out."""
    print(sentence, file=sys.stderr, flush=True)


def progress(items: Iterable[Item], about: str, total: int | None = None, shown: bool = True) -> Iterator[Item]:
    """Iterate over `items` behind a bar named `about`, with an estimate of what is left, unless not `shown`."""
    hidden = not shown or bool(os.environ.get("CI"))
    return iter(tqdm(items, desc=about, total=total, disable=hidden, mininterval=0.5, leave=False))


def share_bar(about: str, shown: bool = True, leave: bool = False) -> tqdm:
    """A bar from 0 to 100 percent named `about`, to be updated, unless not `shown`; `leave` it when it is full.

    What is left is estimated from the mean pace, since work is reported in bursts.
    """
    return tqdm(
        total=100,
        desc=about,
        disable=not shown or bool(os.environ.get("CI")),
        smoothing=0,
        mininterval=0.5,
        miniters=0,
        leave=leave,
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
    )


def short_number(count: float) -> str:
    """Three digits and a unit: `112`, `45k`, `1.2M`, `2.4B`."""
    count = float(f"{count:.3g}")  # first, so that 999,900 is 1M and not 1e+03k
    units = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
    size, letter = next(((size, letter) for size, letter in units if count >= size), (1, ""))
    return f"{count / size:.3g}{letter}"
