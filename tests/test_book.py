"""The book: what the collection puts into it, and the site itself, whole, with working links, fetching nothing."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
import yaml
from make import dry

import kernels
import sparsity_utils
from docs import book
from sparsity_utils import paths

COMMAND = ["-m", "sphinx", "-W", "--keep-going", "-c", "docs", "."]
VERDICTS = pd.read_csv(paths.RESULTS / "verdicts.csv", dtype=str, keep_default_na=False)


def rows(table: str) -> list[list[str]]:
    """The cells of a Markdown table, below its head."""
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("|")][2:]


def test_every_verdict_is_in_the_table_with_a_link_to_its_chapter():
    table = rows(book.verdicts())
    assert {len(row) for row in table} == {6} and len(table) == len(VERDICTS)
    for cells, row in zip(table, VERDICTS.itertuples(), strict=True):
        assert f"../notebooks/{row.notebook}.ipynb" in cells[0] and cells[1].split(maxsplit=1)[1].strip() == row.verdict


def test_verdicts_that_changed_stand_beside_what_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    columns = ["question", "here", "interval", "verdict", "notebook"]
    same = ["as before", "1.0 points", "0.5 to 1.5", "supported", "02_relu_vs_silu"]
    fell = ["it falls", "2.0 points", "-1.0 to 5.0", "inconclusive", "04_scale_insensitivity"]
    gone = ["asked once", "none", "none", "inconclusive", "05_activation_patterns"]
    pd.DataFrame([same, fell, gone], columns=columns).to_csv(tmp_path / "first_study.csv", index=False)
    now = pd.DataFrame([same, ["it falls", "2.0 points", "0.5 to 3.5", "supported", fell[-1]]], columns=columns)
    now.assign(published="none", minutes="").to_csv(tmp_path / "verdicts.csv", index=False)
    (cells,) = rows(book.changes())
    assert [cell.strip() for cell in cells] == [
        *("[04](../notebooks/04_scale_insensitivity.ipynb)", "it falls"),
        *("◇ inconclusive: 2.0 points (-1.0 to 5.0)", "● supported: 2.0 points (0.5 to 3.5)"),
    ]
    now.iloc[:1].assign(published="none", minutes="").to_csv(tmp_path / "verdicts.csv", index=False)
    assert book.changes().startswith("None yet")


def test_the_verdicts_of_the_first_study_are_of_claims_that_stand():
    first = pd.read_csv(paths.RESULTS / "first_study.csv", dtype=str, keep_default_na=False)
    assert first["question"].is_unique and set(first["question"]) <= set(VERDICTS["question"])
    assert set(first["verdict"]) == set(book.SIGNS) and len(first) > 40


def test_every_option_of_every_command_is_there():
    text = book.commands()
    assert text.count("\n## ") + 1 == len(set(re.findall(r"^## (\w+)", text, re.MULTILINE))) > 8
    assert "`--engine {local,slurm}`" in text and "`MODEL`" in text and "`--cost`" in text
    assert "use at most N tokens, evenly spread" in text and "%(" not in text
    assert {len(row) for row in rows(text)} == {2}


def test_every_column_is_there():
    described = pd.read_csv(paths.RESULTS / "columns.csv")
    assert sum(len(rows(part)) for part in book.columns().split("## ")) == len(described)


def test_the_citations_are_those_of_the_file():
    cited = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text())
    own, study = book.citations().split("\n\n")
    assert own.startswith("```bibtex\n@software{") and cited["title"] in own and cited["version"] in own
    assert "@inproceedings{sparsing-law," in study and "Luo, Yuqi and Song, Chenyang and " in " ".join(study.split())
    assert "arXiv:2411.02335" in study and "year = {2025}" in study


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("a `name`, `x|y`s", r"a ``name``\ , ``x|y``\ s"),
        ("the size |s_i| of ``code|here``", r"the size \|s_i\| of ``code|here``"),
    ],
)
def test_docstrings_are_read_as_they_are_meant(written, read):
    lines = [written]
    book._as_restructured_text(None, "function", "f", None, None, lines)
    assert lines == [read]


def test_make_builds_it_and_serves_it_if_asked():
    asked, served = dry("book"), dry("book", "SERVE=1")
    assert f"{' '.join(COMMAND)} build/book" in asked
    assert "http.server" not in asked and "-m http.server --bind 127.0.0.1 --directory build/book" in served


class Page(HTMLParser):
    """What a page holds: its ids, the addresses it links to, those it loads by itself, images without words."""

    def __init__(self, file: Path):
        super().__init__()
        self.ids, self.links, self.loads, self.silent = Counter(), set(), set(), []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.update([values["id"]] if values.get("id") else [])
        if tag == "a" and values.get("href"):
            self.links.add(values["href"])
        elif tag == "link" and values.get("rel") not in ("canonical", "author", "search", "index", "next", "prev"):
            self.loads.add(values["href"])
        elif values.get("src"):
            self.loads.add(values["src"])
        if tag == "img" and (values.get("alt") or ".png").endswith((".png", ".svg")):  # else Sphinx names the file
            self.silent.append(values["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    """Every page of the book, built with warnings as errors by a Python that has no network to speak of."""
    folder = tmp_path_factory.mktemp("site") / "book"
    command = [sys.executable, *COMMAND, "-q", str(folder)]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        command, cwd=paths.ROOT, env=os.environ | nowhere, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return {file: Page(file) for file in sorted(folder.rglob("*.html")) if "_static" not in file.parts}


def targets(file: Path, addresses: set[str]) -> Iterator[tuple[Path, str, str]]:
    """The file and fragment that each address within the site names."""
    for address in addresses:
        parts = urlsplit(address)
        if not parts.scheme and not parts.netloc:
            yield (
                (file.parent / unquote(parts.path)).resolve() if parts.path else file,
                unquote(parts.fragment),
                address,
            )


@pytest.mark.slow
def test_every_link_within_the_book_leads_somewhere(site):
    for file, page in site.items():
        for target, fragment, address in targets(file, page.links | page.loads):
            assert target.exists(), f"{file.name} links to {address}"
            if fragment and target in site:
                assert site[target].ids[fragment], f"{file.name} links to {address}"


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site):
    outside = {address for page in site.values() for address in page.loads if urlsplit(address).netloc}
    assert not outside
    folder = min(site, key=lambda file: len(file.parts)).parent
    for style in folder.rglob("*.css"):
        assert not re.search(r"@import[^;]*//|url\(['\"]?(?:https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.slow
def test_chapters_names_commands_and_source_are_there(site):
    pages = {file.stem: page for file, page in site.items()}
    assert {notebook.stem for notebook in paths.collection()} <= set(pages)
    names = {f"{package.__name__}.{name}" for package in (sparsity_utils, kernels) for name in package.__all__}
    assert names <= set(pages["api"].ids)
    assert any(link.startswith("../_modules/sparsity_utils/sparsity/metrics.html#") for link in pages["api"].links)


@pytest.mark.slow
def test_every_image_has_words(site):
    assert not [(file.name, image) for file, page in site.items() for image in page.silent]
