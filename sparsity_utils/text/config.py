"""Which text is read, how much of it, and with which tokenizer; importing this loads nothing heavy."""

from dataclasses import asdict, dataclass
from typing import Any

from sparsity_utils.console import check

MEASURED_TOKENS = 50_000  # of a text that `python -m sparsity_utils measure` uses at most, unless told otherwise
SOURCES = ("python-source", "python-prose", "path", "hub")
DUPLICATE_RULES = (1, 2)


@dataclass(frozen=True)
class CorpusConfig:
    """Text source and tokenizer."""

    source: str = "python-source"
    path: str | None = None  # source "path": a file or folder; source "hub": the data set's name
    revision: str | None = None  # source "hub": a pinned revision (commit hash)
    text_field: str = "text"  # key of the text in .jsonl, .parquet and hub rows
    max_megabytes: float = 48.0  # 1e6 bytes of text kept, after duplicates are removed
    vocabulary: int = 1024  # byte-level BPE entries, the end-of-text token included
    validation_share: float = 0.02  # share of the kept text
    near_duplicates: int | None = None  # rule of `text.duplicates`; None: 1 for python-source, else the last one

    def __post_init__(self) -> None:
        check(self.source in SOURCES, f"corpus.source is {self.source!r}; choose one of {', '.join(SOURCES)}.")
        if self.source in ("path", "hub"):
            check(bool(self.path), f"corpus.path is empty; source {self.source!r} needs one.")
        if self.source == "hub":
            check(bool(self.revision), "corpus.revision is empty; a hub data set needs a pinned revision.")
        check(257 <= self.vocabulary <= 65536, f"corpus.vocabulary is {self.vocabulary}; choose 257 to 65536.")
        check(self.max_megabytes > 0, f"corpus.max_megabytes is {self.max_megabytes}; it must be positive.")
        check(0 < self.validation_share <= 0.5, f"corpus.validation_share is {self.validation_share}; choose 0 to 0.5.")
        check(
            self.near_duplicates in (None, *DUPLICATE_RULES),
            f"corpus.near_duplicates is {self.near_duplicates}; choose rule 1 (words) or 2 (characters too).",
        )

    @property
    def duplicate_rule(self) -> int:
        """The rule that tells near duplicates; the text of python-source, which studies rest on, keeps the first."""
        return self.near_duplicates or DUPLICATE_RULES[0 if self.source == "python-source" else -1]

    def settings(self) -> dict[str, Any]:
        """All that decides the text, for the name of the corpus; rule 1, which once was the only one, goes without."""
        rule = {} if self.duplicate_rule == 1 else {"near_duplicates": self.duplicate_rule}
        return {name: value for name, value in asdict(self).items() if name != "near_duplicates"} | rule
