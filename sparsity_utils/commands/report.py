"""One page on a reproduction, build/<profile>/report.html: verdicts, what was not decided and why, figures, time.

The page is one file: figures are in it, and nothing is fetched. It tells what the profile's folder holds, so that
notebooks that were not executed this time stand there with what they found last.
"""

import base64
import html
import json
import platform
import resource
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from PIL import Image

from sparsity_utils import paths
from sparsity_utils.commands.expected import Expected, peak_memory
from sparsity_utils.findings.at_a_glance import SIGNS
from sparsity_utils.findings.claims import INTERVAL
from sparsity_utils.laws.trends import INCONCLUSIVE
from sparsity_utils.study.plan import QUESTIONS
from sparsity_utils.study.runs import commit
from sparsity_utils.study.study import Study

OVERVIEW = "verdicts.png"  # the picture of all verdicts
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pandas", "scipy", "statsmodels", "numba", "matplotlib")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; margin: 1rem 0 } th, td { text-align: left; vertical-align: top }
th, td { padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid #ddd } tr.notebook th { padding-top: 1.2rem }
figure { margin: 1.5rem 0 } img { max-width: 100% } code { font-size: 90% } .verdict { white-space: nowrap }
.supported { color: #00663d } .not { color: #a8322a } .inconclusive { color: #7a5b00 }
"""


def write_report(
    study: Study, expected: Expected | None, taken: Mapping[str, float], failures: Mapping[str, str], ended: str = ""
) -> Path:
    """Write the page on a study of a profile, aside and renamed into place; return its path.

    Args:
        expected: the plan; None where it could not be made.
        taken: minutes of this time by step: text, runs, and notebooks by name.
        failures: why notebooks failed, by name.
        ended: what ended the reproduction early; empty if nothing did.
    """
    folder = study.folder.parent
    found = {file.stem: pd.read_csv(file, dtype=str, keep_default_na=False) for file in _verdict_files(folder)}
    missing = [notebook.stem for notebook in paths.collection() if notebook.stem not in {*found, *failures}]
    counts = pd.concat([table["verdict"] for table in found.values()] or [pd.Series(dtype=str)]).value_counts()
    summary = ", ".join(f"{counts.get(word, 0)} {word}" for word in SIGNS)
    summary += f"; {len(failures)} notebooks failed" * bool(failures)
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    parts = [
        f"<h1>Reproduction, profile {_text(study.name)}</h1>",
        f"<p>{_text(study.profile.about)}.<br>Written {_text(now)}, commit <code>{_text(commit())}</code>.</p>",
        f"<p><strong>{_text(ended)}</strong></p>" if ended else "",
        f"<h2>Verdicts</h2><p>{_text(summary)}.</p>",
        *map(_figure, filter(Path.exists, [folder / "figures" / OVERVIEW])),
        _verdict_table(found, taken),
        "<h2>What was not decided, and why</h2>",
        _undecided(study, found, failures, missing),
        "<h2>Figures</h2>",
        *map(_figure, sorted((folder / "figures").glob("[0-9][0-9]_*.png"))),
        "<h2>Time</h2>",
        _times(expected, taken),
        "<h2>Environment</h2>",
        _environment(study),
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Reproduction, {_text(study.name)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    target = folder / "report.html"
    with paths.written_aside(target) as aside:
        aside.write_text(page, encoding="utf-8")
    return target


def _verdict_files(folder: Path) -> Iterable[Path]:
    """The verdicts that notebooks of the collection left, in reading order."""
    files = [folder / "verdicts" / f"{notebook.stem}.csv" for notebook in paths.collection()]
    return filter(Path.exists, files)


def _verdict_table(found: Mapping[str, pd.DataFrame], taken: Mapping[str, float]) -> str:
    rows = []
    for notebook, table in found.items():
        when = "" if notebook in taken else ", from an earlier time"
        rows.append(f'<tr class="notebook"><th colspan="4" scope="colgroup">{_text(notebook + when)}</th></tr>')
        for row in table.itertuples(index=False):
            here = f"{row.here} ({row.interval})" if row.interval not in ("", "none") else row.here
            verdict = f"{SIGNS.get(row.verdict, '')} {row.verdict}"
            rows.append(
                f'<tr><td class="verdict {_text(row.verdict)}">{_text(verdict)}</td><td>{_text(row.question)}</td>'
                f"<td>{_text(row.published)}</td><td>{_text(here)}</td></tr>"
            )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("Verdict", "Claim", "Published", f"Here ({INTERVAL})"))
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _undecided(
    study: Study, found: Mapping[str, pd.DataFrame], failures: Mapping[str, str], missing: Iterable[str]
) -> str:
    """A list: notebooks that failed or were not executed, claims that are inconclusive, questions that are left out."""
    lines = [f"<strong>{_text(name)}</strong> failed: {_text(why)}" for name, why in failures.items()]
    lines += [f"<strong>{_text(name)}</strong> was not executed on this profile." for name in missing]
    for notebook, table in found.items():
        open_ones = table[table["verdict"] == INCONCLUSIVE]
        lines += [f"{_text(row.question)} ({notebook[:2]}): {_text(row.reason)}." for row in open_ones.itertuples()]
    lines += [_text(study.lacking(question)) for question in QUESTIONS if not study.answers(question)]
    return f"<ul>{''.join(f'<li>{line}</li>' for line in dict.fromkeys(lines))}</ul>" if lines else "<p>Nothing.</p>"


def _figure(file: Path) -> str:
    """A figure within the page, with the words that its file holds."""
    name = file.stem.replace("_", " ")
    with Image.open(file) as picture:
        words = picture.info.get("Description", f"Figure {name}")
    image = base64.b64encode(file.read_bytes()).decode()
    shown = f'<img alt="{_text(words)}" src="data:image/png;base64,{image}">'
    return f"<figure>{shown}<figcaption>{_text(name)}</figcaption></figure>"


def _times(expected: Expected | None, taken: Mapping[str, float]) -> str:
    """Minutes of every step, expected before the first of them and taken; and the memory."""
    before = {"runs": expected.run_minutes, **expected.notebook_minutes} if expected else {}
    steps = list(dict.fromkeys([*taken, *before]))
    columns = {
        "expected (min)": [before.get(step) for step in steps],
        "taken (min)": [taken.get(step) for step in steps],
    }
    table = pd.DataFrame(columns, index=steps, dtype=float)
    table.loc["together"] = table.sum()
    largest = max(map(peak_memory, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    memory = f"The largest process took {largest / 1e9:.1f} GB of memory"
    memory += f"; about {expected.memory / 1e9:.1f} GB were expected for all together" if expected else ""
    return f"{table.to_html(float_format='{:.1f}'.format, na_rep='', border=0)}<p>{memory}.</p>"


def _environment(study: Study) -> str:
    """Machine, versions, text and settings."""
    about = {
        "machine": f"{platform.platform()}, {platform.machine()}",
        "computed with": study.environment(),
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{_text(text)}</td></tr>' for name, text in about.items())
    settings = json.dumps(asdict(study.profile), indent=1, default=str)
    return f"<table>{rows}</table><details><summary>All settings</summary><pre>{_text(settings)}</pre></details>"


def _text(text: str) -> str:
    return html.escape(str(text))
