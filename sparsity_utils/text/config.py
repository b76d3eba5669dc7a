"""Which text is read, how much of it, and with which tokenizer; importing this loads nothing heavy."""

from dataclasses import dataclass

from sparsity_utils.console import check

MEASURED_TOKENS = 50_000  # of a text that `python -m sparsity_utils measure` uses at most, unless told otherwise
SOURCES = ("python-source", "path", "hub")


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

    def __post_init__(self) -> None:
        check(self.source in SOURCES, f"corpus.source is {self.source!r}; choose one of {', '.join(SOURCES)}.")
        if self.source != "python-source":
            check(bool(self.path), f"corpus.path is empty; source {self.source!r} needs one.")
        if self.source == "hub":
            check(bool(self.revision), "corpus.revision is empty; a hub data set needs a pinned revision.")
        check(257 <= self.vocabulary <= 65536, f"corpus.vocabulary is {self.vocabulary}; choose 257 to 65536.")
        check(self.max_megabytes > 0, f"corpus.max_megabytes is {self.max_megabytes}; it must be positive.")
        check(0 < self.validation_share <= 0.5, f"corpus.validation_share is {self.validation_share}; choose 0 to 0.5.")
