"""How fast models decode that were trained to be sparse: the table trained_decoding, of runs of experiment q_sparse.

A model that reads a part of its inputs runs in transformers with that choice computed at every map, and on kernels of
linear maps that leave the weights of the other inputs unread. One that reads everything has exact zeros among its
neurons, which kernels of FFNs skip, with and without a certified gate. Beside both stand the same weights with nothing
skipped. All ways of all models take turns.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel

from kernels.reading import Reading
from kernels.timing import alternate, machine, speedups
from sparsity_utils.console import check, progress
from sparsity_utils.decoding.decode import ReadyKernels, ready_kernels, running
from sparsity_utils.decoding.input_kernels import Stored
from sparsity_utils.decoding.kept_text import check_decoder
from sparsity_utils.decoding.masked_text import CountedMask, MaskedText, masked_text
from sparsity_utils.decoding.speed import decoded, ffns_read
from sparsity_utils.models.decoder import default_device
from sparsity_utils.models.input_training import trained_thresholds
from sparsity_utils.neurons.find import find_ffns, layer_count
from sparsity_utils.neurons.linears import find_linears
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.study.experiments import TrainedDecodingConfig
from sparsity_utils.study.makers.input_speeds import WHOLE, Way, interval
from sparsity_utils.study.makers.maker import Asked, Maker
from sparsity_utils.study.makers.pieces import Frames
from sparsity_utils.study.plan import TRAINED_DECODING, decoded_runs
from sparsity_utils.study.profiles import Profile
from sparsity_utils.study.runs import Run
from sparsity_utils.text.windows import measurement_batches

ABOUT = ("run", "d_model", "n_layers", "d_ff", "seed")  # of `Run.checkpoints`
Row = Mapping[str, Any]


def trained_decoding(runs: Sequence[tuple[Row, Run]], prompt: Tensor, settings: TrainedDecodingConfig) -> pd.DataFrame:
    """The table trained_decoding (results/columns.csv): one row per run and way of decoding.

    Every way first decodes the text that it is judged by, once and untimed. One that chooses a wrong word there has no
    speed.

    Args:
        runs: each with columns that say what it is, arm and learning_rate.
        prompt: ids, (1, length).

    Raises InputError where prompt and new tokens are longer than a model's context.
    """
    ways = [way for about, run in runs for way in ways_of_run(about, run, prompt, settings.new_tokens)]
    judged = [way.timed(prompt) for way in progress(ways, "words of trained models", len(ways))]
    seconds = alternate(dict(enumerate(partial(_seconds, way, prompt) for way in ways)), settings.rounds)
    table = rows(ways, judged, seconds)
    about = {"prompt": prompt.shape[1], "words": settings.new_tokens, "rounds": settings.rounds}
    return table.assign(**about, **machine(prompt.device.type))


def ways_of_run(about: Row, run: Run, prompt: Tensor, words: int) -> Iterator[Way]:
    """The ways in which the last checkpoint of a run decodes `words` words after `prompt`."""
    model, stored = run.load(run.last_step, as_trained=False), Stored()
    check_decoder(model, prompt, words)
    about = {**about, **run.checkpoints.iloc[-1][list(ABOUT)]}

    def text(thresholds: Thresholds) -> MaskedText:
        return masked_text(model, CountedMask(model, thresholds), prompt, words)

    def way(kind: tuple[str, str], text: MaskedText, kernels: ReadyKernels | None, read_share: float, runs: Any) -> Way:
        columns = {"engine": kind[0], "way": kind[1], "read_share": read_share, "rounding": text.rounding}
        return Way(runs, kernels, text, {**about, **columns})

    whole = text(Thresholds("teal", (0.0,) * len(find_linears(model))))
    yield way(("transformers", WHOLE), whole, None, 1.0, model)
    yield way(("kernels", WHOLE), whole, ready_kernels(model, None, stored), 1.0, model)
    if kept := trained_thresholds(model):
        trained, kernels = text(kept), ready_kernels(model, kept, stored)
        yield way(("transformers", "as trained"), trained, None, 1.0, run.load(run.last_step))
        yield way(("kernels", kept.rule), trained, kernels, _share_of_maps(model, trained), model)
        return
    zeros = Thresholds("relu", (0.0,) * layer_count(find_ffns(model)))
    for certified in (False, True) if model.device.type == "cpu" else (False,):
        kernels = ready_kernels(model, zeros, stored, certified=certified)
        name = "relu, certified" if certified else "relu"
        yield way(("kernels", name), whole, kernels, _share_of_ffns(model, kernels, prompt, whole), model)


def _share_of_maps(model: PreTrainedModel, text: MaskedText) -> float:
    """Share of the weights of the linear maps that a token of `text` reads."""
    maps = find_linears(model)
    return sum(share * one.size for share, one in zip(text.read, maps, strict=True)) / sum(one.size for one in maps)


def _share_of_ffns(model: PreTrainedModel, kernels: ReadyKernels, prompt: Tensor, text: MaskedText) -> float:
    """Bytes that a token of `text` reads of the linear maps over those of all their weights; attention is read whole.

    The 8-bit copy of a certified gate is read as well.
    """
    readings = list[Reading]()
    with evaluating(model), running(model, kernels), ffns_read(kernels.ffns, kernels.of_ffns, readings):
        decoded(model, prompt, len(text.words), text.words[None])
    passes = len(readings) / len(kernels.ffns)
    attention = sum(one.size * one.weight.itemsize for one in find_linears(model) if one.vector in ("attention", "o"))
    read, every = (sum(getattr(one, name) for one in readings) / passes for name in ("nbytes", "dense_nbytes"))
    return (attention + read) / (attention + every)


def _seconds(way: Way, prompt: Tensor) -> float:
    return way.timed(prompt)["rest"]


def rows(ways: Sequence[Way], judged: Sequence[Row], seconds: Mapping[int, np.ndarray]) -> pd.DataFrame:
    """The table, without what is the same in all rows.

    Args:
        judged: what each way gave when it decoded its text, as `Way.timed` returns it.
        seconds: of each way, by its place, the seconds of all words but the first in each round, (rounds,).
    """
    right = {place: times if not judged[place]["wrong"] else times * np.nan for place, times in seconds.items()}
    places = {(way.about["run"], way.about["engine"], way.about["way"]): place for place, way in enumerate(ways)}
    table = []
    for place, way in enumerate(ways):
        base, whole = (places[way.about["run"], engine, WHOLE] for engine in ("transformers", "kernels"))
        compared = {"dense": right[base], "whole": right[whole], "own": right[place]}
        columns = {
            **{name: int(judged[place][name]) for name in ("differing", "wrong")},
            **interval("tokens_per_second", (len(way.text.words) - 1) / right[place]),
            **speedups(compared, "own", ("whole",)),
        }
        table.append({**way.about, **columns})
    return pd.DataFrame(table)


def _tables(study: Asked) -> Frames:
    """Of the runs that the study has or else trains; one that diverged is left out."""
    profile, settings = study.profile, study.profile.trained_decoding
    arms, configs = decoded_runs(profile), study.configs(TRAINED_DECODING)
    runs = []
    for arm, config, run in zip(arms, configs, study.trained_runs(configs), strict=True):
        if run.diverged:
            warnings.warn(f"{run.diverged} The study goes on without it.", stacklevel=2)
        else:
            runs.append(({"arm": arm.arm, "learning_rate": config.train.learning_rate}, run))
    check(len(runs) > 0, f"Every run of {TRAINED_DECODING} diverged; lower the rates of q_sparse.")
    context = configs[0].model.context
    window = measurement_batches(study.corpus.tokens("validation"), context, "evaluation", context)[0]["input_ids"]
    prompt = window[:1, : settings.prompt].to(default_device())
    return {TRAINED_DECODING: trained_decoding(runs, prompt, settings)}


def _missing(profile: Profile) -> str:
    if decoded_runs(profile):
        return ""
    return f"Profile {profile.name} has no runs of q_sparse that {TRAINED_DECODING} is measured for."


MAKERS = [Maker((TRAINED_DECODING,), _tables, _missing, of_machine=True)]
