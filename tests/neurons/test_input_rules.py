"""The rules on inputs of linear maps: against literal versions, and the theory published with them."""

import math
from itertools import product

import pytest
import torch
from linear_maps import grouped_query
from tiny_granite import granite
from torch import nn

from sparsity_utils.console import InputError
from sparsity_utils.neurons.find import find_ffns
from sparsity_utils.neurons.hooks import observe_neurons
from sparsity_utils.neurons.input_rules import INPUT_RULES, Cats
from sparsity_utils.neurons.linears import LinearMap, find_linears, observe_inputs
from sparsity_utils.neurons.rotations import rotated
from sparsity_utils.neurons.thresholds import Thresholds

IDS = torch.arange(3 * 7).view(3, 7) % 29
TOP_K = [name for name in INPUT_RULES if name in ("teal-top-k", "wina", "wina-released")]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear_map(weight, role="k"):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    module.weight.data = weight
    return LinearMap(0, 0, role, "block", "block.map", module, torch.arange(len(weight)), False)


def literal_score(name, weight, x, j, role):
    column = [float(w) for w in weight[:, j]]
    size = abs(float(x[j]))
    if name in ("teal", "teal-top-k") or (name == "wina-released" and role not in ("k", "gate")):
        return size
    return size * (sum(map(abs, column)) if name == "was" else math.sqrt(sum(w * w for w in column)))


@pytest.mark.parametrize("role", ["q", "k", "gate", "down"])
@pytest.mark.parametrize("name", INPUT_RULES)
def test_a_rule_keeps_what_its_definition_says(name, role):
    weight, xs = normal(5, 11), normal(40, 11, seed=1)
    xs[:, 3] = 0
    linear, rule = linear_map(weight, role), INPUT_RULES[name]
    value = 4 if name in TOP_K else 0.7
    kept = rule.active(linear, xs.abs(), value)
    for x, row in zip(xs, kept.tolist(), strict=True):
        scores = [literal_score(name, weight, x, j, role) for j in range(11)]
        largest = sorted(range(11), key=scores.__getitem__)[-4:]
        assert row == [j in largest if name in TOP_K else scores[j] > value for j in range(11)]
    assert torch.equal(Thresholds(name, (value,)).active_inputs(linear, xs), kept)


@pytest.mark.parametrize("name", INPUT_RULES)
@pytest.mark.parametrize("sparsity", [0, 0.25, 0.5, 0.75, 1])
def test_the_sparsity_asked_for_is_met_on_the_tokens_that_set_it(name, sparsity):
    linear, xs, rule = linear_map(normal(5, 12)), normal(40, 12, seed=1), INPUT_RULES[name]
    value = rule.value(linear, sparsity, rule.scores(linear, xs.abs()).flatten().sort().values)
    kept = rule.active(linear, xs.abs(), value)
    assert int((~kept).sum()) == sparsity * 480
    if name in TOP_K:
        assert set(kept.sum(1).tolist()) == {12 - 12 * sparsity}


@pytest.mark.parametrize("name", [*INPUT_RULES, "cats"])
@pytest.mark.parametrize("sparsity", [-0.1, 1.01, math.nan])
def test_sparsities_outside_0_to_1_are_refused(name, sparsity):
    rule = Cats() if name == "cats" else INPUT_RULES[name]
    with pytest.raises(InputError, match=r"choose a share of the .*, 0 to 1"):
        rule.check_value(sparsity)


def test_widths_that_cannot_meet_a_sparsity_are_told_the_nearest():
    wina, teal = INPUT_RULES["wina"], INPUT_RULES["teal"]
    with pytest.raises(InputError, match=r"of 576 and of 1536 inputs is a share of 0\.4, .* is 0\.401042"):
        wina.check_sparsity(0.4, [1536, 576, 576])
    with pytest.raises(InputError, match=r"of 15 inputs is a share of 0\.5, .* is 0\.533333|0\.466667"):
        wina.check_sparsity(0.5, [15])
    wina.check_sparsity(0.401042, [576, 1536])
    wina.check_sparsity(0.625, [64, 160])
    teal.check_sparsity(0.4, [1536, 576])


def test_weights_that_a_token_reads():
    teal, cats = INPUT_RULES["teal"], Cats()
    assert [teal.map_share(role, 0.3) for role in ("q", "gate", "down")] == [0.3, 0.3, 0.3]
    assert [cats.map_share(role, 0.3, 0.9) for role in ("q", "gate", "up", "down")] == [1, 1, 0.3, 0.3]
    assert cats.weights_read(0.3, 0.9) == pytest.approx((1 + 0.3 + 0.3) / 3)
    assert teal.knob.name == cats.knob.name == "sparsity" and teal.label != INPUT_RULES["was"].label


# The theory of WINA, arXiv 2505.19427v2, section 3. Errors are squared Euclidean norms.


def masks(n, kept=None):
    for bits in product([False, True], repeat=n):
        if kept is None or sum(bits) == kept:
            yield torch.tensor(bits)


def error(weight, x, mask):
    return float((weight @ (x - mask * x)).square().sum())


def orthogonal_columns(rows, n, seed):
    """A matrix whose Gram matrix is diagonal, the norms of its columns being far apart."""
    q = torch.linalg.qr(normal(rows, n, seed=seed)).Q
    return q * torch.exp(normal(n, seed=seed + 1))


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_lemma_3_1_the_largest_scores_are_the_best_of_all_masks_where_the_gram_matrix_is_diagonal(n):
    wina = INPUT_RULES["wina"]
    for seed in range(10):
        weight, x = orthogonal_columns(n + 3, n, seed), normal(n, seed=seed + 2)
        linear = linear_map(weight)
        scores = wina.scores(linear, x.abs())
        for mask in masks(n):
            assert error(weight, x, mask) == pytest.approx(float(scores[~mask].square().sum()), rel=1e-8, abs=1e-12)
        for k in range(n + 1):
            kept = wina.active(linear, x.abs(), k)
            assert int(kept.sum()) == k
            best = min(error(weight, x, mask) for mask in masks(n, k))
            assert error(weight, x, kept) <= best * (1 + 1e-8) + 1e-12


def test_lemma_3_1_needs_the_diagonal():
    """Two equal columns whose contributions cancel: dropping both costs nothing."""
    weight, x = torch.tensor([[1.0, 1.0, 0.1]]).double(), torch.tensor([1.0, -1.0, 1.0]).double()
    kept = INPUT_RULES["wina"].active(linear_map(weight), x.abs(), 1)
    assert error(weight, x, kept) > error(weight, x, torch.tensor([False, False, True])) == 0


def test_rotated_maps_of_a_model_fulfil_the_lemma():
    model, seen, generator = grouped_query(), [], torch.Generator().manual_seed(0)
    maps = rotated(model)
    with observe_inputs(model, lambda readers, x: seen.append((readers, x)), maps), torch.no_grad():
        model(input_ids=IDS)
    checked = 0
    for readers, x in seen:
        for linear in readers:
            if linear.role not in ("k", "gate"):
                continue
            z = linear.coordinates(x)
            kept = INPUT_RULES["wina"].active(linear, z.abs(), 8)
            scores = INPUT_RULES["wina"].scores(linear, z.abs())
            dropped = torch.where(kept, 0.0, z) @ linear.weight.T
            expected = torch.where(kept, 0.0, scores).square().sum(-1)
            torch.testing.assert_close(dropped.square().sum(-1), expected, rtol=1e-8, atol=1e-8)
            other = torch.rand(1000, 24, generator=generator).argsort(dim=1) < 8  # a thousand masks that keep eight
            errors = (~other * scores[:, None].square()).sum(-1)  # (tokens, masks)
            assert bool((errors >= expected[:, None] * (1 - 1e-8)).all())
            checked += 1
    assert checked == 4


def test_the_bound_without_orthogonality():
    """lambda_min(G_D) sum_D s^2 <= error^2 <= lambda_max(G_D) sum_D s^2, G_D the Gram matrix of the dropped columns
    scaled to norm 1."""
    n, tight = 6, 0
    for seed in range(20):
        weight, x = normal(4, n, seed=seed), normal(n, seed=seed + 100)
        scores = INPUT_RULES["wina"].scores(linear_map(weight), x.abs())
        for mask in masks(n):
            if bool(mask.all()):
                continue
            unit = (weight / weight.norm(dim=0))[:, ~mask]
            eigenvalues = torch.linalg.eigvalsh(unit.T @ unit).tolist()
            low, high = eigenvalues[0], eigenvalues[-1]
            total, found = float(scores[~mask].square().sum()), error(weight, x, mask)
            assert low * total - 1e-9 <= found <= high * total + 1e-9
            tight += found > 0.5 * high * total
    assert tight > 0  # the bound is not far from everything


def two_layers(first, second, x, score, k=1):
    """Dense and masked output of second @ first @ x, both masks keeping the k largest `score(linear, x)`, and u, v."""
    z = x * score(linear_map(first), x, k)
    after = first @ z
    kept = after * score(linear_map(second), after, k)
    u, v = second @ (first @ (x - z)), second @ (after - kept)
    return second @ (first @ x), second @ kept, u, v


def by(name):
    return lambda linear, x, k: INPUT_RULES[name].active(linear, x.abs(), k)


def test_theorem_3_2_the_inequality_holds():
    for seed in range(200):
        first, second = normal(5, 6, seed=seed), orthogonal_columns(7, 5, seed)
        dense, masked, u, v = two_layers(first, second, normal(6, seed=seed + 1), by("wina"), k=2)
        found = (dense - masked).square().sum()
        torch.testing.assert_close(dense - masked, u + v, rtol=1e-10, atol=1e-10)
        for alpha in (0.01, 0.5, 1, 3, 100):
            bound = (1 + alpha) * u.square().sum() + (1 + 1 / alpha) * v.square().sum()
            assert float(found) <= float(bound) * (1 + 1e-12)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_theorem_3_2_its_minimum_is_not_that_of_the_largest_scores(signs):
    """Both matrices are diagonal; what the first drops counts by the columns of the product, not of the first."""
    first, second, x = (torch.tensor(values, dtype=torch.float64) for values in ((1, 1.2), (10, 0.1), (1, 0.9)))
    first, second, x = first.diag(), second.diag(), x * torch.tensor(signs)
    errors, bounds = {}, {}
    for name in ("wina", "teal-top-k"):
        dense, masked, u, v = two_layers(first, second, x, by(name))
        errors[name] = float((dense - masked).square().sum())
        bounds[name] = 2 * float(u.square().sum() + v.square().sum())  # alpha = 1
    assert errors["wina"] == pytest.approx(100, rel=1e-8) and bounds["wina"] == pytest.approx(200, rel=1e-8)
    assert errors["teal-top-k"] == pytest.approx(0.108**2, rel=1e-8)
    assert bounds["teal-top-k"] == pytest.approx(2 * 0.108**2, rel=1e-8)


@pytest.mark.parametrize("eps", [0.01, 0.3, 2.0])
def test_cett_keeps_as_many_largest_contributions(eps):
    """What CETT keeps of a token is WINA's top-k on the down projection, k being how many CETT keeps."""
    model, sizes = granite("silu"), set()
    downs = {one.layer: one for one in find_linears(model) if one.role == "down"}
    thresholds = Thresholds("cett", (eps,) * 3)

    def compare(ffn, s, h, tokens):
        kept = thresholds.active(ffn, s, h)
        for row, chosen in zip(h, kept, strict=True):
            k = int(chosen.sum())
            assert torch.equal(INPUT_RULES["wina"].active(downs[ffn.layer], row.abs(), k), chosen)
            sizes.add(k)

    with observe_neurons(model, compare), torch.no_grad():
        model(input_ids=IDS)
    assert len(find_ffns(model)) == 3 and len(sizes) > 3
