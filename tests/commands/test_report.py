"""The page on a reproduction: whole, of one file, with every reason, and never half written."""

from html.parser import HTMLParser

import pandas as pd
import pytest

from sparsity_utils import paths
from sparsity_utils.commands import report
from sparsity_utils.commands.expected import Expected
from sparsity_utils.findings.claims import Claim, Verdicts
from sparsity_utils.findings.style import ShownFigure, captioned
from sparsity_utils.laws.trends import Estimate
from sparsity_utils.study.study import Study

NAMES = [notebook.stem for notebook in paths.collection()]
PLAN = Expected("smoke", 2, 4, 4, 4, 1.0, "16x1", 1.5, {NAMES[0]: 0.5}, 1e9, 1e8)
RISES = Claim("rises", "q", "Rises & stays <so>?", "rises", "points", "a test")
OPEN = Claim("open", "q", "Is it open?", "none", "points", "a test")


class Page(HTMLParser):
    """Text, tags that are open, and all that a browser would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.open, self.fetched, self.images = "", [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.fetched += [found[name] for name in ("src", "href") if name in found]
        self.images += [found] if tag == "img" else []
        self.open += [tag] if tag not in ("img", "br", "meta") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def study(tmp_path, monkeypatch) -> Study:
    """A profile with two notebooks' verdicts and one figure; nothing is trained."""
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path))
    study = Study.from_profile("smoke")
    found = Verdicts([RISES.judged(Estimate(0.05, 0.04, 0.06, 9)), OPEN.undecided("only one seed < two")])
    study.keep_verdicts(NAMES[0], found.table())
    study.keep_verdicts(NAMES[1], Verdicts([RISES.judged(Estimate(-0.05, -0.06, -0.04, 9))]).table())
    study.keep_figure("00_a_figure", captioned(ShownFigure(figsize=(1, 1)), "Caption “a” < b"))
    return study


def page(study: Study, failures=None, ended="") -> Page:
    return Page(
        report.write_report(study, PLAN, {"text": 0.1, "runs": 1.2, NAMES[0]: 0.6}, failures or {}, ended).read_text()
    )


def test_the_page_is_whole_and_fetches_nothing(study):
    found = page(study)
    assert found.open == []
    assert found.fetched and all(address.startswith("data:image/png;base64,") for address in found.fetched)
    assert [image["alt"] for image in found.images] == ["Figure of 0 panels. Caption “a” < b."]


def test_verdicts_are_told_by_shape_and_word_and_earlier_ones_are_marked(study):
    text = page(study).text
    assert "1 supported, 1 not supported, 1 inconclusive." in text
    assert "● supportedRises & stays <so>?rises5.00 points (4.00 to 6.00)" in text
    assert "✖ not supportedRises & stays <so>?" in text and "◇ inconclusiveIs it open?" in text
    assert f"{NAMES[1]}, from an earlier time" in text and f"{NAMES[0]}, from" not in text


def test_what_was_not_decided_has_its_reason(study):
    text = page(study, {NAMES[2]: f"{NAMES[2]}.ipynb failed in cell [3]: KeyError"}, "It was interrupted.").text
    undecided = text[text.index("What was not decided") : text.index("Figures")]
    assert "Is it open? (00): only one seed < two." in undecided
    assert f"{NAMES[2]} failed: {NAMES[2]}.ipynb failed in cell [3]: KeyError" in undecided
    assert f"{NAMES[3]} was not executed on this profile." in undecided
    assert "The smoke study has no table for one_dimension." in undecided
    assert "It was interrupted." in text and "; 1 notebooks failed" in text


def test_time_is_that_of_the_steps_beside_what_was_expected(study):
    text = " ".join(page(study).text.split())
    assert f"text 0.1 runs 1.5 1.2 {NAMES[0]} 0.5 0.6 together 2.0 1.9" in text
    assert "about 1.0 GB were expected for all together" in text


def test_the_environment_and_all_settings_are_told(study):
    text = page(study).text
    assert "torch " in text and '"max_megabytes": 3' in text and "commit" in text


def test_a_page_that_cannot_be_written_leaves_the_one_before(study, monkeypatch):
    page(study)
    target = study.folder.parent / "report.html"
    before = target.read_bytes()
    monkeypatch.setattr(report, "_environment", lambda study: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page(study)
    assert target.read_bytes() == before and list(target.parent.glob(".report*")) == []


def test_the_reason_of_a_verdict_is_kept_beside_it_and_not_shown_in_the_table(study):
    kept = pd.read_csv(study.folder.parent / "verdicts" / f"{NAMES[0]}.csv", keep_default_na=False)
    assert kept["reason"].tolist() == ["", "only one seed < two"]
    assert "reason" not in Verdicts([OPEN.undecided("why")]).table().columns
