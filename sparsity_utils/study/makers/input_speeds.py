"""How fast models decode whose linear maps skip inputs: the table input_speeds.

Thresholds are solved first (`input_settings`), then the masked models write their texts, then all ways of decoding take
turns. Pieces are kept as they finish; the rounds of timing until all are there, so that later ones are of that day.
"""

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kernels.bench import WEIGHTS, memory_works
from kernels.timing import machine, median_interval, speedups, timed
from sparsity_utils import paths
from sparsity_utils.console import progress, short_number
from sparsity_utils.decoding.decode import ReadyKernels, head_kernel, ready_kernels, running
from sparsity_utils.decoding.input_kernels import Stored
from sparsity_utils.decoding.masked_text import CountedMask, MaskedText, masked_text, with_rounded_weights
from sparsity_utils.decoding.speed import decoded
from sparsity_utils.models.decoder import default_device
from sparsity_utils.models.pretrained import open_checkpoint
from sparsity_utils.neurons.input_rules import INPUT_RULES
from sparsity_utils.neurons.linears import find_linears
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.study.makers.input_settings import Calibrated, Setting
from sparsity_utils.study.makers.maker import Asked, Maker
from sparsity_utils.study.makers.pieces import Frames, Pieces, measurement_key
from sparsity_utils.study.makers.pretrained import (
    SECONDS_PER_TOKEN_AND_PARAMETER,
    Text,
    not_here,
    opened,
    read_texts,
)
from sparsity_utils.study.opened_models import InputSpeedConfig, PretrainedConfig
from sparsity_utils.study.plan import INPUT_SPEEDS
from sparsity_utils.study.profiles import Profile

VERSION = 1  # raise it when the same settings would measure something else
WHOLE = "nothing skipped"
READS = 5  # of memory, before each round

OpenedModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Opener = Callable[[str], OpenedModel]


@dataclass(frozen=True, eq=False)
class Way:
    """One way of decoding: what runs, the text that it must choose, and its columns but for the times."""

    model: PreTrainedModel
    kernels: ReadyKernels | None  # None: the model itself
    text: MaskedText
    about: dict[str, Any]

    def timed(self, prompt: Tensor, words: int | None = None) -> dict[str, float]:
        """One pass over its text, or its first words: seconds of prompt and rest, words that differ, wrong ones."""
        text = self.text.words[:words]
        with evaluating(self.model), nullcontext() if self.kernels is None else running(self.model, self.kernels):
            chosen, before, after = decoded(self.model, prompt, len(text), text[None])
        differing, wrong = self.text.differing(chosen[0])
        return {"prompt": before, "rest": after, "differing": differing, "wrong": wrong}


def opened_here(name: str) -> OpenedModel:
    """A model of the recorded study; any other as `pretrained.opened`, which raises InputError for one not fetched."""
    return open_checkpoint(_recorded(name), dtype=torch.float32) if _recorded(name).is_dir() else opened(name)


def _recorded(name: str) -> Path:
    return paths.RECORDED_MODELS / name


def input_speeds(
    settings: InputSpeedConfig, pretrained: PretrainedConfig, folder: Path, of: Opener = opened_here
) -> pd.DataFrame:
    """The table input_speeds (results/columns.csv) of the models of a profile. Pieces are kept in `folder`.

    of: gives a model by its name, and its tokenizer. Raises InputError for a model that was not fetched, cannot be
    measured, or has too little text.
    """
    tables = [_Work(name, of(name), settings, pretrained, folder).table() for name in settings.models]
    return pd.concat(tables, ignore_index=True).assign(**machine(default_device().type))


def _itself(model: PreTrainedModel) -> PreTrainedModel:
    return model


def _key(model: nn.Module, text: Text, settings: InputSpeedConfig) -> str:
    """Digest of all that decides thresholds and texts: weights, token ids, settings."""
    decides = {name: getattr(settings, name) for name in ("prompt", "new_tokens")}
    ids = [batch["input_ids"] for batch in (*text.calibration, *text.evaluation)]
    return measurement_key({**decides, "version": VERSION}, model, ids)


class _Work:
    """The pieces of one model."""

    def __init__(
        self, name: str, opened: OpenedModel, settings: InputSpeedConfig, pretrained: PretrainedConfig, folder: Path
    ) -> None:
        self.model, tokenizer = opened
        tokens = {part: getattr(settings, part) for part in ("window", "calibration_tokens", "evaluation_tokens")}
        self.text = read_texts(tokenizer, replace(pretrained, **tokens))[0]
        self.name, self.settings, self.device = name, settings, default_device()
        self.model = self.model.to(self.device)
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        about = f"the speed of {name}, {short_number(weights)} parameters"
        pieces = folder / _key(self.model, self.text, settings)
        self.pieces = Pieces(pieces, about, weights * SECONDS_PER_TOKEN_AND_PARAMETER)
        self.rounds = Pieces(pieces / f"rounds-{self.device.type}-{torch.get_num_threads()}", about, 1.0)
        self.warm = False
        self.prompt = self.text.evaluation[0]["input_ids"][:1, : settings.prompt].to(self.device)
        self.maps, self.stored = find_linears(self.model), Stored()
        cpu = self.device.type == "cpu"
        self.certified = self.stored.once(("head", 1), partial(head_kernel, self.model, 1)) if cpu else None

    def table(self) -> pd.DataFrame:
        """One row for each way."""
        ways = list(self.ways())
        table = self.rows(ways, [self.round(ways, turn) for turn in range(self.settings.rounds)])
        shutil.rmtree(self.rounds.folder)
        calibration, evaluation = self.text.tokens
        parts = {"calibration_tokens": calibration, "evaluation_tokens": evaluation, "rounds": self.settings.rounds}
        return table.assign(prompt=self.prompt.shape[1], words=self.settings.new_tokens, **parts)

    def ways(self) -> Iterator[Way]:
        """The model itself in both precisions, kernels that skip nothing, then those of each rule and setting."""
        whole = Setting(WHOLE, "", Thresholds("teal", (0.0,) * len(self.maps)), 0.0, 1.0)
        half = copy.deepcopy(self.model).to(torch.bfloat16)
        for model, weights in ((self.model, "float32"), (half, "bfloat16")):
            text = self.masked(whole, weights, partial(_itself, model))
            yield self.way(whole, None, text, ("transformers", weights, "full"), model)
        heads = {"full": None} if self.certified is None else {"full": None, "certified": 1}
        for setting in (whole, *Calibrated(self.model, self.text, self.settings, self.pieces)):
            for weights in ("float32", "8 bits") if setting.thresholds.rule in INPUT_RULES else ("float32",):
                bits = weights == "8 bits"
                made = {
                    head: ready_kernels(self.model, setting.thresholds, self.stored, eight_bits=bits, likeliest=k)
                    for head, k in heads.items()
                }
                model = partial(self.rounded, made["full"]) if bits else partial(_itself, self.model)
                text = self.masked(setting, weights, model)
                for head, kernels in made.items():
                    yield self.way(setting, kernels, text, ("kernels", weights, head), self.model)

    def rounded(self, kernels: ReadyKernels) -> PreTrainedModel:
        """The model with the weights of kernels in 8 bits."""
        return self.stored.once("rounded", partial(with_rounded_weights, self.model, kernels))

    def masked(self, setting: Setting, weights: str, model: Callable[[], PreTrainedModel]) -> MaskedText:
        """The text that the masked `model` writes, kept as a piece."""
        words = self.settings.new_tokens

        def frames() -> Frames:
            text = masked_text(model(), CountedMask(self.model, setting.thresholds), self.prompt, words, self.certified)
            columns = {"word": text.words.tolist(), "second": text.second.tolist(), "gap": text.gaps.tolist()}
            about = pd.DataFrame([{"rounding": text.rounding, "undecided": text.undecided}])
            return {"words": pd.DataFrame(columns), "about": about, "read": pd.DataFrame({"share": text.read})}

        name = " ".join(["text", self.device.type, setting.rule, setting.setting, weights])
        found = self.pieces.kept("-".join(name.split()), words, frames)
        word, second, gap = (
            torch.tensor(column.to_numpy(), device=self.device) for _, column in found["words"].items()
        )
        about = {name: float(value) for name, value in found["about"].iloc[0].items()}
        return MaskedText(word, second, gap, read=list(found["read"]["share"]), **about)

    def way(
        self,
        setting: Setting,
        kernels: ReadyKernels | None,
        text: MaskedText,
        kind: tuple[str, str, str],
        model: PreTrainedModel,
    ) -> Way:
        """A way with what is known of it without timing it. kind: engine, weights, head."""
        engine, weights, head = kind
        about = {
            "model": self.name,
            **{"engine": engine, "rule": setting.rule, "setting": setting.setting, "weights": weights, "head": head},
            **{"sparsity": setting.sparsity, "ppl_ratio": setting.ppl_ratio},
            **self.reading(text, weights, head),
            "rounding": text.rounding,
        }
        return Way(model, kernels, text, about)

    def reading(self, text: MaskedText, weights: str, head: str) -> dict[str, float]:
        """What a generated token reads: share of the maps' weights, of the head's rows, and megabytes in all."""
        size = {"float32": 4, "bfloat16": 2, "8 bits": 1}[weights]
        scale = 4 if weights == "8 bits" else 0  # of each input of each map
        wide = 2 if weights == "bfloat16" else 4  # of all other weights
        shares = list(zip(text.read, self.maps, strict=True))
        maps = sum(share * (one.size * size + one.inputs * scale) for share, one in shares)
        ends = (self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight)
        last = wide * ends[1].numel()
        if head == "certified":
            last = self.certified.copy.nbytes + text.undecided * last
        everything = sum(parameter.numel() for parameter in self.model.parameters())
        elsewhere = {id(part): part.numel() for part in ends} | {one.index: one.size for one in self.maps}
        others = everything - sum(elsewhere.values()) + ends[0].shape[1]  # norms, biases, one row of the embeddings
        return {
            "read_share": sum(share * one.size for share, one in shares) / sum(one.size for one in self.maps),
            "undecided_share": text.undecided if head == "certified" else 1.0,
            "megabytes": (maps + last + others * wide) / 1e6,
        }

    def round(self, ways: Sequence[Way], turn: int) -> pd.DataFrame:
        """What each way takes in one round, in the order of `ways`; every other round runs backwards. A piece."""

        def frames() -> Frames:
            read, nbytes = memory_works(self.device.type, WEIGHTS[self.device.type] // 2)["read"]
            for way in ways if not self.warm else ():
                way.timed(self.prompt, 2)
            self.warm = True
            memory = nbytes / np.median([timed(read, self.device.type) for _ in range(READS)])
            order = range(len(ways))[:: -1 if turn % 2 else 1]
            shown = progress(order, f"round {turn + 1} of {self.settings.rounds}", len(ways))
            times = pd.DataFrame({place: ways[place].timed(self.prompt) for place in shown}).T.sort_index()
            return {"times": times.assign(memory=memory)}

        return self.rounds.kept(f"{turn}", len(ways), frames)["times"]

    def rows(self, ways: Sequence[Way], rounds: Sequence[pd.DataFrame]) -> pd.DataFrame:
        """The table, without what is the same in all rows. A way that chose a wrong word in any round has no speed."""
        # (ways, rounds) each
        found = {name: np.stack([one[name].to_numpy() for one in rounds], axis=1) for name in rounds[0]}
        wrong = found["wrong"].max(axis=1)
        seconds = np.where(wrong[:, None] > 0, np.nan, found["rest"])
        key = ("engine", "rule", "weights", "head")  # unique where nothing is skipped
        places = {tuple(way.about[part] for part in key): place for place, way in enumerate(ways)}
        base, rows = places["transformers", WHOLE, "float32", "full"], []
        for place, way in enumerate(ways):
            weights, head = way.about["weights"], way.about["head"]
            whole = base if way.kernels is None else places["kernels", WHOLE, weights, head]
            compared = {"dense": seconds[base], "whole": seconds[whole], "own": seconds[place]}
            speed = (self.settings.new_tokens - 1) / seconds[place]
            before = np.where(wrong[place] > 0, np.nan, self.prompt.shape[1] / found["prompt"][place])
            rates = way.about["megabytes"] * 1e6 * speed / found["memory"][place]
            rows.append(
                {
                    **way.about,
                    "differing": int(found["differing"][place].max()),
                    "wrong": int(wrong[place]),
                    **interval("prompt_tokens_per_second", before),
                    **interval("tokens_per_second", speed),
                    **speedups(compared, "own", ("whole",)),
                    "memory_share": float(np.median(rates)),
                    "read_gb_per_s": float(np.median(found["memory"]) / 1e9),
                }
            )
        return pd.DataFrame(rows)


def interval(name: str, values: np.ndarray) -> dict[str, float]:
    """The columns of a speed: its median over rounds, and its 90% interval, low_ and high_."""
    low, median, high = median_interval(values)
    return {name: median, f"low_{name}": low, f"high_{name}": high}


def _tables(study: Asked) -> Frames:
    """Of an activation function that the profile trains, the model is the study's own, not that of the record."""

    def own(name: str) -> OpenedModel:
        return study.trained_model(name) if name in study.profile.study.activations else opened_here(name)

    settings, given = study.profile.input_speeds, study.profile.pretrained
    return {INPUT_SPEEDS: input_speeds(settings, given, study.output / INPUT_SPEEDS, own)}


def _missing(profile: Profile) -> str:
    others = [name for name in profile.input_speeds.models if name not in profile.study.activations]
    return next(filter(None, (not_here(name) for name in others if not _recorded(name).is_dir())), "")


MAKERS = [Maker((INPUT_SPEEDS,), _tables, _missing, of_machine=True)]
