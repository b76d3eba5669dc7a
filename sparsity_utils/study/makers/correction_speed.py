"""Tokens per second of full, sparse and corrected decoding, in one process, where drafts leave weights unread."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels.timing import alternate, machine, median_interval
from sparsity_utils.decoding.accounting import effective_density, read_parameters
from sparsity_utils.decoding.correction import Correction, corrected, drafted
from sparsity_utils.decoding.drafters import Drafter, FromPrompt, Masked, OnKernels, Shrunk
from sparsity_utils.decoding.speed import greedy
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.study.opened_models import CorrectionConfig

SHARE = 0.5  # of the neurons, kept by FSparse and by CSparse; of the inputs of all linear maps, by TEAL
ON_KERNELS = ("teal", "cett")  # FSparse has a limit of its own for each token, which no kernel of neurons takes
PERIOD, THRESHOLD = 16, 0.1  # of the published method: its period, and one of its thresholds


def speeds(
    model: PreTrainedModel,
    prompt: Tensor,
    thresholds: Mapping[str, Thresholds],
    densities: Mapping[str, float],
    settings: CorrectionConfig,
) -> pd.DataFrame:
    """Tokens per second after `prompt`, (1, length): one row per rule that leaves weights unread and way to decode.

    Ways alternate, `settings.rounds` times each; what the prompt costs is not timed, nor the copies of weights that
    CSparse makes then. Where a text is not that of the masked model, or a lossless one not the full model's,
    `same_tokens` is False and no speed is given.
    """
    masked: dict[str, Drafter] = {"csparse": FromPrompt(model, SHARE)}
    fast: dict[str, Drafter] = {"csparse": Shrunk(model, SHARE)}
    for rule in filter(ON_KERNELS.__contains__, thresholds):
        masked[rule], fast[rule] = Masked(model, thresholds[rule]), OnKernels(model, thresholds[rule])
    new, published = settings.timed_tokens, Correction(PERIOD, THRESHOLD)
    lossless = replace(published, threshold=None)
    full = greedy(model, prompt, new)[0]
    rows: dict[tuple[str, str], dict] = {("full", "full"): {"same_tokens": True, "advance": 1.0, "megabytes": 1.0}}
    jobs = {("full", "full"): partial(_full, model, prompt, new)}
    for rule, drafter in fast.items():
        density = densities[rule]
        same = torch.equal(*(drafted(model, prompt, one, new)[0] for one in (drafter, masked[rule])))
        rows[rule, "alone"] = {"same_tokens": same, "advance": 1.0, "megabytes": density}
        jobs[rule, "alone"] = partial(_alone, model, prompt, drafter, new)
        for way, correction in (("corrected", published), ("lossless", lossless)):
            found = corrected(model, prompt, drafter, correction, new)
            expected = full if way == "lossless" else corrected(model, prompt, masked[rule], correction, new).tokens
            advance = found.average_advance
            read = effective_density(density, PERIOD, advance)
            rows[rule, way] = {
                "same_tokens": torch.equal(found.tokens, expected),
                "advance": advance,
                "megabytes": read,
            }
            jobs[rule, way] = partial(_corrected, model, prompt, drafter, correction, new)
    rates = alternate(jobs, settings.rounds)
    whole = read_parameters(model) * model.dtype.itemsize / 1e6
    table = []
    for (rule, way), row in rows.items():
        low, median, high = median_interval(rates[rule, way]) if row["same_tokens"] else (math.nan,) * 3
        speed = {"tokens_per_second": median, "low_tokens_per_second": low, "high_tokens_per_second": high}
        about = {"rule": rule, "way": way, "density": densities[rule]}
        table.append({**about, **row, "megabytes": row["megabytes"] * whole, **speed})
    about = {"prompt": prompt.shape[1], "new_tokens": new, "rounds": settings.rounds}
    return pd.DataFrame(table).assign(**about, **machine(prompt.device.type))


def _full(model: PreTrainedModel, prompt: Tensor, new: int) -> float:
    return (new - 1) / greedy(model, prompt, new)[1]


def _alone(model: PreTrainedModel, prompt: Tensor, drafter: Drafter, new: int) -> float:
    return (new - 1) / drafted(model, prompt, drafter, new)[1]


def _corrected(model: PreTrainedModel, prompt: Tensor, drafter: Drafter, correction: Correction, new: int) -> float:
    found = corrected(model, prompt, drafter, correction, new)
    return found.rounds["advance"].sum() / found.seconds  # those beyond the new ones count: they were decoded as well
