"""Documents from files, windows of tokens, the split of documents; all compared with what they must hold."""

import errno
import json
import math
import os
import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparsity_utils.console import InputError
from sparsity_utils.text import windows
from sparsity_utils.text.config import CorpusConfig
from sparsity_utils.text.sources import open_source
from sparsity_utils.text.windows import evenly_spaced, read_documents, split_documents, text_batches

# Documents


def test_documents_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa text")
    (tmp_path / "sub" / "b.md").write_text("a second", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ["row one", " ", "row two"]))
    pd.DataFrame({"text": ["cell", None]}).to_parquet(tmp_path / "table.parquet")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "code.py").write_text("not asked for")
    documents = read_documents(tmp_path)
    assert sorted(documents) == ["a second", "a text", "cell", "row one", "row two"]
    assert documents == read_documents(tmp_path)


def test_text_is_measured_in_the_form_in_which_a_corpus_holds_it(tmp_path: Path) -> None:
    """Windows line ends, old Mac ones and a byte order mark, in files of every kind; nothing else is changed."""
    plain = "one\ntwo\n\nthree e\u0301 \u2028 \x0c four\t\n"
    forms = [plain, plain.replace("\n", "\r\n"), plain.replace("\n", "\r"), "\ufeff" + plain.replace("\n", "\r\n")]
    for number, form in enumerate(forms):
        for name in ("a.txt", "b.MD", "c.py"):
            file = tmp_path / str(number) / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(form.encode())
            assert read_documents(file) == [plain], name
        (tmp_path / "rows.jsonl").write_text(json.dumps({"text": form}) + "\n")
        pd.DataFrame({"text": [form]}).to_parquet(tmp_path / "rows.parquet")
        assert read_documents(tmp_path / "rows.jsonl") == read_documents(tmp_path / "rows.parquet") == [plain]
        corpus = open_source(CorpusConfig("path", str(tmp_path / "rows.jsonl"))).documents
        assert [document.text for document in corpus] == [plain]


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(windows, "LARGEST", 1000)
    files = {
        "good.txt": b"a text", "empty.txt": b"", "blank.md": b" \n", "utf16.txt": "text".encode("utf-16"),
        "utf16-without-mark.txt": "text".encode("utf-16-le"), "large.txt": b"x " * 501, "sub/image.md": b"\x89PNG\x00",
        **{f"latin{number}.txt": b"caf\xe9" for number in range(5)},
        "rows.jsonl": b'{"text": "row"}\n{"text": 1}\n{"text": "half \\ud83d"}\n',
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for name in ("gone.txt", "gone.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    assert sorted(read_documents(tmp_path)) == ["a text", "row"]
    out, line = capsys.readouterr()
    assert out == "" and line.count("\n") == 1
    assert line.startswith(f"Of {tmp_path}, 2 documents are read and 15 left out: ")
    told = dict(re.findall(r"\d+ ([^()]*(?:\(No such[^)]*\))?) \(([^)]*)\)", line.partition("left out: ")[2]))
    assert {reason: set(names.split(", ")) for reason, names in told.items()} == {
        "unreadable (No such file or directory)": {"gone.txt", "gone.jsonl"},
        "not UTF-8": set(told["not UTF-8"].split(", ")),
        "binary": {"utf16.txt", "utf16-without-mark.txt", "sub/image.md"},
        "empty": {"empty.txt", "blank.md"},
        "larger than 0.001 MB": {"large.txt"},
        "not a text": {"rows.jsonl:2"},
    }
    assert "6 not UTF-8" in line and told["not UTF-8"].count(",") == 3 and told["not UTF-8"].endswith(", ...")
    (tmp_path / "good.txt").write_text("a text")
    read_documents(tmp_path / "good.txt")
    assert capsys.readouterr() == ("", "")  # nothing to say


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.txt").write_text("a text")
    scan = os.scandir

    def scandir(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"locked cannot be read \(Permission denied\); correct it or take it away"):
        read_documents(tmp_path)


def test_wikitext_as_json_lines_gives_one_document_an_article(tmp_path: Path) -> None:
    """Raw words, one article a line, as the validation and test files of WikiText-2 are kept."""
    articles = [f'= Robert <unk> {n} = \n \n He had a guest @-@ role , " Craig " , in 2000 . \n' for n in range(3)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": article}) + "\n" for article in articles))
    assert read_documents(tmp_path) == read_documents(tmp_path / "test.jsonl") == articles


@pytest.mark.parametrize("name", ["code.py", "README", "data.csv"])
def test_a_named_file_of_any_kind_is_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfdef f():\n    '''caf\xc3\xa9'''\n")
    assert read_documents(tmp_path / name) == ["def f():\n    '''caf\u00e9'''\n"]


@pytest.mark.parametrize("name", ["rows.jsonl", "a.txt"])
def test_a_named_file_of_a_known_kind(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"text": "x"}\n{"text": "y"}\n')
    assert read_documents(tmp_path / name) == (
        ["x", "y"] if name == "rows.jsonl" else ['{"text": "x"}\n{"text": "y"}\n']
    )


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        (
            "a.txt",
            b"",
            r"a\.txt holds no text; give a file or folder with text in UTF-8 \(left out: 1 empty \(a\.txt\)\)",
        ),
        ("a.py", b" \n", r"a\.py holds no text; give a file or folder with text .*: 1 empty \(a\.py\)\)"),
        ("a.txt", b"caf\xe9", r"a\.txt holds no text; .* in UTF-8 \(left out: 1 not UTF-8 \(a\.txt\)\)"),
        ("a.py", b"caf\xe9", r"a\.py holds no text; .* in UTF-8 \(left out: 1 not UTF-8 \(a\.py\)\)"),
        ("a.safetensors", b"{}\0", r"a\.safetensors holds no text; .*\(left out: 1 binary \(a\.safetensors\)\)"),
        ("a.jsonl", b"\n", r"a\.jsonl holds no text; .* \(left out: nothing\)"),
        ("a.jsonl", b'{"body": 1}\n', r"row 1, has no field 'text'; rename the one that holds the text"),
        ("a.jsonl", b"{\n", r"a\.jsonl, line 1, is not JSON; correct it"),
        ("a.parquet", b"no", r"a\.parquet is not readable as Parquet \(.*\); correct it"),
    ],
)
def test_files_without_text_are_refused(name: str, data: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=sentence) as caught:
        read_documents(tmp_path / name)
    assert "\n" not in str(caught.value) and "corpus.path" not in str(caught.value)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere does not exist; give a file or folder of \.txt"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no text; give a file or folder of \.txt"):
        read_documents(tmp_path)


# Windows

WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {f"w{number}": number for number in range(4, 60)}


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def tokenizer(*, bos: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """A word is a token; with `bos`, each text begins with token 1."""
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.enable_truncation(4)  # some tokenizers are stored so; a document is never cut
    backend.enable_padding(length=50)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        pad_token="<pad>" if pad else None,
        model_max_length=5,
    )


def rows_of(batches: list[dict]) -> list[tuple[int, list[int]]]:
    """(document, real tokens) of each window."""
    return [
        (int(document), ids[mask.bool()].tolist())
        for batch in batches
        for document, ids, mask in zip(batch["documents"], batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_windows_never_mix_documents_and_lose_at_most_a_last_token() -> None:
    documents = [words(*range(10, 17)), words(20, 21), words(30), words(*range(40, 46)), words(50, 51, 52, 53)]
    batches = text_batches(tokenizer(), documents, length=3, batch_windows=2)
    assert rows_of(batches) == [
        (0, [10, 11, 12]),
        (0, [13, 14, 15]),  # 16 would be alone
        (1, [20, 21]),
        (3, [40, 41, 42]),
        (3, [43, 44, 45]),
        (4, [50, 51, 52]),  # 53 would be alone
    ]
    assert [len(batch["documents"]) for batch in batches] == [2, 2, 2]
    for batch in batches:
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 3)
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batches[1]["input_ids"][0].tolist() == [20, 21, 3]  # padded on the right
    assert batches[1]["attention_mask"][0].tolist() == [1, 1, 0]


def test_special_tokens_stand_once_at_the_beginning_of_each_document() -> None:
    batches = text_batches(tokenizer(bos=True), [words(*range(10, 15)), words(20)], length=4)
    assert rows_of(batches) == [(0, [1, 10, 11, 12]), (0, [13, 14]), (1, [1, 20])]


def test_without_a_padding_token_zero_pads(capfd: pytest.CaptureFixture) -> None:
    (batch,) = text_batches(tokenizer(pad=False), [words(*range(10, 20))], length=8)
    assert batch["input_ids"][1].tolist() == [18, 19, 0, 0, 0, 0, 0, 0] and batch["attention_mask"].sum() == 10
    assert capfd.readouterr() == ("", "")  # no warning of a text longer than the model takes


def test_windows_longer_than_the_text_and_a_smaller_last_batch() -> None:
    batches = text_batches(tokenizer(), [words(5, 6)] * 5, length=40, batch_windows=3)
    assert [batch["input_ids"].shape for batch in batches] == [(3, 40), (2, 40)]
    assert rows_of(batches) == [(number, [5, 6]) for number in range(5)]


@pytest.mark.parametrize(
    ("documents", "options", "sentence"),
    [
        ([], {"length": 4}, "There is no document to measure on; give at least one text"),
        ([words(5), ""], {"length": 4}, "No document has 2 tokens, .*; give a longer text"),
        ([words(5, 6)], {"length": 1}, "Windows of 1 tokens, 8 to a batch, cannot be made; choose at least 2 tokens"),
        ([words(5, 6)], {"length": 4, "batch_windows": 0}, "Windows of 4 tokens, 0 to a batch, cannot be made"),
    ],
)
def test_too_little_text_is_refused(documents: list[str], options: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        text_batches(tokenizer(), documents, **options)


# Split


def split_of(sizes: list[int], **options) -> tuple[list[tuple[int, list[int]]], list[tuple[int, list[int]]]]:
    """The rows of both sides, of documents with so many windows of two tokens each."""
    number, documents = 4, []
    for size in sizes:
        documents.append(words(*range(number, number + 2 * size)))
        number += 2 * size
    batches = text_batches(tokenizer(), documents, length=2, batch_windows=2)
    calibration, evaluation = split_documents(batches, **options)
    assert sorted(rows_of(calibration) + rows_of(evaluation)) == rows_of(batches)
    for side in (calibration, evaluation):
        assert all(len(batch["documents"]) == 2 for batch in side[:-1]) and 1 <= len(side[-1]["documents"]) <= 2
    return rows_of(calibration), rows_of(evaluation)


def test_evenly_spaced_items_begin_or_halve_equal_stretches() -> None:
    for total in range(1, 60):
        for count in range(1, total + 1):
            ends = [Fraction(place * total, count) for place in range(count + 1)]
            assert evenly_spaced(count, total) == [math.floor(start) for start in ends[:-1]]
            middles = [math.floor((start + end) / 2) for start, end in pairwise(ends)]
            assert evenly_spaced(count, total, centred=True) == middles


@pytest.mark.parametrize(
    ("sizes", "options", "wanted"),
    [
        ([1] * 9, {}, {1, 4, 7}),
        ([2, 1, 3, 1, 2, 1, 1], {}, {1, 5}),
        ([1, 5], {}, {1}),
        ([1] * 10, {"share": 0.5}, {1, 3, 5, 7, 9}),
        ([1] * 5, {"share": 0.01}, {2}),
        ([1] * 3, {"share": 0.99}, {0, 2}),
    ],
)
def test_whole_documents_spread_evenly(sizes: list[int], options: dict, wanted: set[int]) -> None:
    calibration, evaluation = split_of(sizes, **options)
    assert {document for document, _ in calibration} == wanted
    assert {document for document, _ in evaluation} == set(range(len(sizes))) - wanted


def test_one_document_is_divided_and_keeps_its_number() -> None:
    calibration, evaluation = split_of([9])
    assert [document for document, _ in calibration + evaluation] == [0] * 9
    assert [tokens[0] for _, tokens in calibration] == [4, 6, 8]
    assert [tokens[0] for _, tokens in evaluation] == [10, 12, 14, 16, 18, 20]
    assert [len(side) for side in split_of([2])] == [1, 1]


def test_numbers_of_documents_survive_gaps() -> None:
    batches = text_batches(tokenizer(), [words(5), words(6, 7), "", words(8, 9)], length=2)
    calibration, evaluation = split_documents(batches)
    assert (rows_of(calibration), rows_of(evaluation)) == ([(3, [8, 9])], [(1, [6, 7])])


def test_too_little_to_split_is_refused() -> None:
    batches = text_batches(tokenizer(), [words(5, 6)], length=2)
    for few in (batches, []):
        with pytest.raises(InputError, match="too little text to calibrate and to evaluate on; give two windows"):
            split_documents(few)
    for share in (0, 1, -0.5, 1.5):
        with pytest.raises(InputError, match=rf"The share {share} of the documents .* is not between 0 and 1"):
            split_documents(batches, share)
