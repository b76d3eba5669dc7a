"""Measure how fast a model decodes, dense and with sparse kernels, with the same weights in one process.

A speed is reported only where the kernels give the tokens that the masked dense model gives.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels import SparseFFN
from kernels.bench_cases import Pattern
from kernels.reading import Reading, reading
from kernels.shapes import DENSE
from kernels.timing import alternate, machine, speedups
from sparsity_utils.console import InputError, check
from sparsity_utils.decoding.decode import kernel_rule, replaceable_ffns, sparse_kernels
from sparsity_utils.decoding.kept_text import check_decoder, wait
from sparsity_utils.decoding.layer_kernels import run_as_one_call
from sparsity_utils.neurons.activations import activation_name
from sparsity_utils.neurons.find import FFN, find_ffns
from sparsity_utils.neurons.hooks import observe_neurons, sparse_neurons
from sparsity_utils.neurons.modes import evaluating, forward_replaced
from sparsity_utils.neurons.rules import RULES
from sparsity_utils.neurons.thresholds import Thresholds

PARTS = ("ffn", "attention", "head")


def decode_speeds(
    model: PreTrainedModel, prompts: Tensor, thresholds: Thresholds, *, new_tokens: int, rounds: int
) -> pd.DataFrame:
    """Greedy decoding, dense and with sparse kernels: one row per way, columns as in results/columns.csv.

    Ways alternate, `rounds` times each; the prompt is not timed. "all rows" runs the kernels with nothing skipped, so
    that what sparsity gives can be told from what the kernels give. Where a way's tokens are not those of the dense
    model, masked by `sparse_neurons` for the sparse ways, `same_tokens` is False and no speed is given.

    Args:
        prompts: token ids, (sequences, length), decoded side by side.

    Raises `InputError` as `sparse_kernels` does, for a model that generates no text, for fewer than two new tokens, and
    where prompt and new tokens are longer than its context.
    """
    check_decoder(model, prompts, new_tokens)
    check(new_tokens >= 2, f"{new_tokens} new token has no speed, since the prompt gives it; ask for at least 2.")

    def decoded(block: Callable) -> tuple[Tensor, float]:
        with block():
            return greedy(model, prompts, new_tokens)

    def timed_decoding(block: Callable) -> float:
        return decoded(block)[1]

    ways: dict[str, Callable[[], Any]] = {
        "dense": nullcontext,
        "all rows": lambda: sparse_kernels(model, None),
        "sparse": lambda: sparse_kernels(model, thresholds),
        "certified": lambda: sparse_kernels(model, thresholds, certified=True),
    }
    with evaluating(model):
        if not _can_certify(model, thresholds):
            del ways["certified"]
        dense, masked = (decoded(block)[0] for block in (nullcontext, lambda: sparse_neurons(model, thresholds)))
        right = {
            name: torch.equal(decoded(block)[0], dense if name in DENSE else masked) for name, block in ways.items()
        }
        seconds = alternate({name: partial(timed_decoding, block) for name, block in ways.items()}, rounds)
        seconds = {name: np.where(right[name], values, np.nan) for name, values in seconds.items()}
        rows = []
        for name, block in ways.items():
            low, median, high = np.quantile(len(prompts) * (new_tokens - 1) / seconds[name], (0.05, 0.5, 0.95))
            row = {"way": name, "same_tokens": right[name], "tokens_per_second": median}
            row |= {"low_tokens_per_second": low, "high_tokens_per_second": high, **speedups(seconds, name, DENSE)}
            with block() as kernels:
                rows.append(row | _anatomy(model, prompts, new_tokens, kernels))
    about = {"sequences": len(prompts), "new_tokens": new_tokens, "rounds": rounds}
    return pd.DataFrame(rows).assign(**about, **machine(prompts.device.type))


def greedy(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> tuple[Tensor, float]:
    """The likeliest tokens after `prompts`, (sequences, new_tokens), and the seconds of all but the first."""
    tokens, _, seconds = decoded(model, prompts, new_tokens)
    return tokens, seconds


@torch.no_grad()
def decoded(
    model: PreTrainedModel,
    prompts: Tensor,
    new_tokens: int,
    text: Tensor | None = None,
    keep: Callable[[Tensor], object] = lambda logits: None,
) -> tuple[Tensor, float, float]:
    """The likeliest token at each place after `prompts`, (sequences, length), one place after the other.

    Args:
        text: what the model is given there, (sequences, new_tokens), in place of its own tokens.
        keep: is given the logits of each place, (sequences, 1, vocabulary).

    Returns: tokens, (sequences, new_tokens), the seconds of the prompt, and those of all tokens but the first.
    """
    started = time.perf_counter()
    out = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
    keep(out.logits)
    tokens = [out.logits[:, -1:].argmax(dim=-1)]
    wait(prompts)
    began = time.perf_counter()
    for place in range(new_tokens - 1):
        given = tokens[-1] if text is None else text[:, place : place + 1]
        out = model(input_ids=given, past_key_values=out.past_key_values, use_cache=True)
        keep(out.logits)
        tokens.append(out.logits[:, -1:].argmax(dim=-1))
    wait(prompts)
    return torch.cat(tokens, dim=1), began - started, time.perf_counter() - began


def _can_certify(model: nn.Module, thresholds: Thresholds) -> bool:
    """Whether a certified gate can prove anything for this model, on its device."""
    replaceable_ffns(model)  # raises what is wrong with the model itself
    try:
        with sparse_kernels(model, thresholds, certified=True):
            return True
    except InputError:
        return False


def _anatomy(model: PreTrainedModel, prompts: Tensor, new_tokens: int, kernels: list[SparseFFN] | None) -> dict:
    """Share of the time that each part of the model takes, and what a decoding step reads, in runs of their own.

    A share is NaN where the part is not told apart, since decoder layers run as one call.
    """
    ffns, readings = find_ffns(model), list[Reading]()
    with parts_timed(model, ffns, run_as_one_call(model, len(prompts))) as parts:
        _, seconds = greedy(model, prompts, new_tokens)
    if kernels is not None:
        with ffns_read(ffns, kernels, readings):
            greedy(model, prompts, min(new_tokens, 16))
    dense_ffn = sum(w.nbytes for ffn in ffns for w in _weights(ffn))
    ffn_bytes = sum(r.nbytes for r in readings) / (len(readings) / len(ffns)) if readings else dense_ffn
    everything = sum(parameter.nbytes for parameter in model.parameters())
    embeddings = model.get_input_embeddings().weight
    if embeddings is not model.get_output_embeddings().weight:
        everything -= embeddings.nbytes  # one row per token is read
    rows = {
        "sparsity": [r.sparsity for r in readings] or [0.0],
        "gate_share": [r.gate for r in readings] or [1.0],
        "up_share": [r.up for r in readings] or [1.0],
        "active_share": [r.active for r in readings] or [1.0],
    }
    return {f"{name}_time": parts[name] / seconds for name in PARTS} | {
        **{name: np.mean(values) for name, values in rows.items()},
        "ffn_megabytes": ffn_bytes / 1e6,
        "megabytes": (everything - dense_ffn + ffn_bytes) / 1e6,
    }


def _weights(ffn: FFN) -> list[Tensor]:
    return [ffn.gate.weight, ffn.down_weight] + ([] if ffn.up is None else [ffn.up.weight])


@contextmanager
def parts_timed(model: PreTrainedModel, ffns: list[FFN], undivided: bool) -> Iterator[dict[str, float]]:
    """Seconds that the model spends in each of PARTS inside the block, after its first pass, that of the prompt.

    On a GPU each part is waited for, which takes time of its own.

    Args:
        undivided: decoder layers run as one call, which nothing may be put into: FFNs and attention are NaN.
    """
    seconds, started, passes = dict.fromkeys(PARTS, 0.0), dict[str, float](), list[None]()

    def start(name: str, own: Callable, *args: Any, **kwargs: Any) -> Any:
        if len(passes) > 1:  # not the prompt
            wait(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
            started[name] = time.perf_counter()
        return own(*args, **kwargs)

    def stop(name: str, module: nn.Module, own: Callable, *args: Any, **kwargs: Any) -> Any:
        y = own(*args, **kwargs)
        if name in started:
            wait(next(module.parameters()))
            seconds[name] += time.perf_counter() - started.pop(name)
        return y

    spans = [("head", model.get_output_embeddings(), model.get_output_embeddings())]
    if undivided:
        seconds |= dict.fromkeys(("ffn", "attention"), np.nan)
    else:
        spans += [("ffn", ffn.gate.module, ffn.down) for ffn in ffns]
        spans += [("attention", module, module) for module in _attentions(model)]
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(lambda *given: passes.append(None)).remove)
        for name, first, last in spans:
            stack.enter_context(forward_replaced(first, partial(start, name, first.forward)))
            stack.enter_context(forward_replaced(last, partial(stop, name, last, last.forward)))
        yield seconds


def _attentions(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that transformers calls attention."""
    named = [(name, module) for name, module in model.named_modules() if "Attention" in type(module).__name__]
    names = {name for name, _ in named}
    return [module for name, module in named if not any(name.startswith(f"{other}.") for other in names)]


@contextmanager
def ffns_read(ffns: Sequence[FFN], kernels: Sequence[Any], readings: list[Reading]) -> Iterator[None]:
    """Inside the block, what kernels read for each single token that their FFNs are given is appended to `readings`.

    kernels: each a `SparseFFN`, of one FFN.
    """

    def keep(kernel: SparseFFN) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            if args[0].shape[-2] == 1:
                readings.append(reading(kernel, args[0].flatten(0, -2)))

        return hook

    with ExitStack() as stack:
        for ffn, kernel in zip(ffns, kernels, strict=True):
            stack.callback(ffn.gate.module.register_forward_pre_hook(keep(kernel)).remove)
        yield


def decode_pattern(name: str, model: nn.Module, thresholds: Thresholds, windows: Tensor) -> Pattern:
    """Which neurons of all layers are non-zero and active on the last token of each window, (windows, length) ids.

    The tokens belong to different texts, as those that are decoded side by side do.
    """
    rule, nonzero, active = RULES[thresholds.rule].decided_on, [], []

    def keep(ffn: FFN, s: Tensor, h: Tensor, tokens: Tensor) -> None:
        last = slice(windows.shape[1] - 1, None, windows.shape[1])
        limit = kernel_rule(ffn, thresholds)[1] if rule == "gate" else 0.0
        nonzero.append((s[last].abs() > limit).cpu().numpy())
        active.append(thresholds.active(ffn, s[last], h[last]).cpu().numpy())

    with evaluating(model), observe_neurons(model, keep) as ffns:
        model(input_ids=windows, use_cache=False)
    act = activation_name(ffns[0].activation)
    return Pattern(name, act, rule, np.concatenate(nonzero, axis=1), np.concatenate(active, axis=1))
