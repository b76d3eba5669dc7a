"""What a reader sees in a browser: notebooks that run in JupyterLab, panels that answer, a book that is searched."""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from lab import Server, running_lab
from make import make, targets
from notebook_checks import code_cells
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from sparsity_utils import paths

pytestmark = pytest.mark.slow
PICTURES = paths.ROOT / "build" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOAD, RUN = 60, 240  # seconds at most: a page or the answer of a panel, all cells of a notebook
WITH_PANEL = ("00", "08")
SETTINGS = {  # of JupyterLab: nothing is fetched, no notebook of the collection is saved, every cell is in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
HARMLESS = ("Got invalid theme mode: . Resetting to auto.",)  # of the book's theme, before a reader has chosen one
ERRORS = '[data-mime-type="application/vnd.jupyter.error"]'
BLANK = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium; on Debian it is the package chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def lab(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """JupyterLab as a person has it: neither CI nor an executor of this project is in its environment."""
    folder = tmp_path_factory.mktemp("lab")
    for name, settings in SETTINGS.items():
        file = folder / "CONFIG" / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    with running_lab(folder, "CI", "SPARSITY_UNATTENDED") as server:
        yield server


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """An empty page. What goes wrong in its console fails the test; a failed test leaves a picture under build/."""
    opened, problems = browser.new_page(viewport={"width": 1400, "height": 1000}), []
    opened.set_default_timeout(1000 * LOAD)

    def said(message: ConsoleMessage) -> None:
        if message.type == "error" and message.text not in HARMLESS:
            problems.append(message.text)

    opened.on("console", said)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    before = request.session.testsfailed
    yield opened
    if request.session.testsfailed > before or problems:
        opened.screenshot(path=PICTURES / f"{re.sub(r'[^a-z0-9]+', '_', request.node.name)}.png")
    opened.close()
    assert problems == []


def run_all(page: Page, lab: Server, notebook: Path) -> None:
    """Open a notebook, run all of its cells by the menu, and wait until the last has run."""
    page.goto(f"http://{lab.address}/lab/tree/{notebook.name}?token={lab.token}&reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    until(lambda: kernel_state(lab, notebook) == "idle", LOAD)
    for entry in ("Run", "Run All Cells"):
        page.get_by_role("menuitem", name=entry, exact=True).click()
    page.wait_for_function(f"() => {PROMPTS}.includes('[*]:')")
    page.wait_for_function(f"() => !{PROMPTS}.includes('[*]:')", timeout=1000 * RUN)
    until(lambda: kernel_state(lab, notebook) == "idle", LOAD)


def kernel_state(lab: Server, notebook: Path) -> str:
    """What the kernel of an open notebook is: idle, busy, starting; empty before there is one."""
    sessions = {session["path"]: session["kernel"]["execution_state"] for session in lab.ask("GET", "sessions")}
    return sessions.get(notebook.name, "")


def until(holds: Callable[[], bool], seconds: float) -> None:
    """Return when `holds()`; fail after some seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{seconds} seconds were not enough"
        time.sleep(0.2)


@pytest.mark.parametrize("number", ["00", "02", "08"])
def test_every_cell_of_a_notebook_runs_and_its_panel_answers(page: Page, lab: Server, number: str):
    notebook = next(path for path in paths.collection() if path.name.startswith(number))
    before = notebook.read_bytes()
    run_all(page, lab, notebook)
    cells = len(code_cells(nbformat.read(notebook, as_version=4)))
    assert page.evaluate(PROMPTS) == [f"[{count}]:" for count in range(1, cells + 1)]
    assert page.locator(ERRORS).count() == 0
    panel = page.locator(".widget-vbox")
    assert panel.count() == (number in WITH_PANEL)
    if number in WITH_PANEL:
        picture = panel.locator("img").first
        shown = picture.get_attribute("src")
        panel.locator(".noUi-handle").first.press("ArrowRight")
        until(lambda: picture.count() and picture.get_attribute("src") != shown, LOAD)
        assert panel.locator(ERRORS).count() == 0
    assert notebook.read_bytes() == before


# The book


@pytest.fixture(scope="module")
def book(browser: Browser) -> str:
    """The address of the site's folder, as `make book` leaves it: read from the disk, without a server."""
    if "book" not in targets():
        pytest.skip("the Makefile has no target book")
    done = make("book", f"PY={sys.executable}", "ENV=")
    assert done.returncode == 0, done.stderr
    return (paths.ROOT / "build" / "book").as_uri()


def test_the_book_has_a_front_page_chapters_and_a_search(page: Page, book: str):
    page.goto(f"{book}/index.html")
    page.locator("h1").wait_for()
    assert page.evaluate(BLANK) == []
    page.get_by_role("link", name="Chapters").first.click()
    page.get_by_role("link", name=re.compile("How sparse is your model")).first.click()
    page.get_by_role("heading", level=1, name=re.compile("How sparse is your model")).wait_for()
    assert page.evaluate(BLANK) == [] and page.locator("main img").count() > 1
    page.goto(f"{book}/search.html?q=CETT")
    results = page.locator("#search-results li a")
    results.first.click()
    page.locator("h1").wait_for()
    assert "CETT" in page.locator("main").inner_text()
