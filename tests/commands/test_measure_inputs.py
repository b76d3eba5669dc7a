"""`python -m sparsity_utils measure` with a training-free rule: what it prints and writes, and what it refuses."""

import json

import pandas as pd
import pytest

from sparsity_utils import paths
from sparsity_utils.__main__ import main
from sparsity_utils.text.sources import package_documents

RELU = str(paths.RECORDED_MODELS / "relu")
LAYERS = json.loads((paths.RECORDED_MODELS / "relu" / "config.json").read_text())["num_hidden_layers"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    documents = [document for document in package_documents("mistune") if len(document) > 2500]
    for number, document in enumerate(documents[:9]):
        (folder / f"{number}.txt").write_text(document[:2500], encoding="utf-8")
    return folder


@pytest.mark.parametrize(("metric", "label"), [("teal", "TEAL"), ("wina", "WINA"), ("cats", "CATS")])
def test_a_rule_is_measured_at_a_sparsity(capsys, tmp_path, text, metric, label):
    assert (
        main(["measure", RELU, "--text", str(text), "--metric", metric, "--sparsity", "0.5", "--out", str(tmp_path)])
        == 0
    )
    printed = capsys.readouterr().out
    report, maps = json.loads((tmp_path / "report.json").read_text()), pd.read_csv(tmp_path / "maps.csv")
    read = (maps["weights"] * maps["share_read"]).sum() / maps["weights"].sum()
    assert report["weights_read"] == pytest.approx(read) and report["sparsity"] == pytest.approx(1 - read)
    assert report["loss_sparse"] >= report["loss_dense"] - 1e-6
    assert printed.startswith(f"{label} skips {1 - read:.1%} of the weights of the linear maps (set to 50.0%)")
    assert (
        set(maps["role"]) == {"q", "k", "v", "o", "gate", "up", "down"} and maps["role"].value_counts().eq(LAYERS).all()
    )
    assert "GraniteForCausalLM" in printed and str(tmp_path / "maps.csv") in printed


def test_without_a_sparsity_it_is_solved_for_one_percent(capsys, tmp_path, text):
    assert main(["measure", RELU, "--text", str(text), "--metric", "teal", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert "(solved for 1%)" in capsys.readouterr().out
    assert report["settings"]["p"] == 1.0 and 1.0 < report["ppl_ratio"] < 1.05


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--sparsity", "0.5", "--p", "1"], "Both --sparsity and --p were given"),
        (["--sparsity", "1.5"], "choose a share of the inputs, 0 to 1"),
        (["--k", "3"], "k was given, and metric 'teal' does not use it"),
    ],
)
def test_what_does_not_fit_is_one_sentence(capsys, tmp_path, text, given, says):
    out = tmp_path / "out"
    assert main(["measure", RELU, "--text", str(text), "--metric", "teal", *given, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line and not out.exists()


def test_a_sparsity_that_no_whole_number_meets_names_the_nearest(capsys, tmp_path, text):
    given = ["--metric", "wina", "--sparsity", "0.333", "--out", str(tmp_path / "out")]
    assert main(["measure", RELU, "--text", str(text), *given]) == 2
    assert "the nearest share that is one is 0.34375" in capsys.readouterr().err


def test_sparsity_is_not_for_other_metrics(capsys, tmp_path, text):
    given = ["--metric", "relu", "--sparsity", "0.5", "--out", str(tmp_path / "out")]
    assert main(["measure", RELU, "--text", str(text), *given]) == 2
    assert "sparsity was given, and metric 'relu' does not use it" in capsys.readouterr().err
