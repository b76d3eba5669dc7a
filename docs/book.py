"""What the book takes from the collection itself: an extension of Sphinx, loaded by `conf.py`.

A page says `<!-- book: verdicts -->` where one of PARTS belongs.
"""

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from sparsity_utils import paths
from sparsity_utils.__main__ import command_parser
from sparsity_utils.findings.at_a_glance import SIGNS
from sparsity_utils.findings.claims import INTERVAL

PLACE = re.compile(r"<!-- book: (\w+) -->")


def verdicts() -> str:
    """The recorded verdicts, each with a link to its chapter."""
    rows = []
    for row in pd.read_csv(paths.RESULTS / "verdicts.csv", dtype=str, keep_default_na=False).itertuples():
        chapter = f"[{row.notebook[:2]}](../notebooks/{row.notebook}.ipynb)"
        found = [row.question, row.published, row.here, row.interval]
        rows.append([chapter, f"{SIGNS[row.verdict]} {row.verdict}", *map(_escaped, found)])
    return _table(("Chapter", "Verdict", "Claim", "Published", "Here", INTERVAL), rows)


def changes() -> str:
    """Verdicts of the first study beside the recorded ones that differ."""
    found = ["here", "interval", "verdict"]
    first, now = (
        pd.read_csv(paths.RESULTS / name, dtype=str, keep_default_na=False).set_index("question")
        for name in ("first_study.csv", "verdicts.csv")
    )
    both = first.join(now[found].add_suffix("_now"), how="inner")
    rows = []
    for claim, row in both.iterrows():
        before, after = ([row[name + when] for name in found] for when in ("", "_now"))
        if before != after:
            chapter = f"[{row['notebook'][:2]}](../notebooks/{row['notebook']}.ipynb)"
            rows.append([chapter, _escaped(claim), *map(_found, (before, after))])
    return _table(("Chapter", "Claim", "First study", "Now"), rows) or "None yet: the recorded study is the first."


def _found(verdict: Sequence[str]) -> str:
    here, interval, word = verdict
    numbers = f": {here} ({interval})" if interval not in ("", "none") else ""
    return f"{SIGNS[word]} {word}{_escaped(numbers)}"


def commands() -> str:
    """Every command, from its own help."""
    (every,) = (action for action in command_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return "\n\n".join(_command(name, command) for name, command in every.choices.items())


def _command(name: str, command: argparse.ArgumentParser) -> str:
    """What it does, its examples, its arguments."""
    examples = f"```text\n{command.epilog.strip()}\n```" if command.epilog else ""
    rows = []
    for action in command._actions[1:]:  # the first is --help
        about = (action.help or "") % {"default": action.default}
        rows.append((f"`{' '.join([*action.option_strings[-1:], *_values(action)])}`", _escaped(about)))
    return "\n\n".join([f"## {name}", command.description.strip(), examples, _table(("Argument", "Meaning"), rows)])


def _values(action: argparse.Action) -> Iterable[str]:
    """What may follow an option, or stand for an argument."""
    if action.choices and not action.metavar:
        return [f"{{{','.join(action.choices)}}}"]
    return [] if action.nargs == 0 else [str(action.metavar or action.dest.upper())]


def columns() -> str:
    """The column dictionary, a section for each table."""
    parts = []
    for table, rows in pd.read_csv(paths.RESULTS / "columns.csv", keep_default_na=False).groupby("table", sort=False):
        files = [f"[{file.name}](../results/{file.name})" for file in paths.RESULTS.glob(f"{table}.csv*")]
        described = [(f"`{row.column}`", _escaped(row.unit), _escaped(row.meaning)) for row in rows.itertuples()]
        parts += [f"## {table}", *files, _table(("Column", "Unit", "Meaning"), described)]
    return "\n\n".join(parts)


def citations() -> str:
    """BibTeX of the collection and of the study that it examines, from CITATION.cff."""
    own = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    return "\n\n".join(_bibtex(work) for work in [own, *own["references"]])


def _bibtex(work: dict[str, Any]) -> str:
    names = [author.get("name") or f"{author['family-names']}, {author['given-names']}" for author in work["authors"]]
    names = [f"{{{name}}}" if "," not in name else name for name in names]  # a group is one name
    fields = {
        "title": f"{{{work['title']}}}",
        "author": " and\n    ".join(names),
        "booktitle": work.get("collection-title"),
        "year": work.get("year"),
        "version": work.get("version"),
        "note": ", ".join(identifier["value"] for identifier in work.get("identifiers", [])),
    }
    kind = "inproceedings" if "collection-title" in work else "software"
    key = re.sub(r"\W+", "-", work["title"].partition(":")[0].lower())
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join(["```bibtex", f"@{kind}{{{key},", *lines, "}", "```"])


PARTS = {"verdicts": verdicts, "changes": changes, "commands": commands, "columns": columns, "citations": citations}


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) if len(lines) > 2 else ""


def _escaped(text: str) -> str:
    """Text in which Markdown sees no marks but those of code."""
    return re.sub(r"([\\|*_<\[$])", r"\\\1", " ".join(text.split()))


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=400)  # before napoleon reads sections
    app.connect("build-finished", _enter)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the parts in their places, and the alternative text of a stored figure where myst-nb looks for it."""
    if page.startswith("notebooks/"):
        content = json.loads(source[0])
        for cell in content["cells"]:
            for text in _alternative_texts(cell):
                cell["metadata"]["mystnb"] = {"image": {"alt": text}}
        source[0] = json.dumps(content)
    else:
        source[0] = PLACE.sub(lambda place: PARTS[place[1]](), source[0])


def _alternative_texts(cell: dict[str, Any]) -> Iterator[str]:
    for output in cell.get("outputs", []):
        if "alt" in (about := output.get("metadata", {}).get("image/png", {})):
            yield about["alt"]


def _as_restructured_text(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings mark names by single backticks, as Markdown does, and write |x| for an absolute value."""
    mark = re.compile(r"(``.+?``)|`([^`]+)`|\|")
    lines[:] = [mark.sub(lambda m: m[1] or (f"``{m[2]}``\\ " if m[2] else r"\|"), line) for line in lines]


def _enter(app: Sphinx, failed: Exception | None) -> None:
    """The address of the book itself leads to its front page."""
    page = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=docs/index.html">'
    Path(app.outdir, "index.html").write_text(f"{page}\n", encoding="utf-8")


def _inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(latex2mathml.tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(latex2mathml.tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode
