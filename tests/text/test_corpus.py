"""The street's first stretch: text -> documents without duplicates -> tokens."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from corpus_text import config, own_build_folder, text, texts_of, write_rows  # noqa: F401  (a fixture)

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.text import corpus as corpora
from sparsity_utils.text import sources
from sparsity_utils.text.corpus import Part, build_corpus, open_corpus, split_parts
from sparsity_utils.text.documents import Document


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    odd = ["one\r\ntwo\rthree\n", "in the text: <|endoftext|> goes on", "é → 🙂 \t \x00 \u2028 end", "  indented\n\n\n"]
    return write_rows(tmp_path / "rows.jsonl", [text(seed) for seed in range(20)] + odd)


def parts_of(lines: list[str], domain: str = "rows") -> list[Part]:
    return [
        Part((hashlib.sha256(line.encode()).hexdigest(), 0), len(line), Document(f"{domain}:{number}", domain, line))
        for number, line in enumerate(lines)
    ]


def test_near_duplicate_across_the_split_is_removed(tmp_path: Path) -> None:
    lines = [text(seed) for seed in range(40)]
    planted_of = split_parts(parts_of(lines), 0.2)[1][0].document.text  # would be validation text
    copies = (planted_of.replace(" ", f" planted{number} ", 1) for number in range(100))

    def falls_into_training(copy: str) -> bool:
        train, validation = split_parts(parts_of([*lines, copy]), 0.2)
        return copy in {part.document.text for part in train} and planted_of in {p.document.text for p in validation}

    copy = next(filter(falls_into_training, copies))  # without the removal it would leak
    corpus = build_corpus(config(write_rows(tmp_path / "rows.jsonl", [*lines, copy, lines[3]])))
    assert corpus.manifest["duplicates_removed"] == {"exact": 1, "near": 1}
    assert planted_of in texts_of(corpus, "validation")
    assert "planted" not in " ".join(texts_of(corpus, "train") + texts_of(corpus, "validation"))
    assert sorted(texts_of(corpus, "train") + texts_of(corpus, "validation")) == sorted(lines)


# Split


def test_every_domain_with_two_documents_is_in_validation() -> None:
    parts = [
        *parts_of([text(seed, 50) for seed in range(100)], "large"),
        *parts_of([text(seed, 900) for seed in range(100, 102)], "two"),
        *parts_of([text(200)], "single"),
    ]
    train, validation = split_parts(parts, 0.1)
    assert {part.document.domain for part in validation} == {"large", "two"}
    assert {part.document.domain for part in train} == {"large", "two", "single"}
    taken, whole = (sum(p.size for p in side if p.document.domain == "large") for side in (validation, parts))
    assert taken / whole == pytest.approx(0.1, abs=0.01)
    assert sorted(train + validation, key=lambda part: part.key) == sorted(parts, key=lambda part: part.key)


def test_domains_of_one_document_each_still_give_validation_text() -> None:
    parts = [part for name in "abc" for part in parts_of([text(ord(name))], name)]
    train, validation = split_parts(parts, 0.1)
    assert (len(train), len(validation)) == (2, 1)


def test_split_depends_on_content_not_on_order_or_name() -> None:
    lines = [text(seed, 20) for seed in range(30)]
    sides = [split_parts(parts_of(order), 0.2) for order in (lines, lines[::-1])]
    assert [[p.document.text for p in side] for side in sides[0]] == [[p.document.text for p in s] for s in sides[1]]


@pytest.mark.parametrize("line", ["word word word\n", "wörd →", "é"], ids=["lines", "two bytes", "no space"])
def test_long_documents_are_cut_into_parts_that_give_the_text_back(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "LONGEST", 63)
    whole = line * 50
    source = sources.Source({}, iter([Document("book", "txt", whole), Document("note", "txt", "short")]))
    *pieces, short = corpora._parts(source)
    assert "".join(part.document.text for part in pieces) == whole
    assert all(part.size == len(part.document.text.encode()) <= 63 for part in pieces)
    assert len({part.key[0] for part in pieces}) == 1 and [part.key[1] for part in pieces] == list(range(len(pieces)))
    assert pieces[1].document.name == "book#1" and short.document.name == "note"
    assert "\n" not in whole or all(part.document.text.endswith("\n") for part in pieces)


def test_a_single_long_file_is_enough(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n".join(text(seed, 30) for seed in range(1500)))
    corpus = build_corpus(config(tmp_path / "book.txt"))
    assert corpus.manifest["splits"]["validation"]["documents"] == 1
    assert set(corpus.documents("train")["domain"]) == {"txt"}


# Tokens, tables and manifest


def test_tokens_decode_to_the_documents_and_each_ends_with_end_of_text(rows: Path) -> None:
    corpus = build_corpus(config(rows))
    wanted = [json.loads(line)["text"].replace("\r\n", "\n").replace("\r", "\n") for line in rows.open()]
    assert sorted(texts_of(corpus, "train") + texts_of(corpus, "validation")) == sorted(wanted)
    for split in ("train", "validation"):
        tokens, documents = corpus.tokens(split), corpus.documents(split)
        assert tokens.dtype == np.uint16 and not tokens.flags.writeable and tokens.max() < corpus.vocabulary == 300
        assert documents["start"].tolist() == [0, *documents["stop"][:-1]] and documents["stop"].iloc[-1] == len(tokens)
        assert np.flatnonzero(tokens == corpus.end_of_text).tolist() == (documents["stop"] - 1).tolist()


def test_manifest_counts_and_hashes_what_was_written(rows: Path) -> None:
    corpus = build_corpus(config(rows))
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    assert manifest == corpus.manifest
    assert manifest["source"]["files"] == {"rows.jsonl": hashlib.sha256(rows.read_bytes()).hexdigest()}
    assert set(manifest["versions"]) == {"python", "numpy", "datasets", "datasketch", "tokenizers"}
    for name, written in manifest["files"].items():
        data = (corpus.folder / name).read_bytes()
        assert written == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    both = b"".join((corpus.folder / f"{split}.bin").read_bytes() for split in ("train", "validation"))
    assert corpus.hash == hashlib.sha256(both).hexdigest()
    assert corpus.tokenizer_hash == hashlib.sha256((corpus.folder / "tokenizer.json").read_bytes()).hexdigest()
    for split in ("train", "validation"):
        counts = {
            "documents": len(corpus.documents(split)),
            "bytes": sum(len(line.encode()) for line in texts_of(corpus, split)),
            "tokens": len(corpus.tokens(split)),
        }
        assert manifest["splits"][split] == counts == manifest["domains"][split]["rows"]


def test_building_twice_gives_identical_bytes(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for name in ("once", "twice"):
        monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / name))
        folders.append(build_corpus(config(rows)).folder)
    assert folders[0] != folders[1] and folders[0].name == folders[1].name
    for file in (*corpora.FILES, "manifest.json"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file


def test_folder_follows_the_text_and_the_settings(rows: Path) -> None:
    first = build_corpus(config(rows))
    fewer = build_corpus(config(rows, vocabulary=280))
    write_rows(rows, [text(seed) for seed in range(21)])
    changed = build_corpus(config(rows))
    assert len({first.folder, fewer.folder, changed.folder}) == 3 and first.hash != changed.hash
    assert sorted(path.name for path in paths.corpora().glob("[!.]*")) == sorted(
        corpus.folder.name for corpus in (first, fewer, changed)
    )  # and nothing is left beside them


def test_a_complete_corpus_is_opened_and_a_damaged_one_built_again(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    built = build_corpus(config(rows))
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "collect", lambda *_: pytest.fail("read the text again"))
        assert build_corpus(config(rows)) == built
    train = built.folder / "train.bin"
    data = train.read_bytes()
    for damaged in (data[:-2], bytes([data[0] ^ 1]) + data[1:], None):
        train.unlink() if damaged is None else train.write_bytes(damaged)
        with pytest.raises(InputError, match=r"train\.bin is not what its manifest says"):
            open_corpus(built.folder)
        assert build_corpus(config(rows)) == built and train.read_bytes() == data
        assert "train.bin is not what its manifest says was written; build the corpus again. This is done now." in (
            capsys.readouterr().out
        )


def test_opening_needs_none_of_the_building_libraries(rows: Path) -> None:
    built = build_corpus(config(rows))
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['datasketch', 'datasets', 'tokenizers']));"
        "from pathlib import Path; from sparsity_utils.text.corpus import open_corpus;"
        "corpus = open_corpus(Path(sys.argv[1])); print(len(corpus.tokens('train')), len(corpus.documents('train')))"
    )
    stub = "import sys, types; stub = types.ModuleType('sparsity_utils'); stub.__path__ = [sys.argv[2]];"
    stub += "sys.modules['sparsity_utils'] = stub;"  # without the package's public names, which import torch
    command = [sys.executable, "-c", stub + code, str(built.folder), str(paths.ROOT / "sparsity_utils")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=paths.ROOT).stdout
    assert output.split() == [str(len(built.tokens("train"))), str(len(built.documents("train")))]


def test_size_cap_is_kept_and_no_more_is_read(rows: Path) -> None:
    read = []

    def documents():
        for seed in range(1000):
            read.append(seed)
            yield Document(str(seed), "rows", text(seed))

    parts = corpora.collect(sources.Source({}, documents()), config(rows, max_megabytes=0.02)).parts
    size = sum(part.size for part in parts)
    assert 20_000 - 5_000 < size <= 20_000 and len(read) == len(parts) + 1


# Bad input: one clear sentence each


def test_missing_and_empty_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere does not exist; give a file or folder of \.txt"):
        build_corpus(config(tmp_path / "nowhere"))
    (tmp_path / "a.csv").write_text("no text")
    with pytest.raises(InputError, match=r"holds no text; give a file or folder of \.txt, \.md, \.jsonl, \.parquet"):
        build_corpus(config(tmp_path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=rf"{name} cannot be read \(No such file or directory\); correct it"):
        build_corpus(config(tmp_path))


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "a.jsonl, line 2, is not JSON; correct it"),
        (
            "a.jsonl",
            b'{"body": "one", "id": 1}\n',
            r"row 1, has no field 'text'; rename .* corpus.text_field \(body, id\)",
        ),
        ("a.jsonl", b"[1, 2]\n", r"row 1, has no field 'text'; .*\(no field at all\)"),
        ("a.parquet", b"not parquet", r"a\.parquet is not readable as Parquet \(.*\); correct it"),
        ("a.txt", b"caf\xe9", r"gave 0 usable document\(s\) within 48.0 MB \(left out: 1 not UTF-8 \(a\.txt\)\)"),
        ("a.txt", b" \n", r"gave 0 usable document\(s\) within 48.0 MB \(left out: 1 empty \(a\.txt\)\)"),
        ("a.txt", b"one", r"gave 1 usable document\(s\) .*\(left out: none\); training and validation need one each"),
    ],
)
def test_unusable_files(name: str, data: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=sentence):
        build_corpus(config(tmp_path))
    assert not list(paths.corpora().glob("[!.]*"))


def test_parquet_without_the_field(tmp_path: Path) -> None:
    pd.DataFrame({"body": ["one"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet has no field 'text'; .*\(body\)"):
        build_corpus(config(tmp_path))


def test_only_duplicates_is_too_little(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gave 1 usable document\(s\) .*\(left out: 4 exact duplicate\)"):
        build_corpus(config(write_rows(tmp_path / "a.jsonl", [text(0)] * 5)))


def test_too_little_text_for_the_vocabulary(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", ["one two", "three four"])
    with pytest.raises(InputError, match=r"is enough for \d+ tokenizer entries, not 5000; add text or lower corpus"):
        build_corpus(config(file, vocabulary=5000))


def test_no_corpus_damaged_manifest_and_unknown_split(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no corpus; build one with `python -m sparsity_utils corpus`"):
        open_corpus(tmp_path)
    corpus = build_corpus(config(rows))
    with pytest.raises(InputError, match="has no split 'test'; choose one of train, validation"):
        corpus.tokens("test")
    for manifest in ("{", "[]", "{}"):
        (corpus.folder / "manifest.json").write_text(manifest)
        with pytest.raises(InputError, match=r"The manifest of the corpus .* is damaged; build the corpus again"):
            open_corpus(corpus.folder)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("name", [*corpora.FILES, "manifest.json"])
def test_full_disk_leaves_nothing_behind(name: str, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def make_with_a_full_file(folder: Path, *arguments, **options) -> None:
        make(folder, *arguments, **options)
        if folder.parent.name.startswith("."):  # the folder being written aside
            (folder / name).symlink_to("/dev/full")

    monkeypatch.setattr(Path, "mkdir", make_with_a_full_file)
    with pytest.raises(InputError, match=r"The disk is full: .* could not be written .* free some space") as caught:
        build_corpus(config(rows))
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert [path for path in paths.corpora().iterdir() if path.suffix != ".lock"] == []


def test_the_request_for_a_corpus_is_in_its_manifest(rows: Path) -> None:
    wanted = config(rows)
    assert build_corpus(wanted).manifest["config"] == wanted.settings()
