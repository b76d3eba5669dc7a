"""Text sources: what each reads, how it labels it, and what it refuses."""

import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from corpus_text import config, install, own_build_folder, text, texts_of, write_rows  # noqa: F401  (a fixture)

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.text import sources
from sparsity_utils.text.config import CorpusConfig
from sparsity_utils.text.corpus import build_corpus

# Source "python-source"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package `planted`, the only one of the list."""
    site = tmp_path / "site"
    files: dict[str, bytes] = {f"planted/sub/m{seed}.py": f"x = '''{text(seed)}'''\n".encode() for seed in range(60)}
    documented = "\n".join(f"def f{n}():\n    '''{text(1000 + n, 90)}'''\n    return {n}\n" for n in range(3))
    files |= {f"planted/documented{seed}.py": f"'''{text(2000 + seed)}'''\n{documented}".encode() for seed in range(9)}
    files |= {
        "planted/sub/__init__.py": b"",
        "planted/table.py": b"x = [" + b"1234567, " * 90 + b"]\n",
        "planted/latin.py": "# caf\u00e9\n".encode("latin-1"),
        "planted/changed.py": b"wheel = True\n",
        "planted/version.py": b"git = 'abc'\n",
        "planted/__init__.py": b"# repaired\n",
        "planted/generated/ops.py": b"# built\n",
        "planted/data.json": b"{}",
    }
    install(site, "planted", files)
    (site / "planted" / "changed.py").write_bytes(b"wheel = False\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(sources, "FAMILIES", {"planted family": ("planted",)})
    return site / "planted"


def test_python_source_is_the_wheels_text_either_code_or_docstrings(package: Path) -> None:
    source = sources.open_source(CorpusConfig())
    documents = {document.name: document for document in source.documents}
    left_out = {"table of numbers": "table", "not UTF-8": "latin", "changed since it was installed": "changed"}
    assert source.skipped == dict.fromkeys([*left_out, "empty"], 1)
    assert source.skipped.names == {reason: [f"planted/{name}.py"] for reason, name in left_out.items()} | {
        "empty": ["planted/sub/__init__.py"]
    }
    assert source.identity["packages"] == {"planted": "1.0"}
    assert set(documents) == {
        *(f"planted/sub/m{seed}.py" for seed in range(60)),
        *(f"planted/documented{seed}.py" for seed in range(9)),
    }
    prose = [document for document in documents.values() if document.domain == "prose"]
    assert 1 <= len(prose) <= 4 and all(document.name.startswith("planted/documented") for document in prose)
    for document in prose:
        assert "def " not in document.text and document.text.startswith(text(2000 + int(document.name[-4])))
    code = [document for document in documents.values() if document.domain == "planted family"]
    assert all(document.text == (package.parent / document.name).read_text() for document in code)
    assert len(code) + len(prose) == len(documents)


def test_python_source_builds_a_corpus(package: Path) -> None:
    corpus = build_corpus(CorpusConfig(vocabulary=300, validation_share=0.1))
    assert corpus.manifest["skipped"]["empty"] == 1
    assert {"planted family"} <= set(corpus.documents("validation")["domain"]) <= {"planted family", "prose"}


def test_the_real_packages_hold_hundreds_of_megabytes() -> None:
    files = sources._package_files(sources._is_source)
    names = [name for name, _, _ in files]
    assert sum(file.size for _, _, file in files) > 200e6 and len(set(names)) == len(names)
    assert "torch/nn/modules/linear.py" in names and "torch/version.py" not in names
    first = pd.Series([domain for _, domain, _ in files[:3000]]).value_counts(normalize=True)
    whole = pd.Series([domain for _, domain, _ in files]).value_counts(normalize=True)
    assert (first - whole).abs().max() < 0.03  # any prefix is a proportional sample


def test_the_packages_have_one_pin_each_in_the_lock_file() -> None:
    lines = paths.LOCK.read_text().splitlines()
    for package in sources._packages():
        pins = [line for line in lines if re.match(rf"{package}==", line)]
        assert len(pins) == 1 and ";" not in pins[0], (package, pins)


def test_a_package_outside_the_corpus_is_text_that_no_model_here_was_trained_on(package, monkeypatch) -> None:
    with pytest.raises(InputError, match=r"The package planted is part of the training text"):
        sources.package_documents("planted")
    monkeypatch.setattr(sources, "FAMILIES", {})
    with pytest.raises(InputError, match=r"The package planted was changed since it was installed"):
        sources.package_documents("planted")
    (package / "changed.py").write_bytes(b"wheel = True\n")
    texts = sources.package_documents("planted")
    names = sorted(file for file in package.rglob("*.py") if file.name.startswith(("m", "documented", "changed")))
    assert texts == [file.read_text() for file in names]


# Source "path"


def test_path_reads_every_format_and_labels_domains(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    write_rows(root / "rows.jsonl", [text(0), text(1)], field="body")
    pd.DataFrame({"body": [text(2), None], "other": [1, 2]}).to_parquet(root / "table.parquet")
    (root / "letters" / "deep").mkdir(parents=True)
    (root / "letters" / "deep" / "a.txt").write_text(text(3))
    (root / "b.md").write_bytes(b"\xef\xbb\xbf" + text(4).encode())
    (root / "c.txt").write_bytes(b"caf\xe9")
    (root / "folder.txt").mkdir()
    (root / "ignored.csv").write_text("no text")
    source = sources.open_source(config(root, text_field="body"))
    found = {(document.name, document.domain, document.text) for document in source.documents}
    assert found == {
        ("rows.jsonl:1", "rows", text(0)),
        ("rows.jsonl:2", "rows", text(1)),
        ("table.parquet:1", "table", text(2)),
        ("letters/deep/a.txt", "letters", text(3)),
        ("b.md", "md", text(4)),
    }
    assert source.skipped == {"not a text": 1, "not UTF-8": 1}


def test_half_a_surrogate_pair_and_empty_rows_are_counted(tmp_path: Path) -> None:
    lines = [*(text(seed) for seed in range(20)), "half \ud83d", " \n ", ""]
    corpus = build_corpus(config(write_rows(tmp_path / "rows.jsonl", lines)))
    assert corpus.manifest["skipped"] == {"empty": 2, "not UTF-8": 1}


def test_a_parquet_table_is_read_whole_whatever_its_name_and_its_other_columns(tmp_path: Path, capfd) -> None:
    texts = ["", "2020-01-01", " a\r\nb\u2028c\x00 ", "1e400", *(text(seed) for seed in range(3000))]
    file = tmp_path / "a[1]*?{b}" / "p (1)#%20.parquet"
    file.parent.mkdir()
    others = {"number": range(len(texts)), "map": [{"a": 1}] * len(texts)}
    pd.DataFrame({"text": texts} | others).to_parquet(file, row_group_size=700)
    for path in (file, file.parent):
        found = [document.text for document in sources.open_source(config(path)).documents]
        assert found == ["2020-01-01", " a\nb\u2028c\x00 ", *texts[3:]]
    pd.DataFrame({"text": pd.Categorical(["a", "b", "a"])}).to_parquet(file)
    assert [document.text for document in sources.open_source(config(file)).documents] == ["a", "b", "a"]
    pd.DataFrame({"text": []}).to_parquet(file)
    assert not list(sources.open_source(config(file)).documents)
    file.write_bytes(b"no")
    with pytest.raises(InputError, match=r"p \(1\)#%20\.parquet is not readable as Parquet \(.*\); correct it"):
        list(sources.open_source(config(file)).documents)
    assert capfd.readouterr() == ("", "")


# Source "hub"


def hub_config(path: Path | str, **changes) -> CorpusConfig:
    return config(path, source="hub", revision="0123abc", **changes)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    assert not (tmp_path / "cache").exists()  # nothing is left in the reader's own


def test_hub_streams_a_local_data_set(tmp_path: Path) -> None:
    lines = [text(seed) for seed in range(20)]
    write_rows(tmp_path / "data" / "train.jsonl", lines, field="body")
    corpus = build_corpus(hub_config(tmp_path / "data", text_field="body"))
    assert sorted(texts_of(corpus, "train") + texts_of(corpus, "validation")) == sorted(lines)
    assert set(corpus.documents("train")["domain"]) == {"hub"}
    assert corpus.manifest["source"]["revision"] == "0123abc"
    assert set(corpus.manifest["source"]["files"]) == {"train.jsonl"}


def test_a_hub_corpus_that_was_built_opens_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": text(seed)} for seed in range(20)])
    built = build_corpus(hub_config("owner/name"))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub again"))
    assert build_corpus(hub_config("owner/name")) == built


def test_the_hub_is_asked_for_the_pinned_revision_and_runs_no_remote_code(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return [{"text": text(seed)} for seed in range(20)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    build_corpus(hub_config("owner/name"))
    ((names, options),) = calls
    assert not Path(options.pop("cache_dir")).exists()
    assert (names, options) == (("owner/name",), {"revision": "0123abc", "split": "train", "streaming": True})


# Bad input


def test_unknown_data_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing at revision 0123abc cannot be read \(.*check corpus\.path"):
        build_corpus(hub_config(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"owner/nothing at revision 0123abc cannot be read .* the network"):
        build_corpus(hub_config("owner/nothing"))


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FAMILIES", {"none": ("no-such-package",)})
    with pytest.raises(InputError, match=r"no-such-package, whose source is read as text, is not installed"):
        build_corpus(CorpusConfig())


def test_a_package_file_that_is_gone(package: Path) -> None:
    (package / "sub" / "m7.py").unlink()
    with pytest.raises(InputError, match=r"planted/sub/m7\.py cannot be read \(.*\); install its package again"):
        build_corpus(CorpusConfig(vocabulary=300))
