"""What a study measures of neurons, tokens, dead neurons and transfer, held against direct calls on the checkpoints."""

import numpy as np
import pandas as pd
import pytest
from small import write_text

from sparsity_utils.models.config import ModelConfig, TrainConfig
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.metrics import measure_sparsity
from sparsity_utils.sparsity.patterns import DEAD, activation_patterns, transfer_matrix
from sparsity_utils.study.measurements import (
    VERSION,
    dead_curve,
    decided_by,
    domain_transfer,
    neuron_frequencies,
    sparsity_curve,
    token_ratios,
)
from sparsity_utils.study.profiles import MeasureConfig
from sparsity_utils.study.runs import RunConfig, train_run
from sparsity_utils.text.config import CorpusConfig
from sparsity_utils.text.corpus import build_corpus
from sparsity_utils.text.windows import domain_batches, measurement_batches

SETTINGS = MeasureConfig(calibration_tokens=512, evaluation_tokens=1536)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A ReLU model of three layers on text of two domains."""
    folder = tmp_path_factory.mktemp("portraits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSITY_BUILD", str(folder / "build"))
        for domain in ("code", "prose"):
            write_text(folder / "text" / domain)
        for file in (folder / "text" / "prose").iterdir():  # another text, not a duplicate of the code
            file.write_text(file.read_text()[::-1])
        corpus = build_corpus(CorpusConfig("path", str(folder / "text"), vocabulary=300, validation_share=0.2))
        model = ModelConfig(16, 3, "relu", vocabulary=300, context=32, head_size=8, base_width=16)
        training = TrainConfig(tokens=8000, batch_tokens=256, checkpoints=8, validation_tokens=512)
        yield train_run(RunConfig(model, training, corpus.hash, corpus.tokenizer_hash, 1), corpus), corpus


@pytest.fixture(scope="module")
def domains(trained):
    _, corpus = trained
    return domain_batches(corpus.tokens("validation"), corpus.documents("validation"), 32, 256, 256)


def last_stable(run):
    step = int(run.checkpoints.query("role == 'stable'")["step"].max())
    return step, run.load(step)


def test_neurons_and_tokens_are_those_of_the_stabilised_cett(trained, domains):
    run, corpus = trained
    step, model = last_stable(run)
    cett = sparsity_curve(run, corpus, SETTINGS).set_index("step").loc[step, "cett"]
    calibration = [batch for part, _ in domains.values() for batch in part]
    evaluation = {name: batches for name, (_, batches) in domains.items()}
    solved = measure_sparsity(model, calibration, "cett", cett=cett).thresholds
    expected = activation_patterns(model, evaluation, solved)
    neurons, tokens = neuron_frequencies(run, corpus, SETTINGS), token_ratios(run, corpus, SETTINGS)
    assert set(neurons["domain"]) == {"code", "prose"} and set(neurons["step"]) == set(tokens["step"]) == {step}
    np.testing.assert_allclose(neurons["frequency"], expected.frequencies["frequency"], rtol=5e-4)
    columns = ["token_id", "count", "activation_ratio", "first", "middle", "last"]
    pd.testing.assert_frame_equal(tokens[columns], expected.vocabulary[columns], rtol=5e-4)
    assert tokens["count"].sum() == 2 * 256


def test_dead_neurons_are_judged_by_both_thresholds_at_every_stable_checkpoint(trained):
    run, corpus = trained
    table = dead_curve(run, corpus, SETTINGS)
    curve = sparsity_curve(run, corpus, SETTINGS).set_index("step")
    stable = run.checkpoints.query("role == 'stable'")["step"].tolist()
    assert table[["step", "layer"]].drop_duplicates().shape == (len(stable) * 3, 2) and set(table["step"]) == set(
        stable
    )
    means = table.groupby("step")[["activation_ratio", "nonzero_share"]].mean()
    np.testing.assert_allclose(means, curve.loc[stable, ["activation_ratio", "nonzero_share"]], atol=1e-6)
    evaluation = measurement_batches(corpus.tokens("validation"), 32, "evaluation", SETTINGS.evaluation_tokens)
    step, model = last_stable(run)
    zero = activation_patterns(model, {"all": evaluation}, Thresholds("relu", (0.0,) * 3)).frequencies
    dead = zero.assign(dead=zero["frequency"] < DEAD).groupby("layer")["dead"].mean()
    np.testing.assert_allclose(table[table["step"] == step]["dead_share_zero"], dead)
    assert (table["dead_share"] >= table["dead_share_zero"]).all()
    assert (table[table["step"] == step]["dying_ratio"] < DEAD).all()
    assert (table["dying_ratio"] <= table["activation_ratio"]).all() and set(table["neurons"]) == {40}


def test_transfer_is_the_matrix_between_the_domains(trained, domains):
    run, corpus = trained
    step, model = last_stable(run)
    table = domain_transfer(run, corpus, SETTINGS)
    assert set(table["step"]) == {step} and set(table["p"]) == {1.0}
    pd.testing.assert_frame_equal(table.drop(columns=["step", "p"]), transfer_matrix(model, domains))


def test_domains_may_be_calibrated_on_a_number_of_tokens_of_their_own(trained):
    """More calibration must not take the small domains away; without the setting, names stay as they were."""
    run, corpus = trained
    own = MeasureConfig(calibration_tokens=8192, evaluation_tokens=1536, domain_calibration_tokens=256)
    batches = domain_batches(corpus.tokens("validation"), corpus.documents("validation"), 32, 256, 256)
    _, model = last_stable(run)
    expected = transfer_matrix(model, batches, own.p)
    found = domain_transfer(run, corpus, own)
    pd.testing.assert_frame_equal(found[expected.columns], expected)
    old = {"p": 1.0, "protocol": "stabilised", "calibration_tokens": 512, "evaluation_tokens": 1536, "version": VERSION}
    assert decided_by(SETTINGS) == old and decided_by(own)["domain_calibration_tokens"] == 256
