"""The bench of the kernels on tiny shapes: patterns as asked for, bytes as counted, and no speed of a wrong output."""

import numpy as np
import pandas as pd
import pytest
import torch
from ffn_cases import ffn_case, neurons

from kernels import SparseFFN, bench, bench_cases, naive
from kernels.bench_cases import Case, Pattern, build, random_pattern
from kernels.reading import reading

TINY = {"tiny": (24, 60), "small": (32, 80)}


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    for module in (bench, bench_cases):
        monkeypatch.setattr(module, "SHAPES", TINY)


OPTIONS = {"compiled": False, "megabytes": 1, "device": "cpu"}


def masks(tokens=16, size=30, seed=0):
    random = np.random.default_rng(seed)
    nonzero = random.random((tokens, size)) < 0.5
    return nonzero, nonzero & (random.random((tokens, size)) < 0.5)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("tokens", [1, 4])
def test_random_patterns_have_the_sparsity_asked_for(sparsity, tokens):
    pattern = random_pattern(sparsity, 60, 16)
    problem = build(Case("tiny", pattern, tokens), "cpu")
    _, s, _ = neurons({**vars(problem.ffn), "x": problem.x})
    assert torch.equal(s > 0, torch.from_numpy(pattern.active[:tokens]))
    assert reading(problem.ffn, problem.x).sparsity == pytest.approx(sparsity, abs=0.01)


@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_given_patterns_are_reproduced_under_the_rule_of_neurons(act, tokens):
    nonzero, active = masks()
    problem = build(Case("tiny", Pattern("trained", act, "neuron", nonzero, active), tokens), "cpu")
    g, s, h = neurons({**vars(problem.ffn), "x": problem.x})
    found = naive.active_neurons(g, s, h, 1.0, "neuron")
    order = np.resize(np.random.default_rng(0).permutation(30), 60)
    assert torch.equal(found, torch.from_numpy(active[:tokens, order]))
    if act == "relu":
        assert torch.equal(s > 0, torch.from_numpy(nonzero[:tokens, order]))


@pytest.mark.parametrize("rule", naive.RULES)
@pytest.mark.parametrize("gated", [True, False])
def test_bytes_read_are_those_of_counted_rows(rule, gated):
    case = ffn_case("odd", 0.7, tokens=3, rule=rule, gated=gated, biases=True)
    ffn = SparseFFN(**{key: value for key, value in case.items() if key != "x"})
    _, s, h = neurons(case)
    threshold = torch.as_tensor(case["threshold"])
    loud = s.abs() > threshold if rule == "gate" else s != 0
    active = loud if rule == "gate" else h.abs() >= threshold
    rows = 157 + (int(loud.any(0).sum()) if gated else 0) + int(active.any(0).sum())
    found = reading(ffn, case["x"])
    assert found.nbytes == rows * 63 * 4 and found.dense_nbytes == (3 if gated else 2) * 157 * 63 * 4
    assert found.sparsity == pytest.approx(1 - active.double().mean().item(), abs=1e-6)
    certified = ffn.certified()
    undecided = (~certified.certificate.certain(case["x"], ffn.b_gate)).any(0).sum().item()
    assert reading(certified, case["x"]).nbytes == pytest.approx(
        found.nbytes - (157 - undecided) * 63 * 4 + 157 * (63 + 8 * 7), abs=1
    )  # seven float64 per neuron beside the bits


def test_the_table_has_one_row_per_case_and_way_beside_the_limits():
    nonzero, active = masks()
    cases = [Case("tiny", random_pattern(0.5, 60, 4), tokens) for tokens in (1, 4)]
    cases += [Case("small", Pattern("trained silu", "silu", "neuron", nonzero, active), 1, torch.bfloat16)]
    table = bench.ffn_speeds(cases, rounds=3, **OPTIONS)
    assert list(table["way"]) == [*["dense", "all rows", "sparse", "certified"] * 2, "dense", "all rows", "sparse"]
    assert (table.filter(like="_per_s") > 0).all(axis=None) and set(table["rounds"]) == {3}
    dense = table[table["way"].isin(bench.FULL_READS)]
    assert dense["ideal_speedup"].eq(1).all() and table.loc[table["way"] == "dense", "speedup"].eq(1).all()
    assert table.groupby(["shape", "tokens"])["strict_speedup"].max().ge(1).all()
    one = table.iloc[2]
    assert one["megabytes"] == pytest.approx(2 * 60 * 24 * 4 / 1e6) and one["ideal_speedup"] == pytest.approx(1.5)


def test_no_speed_is_reported_for_a_wrong_output(monkeypatch):
    monkeypatch.setattr(bench, "sparse", lambda problem: problem.ffn(problem.x) * 1.001)
    with pytest.raises(RuntimeError, match=r"No speed is reported: all rows at tiny is off by "):
        bench.ffn_speeds([Case("tiny", random_pattern(0.5, 60, 1))], rounds=1, **OPTIONS)


def test_ffns_without_an_active_neuron_agree_exactly():
    nothing = np.zeros((1, 30), bool)
    table = bench.ffn_speeds([Case("tiny", Pattern("none", "relu", "neuron", nothing, nothing))], rounds=1, **OPTIONS)
    assert table.set_index("way").loc[["sparse", "certified"], "active_share"].eq(0).all()


def test_the_grid_covers_shapes_sparsities_dtypes_batches_and_patterns(monkeypatch):
    monkeypatch.undo()
    nonzero, active = masks()
    cases = bench.grid(bench.SHAPES, [Pattern("trained", "relu", "neuron", nonzero, active)])
    assert {case.shape for case in cases} == set(bench.SHAPES)
    assert {case.tokens for case in cases} == {1, 2, 4, 8, 16} and len({case.dtype for case in cases}) == 3
    keys = [(case.shape, case.pattern.name, case.pattern.active.sum(), case.tokens, case.dtype) for case in cases]
    assert len(set(keys)) == len(keys)


def test_the_numbers_of_the_bench_do_not_depend_on_time():
    case = Case("tiny", random_pattern(0.9, 60, 1))
    tables = [bench.ffn_speeds([case], rounds=1, **OPTIONS) for _ in range(2)]
    fixed = ["sparsity", "gate_share", "up_share", "active_share", "megabytes", "ideal_speedup"]
    pd.testing.assert_frame_equal(tables[0][fixed], tables[1][fixed])


def test_the_memory_of_this_machine_has_a_rate(monkeypatch):
    monkeypatch.setattr(bench, "WEIGHTS", {"cpu": 2**20, "cuda": 2**20})
    assert 0 < bench.measured_bandwidth(rounds=2) < 1e5
