"""Measure how fast sparse FFNs are, compared with dense ones of the same weights and with the speed of memory.

All ways of computing a case take turns in one process. The weights are kept in several copies, together far larger
than any cache, and every call uses the next copy, as the layers of a model would. A speed is reported only where the
output agrees with that of the same rule run densely.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from kernels import MAX_TOKENS, SparseFFN, naive
from kernels.bench_cases import Case, Pattern, Problem, build, random_pattern
from kernels.reading import reading
from kernels.shapes import SHAPES
from kernels.timing import alternate, machine, speedups, timed

SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.935, 0.97, 0.99)
FEWER_SPARSITIES = (0.0, 0.5, 0.9, 0.97)
BATCHES = (2, 4, 8, 16)
ROUNDS = 15
WEIGHTS = {"cpu": 2**28, "cuda": 2**30}  # bytes of all copies together: several times the largest cache
AGREE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # relative RMS
FULL_READS = ("dense", "dense compiled", "all rows")  # read all weights: torch, torch compiled, the kernel
EVERY_ROW = {"rule": "gate", "threshold": -1.0}
Way = Callable[[Problem], Tensor]


def grid(shapes: Iterable[str], patterns: Iterable[Pattern]) -> list[Case]:
    """The cases of the bench.

    One shape, "2.4B" where it is given, has all sparsities, dtypes, batches and `patterns`; the others have a few
    sparsities.
    """
    shapes = list(shapes)
    one = "2.4B" if "2.4B" in shapes else shapes[-1]

    def random_cases(shape: str, sparsities: Iterable[float], tokens: int = 1, dtype: torch.dtype = torch.float32):
        return [
            Case(shape, random_pattern(sparsity, SHAPES[shape][1], MAX_TOKENS), tokens, dtype)
            for sparsity in sparsities
        ]

    cases = [case for shape in shapes if shape != one for case in random_cases(shape, FEWER_SPARSITIES)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cases += random_cases(one, SPARSITIES, dtype=dtype)
    for batch in BATCHES:
        cases += random_cases(one, FEWER_SPARSITIES, batch)
    return cases + [Case(one, pattern, batch) for pattern in patterns for batch in (1, *BATCHES)]


def ffn_speeds(
    cases: Iterable[Case], *, compiled: bool, rounds: int, megabytes: int | None, device: str
) -> pd.DataFrame:
    """One row per case and way of computing it; columns are described in results/columns.csv, table sparse_ffn.

    Args:
        compiled: also time torch.compile, which on a CPU needs a C++ compiler.
        megabytes: of all copies of the weights of a case together; None: several times the largest cache.
        device: "cpu" or "cuda".

    Raises `RuntimeError` when an output does not agree with the same rule run densely.
    """
    size = WEIGHTS[device] if megabytes is None else 10**6 * megabytes
    memory, rows = memory_works(device, size // 2), list[dict]()
    compile_once = cache(partial(_compiled, device)) if compiled else None
    with torch.inference_mode():
        for case in tqdm(list(cases), desc="sparse FFNs", disable=bool(os.environ.get("CI")), leave=False):
            rows += _case_rows(case, device, size, compile_once, rounds, memory)
    return pd.DataFrame(rows).assign(**machine(device))


def memory_works(device: str, size: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Two jobs that only memory limits, a copy and a read of `size` bytes, each with the number of bytes it moves.

    They take turns with the ways of each case, because the speed of memory may change from minute to minute.
    """
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return {
        "copy": (lambda: target.copy_(source), 2 * source.nbytes),
        "read": (lambda: source.sum(), source.nbytes),
    }


def measured_bandwidth(rounds: int = ROUNDS) -> float:
    """GB/s of reading memory on this machine, median over rounds; on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    read, size = memory_works(device, WEIGHTS[device] // 2)["read"]
    with torch.inference_mode():
        seconds = alternate({"read": lambda: timed(read, device)}, rounds, warm_up=True)["read"]
    return float(np.median(size / seconds / 1e9))


def dense(problem: Problem) -> Tensor:
    """The dense FFN, as a model computes it."""
    ffn, act = problem.ffn, naive.ACTIVATIONS[problem.ffn.act]
    return F.linear(act(F.linear(problem.x, ffn.w_gate)) * F.linear(problem.x, ffn.w_up), problem.w_down)


def sparse(problem: Problem) -> Tensor:
    """The kernel of this project, which uses the certified gate where the FFN has one."""
    return problem.ffn(problem.x)


def _case_rows(
    case: Case, device: str, size: int, compile_once: Callable[..., Way | None] | None, rounds: int, memory: dict
) -> Iterator[dict]:
    first = build(case, device)
    count = max(1, size // first.nbytes)
    problems = [first, *(first.copied() for _ in range(count - 1))]
    ways: dict[str, tuple[Way, list[Problem]]] = {"dense": (dense, problems)}
    if compile_once is not None and (way := compile_once(first.ffn.act, first.x.shape, case.dtype)) is not None:
        ways["dense compiled"] = way, problems
    ways["all rows"] = sparse, [replace(problem, ffn=replace(problem.ffn, **EVERY_ROW)) for problem in problems]
    ways["sparse"] = sparse, problems
    if device == "cpu" and first.ffn.act == "relu":
        ways["certified"] = sparse, [replace(problem, ffn=problem.ffn.certified()) for problem in problems]
    for name, (way, given) in ways.items():
        _check(case, name, way(given[0]), given[0])
    works = {name: every_copy(way, given, device) for name, (way, given) in ways.items()}
    works |= {name: work for name, (work, _) in memory.items()}
    if device == "cpu":  # on a GPU a part of the first launch
        works["index"] = _index_work(first)
    seconds = alternate({name: partial(timed, work, device) for name, work in works.items()}, rounds)
    beside = {f"{name}_gb_per_s": np.median(moved / seconds[name] / 1e9) for name, (_, moved) in memory.items()}
    beside["index_milliseconds"] = 1e3 * np.median(seconds["index"]) if "index" in seconds else np.nan
    times = {name: seconds[name] / count for name in ways}
    for name, (_, given) in ways.items():
        yield _row(case, name, first, given[0].ffn, times) | beside


def _index_work(problem: Problem) -> Callable[[], object]:
    """The job of building the list of active neurons, and nothing else, on a CPU."""
    from kernels.cpu_ffn import indices

    g = F.linear(problem.x.float(), problem.ffn.w_gate.float())
    chosen = (naive.ACTIVATIONS[problem.ffn.act](g).abs() > problem.ffn.gate_limit).any(dim=0).numpy()
    indices(chosen)
    return lambda: indices(chosen)


def every_copy(way: Way, problems: list[Problem], device: str) -> Callable[[], object]:
    """A job that computes every copy once; on a GPU it replays one CUDA graph, so that no launch is waited for."""

    def run() -> None:
        for problem in problems:
            way(problem)

    run()
    if device != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _compiled(device: str, act: str, shape: torch.Size, dtype: torch.dtype) -> Way | None:
    """`dense` under torch.compile, for x of the given `shape`; None where torch cannot compile it."""
    function = naive.ACTIVATIONS[act]

    def linear_maps(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(function(F.linear(x, gate)) * F.linear(x, up), down)

    torch.compiler.reset()  # after eight shapes of one function torch would stop compiling it
    maps = torch.compile(linear_maps, dynamic=False)
    tiny = (torch.zeros(size, dtype=dtype, device=device) for size in (shape, (8, shape[1]), (8, shape[1]), (8, 8)))
    try:
        maps(*tiny)
    except Exception as error:
        print(f"torch.compile is left out: {type(error).__name__}")
        return None
    return lambda given: maps(given.x, given.ffn.w_gate, given.ffn.w_up, given.w_down)


def _check(case: Case, way: str, y: Tensor, problem: Problem) -> None:
    """Raises `RuntimeError` unless `y` is the rule's output; ways that read all weights are compared at threshold 0."""
    ffn = problem.ffn
    threshold = ffn.threshold if way in ("sparse", "certified") else 0.0
    gate, up, down = (weight.float() for weight in (ffn.w_gate, ffn.w_up, ffn.w_down_t))
    expected = naive.sparse_ffn(problem.x.float(), gate, up, down, threshold, ffn.act, ffn.rule)
    error, size = ((part.square().mean().sqrt()).item() for part in (y.float() - expected, expected))
    if not error <= size * AGREE[case.dtype] * (3 if way.startswith("dense") else 1):  # those round s and h as well
        raise RuntimeError(f"No speed is reported: {way} at {case.shape} is off by {error:.2g} of {size:.2g}.")


def _row(case: Case, way: str, problem: Problem, ffn: SparseFFN, seconds: dict[str, np.ndarray]) -> dict:
    d, d_ff = SHAPES[case.shape]
    pattern, rows = reading(problem.ffn, problem.x), reading(ffn, problem.x)
    read = rows.dense_nbytes if way in FULL_READS else rows.nbytes
    low, median, high = np.quantile(seconds[way], (0.05, 0.5, 0.95))
    return {
        "shape": case.shape,
        "d_model": d,
        "d_ff": d_ff,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tokens": case.tokens,
        "pattern": case.pattern.name,
        "activation": case.pattern.act,
        "rule": case.pattern.rule,
        "sparsity": pattern.sparsity,
        "gate_share": rows.gate,
        "up_share": rows.up,
        "active_share": rows.active,
        "way": way,
        "milliseconds": 1e3 * median,
        "low_milliseconds": 1e3 * low,
        "high_milliseconds": 1e3 * high,
        "megabytes": read / 1e6,
        "gb_per_s": read / median / 1e9,
        "ideal_speedup": rows.dense_nbytes / read,
        **speedups(seconds, way, FULL_READS),
        "rounds": len(seconds[way]),
    }
