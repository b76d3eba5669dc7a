"""Gradients of untrained models by layer: against the loss's own differences, and with what a mask lets through."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from small import tiny_study

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.study.ends import first_gradients, initial_model
from sparsity_utils.study.makers import gradient_flow as module
from sparsity_utils.study.study import Study
from sparsity_utils.text.windows import TrainingBatches

LAYERS = 8
EXPERIMENT = {
    "common": {"shape": "16x2", "d_ff": 32, "activation": "relu2", "tokens": 5000, "rates": [0.01]},
    "seeds": [0],
    "arms": {"dense": {}},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A tiny study that has the experiment, with eight layers to look through."""
    flow = {"d_model": 16, "n_layers": LAYERS, "head_size": 8, "seeds": [0, 3], "batch_tokens": 128}
    folder = tmp_path_factory.mktemp("gradient_flow")
    return tiny_study(folder, experiments={"q_sparse": EXPERIMENT}, gradient_flow=flow)


@pytest.fixture(scope="module")
def table(study):
    return study.table("gradient_flow")


def test_one_row_for_each_way_seed_and_layer(table):
    described = pd.read_csv(paths.RESULTS / "columns.csv").query("table == 'gradient_flow'")
    assert list(table.columns) == list(described["column"]) == ["way", "seed", "layer", "norm", "loss"]
    assert table.groupby(["way", "seed"], sort=False)["layer"].apply(list).tolist() == [list(range(LAYERS))] * 6
    assert list(dict.fromkeys(table["way"])) == list(module.WAYS) and set(table["seed"]) == {0, 3}
    assert (table["norm"] > 0).all()


def test_the_estimator_changes_gradients_and_nothing_else(table):
    loss = table.groupby(["way", "seed"])["loss"].first()
    assert loss["straight-through"].equals(loss["no straight-through"])
    assert (loss["straight-through"] != loss["dense"]).all() and loss["dense"].nunique() == 2
    norm = table.set_index(["way", "seed", "layer"])["norm"].unstack("way")
    assert (norm["straight-through"] != norm["no straight-through"]).all()


def test_a_norm_is_that_of_the_slope_of_the_loss(study, table):
    """Of dense models: the loss changes along a layer's gradient as fast as its norm says."""
    settings = {way: found for way, found in module._settings(study.profile) if found[1].seed == 3}
    (config,) = study.configs_of([settings["dense"]])
    model = initial_model(config.model, 3).double()
    inputs, targets = TrainingBatches(study.corpus.tokens("train"), 32, 128, 3)(0)
    for layer in (0, LAYERS - 1):
        matrices = [one for one in model.model.layers[layer].parameters() if one.ndim == 2]

        def loss():
            logits = model(input_ids=inputs).logits.flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits, targets.flatten())

        gradients = torch.autograd.grad(loss(), matrices)
        row = table[(table["way"] == "dense") & (table["seed"] == 3) & (table["layer"] == layer)].iloc[0]
        step = 3e-3 / row["norm"]  # norms of vectors are computed in float32, also in a model in float64
        with torch.no_grad():
            before, losses = [one.clone() for one in matrices], []
            for sign in (1, -1):
                for one, start, gradient in zip(matrices, before, gradients, strict=True):
                    one.copy_(start + sign * step * gradient)
                losses.append(loss().item())
            for one, start in zip(matrices, before, strict=True):
                one.copy_(start)
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(row["norm"] ** 2, rel=5e-3)
        assert sum(losses) / 2 == pytest.approx(row["loss"], rel=1e-5)


def test_ways_share_weights_and_batch(study):
    configs = [study.configs_of([settings])[0] for _, settings in module._settings(study.profile)]
    models = [initial_model(config.model, config.train.seed) for config in configs[::2]]  # seed 0 of each way
    for model in models[1:]:
        for one, other in zip(model.parameters(), models[0].parameters(), strict=True):
            assert torch.equal(one, other)
    # With all hooks gone the three are one model, and have one gradient: the batch is the same.
    for model in models[1:]:
        for part in model.modules():
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
    found = [first_gradients(model, config, study.corpus) for model, config in zip(models, configs[::2], strict=True)]
    assert found[0] == found[1] == found[2]


def test_a_profile_without_the_experiment_leaves_it_out(study):
    other = Study(study.name, study.folder, replace(study.profile, experiments={}))
    assert not other.answers("gradient_flow") and study.answers("gradient_flow")
    with pytest.raises(InputError, match="has no experiment q_sparse"):
        other.made("gradient_flow")


def test_impossible_seeds_are_refused(study):
    with pytest.raises(InputError, match=r"gradient_flow\.seeds are \[1, 1\]"):
        replace(study.profile.gradient_flow, seeds=(1, 1))
