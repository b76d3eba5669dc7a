"""What a study measures on a run, held against direct calls on the loaded checkpoints."""

import numpy as np
import pytest
from small import write_text

from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.sparsity.calibration import solve_stabilised_cett
from sparsity_utils.sparsity.metrics import measure_sparsity
from sparsity_utils.study.measurements import CETTS, metric_comparison, sparsity_curve
from sparsity_utils.study.profiles import MeasureConfig
from sparsity_utils.study.runs import RunConfig, train_run
from sparsity_utils.text.config import CorpusConfig
from sparsity_utils.text.corpus import build_corpus
from sparsity_utils.text.windows import measurement_batches

SETTINGS = MeasureConfig(calibration_tokens=256, evaluation_tokens=512)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curves")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSITY_BUILD", str(folder / "build"))
        text = write_text(folder / "text")
        corpus = build_corpus(CorpusConfig("path", str(text), vocabulary=300, validation_share=0.2))
        model = ModelConfig(16, 2, "relu", vocabulary=300, context=32, head_size=8, base_width=16)
        training = TrainConfig(tokens=8000, batch_tokens=256, checkpoints=8, validation_tokens=512)
        yield train_run(RunConfig(model, training, corpus.hash, corpus.tokenizer_hash, 1), corpus), corpus


def batches(corpus) -> tuple[list, list]:
    tokens = corpus.tokens("validation")
    return measurement_batches(tokens, 32, "calibration", 256), measurement_batches(tokens, 32, "evaluation", 512)


def test_the_stabilised_curve_applies_the_cett_of_the_last_five(trained):
    run, corpus = trained
    curve, (calibration, evaluation) = sparsity_curve(run, corpus, SETTINGS), batches(corpus)
    stable = run.checkpoints.query("role == 'stable'")["step"].tolist()
    solved = solve_stabilised_cett([run.load(step) for step in stable[-5:]], calibration, 1.0)
    assert set(curve["cett"]) == {solved.cett} and list(curve["step"]) == list(run.checkpoints["step"])
    row = curve.iloc[2]
    report = measure_sparsity(run.load(int(row["step"])), evaluation, "cett", cett=solved.cett, calibration=calibration)
    assert (row["activation_ratio"], row["ppl_ratio"]) == (report.activation_ratio, report.ppl_ratio)
    plain = measure_sparsity(run.load(int(row["step"])), evaluation, "relu")
    assert row["nonzero_share"] == plain.activation_ratio == plain.nonzero_share < 1


def test_the_per_checkpoint_curve_solves_each(trained):
    run, corpus = trained
    each = sparsity_curve(run, corpus, MeasureConfig(1.0, "per-checkpoint", 256, 512))
    assert each["cett"].nunique() > 1
    calibration, evaluation = batches(corpus)
    last = measure_sparsity(run.load(int(each["step"].iloc[-1])), evaluation, calibration=calibration)
    assert each["cett"].iloc[-1] == last.target_cett


def test_every_metric_is_compared_on_the_last_stable_checkpoint(trained):
    run, corpus = trained
    table = metric_comparison(run, corpus, SETTINGS)
    assert set(table["step"]) == {run.checkpoints.query("role == 'stable'")["step"].max()}
    assert list(table.query("metric == 'cett'")["setting"]) == list(CETTS)
    for metric in ("top-k", "fat", "cett"):
        rows = table[table["metric"] == metric].sort_values("setting")
        rising = rows["activation_ratio"] if metric == "top-k" else -rows["activation_ratio"]
        assert (np.diff(rising) >= 0).all(), metric  # the knob moves the ratio one way
    relu = table.query("metric == 'relu'").iloc[0]
    assert relu["ppl_ratio"] == pytest.approx(1, abs=1e-6) and np.isnan(relu["setting"])
    assert np.allclose(np.exp(table["loss"] - relu["loss"]), table["ppl_ratio"], rtol=1e-6)
