"""Text to tokens: documents without duplicates, split, a tokenizer, and memory-mapped token files.

`build_corpus` makes one folder per corpus, or opens the one that is there; `open_corpus` needs NumPy and pandas only.

    train.bin, validation.bin   uint16 tokens, little-endian; every document ends with `<|endoftext|>`
    documents.csv               split, start, stop (token positions, end-of-text included), domain, name
    tokenizer.json              byte-level BPE, trained on the training documents
    manifest.json               source, versions, bytes, documents and tokens by domain, SHA-256 of the files
"""

import hashlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sparsity_utils import paths
from sparsity_utils.console import InputError, progress
from sparsity_utils.text.config import CorpusConfig
from sparsity_utils.text.documents import Document
from sparsity_utils.text.duplicates import PERMUTATIONS, SEED, SIMILARITY, WORDS, Duplicates
from sparsity_utils.text.files import sha256
from sparsity_utils.text.sources import Source, open_source

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERSION = 2  # raise it when the same source would give other tokens
SPLITS = ("train", "validation")
END_OF_TEXT = "<|endoftext|>"
LONGEST = 100_000  # bytes of one document
TOKENIZER_SAMPLE = 12_000_000  # bytes of training text the tokenizer is trained on
BATCH = 2_000_000  # bytes of text encoded at a time
FILES = ("train.bin", "validation.bin", "documents.csv", "tokenizer.json")


@dataclass(frozen=True)
class Corpus:
    """A built corpus: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def vocabulary(self) -> int:
        """Number of tokens, the end-of-text token included."""
        return self.manifest["vocabulary"]

    @property
    def end_of_text(self) -> int:
        """The token that ends every document."""
        return self.manifest["end_of_text"]

    @property
    def hash(self) -> str:
        """SHA-256 of the training tokens followed by the validation tokens."""
        return self.manifest["tokens_sha256"]

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 of tokenizer.json."""
        return self.manifest["files"]["tokenizer.json"]["sha256"]

    def tokens(self, split: str) -> np.memmap:
        """The tokens of a split, (tokens,) uint16, read-only and memory-mapped."""
        return np.memmap(self.folder / f"{_checked(split)}.bin", dtype="<u2", mode="r")

    def documents(self, split: str) -> pd.DataFrame:
        """One row per document of a split, in token order: start, stop, domain, name."""
        table = pd.read_csv(self.folder / "documents.csv", keep_default_na=False, dtype={"domain": str, "name": str})
        return table[table["split"] == _checked(split)].drop(columns="split").reset_index(drop=True)

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer. `<|endoftext|>` written out in a text is text to it, not the end of a document."""
        from tokenizers import Tokenizer

        return _literal(Tokenizer.from_file(str(self.folder / "tokenizer.json")))


def _checked(split: str) -> str:
    if split not in SPLITS:
        raise InputError(f"A corpus has no split {split!r}; choose one of {', '.join(SPLITS)}.")
    return split


def _literal(tokenizer: "Tokenizer") -> "Tokenizer":
    tokenizer.encode_special_tokens = True  # not stored in tokenizer.json
    return tokenizer


def open_corpus(folder: Path) -> Corpus:
    """Open a built corpus after comparing the sizes and SHA-256 of its files with its manifest.

    Raises:
        InputError: when `folder` is no corpus, or a file of it is missing or not what was written.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        wanted = {name: manifest["files"][name] for name in FILES}
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no corpus; build one with `python -m sparsity_utils corpus`.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"The manifest of the corpus {folder} is damaged; build the corpus again.") from error
    for name, written in wanted.items():
        file = folder / name
        whole = file.is_file() and file.stat().st_size == written["bytes"]
        if not whole or sha256(file.read_bytes()) != written["sha256"]:
            raise InputError(f"{file} is not what its manifest says was written; build the corpus again.")
    return Corpus(folder, manifest)


def build_corpus(config: CorpusConfig) -> Corpus:
    """Build the corpus a profile asks for, or open it if it is there; a damaged one is built again.

    Raises:
        InputError: when the source is empty or unreadable, too small to split, or the disk is full.
    """
    source = open_source(config)
    return corpus_of(request(source, config), config, lambda: collect(source, config))


def request(source: Source, config: CorpusConfig) -> dict[str, Any]:
    """All that decides the tokens of a corpus; its hash names the folder."""
    return {"recipe": VERSION, "config": config.settings(), "source": source.identity}


def corpus_of(asked: dict[str, Any], config: CorpusConfig, collected: Callable[[], "Collected"]) -> Corpus:
    """The corpus that answers the request `asked`; one that is missing or damaged is built from `collected()`."""
    folder = paths.corpora() / sha256(json.dumps(asked, sort_keys=True).encode())[:16]
    with paths.locked(folder):  # somebody else may be building it
        if folder.exists():
            try:
                return open_corpus(folder)
            except InputError as damage:
                print(f"{damage} This is done now.")
        return _build(folder, asked, config, collected())


def _build(folder: Path, asked: dict[str, Any], config: CorpusConfig, text: "Collected") -> Corpus:
    train, validation = split_parts(text.parts, config.validation_share)
    tokenizer = train_tokenizer(train, config.vocabulary)
    with paths.written_aside(folder) as aside:
        aside.mkdir()
        manifest = {
            **asked,
            "versions": _versions(),
            "skipped": text.skipped,
            "duplicates_removed": text.duplicates,
            "near_duplicates": {"words": WORDS, "similarity": SIMILARITY, "permutations": PERMUTATIONS, "seed": SEED},
            "vocabulary": tokenizer.get_vocab_size(),
            "end_of_text": tokenizer.token_to_id(END_OF_TEXT),
            **_write_tokens(aside, {"train": train, "validation": validation}, tokenizer),
        }
        _write_text(aside / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return Corpus(folder, manifest)


def _versions() -> dict[str, str]:
    installed = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    names = ("numpy", "datasets", "datasketch", "tokenizers")  # packed text needs two of them
    return {"python": platform.python_version()} | {name: installed[name] for name in names if name in installed}


# Documents


@dataclass(frozen=True)
class Part:
    """A document, or a piece of a long one. `key` orders parts: by a hash of the whole document, then by place."""

    key: tuple[str, int]
    size: int  # bytes
    document: Document


@dataclass(frozen=True)
class Collected:
    """The text of a corpus before it is split: its parts, and what was left out, by reason."""

    parts: list[Part]
    skipped: dict[str, int]
    duplicates: dict[str, int]  # exact and near


def collect(source: Source, config: CorpusConfig) -> Collected:
    """Read documents until `max_megabytes` are kept; leave out empty ones and duplicates, and count them."""
    seen, parts, total = Duplicates(config.duplicate_rule), [], 0
    removed: Counter = Counter()
    for part in progress(_parts(source), "Reading text, removing duplicates"):
        kind = seen.kind(part.document.text)
        if kind is not None:
            removed[f"{kind} duplicate"] += 1
            continue
        total += part.size
        if total > config.max_megabytes * 1e6:
            break
        parts.append(part)
    if len(parts) < 2:
        where = f"{config.source} {config.path}" if config.path else config.source
        repeated = [f"{count} {kind}" for kind, count in removed.items()]
        left_out = ", ".join(filter(None, [source.skipped.told(), *repeated])) or "none"
        raise InputError(
            f"The corpus {where} gave {len(parts)} usable document(s) within {config.max_megabytes} MB (left out: "
            f"{left_out}); training and validation need one each: add text or raise corpus.max_megabytes."
        )
    duplicates = {kind: removed[f"{kind} duplicate"] for kind in ("exact", "near")}
    return Collected(parts, dict(sorted(source.skipped.items())), duplicates)


def _parts(source: Source) -> Iterator[Part]:
    """The documents, long ones in parts, so that none fills a domain's validation text alone."""
    for document in source.documents:
        data = document.text.encode()
        digest = sha256(data)
        if len(data) <= LONGEST:
            yield Part((digest, 0), len(data), document)
            continue
        for number, piece in enumerate(_pieces(data)):
            labelled = Document(f"{document.name}#{number}", document.domain, piece)
            yield Part((digest, number), len(piece.encode()), labelled)


def _pieces(data: bytes) -> Iterator[str]:
    """Cut UTF-8 text into pieces of at most LONGEST bytes, after a line end where there is one."""
    start = 0
    while start < len(data):
        stop = len(data)
        if stop - start > LONGEST:
            stop = data.rfind(b"\n", start, start + LONGEST) + 1 or start + LONGEST
            while data[stop] & 0xC0 == 0x80:  # inside a character
                stop -= 1
        yield data[start:stop].decode()
        start = stop


def split_parts(parts: list[Part], validation_share: float) -> tuple[list[Part], list[Part]]:
    """Training and validation parts, both ordered by key: a fixed shuffle that keeps the parts of a document together.

    Every domain gives its first parts to validation, up to `validation_share` of its bytes, and at least one where it
    has two. So at most one long document per domain has parts on both sides, and no part is on both.
    """
    by_domain: dict[str, list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.key):
        by_domain.setdefault(part.document.domain, []).append(part)
    sides: tuple[list[Part], list[Part]] = ([], [])
    for domain_parts in by_domain.values():
        wanted = validation_share * sum(part.size for part in domain_parts)
        count, taken = 0, 0.0
        while count < len(domain_parts) - 1 and (count == 0 or taken + domain_parts[count].size / 2 <= wanted):
            taken += domain_parts[count].size
            count += 1
        sides[1].extend(domain_parts[:count])
        sides[0].extend(domain_parts[count:])
    train, validation = (sorted(side, key=lambda part: part.key) for side in sides)
    if not validation:  # every domain has a single document
        train, validation = train[1:], train[:1]
    return train, validation


# Tokens


def train_tokenizer(parts: list[Part], vocabulary: int) -> "Tokenizer":
    """Byte-level BPE (Radford et al. 2019) of exactly `vocabulary` entries from the first 12 MB of `parts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    sizes = np.cumsum([part.size for part in parts])
    sample = parts[: int(np.searchsorted(sizes, TOKENIZER_SAMPLE)) + 1]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # all 256 bytes: every text can be encoded
        show_progress=False,
    )
    texts = progress((part.document.text for part in sample), "Training the tokenizer", total=len(sample))
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocabulary:
        raise InputError(
            f"The training text, {sizes[-1]} bytes, is enough for {tokenizer.get_vocab_size()} tokenizer entries, not "
            f"{vocabulary}; add text or lower corpus.vocabulary."
        )
    return _literal(tokenizer)


def _write_tokens(folder: Path, sides: dict[str, list[Part]], tokenizer: "Tokenizer") -> dict[str, Any]:
    """Write every file but the manifest; return what the manifest says of them."""
    both = hashlib.sha256()
    tables, hashes = [], {}
    for split, parts in sides.items():
        digest, lengths = hashlib.sha256(), []
        with (folder / f"{split}.bin").open("wb") as stream:
            for ids in _encoded(parts, tokenizer, f"Encoding {split} text"):
                data = ids.tobytes()
                stream.write(data)
                digest.update(data)
                both.update(data)
                lengths.append(len(ids))
        hashes[f"{split}.bin"] = digest.hexdigest()
        stops = np.cumsum(lengths)
        tables.append(
            pd.DataFrame(
                {
                    "split": split,
                    "start": stops - lengths,
                    "stop": stops,
                    "domain": [part.document.domain for part in parts],
                    "name": [part.document.name for part in parts],
                    "bytes": [part.size for part in parts],
                }
            )
        )
    table = pd.concat(tables)
    csv = table.drop(columns="bytes").to_csv(index=False, lineterminator="\n")
    hashes["documents.csv"] = _write_text(folder / "documents.csv", csv)
    hashes["tokenizer.json"] = _write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    table["tokens"] = table["stop"] - table["start"]
    table["documents"] = 1
    counts = table.groupby(["split", "domain"])[["documents", "bytes", "tokens"]].sum()
    return {
        "splits": {split: _plain(counts.loc[split].sum()) for split in SPLITS},
        "domains": {split: {domain: _plain(row) for domain, row in counts.loc[split].iterrows()} for split in SPLITS},
        "tokens_sha256": both.hexdigest(),
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": hashes[name]} for name in FILES},
    }


def _encoded(parts: list[Part], tokenizer: "Tokenizer", about: str) -> Iterator[np.ndarray]:
    """The tokens of each part with end-of-text after it, (tokens,) uint16; encoded in batches on all threads."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    batch_of = np.cumsum([part.size for part in parts]) // BATCH  # (parts,)
    for batch in progress(np.unique(batch_of), about):
        texts = [parts[index].document.text for index in np.flatnonzero(batch_of == batch)]
        for encoding in tokenizer.encode_batch_fast(texts):
            yield np.array([*encoding.ids, end], dtype="<u2")


def _plain(row: pd.Series) -> dict[str, int]:
    return {str(name): int(value) for name, value in row.items()}


def _write_text(file: Path, text: str) -> str:
    """Write UTF-8 text as it is; return its SHA-256."""
    file.write_bytes(text.encode())
    return sha256(text.encode())
