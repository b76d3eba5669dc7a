"""A document: one text with its labels, in the one form in which text is trained on and measured."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

NAMED = 3  # documents left out that a message names for each reason; the others are counted


@dataclass(frozen=True)
class Document:
    """One text and its labels."""

    name: str
    domain: str
    text: str


class Skipped(Counter):
    """How many documents were left out, and the names of the first few, by reason."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count the document `name`."""
        self[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < NAMED:
            names.append(name)

    def told(self) -> str:
        """`4 not UTF-8 (a.txt, b.txt, c.txt, ...), 1 empty (d.md)`; nothing where nothing was left out."""
        return ", ".join(
            f"{count} {reason} ({', '.join(self.names[reason])}{', ...' if count > NAMED else ''})"
            for reason, count in self.items()
        )


def decoded(data: bytes, name: str, skipped: Skipped) -> str | None:
    """The text of `data`, or None, counted, when it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped.add("not UTF-8", name)
        return None


def normalised(documents: Iterable[Document], skipped: Skipped) -> Iterator[Document]:
    """The documents without byte order mark, their lines ended by `\\n` alone; without those that hold no text.

    Nothing else is changed: what a tokenizer does to Unicode forms, tabs or form feeds belongs to the model.
    """
    for document in documents:
        text = document.text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        if not text.strip():
            skipped.add("empty", document.name)
            continue
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, written as an escape
            skipped.add("not UTF-8", document.name)
            continue
        yield replace(document, text=text)
