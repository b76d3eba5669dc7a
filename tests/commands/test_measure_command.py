"""`python -m sparsity_utils measure`: what it prints and writes, and what it says when it cannot."""

import errno
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_files import tiny_gguf
from transformers import BertConfig, BertForMaskedLM

from sparsity_utils import paths
from sparsity_utils.__main__ import command_parser, main
from sparsity_utils.commands import measure
from sparsity_utils.console import InputError
from sparsity_utils.text.config import MEASURED_TOKENS
from sparsity_utils.text.sources import package_documents

RELU = str(paths.RECORDED_MODELS / "relu")
FILES = {"report.json", "layers.csv", "tokens.csv"} | {
    f"{name}.{kind}" for name in ("layers", "heatmap") for kind in ("png", "svg")
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Nine documents of a pinned package's source, the same for everybody."""
    folder = tmp_path_factory.mktemp("text")
    documents = [document for document in package_documents("mistune") if len(document) > 2500]
    for number, document in enumerate(documents[:9]):
        (folder / f"{number}.txt").write_text(document[:2500], encoding="utf-8")
    return folder


def measured(capsys, *arguments: object) -> str:
    """What a successful `measure` prints."""
    assert main(["measure", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, out: Path, *arguments: object) -> str:
    """The one sentence of a `measure` that fails, having written nothing."""
    assert main(["measure", *map(str, arguments), "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and not out.exists()
    (line,) = printed.err.strip().splitlines()
    return line.removeprefix("Error: ")


def test_a_model_and_a_text_give_a_number_a_table_and_files(capsys, text, tmp_path):
    out = tmp_path / "found"
    printed = measured(capsys, RELU, "--text", text, "--length", 128, "--max-tokens", 6000, "--out", out)
    assert {file.name for file in out.iterdir()} == FILES
    found, layers = json.loads((out / "report.json").read_text()), pd.read_csv(out / "layers.csv")
    tokens = pd.read_csv(out / "tokens.csv", keep_default_na=False)

    lines = printed.splitlines()
    assert lines[0].startswith(f"{found['activation_ratio']:.1%} of the neurons are active per token (standard error ")
    assert f"perplexity from {found['perplexity_dense']:.2f} to {found['perplexity_sparse']:.2f} (" in lines[1]
    assert (
        lines[2] == f"Metric cett-ppl, p = 1; {len(tokens):,} tokens of 6 documents; thresholds solved on other text."
    )
    assert lines[3] == f"Model {found['settings']['opened']}."
    assert found["settings"]["opened"].startswith("GraniteForCausalLM, ") and lines[3].endswith(" parameters, float32.")
    after = 6 + len(layers)
    assert [line.split()[:2] for line in lines[6:after]] == [[str(n), f"model.layers.{n}.mlp"] for n in layers["layer"]]
    notes, files = lines[after : -len(FILES)], lines[-len(FILES) :]
    assert {Path(line) for line in files} == {out / name for name in FILES}
    assert all(line.startswith("Note: ") for line in notes if line)  # whether there are any is up to the text

    assert 0.05 < found["activation_ratio"] < found["nonzero_share"] < 0.6
    assert found["interval"][0] < found["activation_ratio"] < found["interval"][1]
    assert layers["activation_ratio"].mean() == pytest.approx(found["activation_ratio"])
    assert len(tokens) == found["tokens"] < 4500 and found["documents"] == 6  # two thirds of 6,000, whole documents
    ratios = tokens[[f"layer_{layer}" for layer in layers["layer"]]]
    np.testing.assert_allclose(ratios.mean(), layers["activation_ratio"], rtol=1e-4)
    assert found["settings"]["length"] == 128 and found["settings"]["dtype"] == "float32"
    assert found["versions"]["torch"] == torch.__version__


def test_a_gguf_file_is_measured_like_any_model(capsys, text, tmp_path):
    tiny_gguf(tmp_path / "tiny.gguf")
    arguments = ("--text", text, "--metric", "top-k", "--k", 16, "--max-tokens", 1000, "--out", tmp_path / "found")
    printed = measured(capsys, tmp_path / "tiny.gguf", *arguments)
    assert printed.startswith("25.0% of the neurons are active per token")
    assert "\nModel LlamaForCausalLM, 36.2k parameters, float32, dequantised from Q8_0 (GGUF).\n" in printed


def test_a_metric_that_solves_nothing_measures_all_documents(capsys, text, tmp_path):
    arguments = ("--text", text, "--metric", "top-k", "--k", 12, "--dtype", "bfloat16", "--out", tmp_path)
    printed = measured(capsys, RELU, *arguments)
    share = 12 / json.loads((paths.RECORDED_MODELS / "relu" / "config.json").read_text())["intermediate_size"]
    assert printed.startswith(f"{share:.1%} of the neurons are active per token (standard error 0.0")
    assert "Metric top-k, k = 12; " in printed and "tokens of 9 documents.\n" in printed
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["dtype"] == "bfloat16"


def test_one_document_has_no_error_and_calibration_may_be_another_text(capsys, text, tmp_path):
    one, other = text / "0.txt", text / "1.txt"
    arguments = ("--text", one, "--calibration", other, "--metric", "cett", "--cett", 0.2, "--out", tmp_path)
    printed = measured(capsys, RELU, *arguments)
    assert "are active per token (one document, so its error is unknown)." in printed
    assert "Metric cett, cett = 0.2; " in printed and f"of 1 document; thresholds solved on {other}." in printed
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["standard_error"] is None and found["interval"] == [None, None]
    assert found["settings"]["calibration"] == str(other) and found["cett"] == pytest.approx(0.2, abs=0.03)


def test_results_go_where_build_is_by_default(capsys, text, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path))
    measured(capsys, RELU, "--text", text, "--metric", "relu", "--max-tokens", 600)
    assert {file.name for file in (tmp_path / "measure" / "relu").iterdir()} == FILES


def test_a_second_measurement_replaces_its_files_and_leaves_others(capsys, text, tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    for metric in ("relu", "cett-ppl"):
        measured(capsys, RELU, "--text", text, "--metric", metric, "--max-tokens", 3000, "--out", tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == FILES | {"thesis.txt"}
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["metric"] == "cett-ppl"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--p", 0], "p is 0.0; choose a rise of perplexity above 0 and at most 100 percent."),
        (["--metric", "top-k"], "Metric 'top-k' needs k: give k=..., on the command line --k."),
        (["--k", 3], "k was given, and metric 'cett-ppl' does not use it"),
        (["--length", 300], "length is 300; choose 2 to 256, the context of the model in tokens."),
        (["--length", 1], "length is 1; choose 2 to 256"),
        (["--max-tokens", 10], "3 tokens are less than one window of 256: raise --max-tokens, of which a third"),
        (["--metric", "relu", "--calibration", "x.txt"], "--calibration was given, and metric 'relu' solves nothing"),
        (["--calibration", "no_such.txt"], "no_such.txt"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_be_asked_is_refused_in_one_sentence(capsys, text, tmp_path, arguments, sentence):
    assert sentence in refused(capsys, tmp_path / "out", RELU, "--text", text, *arguments)


def test_a_missing_model_or_text_is_named(capsys, text, tmp_path):
    out = tmp_path / "out"
    assert "no_such_model" in refused(capsys, out, tmp_path / "no_such_model", "--text", text)
    assert "no_such.txt" in refused(capsys, out, RELU, "--text", tmp_path / "no_such.txt")


@pytest.mark.parametrize("content", ["", " \n\n", "x"], ids=["empty", "blank", "one token"])
def test_a_text_too_short_is_refused(capsys, tmp_path, content):
    (tmp_path / "short.txt").write_text(content)
    assert refused(capsys, tmp_path / "out", RELU, "--text", tmp_path / "short.txt")


def test_a_model_that_predicts_no_next_token_is_refused(capsys, text, tmp_path, monkeypatch):
    tiny = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    bert = BertForMaskedLM(BertConfig(vocab_size=50, **tiny))
    monkeypatch.setattr(measure, "open_checkpoint", lambda *_, **__: (bert, object()))
    sentence = "bert is a BertForMaskedLM, which does not predict the next token of a text"
    assert refused(capsys, tmp_path / "out", "bert", "--text", text).startswith(sentence)


def read_only(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(capsys, text, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(measure, "open_checkpoint", lambda *_, **__: pytest.fail("went to work"))
    assert main(["measure", RELU, "--text", str(text), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "file is not a folder that can be written to; name another one with --out." in capsys.readouterr().err
    monkeypatch.setattr(measure.tempfile, "mkdtemp", read_only)
    assert main(["measure", RELU, "--text", str(text), "--out", str(tmp_path / "out")]) == 2
    assert f"Error: {tmp_path} is not a folder that can be written to" in capsys.readouterr().err


def test_an_interruption_writes_nothing(capsys, text, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure_sparsity", interrupt)
    assert main(["measure", RELU, "--text", str(text), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "\nInterrupted. Nothing was written.\n" and not (tmp_path / "out").exists()


def test_help_teaches_with_examples_that_parse(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["measure", "--help"])
    shown = capsys.readouterr().out
    examples = [line.split() for line in shown.splitlines() if line.startswith("  python -m sparsity_utils measure")]
    assert [Path(command_parser().parse_args(words[3:]).model).name for words in examples] == ["relu", "gpt2"]
    assert "the share of neurons that are active" in shown and f"(default: {MEASURED_TOKENS})" in shown


# Parts


def windows(*sizes: int, length: int = 4, padded: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches of `sizes` windows, numbered from 0, the last `padded` tokens of each no real ones."""
    batches, first = [], 0
    for size in sizes:
        ids = torch.arange(first, first + size)[:, None].expand(size, length)
        mask = torch.ones(size, length, dtype=torch.int64)
        mask[:, length - padded :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "documents": ids[:, 0]})
        first += size
    return batches


@pytest.mark.parametrize(
    ("tokens", "padded", "kept"),
    [
        (100, 0, [[0, 1, 2], [3, 4], [5, 6, 7]]),
        (32, 0, [[0, 1, 2], [3, 4], [5, 6, 7]]),
        (16, 0, [[0, 2], [4], [6]]),
        (12, 2, [[0, 1, 2], [4], [5, 6]]),
        (4, 0, [[0]]),
    ],
)
def test_windows_are_thinned_evenly(tokens, padded, kept):
    thin = measure.thinned(windows(3, 2, 3, padded=padded), tokens)
    assert [batch["documents"].tolist() for batch in thin] == kept
    assert all(batch["input_ids"][:, 0].tolist() == batch["documents"].tolist() for batch in thin)


def test_less_than_a_window_is_refused():
    with pytest.raises(InputError, match=r"3 tokens are less than one window of 4: raise --max-tokens"):
        measure.thinned(windows(3), 3)


def test_what_is_unknown_is_null_in_json():
    assert measure.known((math.nan, 1.0)) == [None, 1.0] and measure.known(math.nan) is None
    assert measure.known("calibration") == "calibration" and measure.known(3) == 3


def test_a_price_belongs_to_its_metric(capsys, text, tmp_path):
    said = refused(capsys, tmp_path / "out", RELU, "--text", text, "--metric", "relu", "--p", 2)
    assert said == "p was given, and metric 'relu' does not use it: leave p out."


def test_a_price_far_from_the_promise_is_noted(capsys, text, tmp_path):
    (tmp_path / "one.txt").write_text("print(1)\n" * 60, encoding="utf-8")
    printed = measured(capsys, RELU, "--text", text, "--calibration", tmp_path / "one.txt", "--out", tmp_path / "out")
    assert "Note: the thresholds were solved for 1% and cost" in printed
