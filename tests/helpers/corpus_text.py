"""Documents of made-up words, and corpora of them."""

import base64
import hashlib
import json
import random
from pathlib import Path

import pytest

from sparsity_utils.text.config import CorpusConfig
from sparsity_utils.text.corpus import Corpus

WORDS = [f"{a}{b}{c}" for a in ("lo", "mi", "ra", "tesh") for b in ("", "n", "kar") for c in ("o", "ium", "edly", "")]


@pytest.fixture(autouse=True)
def own_build_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))


def words(seed: int, count: int = 300) -> list[str]:
    return random.Random(seed).choices(WORDS, k=count)


def text(seed: int, count: int = 300) -> str:
    return " ".join(words(seed, count))


def write_rows(file: Path, texts: list[str], field: str = "text") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({field: line}) + "\n" for line in texts))
    return file


def config(path: Path, **changes) -> CorpusConfig:
    return CorpusConfig(**{"source": "path", "path": str(path), "vocabulary": 300, "validation_share": 0.2} | changes)


def texts_of(corpus: Corpus, split: str) -> list[str]:
    tokens, tokenizer = corpus.tokens(split), corpus.tokenizer()
    rows = corpus.documents(split).itertuples()
    return [tokenizer.decode(tokens[row.start : row.stop - 1].tolist(), skip_special_tokens=False) for row in rows]


def install(site: Path, name: str, files: dict[str, bytes]) -> None:
    """A package as pip leaves it: its files, and their hashes in RECORD."""
    files = {f"{name}-1.0.dist-info/METADATA": f"Name: {name}\nVersion: 1.0+cpu\n".encode()} | files
    record = f"{name}/__pycache__/m.cpython-311.py,,\n../../bin/tool.py,sha256=aaaa,3\n"
    for file, data in files.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_bytes(data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{file},sha256={digest},{len(data)}\n"
    (site / f"{name}-1.0.dist-info" / "RECORD").write_text(record)
