"""Thresholds of rules on inputs from calibration text, and the greedy allocation."""

import numpy as np
import pytest
import torch
from families import left_behind
from linear_maps import grouped_query
from tiny_granite import granite

from sparsity_utils.console import InputError
from sparsity_utils.neurons.hooks import observe_neurons, sparse_neurons
from sparsity_utils.neurons.input_rules import INPUT_RULES
from sparsity_utils.neurons.linears import find_linears, observe_inputs, sparse_inputs
from sparsity_utils.neurons.rotations import rotated
from sparsity_utils.sparsity import input_thresholds as module
from sparsity_utils.sparsity.input_thresholds import calibrated, greedy_sparsities

IDS = torch.randperm(41, generator=torch.Generator().manual_seed(1))[:36].view(4, 9)  # equal tokens would make ties
MASK = (torch.arange(9) < torch.tensor([9, 9, 6, 3])[:, None]).long()
BATCHES = [
    {"input_ids": IDS[:2], "attention_mask": MASK[:2]},
    {"input_ids": IDS[2:], "attention_mask": MASK[2:]},
]
REAL = MASK.flatten().bool()


def vectors(model, maps=None):
    """What each map reads on the real tokens."""
    seen = {}

    def keep(readers, x):
        for one in readers:
            seen.setdefault(one.index, []).append(x)

    with observe_inputs(model, keep, maps):
        run(model)
    return {index: torch.cat(parts)[REAL] for index, parts in seen.items()}


def run(model):
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in BATCHES])


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("name", INPUT_RULES)
def test_thresholds_skip_exactly_their_share_of_the_calibration_tokens(name, rotate):
    model = grouped_query()
    maps = rotated(model) if rotate else find_linears(model)
    thresholds = calibrated(model, BATCHES, name, 0.25, maps=maps)
    assert thresholds.rule == name and len(thresholds.values) == len(maps) and left_behind(model) == []
    seen = vectors(model, maps)
    for linear in maps:
        z = linear.coordinates(seen[linear.index])
        kept = thresholds.active_inputs(linear, z)
        assert int((~kept).sum()) == round(0.25 * z.numel())
        if name == "teal":
            ordered = np.sort(z.abs().numpy(), axis=None)
            assert thresholds.values[linear.index] == ordered[round(0.25 * ordered.size) - 1]


def test_kept_tokens_are_bounded_and_spread_over_the_text(monkeypatch):
    model = grouped_query()
    one_token = (24 + 24 + 24 + 40) * 2 * 8
    monkeypatch.setattr(module, "KEPT_BYTES", 12 * one_token)
    kept = module.KeptInputs(model, list(module.checked(model, BATCHES, "calibration")), find_linears(model))
    assert kept.every == 3
    rows = [x[::3] for x in vectors(model)[0].split([18, 9])]
    assert torch.equal(kept.x[0, "attention"], torch.cat(rows))


def test_cats_skips_its_share_of_the_neurons_in_every_layer():
    model, shares = granite("silu", vocabulary=41), []

    def count(ffn, s, h, tokens):
        x = s[MASK[:2].flatten().bool()]
        shares.append(int((~thresholds.active(ffn, x, x)).sum()) - round(0.3 * x.numel()))

    thresholds = calibrated(model, BATCHES[:1], "cats", 0.3)
    with observe_neurons(model, count), torch.no_grad():
        model(**BATCHES[0])
    assert shares == [0, 0, 0] and thresholds.rule == "fat"
    with torch.no_grad(), sparse_neurons(model, thresholds):
        assert run(model).isfinite().all()


@pytest.mark.parametrize("call", [calibrated, greedy_sparsities])
def test_bad_input_is_refused(call):
    model = grouped_query()
    with pytest.raises(InputError, match="The rule is 'magic'; choose one of teal"):
        call(model, BATCHES, "magic", 0.5)
    for sparsity in (-0.1, 1.5):
        with pytest.raises(InputError, match="choose a share of the inputs, 0 to 1"):
            call(model, BATCHES, "teal", sparsity)
    with pytest.raises(InputError, match="hold no token"):
        call(model, [], "teal", 0.5)


def test_a_share_that_no_whole_number_of_inputs_meets_is_refused():
    with pytest.raises(InputError, match=r"of 24 and of 40 inputs is a share of 0\.3, .* is 0\.25"):
        calibrated(grouped_query(), BATCHES, "wina", 0.3)


def test_a_step_outside_its_range_is_refused():
    with pytest.raises(InputError, match="step is 0"):
        greedy_sparsities(grouped_query(), BATCHES, "teal", 0.5, step=0)


class OneLayer:
    """Thresholds of one block alone; the other blocks keep everything."""

    def __init__(self, maps, layer, sparsities, seen, rule):
        self.values, self.layer, self.rule = (0.0,) * len(maps), layer, INPUT_RULES[rule]
        self.sparsities, self.seen = sparsities, seen

    def active_inputs(self, linear, x):
        if linear.layer != self.layer:
            return torch.ones_like(x, dtype=torch.bool)
        z = linear.coordinates(self.seen[linear.index])
        scores = self.rule.scores(linear, z.abs()).flatten().sort().values
        value = self.rule.value(linear, min(1.0, self.sparsities[linear.role]), scores)
        return self.rule.active(linear, x.abs(), value)


def block_outputs(model, layer):
    outputs = []
    handle = model.model.layers[layer].register_forward_hook(
        lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    run(model)
    handle.remove()
    return torch.cat(outputs).flatten(0, 1)[REAL]


def literal_greedy(model, maps, layer, rule, target, step):
    """The algorithm by passes of the whole model, in which one block alone is masked."""
    own, seen = [one for one in maps if one.layer == layer], vectors(model, maps)
    total, now, path = sum(one.weight.numel() for one in own), {one.role: 0.0 for one in own}, []
    dense = block_outputs(model, layer)
    while (reached := sum(now[one.role] * one.weight.numel() for one in own) / total) < target - 1e-12:
        errors, weights = {}, min(step, target - reached) * total
        for one in own:
            tried = now | {one.role: now[one.role] + weights / one.weight.numel()}
            if now[one.role] < 1:
                with sparse_inputs(model, OneLayer(maps, layer, tried, seen, rule), maps):
                    off = block_outputs(model, layer) - dense
                errors[one.role] = float((off.norm(dim=-1) / dense.norm(dim=-1)).mean())
        best = min(errors, key=errors.get)
        size = next(one.weight.numel() for one in own if one.role == best)
        now[best] = min(1.0, now[best] + weights / size)
        path.append((best, errors[best], dict(now)))
    return path


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("rule", ["teal", "wina"])
def test_the_greedy_allocation_is_that_of_whole_passes(rule, rotate):
    model = grouped_query()
    maps = rotated(model) if rotate else find_linears(model)
    sparsities, path = greedy_sparsities(model, BATCHES, rule, 0.3, step=0.05, maps=maps)
    assert left_behind(model) == []
    for layer in range(2):
        expected = literal_greedy(model, maps, layer, rule, 0.3, 0.05)
        rows = path[path["layer"] == layer]
        assert rows["role"].tolist() == [role for role, _, _ in expected]
        np.testing.assert_allclose(rows["error"], [error for _, error, _ in expected], rtol=1e-9)
        for one in maps:
            if one.layer == layer:
                np.testing.assert_allclose(rows[one.role], [now[one.role] for _, _, now in expected], rtol=1e-12)
                assert sparsities[one.index] == pytest.approx(rows[one.role].iloc[-1], rel=1e-12)


def test_every_block_meets_its_target_by_steps_of_no_more_than_asked():
    model = grouped_query()
    maps = find_linears(model)
    sparsities, path = greedy_sparsities(model, BATCHES, "teal", 0.33, step=0.1)
    for layer in range(2):
        own = [one for one in maps if one.layer == layer]
        mean = sum(sparsities[one.index] * one.size for one in own) / sum(one.size for one in own)
        assert mean == pytest.approx(0.33, abs=1e-12)
        reached = path[path["layer"] == layer]["sparsity"].tolist()
        assert reached[-1] == pytest.approx(0.33) and np.diff([0.0, *reached]).max() <= 0.1 + 1e-12


def test_no_sparsity_needs_no_step_and_full_sparsity_skips_everything():
    model = grouped_query(layers=1)
    sparsities, path = greedy_sparsities(model, BATCHES, "teal", 0.0)
    assert sparsities == [0.0] * 7 and path.empty
    sparsities, _ = greedy_sparsities(model, BATCHES, "teal", 1.0, step=0.25)
    assert sparsities == pytest.approx([1.0] * 7)
    with sparse_inputs(model, calibrated(model, BATCHES, "teal", 1.0)), torch.no_grad():
        hidden = model.model(input_ids=IDS).last_hidden_state
    embedded = model.model.norm(model.model.embed_tokens(IDS))
    torch.testing.assert_close(hidden, embedded.detach())


@pytest.mark.parametrize("rule", ["teal", "wina"])
def test_errors_of_blocks_are_those_at_which_a_greedy_path_arrives(rule):
    """The last error of a path is that of its block alone, on the input of the dense run; so is this one."""
    model = grouped_query()
    maps, batches = find_linears(model), list(module.checked(model, BATCHES, "calibration"))
    sparsities, path = greedy_sparsities(model, BATCHES, rule, 0.4, step=0.2)
    kept = module.KeptInputs(model, batches, maps)
    greedy = kept.thresholds(INPUT_RULES[rule], sparsities)
    nothing = kept.thresholds(INPUT_RULES[rule], [0.0] * len(maps))
    found = module.block_errors(model, batches, [greedy, nothing], maps)
    expected = path.groupby("layer")["error"].last()
    np.testing.assert_allclose(found[0], expected, rtol=1e-9)
    assert found[1].max() < 1e-12 and left_behind(model) == []
