"""Networks on digits: parts, noise and networks against literal versions, stacks against single seeds, the table."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from small import profile_content, write_profile

from sparsity_utils.console import InputError
from sparsity_utils.study.digits_config import DigitsConfig
from sparsity_utils.study.makers import digits as module
from sparsity_utils.study.makers import digits_images, digits_models
from sparsity_utils.study.makers.digits import Condition, gap_sums
from sparsity_utils.study.makers.digits_images import BRIGHTEST, LEVELS, corrupted, loaded, parts_of, redrawn
from sparsity_utils.study.makers.digits_models import (
    ARMS,
    HEADS,
    NEURONS,
    SHAPES,
    TOKENS,
    WIDTH,
    K,
    initial,
    outputs,
    top_k,
)
from sparsity_utils.study.plan import planned
from sparsity_utils.study.study import Study

SETTINGS = DigitsConfig(seeds=2, tuning_seeds=1, rates=(0.003,), epochs=1, transformer_epochs=1)


def test_the_parts_of_a_seed_share_no_image_and_hold_all():
    parts = parts_of([0, 1], 0.4)
    images, _ = loaded()
    for seed in range(2):
        found = torch.cat([parts.training[seed], parts.validation[seed], parts.test[seed]]) * BRIGHTEST
        assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, images.tolist()))
    assert parts.test.shape == (2, 997, 64) and not parts.test[0].equal(parts.test[1])


def test_noise_in_labels_reaches_what_trains_and_never_what_tests():
    images, labels = loaded()
    true = {tuple(image): label for image, label in zip(images.tolist(), labels.tolist(), strict=True)}
    parts = parts_of([3], 0.8)
    for name, least, most in (("training", 0.6, 0.8), ("validation", 0.6, 0.8), ("test", 0, 0)):
        known = [true[tuple(one)] for one in (getattr(parts, name)[0] * BRIGHTEST).tolist()]
        wrong = (getattr(parts, f"{name}_labels")[0] != torch.tensor(known)).double().mean().item()
        assert least <= wrong <= most, name  # 72% of the labels are expected to change: a tenth is drawn as it was


def test_redrawn_labels_are_as_many_as_asked_for_uniform_and_nested():
    labels = np.full(20_000, 3)
    some, many, none = (redrawn(labels, share, np.random.default_rng(0)) for share in (0.4, 0.8, 0.0))
    assert (none == labels).all()
    assert (some != 3).mean() == pytest.approx(0.36, abs=0.01) and (many != 3).mean() == pytest.approx(0.72, abs=0.01)
    assert ((some != 3) <= (many != 3)).all() and (some[some != 3] == many[some != 3]).all()
    counts = np.bincount(many[many != 3], minlength=10)
    assert counts[3] == 0 and np.delete(counts, 3) == pytest.approx(np.full(9, 1600), rel=0.1)


def test_pixel_noise_has_the_size_that_it_names():
    middle, random = np.full((2000, 64), 8.0), np.random.default_rng(0)
    assert corrupted(middle, "gaussian", 2.0, random).std() == pytest.approx(2, rel=0.01)
    impulse = corrupted(middle, "impulse", 0.3, random)
    assert (impulse == 0).mean() == pytest.approx(0.15, abs=0.01) == (impulse == BRIGHTEST).mean()
    counts = corrupted(middle, "shot", 8.0, random) / BRIGHTEST * 8
    assert np.allclose(counts, counts.round()) and counts.mean() == pytest.approx(4, rel=0.02)  # 8 at the brightest
    assert corrupted(np.zeros((5, 64)), "shot", 2.0, random).max() == 0
    for kind, levels in LEVELS.items():
        noisy = corrupted(loaded()[0], kind, levels[-1], random)
        assert noisy.min() >= 0 and noisy.max() <= BRIGHTEST and (noisy != loaded()[0]).any()


def test_noisy_tests_are_of_the_test_images_of_each_seed():
    tests, clean = digits_images.noisy_tests([4, 5]), parts_of([4, 5], 0.0).test
    alone = digits_images.noisy_tests([5])
    for kind, levels in tests.items():
        for noisy, single in zip(levels, alone[kind], strict=True):
            assert noisy.shape == clean.shape and noisy[1].equal(single[0])
    kept = tests["impulse"][0] == clean
    assert kept.double().mean().item() == pytest.approx(
        0.9 + 0.1 * ((clean == 0) | (clean == 1)).double().mean().item() / 2, abs=0.02
    )


def test_top_k_keeps_the_largest_and_passes_gradient_to_them_alone():
    active = torch.randn(3, 5, NEURONS, generator=torch.Generator().manual_seed(0)).relu().requires_grad_()
    kept = top_k(active)
    literal = torch.zeros_like(active)
    for row, out in zip(active.detach().flatten(0, 1), literal.flatten(0, 1), strict=True):
        for place in sorted(range(NEURONS), key=lambda place: -row[place])[:K]:
            out[place] = row[place]
    assert kept.equal(literal) and (kept > 0).sum(-1).eq(K).all()
    kept.sum().backward()
    assert active.grad.equal((literal > 0).float())
    few = torch.zeros(1, 1, NEURONS)
    few[..., :5] = 1.0
    assert top_k(few).equal(few)  # fewer than K are not zero


def literal_transformer(parameters, image, keep):
    """Logits of one image (8, 8) in float64, patch by patch."""
    weight = {name: value.detach()[0].double() for name, value in parameters.items()}

    def linear(name, x):
        return x @ weight[name] + weight[f"{name} bias"][0]

    def normed(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    tokens = []
    for place in range(TOKENS):
        row, column = 2 * (place // 4), 2 * (place % 4)
        one_hot = torch.eye(TOKENS, dtype=torch.float64)[place]
        tokens.append(linear("embed", torch.cat([image[row : row + 2, column : column + 2].flatten(), one_hot])))
    x = torch.stack(tokens)  # (TOKENS, WIDTH)
    query, key, value = linear("attend", normed(x)).split(WIDTH, dim=-1)
    size, heads = WIDTH // HEADS, []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = (query[:, part] @ key[:, part].T / size**0.5).softmax(dim=-1)
        heads.append(scores @ value[:, part])
    x = x + linear("join", torch.cat(heads, dim=-1))
    x = x + linear("value", keep(linear("key", normed(x)).relu()))
    return linear("classify", normed(x).mean(0))


@pytest.mark.parametrize("arm", ARMS)
def test_the_transformer_is_the_literal_one(arm):
    parameters, images = initial("transformer", [7]), parts_of([7], 0.0).test[:, :6]
    with torch.no_grad():
        for name in [name for name in parameters if name.endswith("bias")]:
            parameters[name].normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    keep = (lambda x: x) if arm == "all" else lambda x: x * (x >= x.sort(-1).values[:, -K, None])
    wanted = torch.stack([literal_transformer(parameters, one.view(8, 8).double(), keep) for one in images[0]])
    torch.testing.assert_close(
        outputs("transformer", parameters, images, arm)[0][0].double(), wanted, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("arm", ARMS)
def test_the_mlp_is_the_literal_one(arm):
    parameters, images = initial("mlp", [7]), parts_of([7], 0.0).test[:, :6]
    active = (images[0].double() @ parameters["key"][0].double()).relu()
    if arm != "all":
        active = active * (active >= active.sort(-1).values[:, -K, None])
    wanted = active @ parameters["value"][0].double()
    logits, passed = outputs("mlp", parameters, images, arm)
    torch.testing.assert_close(logits[0].double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(passed[0].double(), active, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("arm", ARMS)
def test_a_stack_of_seeds_trains_each_as_it_would_alone(model, arm, monkeypatch):
    monkeypatch.setattr(module, "BATCHES", {"mlp": 60, "transformer": 200})  # few steps: rounding stays small
    condition = Condition(model, arm, 0.4)
    both, alone = (
        module.trained(condition, parts_of(seeds, 0.4), 0.003, SETTINGS) for seeds in ((0, 5), (5,))
    )  # fmt: skip
    start = initial(model, [5])
    for name, value in alone.items():
        torch.testing.assert_close(both[name][1:], value, rtol=0, atol=2e-4)
        assert (value - start[name]).abs().max() > 0.003, name


def test_a_trained_network_reads_digits_and_noise_harms_it():
    condition, settings = Condition("mlp", "top-k", 0.0), replace(SETTINGS, epochs=5)
    parts = parts_of([0], 0.0)
    found = module.tested(condition, module.trained(condition, parts, 0.01, settings), parts)
    (accuracy,), (noisy,), (nonzero,) = (found[name] for name in ("accuracy", "accuracy_gaussian", "nonzero_share"))
    assert accuracy > 0.85 and 0.3 < noisy < accuracy and nonzero == pytest.approx(K / NEURONS)


def test_gaps_pool_to_the_calibration_error_of_all_images():
    random = torch.Generator().manual_seed(0)
    probabilities = (3 * torch.randn(2, 300, 10, generator=random)).softmax(-1)
    probabilities[0, 0] = torch.eye(10)[4]  # a confidence of 1 falls in the last bin
    labels = torch.randint(10, (2, 300), generator=random)
    gaps = gap_sums(probabilities, labels)
    confidence, chosen = (value.flatten() for value in probabilities.double().max(-1))
    right, error = (chosen == labels.flatten()).double(), 0.0
    for number in range(10):
        inside = (confidence >= number / 10) & ((confidence < (number + 1) / 10) | (number == 9))
        if inside.any():
            error += inside.double().mean().item() * abs(right[inside].mean() - confidence[inside].mean()).item()
    assert (gaps.sum(0).abs().sum() / 600).item() == pytest.approx(error) and error > 0.1


def test_the_rate_is_that_of_the_lowest_finite_validation_loss(monkeypatch):
    losses = {0.1: [0.2, 0.9], 0.2: [0.5, 0.4], 0.3: [float("nan"), 0.1]}
    monkeypatch.setattr(module, "trained", lambda condition, parts, rate, settings: rate)
    monkeypatch.setattr(module, "validation_losses", lambda condition, rate, parts: torch.tensor(losses[rate]))
    settings = replace(SETTINGS, tuning_seeds=2, rates=tuple(losses))
    assert module.chosen_rate(Condition("mlp", "all", 0.0), settings) == 0.2


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of the pieces, and the table."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, module.digits(SETTINGS, folder)


def test_the_table_has_a_row_for_each_seed_and_the_columns_that_are_described(kept):
    _, table = kept
    assert len(table) == 2 * 2 * 3 * 2 and not table.duplicated(["model", "arm", "label_noise", "seed"]).any()
    assert set(table["learning_rate"]) <= set(SETTINGS.rates) and set(table["images"]) == {997}
    noisy = ["accuracy_gaussian", "accuracy_impulse", "accuracy_shot"]
    trained_clean = table["label_noise"] == 0
    assert table.loc[trained_clean, noisy].notna().all(axis=None) and table.loc[~trained_clean, noisy].isna().all(
        axis=None
    )
    confident = table.filter(like="gap_").sum(axis=1) / table["images"] + table["accuracy"]  # the mean confidence
    assert confident.between(0.1, 1).all() and table.drop(columns=noisy).notna().all(axis=None)


def test_finished_conditions_are_kept_and_the_same_settings_give_the_same_rows(kept, monkeypatch):
    folder, table = kept
    again = module._measured(Condition("mlp", "top-k", 0.4), SETTINGS)["runs"]
    rows = table.query("model == 'mlp' and arm == 'top-k' and label_noise == 0.4").reset_index(drop=True)
    pd.testing.assert_frame_equal(again, rows, rtol=1e-12)
    monkeypatch.setattr(module, "_measured", lambda *given: pytest.fail("measured again"))
    pd.testing.assert_frame_equal(module.digits(SETTINGS, folder), table)


def test_a_study_makes_the_table_without_runs_unless_scikit_learn_is_missing(kept, tmp_path, monkeypatch):
    _, table = kept

    def measured(condition, settings):
        same = "model == @condition.model and arm == @condition.arm and label_noise == @condition.label_noise"
        return {"runs": table.query(same).head(settings.seeds)}

    monkeypatch.setattr(module, "_measured", measured)
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    study = Study.from_profile(write_profile(tmp_path, profile_content(tmp_path)))
    assert study.answers("digits") and planned(study.profile, "digits") == [] == study.jobs("digits")
    assert len(study.table("digits")) == 12 and study.file("digits").exists()
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert not study.answers("digits") and "pip install scikit-learn" in study.lacking("digits")
    with pytest.raises(InputError, match="scikit-learn, which is not installed"):
        Study.from_profile(str(tmp_path / "tiny.yaml")).table("digits")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seeds": 0}, r"digits\.seeds is 0; at least 1"),
        ({"tuning_seeds": 3}, r"digits\.tuning_seeds is 3 of 2 seeds"),
        ({"rates": ()}, r"digits\.rates is \[\]"),
        ({"rates": (2.0,)}, r"digits\.rates is \[2\.0\]"),
        ({"transformer_epochs": 0}, r"digits\.transformer_epochs is 0"),
    ],
)
def test_impossible_settings_are_refused(changes, match):
    with pytest.raises(InputError, match=match):
        replace(SETTINGS, **changes)


def test_neurons_and_k_are_the_published_share():
    assert (NEURONS, K) == (512, 21) and digits_models.WIDTH % HEADS == 0
