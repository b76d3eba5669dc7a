"""The machinery that finds the runs of notebooks, executes and refreshes them."""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import notebook_checks
import pytest
from small import one_size, profile_content, write_profile, write_text
from small_notebook import a_notebook

from sparsity_utils import paths
from sparsity_utils.__main__ import main
from sparsity_utils.commands import notebooks
from sparsity_utils.console import InputError
from sparsity_utils.study.plan import QUESTIONS
from sparsity_utils.study.study import Study


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a notebook into a collection of the test's own."""
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    paths.NOTEBOOKS.mkdir()

    def put(name: str, *sources: str) -> Path:
        nbformat.write(a_notebook(*sources), paths.NOTEBOOKS / name)
        return paths.NOTEBOOKS / name

    return put


class Asked:
    """In place of a study: notes what is asked of it and gives nothing, so that every later cell fails at once."""

    def __init__(self, study: Study):
        self.answers, self.questions, self.models = study.answers, set(), set()

    def table(self, question: str) -> None:
        self.questions.add(question)

    table_or_none = table

    def trained_model(self, activation: str) -> tuple[None, None]:
        self.models.add(activation)
        return None, None


@pytest.fixture(scope="module")
def many_lines(tmp_path_factory):
    """A study, nothing of it trained, whose profile leaves no question of a notebook out."""
    folder = tmp_path_factory.mktemp("lines")
    content = profile_content(write_text(folder / "text"))
    content["study"] |= {
        "second_sizes": [one_size("12x1")],
        "data_limited": [one_size("24x1")],
        "other_sizes": [one_size("8x1")],
        "other_activations": ["gelu"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSITY_BUILD", str(folder / "build"))
        yield Study.from_profile(write_profile(folder, content))


@pytest.mark.parametrize("path", paths.collection(), ids=lambda path: path.stem)
def test_the_runs_of_a_notebook_are_those_that_its_cells_ask_for(path: Path, many_lines, monkeypatch):
    asked = Asked(many_lines)
    monkeypatch.setattr(Study, "open", lambda source, profile, *section, **settings: asked)
    names = {"display": print}
    for cell in notebook_checks.code_cells(nbformat.read(path, as_version=4)):
        with contextlib.suppress(Exception):
            exec(cell.source, names)
    expected = many_lines.jobs(*asked.questions & set(QUESTIONS), models=asked.models)
    assert work(notebooks.jobs_of([path], many_lines)) == work(expected)
    assert asked.questions or asked.models


def work(jobs) -> set:
    """What is trained and measured, in no order."""
    return {(job.config.key, frozenset(job.what)) for job in jobs}


# Executing


def test_an_undeclared_parameter_is_an_input_error(shelf):
    path = shelf("01_a.ipynb")
    with pytest.raises(InputError, match=r"01_a.ipynb has no parameter 'sauce'.*declares source, profile"):
        notebooks.execute(path, paths.build() / "out.ipynb", {"sauce": "run"})
    assert not (paths.build() / "out.ipynb").exists()


def test_execute_uses_this_python_and_the_parameters(shelf, tmp_path, monkeypatch):
    other = tmp_path / "jupyter" / "kernels" / "python3"  # a kernel named python3 that is not this Python
    other.mkdir(parents=True)
    (other / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    path = shelf("01_a.ipynb", "import sys, os, sparsity_utils\nprint(sys.prefix, source, profile)\nprint(os.getcwd())")
    before = path.read_bytes()
    minutes = notebooks.execute(path, tmp_path / "out" / "01_a.ipynb", {"source": "run", "profile": "tiny"})
    content = nbformat.read(tmp_path / "out" / "01_a.ipynb", as_version=4)
    assert content.cells[3].outputs[0].text == f"{sys.prefix} run tiny\n{paths.NOTEBOOKS.resolve()}\n"
    assert 0 < minutes < 1
    assert path.read_bytes() == before


def test_a_failing_notebook_says_where_and_keeps_what_it_had(shelf, tmp_path):
    path = shelf("01_a.ipynb", "print('so far')", "{}['x']")
    with pytest.raises(notebooks.NotebookFailed, match=r"^01_a.ipynb failed in cell \[4\]: KeyError: 'x'$"):
        notebooks.execute(path, tmp_path / "out.ipynb", {"source": "run"})
    assert "so far" in (tmp_path / "out.ipynb").read_text()


def test_a_dead_kernel_is_a_failed_notebook(shelf, tmp_path):
    path = shelf("01_a.ipynb", "import os\nos._exit(9)")
    with pytest.raises(notebooks.NotebookFailed, match=r"01_a\.ipynb stopped: Kernel died"):
        notebooks.execute(path, tmp_path / "out.ipynb", {})


WRITE = """from sparsity_utils import paths
folder = paths.profile_output(profile)
(folder / "verdicts").mkdir(parents=True, exist_ok=True)
text = "question,published,here,interval,verdict\\nfalls?,7.1%,22%,20 to 24%,supported\\n"
_ = (folder / "verdicts" / "02_b.csv").write_text(text)
(folder / "figures").mkdir(exist_ok=True)
(folder / "figures" / "b.png").touch()"""


def test_reproduce_goes_on_after_a_failure_and_ends_with_one_table(shelf, capfd):
    shelf("01_a.ipynb", "raise ValueError('no')")
    shelf("02_b.ipynb", WRITE)
    stale = paths.profile_output("smoke") / "verdicts" / "01_a.csv"
    stale.parent.mkdir(parents=True)
    stale.write_text("question,published,here,interval,verdict\nstale,1,1,1,supported\n")
    assert notebooks.reproduce("smoke") == 1
    out, err = capfd.readouterr()
    table = (paths.profile_output("smoke") / "verdicts.csv").read_text().splitlines()
    assert table[0] == "question,published,here,interval,verdict,minutes,notebook"
    assert table[1] == "01_a,,,,failed,,01_a"
    assert table[2].startswith("falls?,7.1%,22%,20 to 24%,supported,0.")
    assert "stale" not in out and "20 to 24%" in out
    words = ("Verdict", "failed", "supported")  # the first column
    header, failed, judged = (next(line for line in out.splitlines() if line.startswith(f" {w}")) for w in words)
    assert header.index("Claim") == failed.index("01_a") == judged.index("falls?")
    folder = paths.profile_output("smoke")
    figures = [str(folder / "figures" / name) for name in ("b.png", "verdicts.png")]
    assert out.splitlines()[-3:] == [*figures, str(folder / "report.html")]
    assert err.rstrip().endswith("01_a.ipynb failed in cell [3]: ValueError: no")


ASKS = """from sparsity_utils import Study
study = Study.open(source, profile)
assert all(job.done() for job in study.jobs("metrics", models=["silu"]))
table, model = study.table("metrics"), study.trained_model("silu")[0]
print(len(table))"""


@pytest.mark.slow
def test_all_runs_are_done_in_one_pool_before_the_first_notebook_opens(shelf, tmp_path, monkeypatch, capfd):
    pools, do_jobs = [], notebooks.do_jobs
    monkeypatch.setattr(notebooks, "do_jobs", lambda jobs, profile: (pools.append(work(jobs)), do_jobs(jobs, profile)))
    profile = write_profile(tmp_path, profile_content(write_text(tmp_path / "text")))
    study = Study.from_profile(profile)
    shelf("01_a.ipynb", ASKS, ASKS.replace("metrics", "width_depth_ratio"))
    shelf("02_b.ipynb", 'print("token_patterns")', ASKS)
    notebooks.reproduce(profile)
    out, err = capfd.readouterr()
    assert out.startswith("Profile tiny: 01_a, 02_b.\n")
    plan, begun = out.index("6 of 6 to do, 6 of them to train"), out.index("[1/2] 01_a")
    assert plan < begun and "failed in cell" not in err
    assert pools == [work(study.jobs("metrics", "width_depth_ratio"))]
    everything = notebooks.jobs_of(paths.collection(), study)
    assert "none of 6 is left" in notebooks.expect(study, paths.collection(), everything).told()


STORES = """import pandas as pd
from sparsity_utils import Study
row = ["falls?", "7.1%", "22%", "20 to 24%", "supported"]
columns = ["question", "published", "here", "interval", "verdict"]
Study.open(source, profile).keep_verdicts("01_a", pd.DataFrame([row], columns=columns))"""


@pytest.mark.slow
def test_a_run_that_cannot_be_trained_stops_only_the_notebooks_that_need_it(shelf, tmp_path, capfd):
    content = profile_content(write_text(tmp_path / "text"))
    content["train"]["batch_tokens"], content["study"]["ratio_tokens"] = 2**16, 2**19
    content["study"]["sizes"] = [one_size("8x1", 2**19)]
    profile = write_profile(tmp_path, content)
    shelf("01_a.ipynb", STORES)
    shelf("02_b.ipynb", ASKS.replace("assert", "0 and"))
    assert notebooks.reproduce(profile) == 1
    out, err = capfd.readouterr()
    assert "\nInputError: " in f"\n{err}" and "20 to 24%" in out
    assert "02_b.ipynb failed in cell [3]: InputError" in err and "01_a.ipynb failed" not in err


def test_an_interrupted_notebook_stops_them_all(shelf, capfd):
    shelf("01_a.ipynb", "raise KeyboardInterrupt")
    shelf("02_b.ipynb", WRITE)
    assert main(["reproduce", "--profile", "smoke"]) == 130
    out, err = capfd.readouterr()
    assert "02_b.ipynb" not in out and "Interrupted. Finished runs are kept" in err


def test_an_interruption_loses_no_verdict_and_tells_what_was_found(shelf, capfd):
    shelf("01_a.ipynb", WRITE.replace("02_b", "01_a"))
    shelf("02_b.ipynb", WRITE)
    assert notebooks.reproduce("smoke") == 0
    before = (paths.profile_output("smoke") / "verdicts" / "02_b.csv").read_bytes()
    shelf("02_b.ipynb", "raise KeyboardInterrupt")
    assert main(["reproduce", "--profile", "smoke"]) == 130
    assert (paths.profile_output("smoke") / "verdicts" / "02_b.csv").read_bytes() == before
    page = (paths.profile_output("smoke") / "report.html").read_text()
    assert "It was interrupted before the last notebook." in page and "02_b, from an earlier time" in page
    assert "01_a, from an earlier time" not in page
    assert str(paths.profile_output("smoke") / "report.html") in capfd.readouterr().out


BAR = """from sparsity_utils.console import progress
print(sum(progress(range(3), "adding")))"""


def test_bars_are_text_that_a_terminal_shows_and_no_widget(shelf, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("CI")
    notebooks.execute(shelf("01_a.ipynb", BAR), tmp_path / "out.ipynb", {})
    assert "adding: " in capfd.readouterr().err
    assert "widget" not in (tmp_path / "out.ipynb").read_text()


def test_reproduce_takes_the_notebooks_that_are_named(shelf, capfd):
    shelf("01_a.ipynb", "raise ValueError('not asked for')")
    shelf("02_b.ipynb", WRITE)
    assert main(["reproduce", "--profile", "smoke", "--notebooks", "2"]) == 0
    assert "[1/1] 02_b.ipynb, profile smoke\n" in capfd.readouterr().out
    assert main(["reproduce", "--profile", "smoke", "--notebooks", "02", "3"]) == 2
    assert "There is no notebook 03; choose from 01, 02." in capfd.readouterr().err
    assert main(["reproduce", "--profile", "smoke", "--without", "1"]) == 0
    assert "[1/1] 02_b.ipynb, profile smoke" in capfd.readouterr().out
    assert main(["reproduce", "--profile", "smoke", "--without", "01", "2"]) == 2
    assert "Every notebook is left out; name fewer of them." in capfd.readouterr().err


def test_reproduce_succeeds_when_every_notebook_does(shelf):
    shelf("01_a.ipynb", STORES)
    assert notebooks.reproduce("smoke") == 0
    row = (paths.profile_output("smoke") / "verdicts.csv").read_text().splitlines()[1]
    assert row.startswith("falls?,7.1%,22%,20 to 24%,supported,0.")


def test_a_notebook_without_verdicts_has_failed(shelf, capfd):
    shelf("01_a.ipynb")
    assert notebooks.reproduce("smoke") == 1
    assert "01_a.ipynb stored no table of verdicts" in capfd.readouterr().err


def test_reproduce_takes_a_profile_of_ones_own(shelf, tmp_path, monkeypatch):
    shelf("01_a.ipynb", "print(profile)", STORES)
    (tmp_path / "mine.yaml").write_text((paths.PROFILES / "smoke.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    assert notebooks.reproduce("mine.yaml") == 0
    assert str(tmp_path / "mine.yaml") in (paths.profile_output("mine") / "notebooks" / "01_a.ipynb").read_text()


def test_reproduce_checks_the_profile_and_all_parameters_before_it_runs_any(shelf):
    shelf("01_a.ipynb")
    content = a_notebook()
    content.cells[1].source = 'source: str = "recorded"  # or "run"'
    nbformat.write(content, paths.NOTEBOOKS / "02_b.ipynb")
    with pytest.raises(InputError, match=r"02_b\.ipynb has no parameter 'profile'"):
        notebooks.reproduce("smoke")
    with pytest.raises(InputError, match="There is no profile 'smokey'"):
        notebooks.reproduce("smokey")
    assert not paths.build().exists()


def test_reproduce_without_notebooks_is_an_input_error(shelf):
    with pytest.raises(InputError, match="There is no notebook in"):
        notebooks.reproduce("smoke")


# Refreshing


def test_refresh_twice_writes_the_same_bytes_and_keeps_every_rule(shelf):
    path = shelf("01_a.ipynb", "import sys\nfor i in range(3):\n    print(i, flush=True)\nx = 5", "x")
    notebooks.refresh()
    first = path.read_bytes()
    notebooks.refresh()
    assert path.read_bytes() == first
    content = nbformat.read(path, as_version=4)
    assert [list(check(content)) for check in notebook_checks.ALL] == [[]] * len(notebook_checks.ALL)
    assert content.cells[2].outputs[0].text == "0\n1\n2\n"
    assert content.cells[3].outputs[0].data["text/plain"] == "5"


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("1 / 0", notebooks.NotebookFailed, "01_a.ipynb was left as it was: ZeroDivisionError"),
        ("import sys\nsys.prefix", InputError, "01_a.ipynb was left as it was: cell .2. stores an absolute path"),
    ],
    ids=["error", "absolute path"],
)
def test_refresh_refuses_and_leaves_the_notebook_as_it_was(shelf, source, error, message):
    path = shelf("01_a.ipynb", source)
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        notebooks.refresh_one(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
