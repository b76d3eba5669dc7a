"""Panels: shown to a person and to nobody else, and what their pictures say against the tables behind them."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from sparsity_utils import paths
from sparsity_utils.commands.notebooks import OwnKernel
from sparsity_utils.console import UNATTENDED
from sparsity_utils.findings import panels
from sparsity_utils.findings.budget import machine, plan_budget
from sparsity_utils.findings.panels import Choice
from sparsity_utils.laws.design import CURVES, fit_design, joined
from sparsity_utils.models.shapes import WIDTH_STEP, non_embedding_parameters
from sparsity_utils.study.tables import Tables

RECORDED = Tables.recorded()
FFNS, DECODING = RECORDED.table("sparse_ffn"), RECORDED.table("sparse_decoding")


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch):
    """Nothing says that a program runs this."""
    for name in ("CI", UNATTENDED):
        monkeypatch.delenv(name, raising=False)


# Who sees a panel

CELL = """from sparsity_utils.findings.panels import Choice, panel
panel(lambda x: [f"x is {x}"], x=Choice("x", (1, 2, 3), 2))"""


@pytest.mark.parametrize(
    ("kernel", "ci", "seen"),
    [({}, False, True), ({}, True, False), ({"kernel_manager_class": OwnKernel}, False, False)],
    ids=["a person", "nbval and CI", "papermill and refresh"],
)
def test_a_person_has_the_panel_and_a_program_stores_nothing_of_it(kernel, ci, seen, person, monkeypatch):
    if ci:
        monkeypatch.setenv("CI", "1")
    content = new_notebook(cells=[new_code_cell(CELL)])
    NotebookClient(
        content, kernel_name="python3", resources={"metadata": {"path": str(paths.ROOT)}}, **kernel
    ).execute()
    shown = [kind for output in content.cells[0].outputs for kind in output.get("data", {})]
    assert ("application/vnd.jupyter.widget-view+json" in shown) == ("widgets" in content.metadata) == seen
    assert seen or not content.cells[0].outputs


@pytest.mark.parametrize("name", ["CI", UNATTENDED])
def test_no_widget_is_made_where_nobody_looks_on(name, person, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert panels.panel(lambda x: pytest.fail("drawn"), x=Choice("x", (1, 2), 1)) is None


def test_a_slider_and_a_list_hand_their_values_on(person):
    asked = []
    shown = panels.panel(
        lambda **values: [asked.append(values)],
        size=Choice("n", (1000, 2000), 1000),
        on=Choice("m", {"slow": 1.5}, 1.5),
    )
    slider, names = shown.children[0].children
    assert [text for text, _ in slider.options] == ["1,000", "2,000"] and names.label == "slow"
    slider.value = 2000
    assert asked == [{"size": 1000, "on": 1.5}, {"size": 2000, "on": 1.5}]


# Notebook 00


def report(p: float) -> SimpleNamespace:
    rows = pd.DataFrame({"layer_0": [0.1, 0.2, 0.3], "layer_1": [0.3, 0.4, 0.5]})
    sample = {"per_token": rows, "tokens": 3, "documents": 2}
    ratios = {"activation_ratio": 0.2 / p, "interval": (0.1 / p, 0.3 / p)}
    return SimpleNamespace(**sample, **ratios, ppl_ratio=1 + p / 100, ppl_ratio_interval=(1, 1 + p / 50))


def test_a_price_is_measured_once_and_only_when_it_is_chosen(person):
    asked = []
    shown = panels.prices(
        lambda p, show_progress: asked.append(p) or report(p), report(1.0), pd.Index([1, 2]), ["a", "b"]
    )
    (slider,) = shown.children[0].children
    assert slider.value == 1.0 and not asked
    for price in (5.0, 1.0, 5.0, 0.1):
        slider.value = price
    assert asked == [5.0, 0.1]


def test_the_chosen_price_is_marked_among_those_measured():
    figure = panels.prices_figure({q: report(q) for q in (5.0, 0.5, 1.0)}, 5.0)
    ratios, rises = figure.axes
    line, mark = (line.get_xydata() for line in ratios.lines if line.get_marker() == "o")
    assert line.tolist() == [[0.5, 40], [1, 20], [5, 4]] and mark.tolist() == [[5, 4]]
    assert "5%" in ratios.get_title("left") and rises.get_title("left") == "Perplexity × 1.0500"


# Notebook 06


def test_a_measured_call_on_the_measured_memory_takes_what_it_took():
    rows = panels._measured(FFNS)
    for way, row in rows[(rows["tokens"] == 1) & (rows["sparsity"].round(3) == 0.9)].set_index("way").iterrows():
        found = panels.expected_call(rows, 100 * row["sparsity"], row["read_gb_per_s"], 1).loc[way]
        assert found["milliseconds"] == pytest.approx(row["milliseconds"])
        assert found["limit"] == pytest.approx(row["megabytes"] / row["read_gb_per_s"])
        assert found["read_share"] == pytest.approx(1 / row["ideal_speedup"])


def test_twice_the_memory_halves_times_and_logarithms_are_interpolated():
    rows = pd.DataFrame(
        {"way": ["dense", "sparse"] * 2, "tokens": 2, "sparsity": [0.5, 0.5, 0.9, 0.9], "read_gb_per_s": 30.0,
         "milliseconds": [8.0, 4.0, 8.0, 1.0], "megabytes": [90.0, 60.0, 90.0, 30.0],
         "ideal_speedup": [1.0, 1.5, 1.0, 3.0]}
    )  # fmt: skip
    found = panels.expected_call(rows, 70, 60.0, 2)
    assert list(found.index) == ["dense", "sparse"]
    assert found["milliseconds"].tolist() == pytest.approx([4.0, 1.0])
    assert found["limit"].tolist() == pytest.approx([1.5, np.sqrt(60 * 30) / 60])


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("sparsity", [panels.SPARSITIES[0], panels.SPARSITIES[-1]])
def test_the_ends_of_the_decoding_panel_can_be_drawn(tokens, sparsity, tmp_path):
    figure = panels.decoding_figure(panels._measured(FFNS), sparsity=sparsity, bandwidth=50, tokens=tokens)
    assert figure.save(tmp_path / "shown") and "Expected at 50 GB/s" in figure.axes[1].get_title("left")


# Notebook 08


@pytest.fixture(scope="module")
def fitted():
    return fit_design(joined(RECORDED.table(question) for question in CURVES if RECORDED.answers(question)))


@pytest.mark.parametrize("size", panels.SIZES.values())
@pytest.mark.parametrize("layers", panels.LAYERS)
def test_the_width_is_the_nearest_and_the_plan_is_of_that_shape(fitted, size, layers):
    width = panels.width(size, layers)
    near = {
        w: abs(non_embedding_parameters(w, layers) ** 0.5 - size**0.5) for w in range(WIDTH_STEP, 10**5, WIDTH_STEP)
    }
    assert width == min(near, key=near.get)
    exact = non_embedding_parameters(width, layers)
    models = plan_budget(fitted, machine(FFNS, DECODING, 50.0), exact, 100 * exact, 1024, ratios=(width / layers,))
    assert set(models["shape"]) == {f"{width}x{layers}"} and len(models) == 2


def test_the_budget_panel_answers_and_says_what_is_beyond_the_runs(fitted, person, monkeypatch):
    drawn = []
    monkeypatch.setattr(panels, "budget_figure", lambda models, tokens: drawn.append((models, tokens)))
    shown = panels.budgets(fitted, FFNS, DECODING, 1024)
    size, _, _, device, _ = shown.children[0].children
    device.label = "twelve channels of DDR5-4800, 461 GB/s"  # faster than any machine that records on two cores
    size.label = "1B"
    (before, _), (faster, _), (large, tokens) = drawn
    assert (faster["dense"] > before["dense"]).all() and tokens == 100 * large["parameters"].iloc[0]
    assert large["extrapolates"].str.contains("decades above").all()


def test_the_budget_figure_shows_values_and_what_is_missing(fitted):
    models = plan_budget(fitted, machine(FFNS, DECODING, 50.0), 100_000, 1e7, 1024, ratios=(12,))
    figure = panels.budget_figure(models, 1e7)
    shown = figure.axes[0].containers[0].lines[0].get_ydata()
    assert shown.tolist() == pytest.approx(100 * models["activation_ratio"])
    assert "rates of kernels measured from d_model 768 on." in figure.get_supxlabel().replace("\n", " ")
    assert "too few runs" in panels.budget_figure(models.iloc[:0], 1e7).get_supxlabel()
