"""One checkpoint measured on one text: the work of `python -m sparsity_utils measure`."""

import json
import math
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.models.config import DTYPES
from sparsity_utils.models.context import context_length
from sparsity_utils.models.pretrained import open_checkpoint
from sparsity_utils.models.weights import description
from sparsity_utils.neurons.rules import METRICS, metric_named
from sparsity_utils.sparsity.inputs import predicts_next_token
from sparsity_utils.sparsity.metrics import SparsityReport, measure_sparsity
from sparsity_utils.text.config import MEASURED_TOKENS
from sparsity_utils.text.windows import CALIBRATION_SHARE, evenly_spaced, read_documents, split_documents, text_batches

WINDOW = 256  # tokens, unless the model's context is shorter
HEATMAP_TOKENS = 48
FAR = 0.5  # share of log(1 + p/100) by which log(PPL ratio) may differ from it without a note
NUMBERS = (
    "activation_ratio", "standard_error", "interval", "ratio_of_all_neurons", "nonzero_share", "ppl_ratio",
    "ppl_ratio_interval", "loss_dense", "loss_sparse", "cett", "target_cett", "tokens", "documents", "skipped_tokens",
    "calibrated_on", "note",
)  # fmt: skip

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Measured:
    """A report, the tokenizer that can read its token ids, and the settings it was made with."""

    report: SparsityReport
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]


def measure_checkpoint(
    model: str,
    text: Path,
    metric: str = "cett-ppl",
    *,
    length: int | None = None,
    calibration: Path | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    max_tokens: int = MEASURED_TOKENS,
    **knobs: float | None,
) -> Measured:
    """Open `model` (as `open_checkpoint` takes it) and measure it on the documents of `text`, behind progress bars.

    Args:
        metric, knobs: as for `measure_sparsity`, where p is one of the knobs: only the metric's own may be given.
        length: tokens of a window; by default 256, or the model's context if that is shorter.
        calibration: text to solve thresholds on; by default a third of the documents of `text`, which are then not
            measured. A metric that solves nothing is measured on all of them.
        dtype: one of DTYPES; by default the one the weights are stored in.
        revision: branch, tag or commit of a model of the hub.
        max_tokens: of both texts together, a third of them for calibration; windows evenly spread over each text.

    Raises `InputError` for whatever cannot be opened, read or measured.
    """
    rule = metric_named(metric)
    setting = rule.setting(knobs)
    if calibration and not rule.solved:
        raise InputError(f"--calibration was given, and metric {metric!r} solves nothing on it: leave it out.")
    given = prepared(
        model, text, length=length, calibration=calibration, dtype=dtype, revision=revision, max_tokens=max_tokens,
        solves=rule.solved,
    )  # fmt: skip
    how = dict[str, Any](calibration=given.calibration, **setting)
    report = measure_sparsity(given.model, given.evaluation, metric, per_token=True, show_progress=True, **how)
    return Measured(report, given.tokenizer, given.settings | {"metric": metric} | knobs | setting)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model and what it is to be measured on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    evaluation: Batches
    calibration: Batches | None  # None: nothing is solved
    settings: dict[str, Any]


def prepared(
    model: str,
    text: Path,
    *,
    length: int | None,
    calibration: Path | None,
    dtype: str | None,
    revision: str | None,
    max_tokens: int,
    solves: bool,
) -> Prepared:
    """Open a model and read its texts, as `measure_checkpoint` describes; `solves`: whether calibration text is needed.

    Raises `InputError` for whatever cannot be opened or read.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"The dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    documents = read_documents(text)
    others = read_documents(calibration) if calibration else None
    network, tokenizer = open_checkpoint(model, dtype=getattr(torch, dtype) if dtype else None, revision=revision)
    if tokenizer is None or not predicts_next_token(network):
        raise InputError(
            f"{model} is a {type(network).__name__}, which does not predict the next token of a text; this command "
            f"needs a model that does (measure_sparsity takes others, with batches that you make)."
        )
    length = window_length(network, length)
    evaluation, solved_on = text_batches(tokenizer, documents, length), None
    if others:
        solved_on = text_batches(tokenizer, others, length)
    elif solves:
        solved_on, evaluation = split_documents(evaluation)
    if solved_on:
        solved_on = thinned(solved_on, round(CALIBRATION_SHARE * max_tokens))
        max_tokens -= round(CALIBRATION_SHARE * max_tokens)
    settings = {
        "model": model,
        "revision": revision,
        "opened": description(network),
        "architecture": type(network).__name__,
        "dtype": str(network.dtype).removeprefix("torch."),
        "text": str(text),
        "calibration": str(calibration) if calibration else None,
        "length": length,
    }
    return Prepared(network, tokenizer, thinned(evaluation, max_tokens), solved_on, settings)


def window_length(model: PreTrainedModel, wanted: int | None = None) -> int:
    """Tokens of a window: 256, or the model's context if that is shorter; or `wanted`.

    Raises `InputError` when `wanted` is longer than the context or shorter than two tokens.
    """
    context: Any = context_length(model) or math.inf
    if wanted is None:
        return min(WINDOW, context)
    if not 2 <= wanted <= context:
        raise InputError(f"length is {wanted}; choose 2 to {context}, the context of the model in tokens.")
    return wanted


def thinned(batches: Sequence[Mapping[str, Tensor]], tokens: int) -> Batches:
    """Windows evenly spread over `batches`, as many as hold about `tokens` real tokens; all of them if they are fewer.

    Raises `InputError` when that is less than one window.
    """
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    windows = sum(len(batch["input_ids"]) for batch in batches)
    count = min(windows, math.floor(windows * tokens / real))
    if count < 1:
        raise InputError(
            f"{tokens:,} tokens are less than one window of {batches[0]['input_ids'].shape[1]}: raise --max-tokens, "
            f"of which a third is for calibration."
        )
    chosen = torch.tensor(evenly_spaced(count, windows))  # (count,)
    thin, first = [], 0
    for batch in batches:
        rows = chosen[(chosen >= first) & (chosen < first + len(batch["input_ids"]))] - first
        first += len(batch["input_ids"])
        if len(rows):
            thin.append({name: value[rows] for name, value in batch.items()})
    return thin


def summary(measured: Measured) -> str:
    """What the command prints: the activation ratio, its cost in perplexity, the layers, and any notes."""
    report = measured.report
    spread, price = "one document, so its error is unknown", ""
    if report.documents > 1:
        low, high = report.interval
        spread = f"standard error {100 * report.standard_error:.2f} points, 90% interval {low:.1%} to {high:.1%}"
        price = "; 90% interval {:+.2%} to {:+.2%}".format(*(end - 1 for end in report.ppl_ratio_interval))
    dense, sparse = math.exp(report.loss_dense), math.exp(report.loss_sparse)
    lines = [
        f"{report.activation_ratio:.1%} of the neurons are active per token ({spread}).",
        f"Skipping the other {report.sparsity:.1%}, chosen anew for every token, takes perplexity from {dense:.2f} to "
        f"{sparse:.2f} ({report.ppl_ratio - 1:+.2%}{price}).",
        _basis(measured),
        f"Model {measured.settings['opened']}.",
        "",
        _layer_lines(report),
    ]
    notes = [note for note in (report.note, _price_note(measured)) if note]
    return "\n".join([*lines, *(f"\nNote: {note}." for note in notes)])


def _price_note(measured: Measured) -> str:
    """A warning where log(PPL ratio) differs from log(1 + p/100), which was solved for, by more than the share FAR."""
    report, p = measured.report, measured.settings.get("p")
    if p is None or abs(math.log(report.ppl_ratio) / math.log1p(p / 100) - 1) <= FAR:
        return ""
    return (
        f"the thresholds were solved for {p:g}% and cost {report.ppl_ratio - 1:.2%} here; to trust the number, "
        f"calibrate on more text, of the same kind"
    )


def _basis(measured: Measured) -> str:
    """Metric and sample size in one sentence."""
    settings, report = measured.settings, measured.report
    knob = METRICS[report.metric].knob
    knobs = f", {knob.name} = {settings[knob.name]:g}" if knob else ""
    count = f"{report.tokens:,} tokens of {report.documents} document{'s' if report.documents > 1 else ''}"
    solved = (
        "" if report.calibrated_on == "none" else f"; thresholds solved on {settings['calibration'] or 'other text'}"
    )
    return f"Metric {report.metric}{knobs}; {count}{solved}."


def _layer_lines(report: SparsityReport) -> str:
    """The table of layers as text; columns on experts only where the model is a mixture of experts."""
    layers = report.layers
    shown = layers[["layer", "name", "threshold"]].copy()
    shown["threshold"] = [f"{value:.3g}" for value in layers["threshold"]]
    shown["active %"] = (100 * layers["activation_ratio"]).round(1)
    if (layers["experts"] > 1).any():
        shown.insert(2, "experts", layers["experts"])
        shown["of all experts %"] = (100 * layers["ratio_of_all_neurons"]).round(1)
    shown["not zero %"] = (100 * layers["nonzero_share"]).round(1)
    shown["CETT"] = layers["cett"].round(3)
    return shown.to_string(index=False)


def write_results(measured: Measured, folder: Path) -> list[Path]:
    """Write report.json, layers.csv, tokens.csv and the figures layers and heatmap, PNG and SVG; return the files.

    tokens.csv has one row per token, its entry of the vocabulary beside its id. The heatmap shows the first tokens of
    the text. Nothing is written before everything is computed, and each file is renamed into place when complete.
    """
    from sparsity_utils.findings.report_figures import layer_bars, token_heatmap, token_texts

    report, tokenizer = measured.report, measured.tokenizer
    tokens = report.per_token.copy()
    tokens.insert(3, "token", tokenizer.convert_ids_to_tokens(tokens["token_id"].tolist()))
    first = tokens[tokens["document"] == tokens["document"].iloc[0]].head(HEATMAP_TOKENS)
    figures = {
        "layers": layer_bars(report),
        "heatmap": token_heatmap(first, token_texts(tokenizer, first["token_id"])),
    }
    texts = {
        "report.json": json.dumps(_headline(measured), indent=1) + "\n",
        "layers.csv": report.layers.to_csv(index=False, float_format="%.8g"),
        "tokens.csv": tokens.to_csv(index=False, float_format="%.6g"),
    }
    for name, text in texts.items():
        with paths.written_aside(folder / name) as aside:
            aside.write_text(text, encoding="utf-8")
    drawn = [file for name, figure in figures.items() for file in figure.save(folder / name)]
    return [*(folder / name for name in texts), *drawn]


def _headline(measured: Measured) -> dict[str, Any]:
    """Headline numbers, settings and versions as JSON: None where a number is unknown."""
    report = measured.report
    numbers = {name: getattr(report, name) for name in NUMBERS}
    numbers |= {"perplexity_dense": math.exp(report.loss_dense), "perplexity_sparse": math.exp(report.loss_sparse)}
    return {
        **{name: known(value) for name, value in numbers.items()},
        "settings": measured.settings,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what a number rests on."""
    libraries = {"python": platform.python_version(), "torch": torch.__version__}
    return libraries | {"transformers": transformers.__version__}


def known(value: Any) -> Any:
    """`value` with None for each number that JSON does not have: NaN and infinity."""
    if isinstance(value, tuple):
        return [known(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_folder(folder: Path) -> None:
    """Raises `InputError` when results cannot be written into `folder`; asked before minutes are spent measuring."""
    place = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryDirectory(dir=place):  # permissions alone do not tell: /proc, a full disk
            return
    except OSError as error:
        raise InputError(f"{place} is not a folder that can be written to; name another one with --out.") from error
