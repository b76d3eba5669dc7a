"""A pretrained model under the same lens: what notebook 09 measures, on English and on Python source.

The measurement is cut into pieces. Each is kept as it finishes, so that a killed one goes on where it was. One window
of each document is read, the middle one: documents are then alike, and first tokens are not always the same word.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsity_utils.console import InputError, check, short_number
from sparsity_utils.models.fetched import SOURCES, fetched
from sparsity_utils.models.pretrained import open_checkpoint
from sparsity_utils.models.weights import description
from sparsity_utils.neurons.find import find_ffns, layer_count
from sparsity_utils.neurons.hooks import sparse_neurons
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.calibration import TOLERANCE, Calibration, solve_cett
from sparsity_utils.sparsity.metrics import SparsityReport, measure_sparsity
from sparsity_utils.sparsity.passes import checked
from sparsity_utils.sparsity.predictions import by_document, document_activity, fat_thresholds, predictions
from sparsity_utils.study.makers.maker import Asked, Maker
from sparsity_utils.study.makers.pieces import Frames, Pieces, measurement_key
from sparsity_utils.study.opened_models import PRICE, PretrainedConfig
from sparsity_utils.study.plan import PRETRAINED
from sparsity_utils.study.profiles import Profile
from sparsity_utils.text.windows import pinned_documents, read_documents, split_documents

VERSION = 1  # raise it when the same settings would measure other numbers
TEXTS = ("english", "python")
EARLY = 4  # first positions of a window: as many as attention sinks need (arXiv 2309.17453)
MEGABYTES = 2.0  # of the pinned packages' text that is looked through: some 100 documents of 512 tokens and more
BATCH_TOKENS = 1024  # 200 MB of float32 logits at a vocabulary of 49,152
# One pass of SmolLM2-135M over 12,000 tokens took 24 s on two quiet cores; a solution takes about six of its text.
SECONDS_PER_TOKEN_AND_PARAMETER, SOLVING = 1.5e-11, 6


@dataclass(frozen=True)
class Setting:
    """Which neurons are left out of a sparse pass."""

    metric: str
    price: float  # p of the CETT-PPL-p% whose thresholds, or else whose activation ratio, it has
    solved_on: str  # the text of those thresholds
    value: float  # CETT, k or eps
    thresholds: Thresholds
    activity: pd.Series  # activation ratio of each document of the evaluation

    def about(self) -> dict[str, object]:
        """Its columns in the table of prices."""
        return {name: getattr(self, name) for name in ("metric", "price", "solved_on", "value")}


@dataclass(frozen=True)
class Text:
    """Windows of one kind of text, each of another document."""

    name: str
    calibration: list[dict[str, Tensor]]
    evaluation: list[dict[str, Tensor]]

    @property
    def window(self) -> int:
        """Tokens of a window."""
        return self.evaluation[0]["input_ids"].shape[1]

    @property
    def tokens(self) -> tuple[int, int]:
        """Of calibration and of evaluation."""
        parts = (self.calibration, self.evaluation)
        calibration, evaluation = (sum(batch["input_ids"].numel() for batch in part) for part in parts)
        return calibration, evaluation


def found_model(name: str) -> str | Path | None:
    """What `open_checkpoint` opens for a model of a profile; None for one that can be fetched and was not."""
    return fetched(name) if name in SOURCES else name


def not_here(name: str) -> str:
    """How to get a model of a profile that can be fetched and was not; empty for any other."""
    if found_model(name) is not None:
        return ""
    about = SOURCES[name].about
    return f"{name} is not here, so nothing is measured: python -m sparsity_utils fetch {name} gets it ({about})."


def opened(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of a profile, in float32, and its tokenizer. Raises InputError for one that was not fetched."""
    place = found_model(name)
    if place is None:
        raise InputError(not_here(name))
    return open_checkpoint(place, dtype=torch.float32)


def read_texts(tokenizer: PreTrainedTokenizerBase, settings: PretrainedConfig) -> list[Text]:
    """Both texts, as windows of `settings.window` tokens. Raises InputError for one with too few documents."""
    count = (settings.calibration_tokens + settings.evaluation_tokens) // settings.window
    share = settings.calibration_tokens / (settings.calibration_tokens + settings.evaluation_tokens)
    english = read_documents(Path(settings.english)) if settings.english else pinned("python-prose")
    texts = []
    for name, documents in zip(TEXTS, (english, pinned("python-source")), strict=True):
        ids = torch.tensor(list(islice(middle_windows(tokenizer, documents, settings.window), count)))
        check(
            len(ids) == count,
            f"The {name} text has {len(ids)} documents of {settings.window} tokens, and {count} are asked for, one "
            f"window of each; give more text, or lower pretrained.evaluation_tokens.",
        )
        size = max(1, BATCH_TOKENS // settings.window)
        numbers = torch.arange(count)
        batches = [{"input_ids": ids[rows], "documents": rows} for rows in numbers.split(size)]
        texts.append(Text(name, *split_documents(batches, share)))
    return texts


@cache
def pinned(source: str) -> list[str]:
    """Text of the pinned packages, one document of each file: a long file comes in parts."""
    files: dict[str, str] = {}
    for document in pinned_documents(source, MEGABYTES):
        files.setdefault(document.name.partition("#")[0], document.text)
    return list(files.values())


def middle_windows(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], length: int) -> Iterator[list[int]]:
    """The middle window of each document that has one."""
    for document in documents:
        ids = tokenizer(document, verbose=False)["input_ids"]
        if windows := len(ids) // length:
            start = (windows - 1) // 2 * length
            yield ids[start : start + length]


def measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: PretrainedConfig, folder: Path
) -> Frames:
    """The tables pretrained, pretrained_prices and pretrained_positions of a model in float32; columns.csv has them.

    The model is in bfloat16 afterwards. Pieces that are already in `folder` are not measured again; each model, text
    and setting has a folder of its own there.

    Raises InputError for a text with too few documents and for a model that cannot be measured.
    """
    texts = read_texts(tokenizer, settings)
    work = _Work(model, settings, folder / _key(model, texts, settings))
    with work.shown(texts), evaluating(model):
        delimiters = np.array([is_delimiter(tokenizer.decode([id])) for id in range(len(tokenizer))])
        return work.tables(texts, delimiters)


def is_delimiter(token: str) -> bool:
    """Whether a token, as text, is a full stop or holds nothing but line breaks and spaces around them."""
    return token.strip(" ") == "." or ("\n" in token and not token.strip())


def _key(model: nn.Module, texts: list[Text], settings: PretrainedConfig) -> str:
    """Digest of all that decides the numbers: weights, token ids, settings."""
    decides = {name: value for name, value in asdict(settings).items() if name not in ("model", "english")}
    ids = [batch["input_ids"] for text in texts for batch in (*text.calibration, *text.evaluation)]
    return measurement_key({**decides, "version": VERSION}, model, ids)


class _Work:
    """The pieces of one measurement, behind one bar."""

    def __init__(self, model: PreTrainedModel, settings: PretrainedConfig, folder: Path) -> None:
        self.model, self.settings = model, settings
        self.layers, self.d_ff = layer_count(find_ffns(model)), find_ffns(model)[0].d_ff
        weights = sum(parameter.numel() for parameter in model.parameters())
        about = f"{Path(settings.model).name}, {short_number(weights)} parameters"
        self.pieces = Pieces(folder, about, weights * SECONDS_PER_TOKEN_AND_PARAMETER)

    @property
    def dtype(self) -> str:
        """`float32`, or `bfloat16` at the end."""
        return str(self.model.dtype).removeprefix("torch.")

    def tables(self, texts: list[Text], delimiters: np.ndarray) -> Frames:
        """All pieces, put together."""
        english = Path(self.settings.english).name if self.settings.english else "prose of pinned packages"
        about = {"opened": description(self.model), "source": [english, "source of pinned packages"]}
        reports = [self.report(text, delimiters) for text in texts]
        others = [price for price in self.settings.prices if price != PRICE]
        solved = [found["thresholds"] for found in reports] + [self.solved(text, others) for text in texts]
        prices = [self.prices(text, pd.concat(solved)) for text in texts]
        nn.Module.to(self.model, torch.bfloat16)
        prices.append(self.prices(texts[0], self.solved(texts[0], [PRICE])))
        parts = {
            "pretrained": [pd.concat([found["report"] for found in reports]).assign(**about)],
            "pretrained_prices": prices,
            "pretrained_positions": [found["positions"] for found in reports],
        }
        return {name: pd.concat(frames, ignore_index=True) for name, frames in parts.items()}

    def report(self, text: Text, delimiters: np.ndarray) -> Frames:
        """CETT-PPL-1% as a reader would measure it: its numbers, its thresholds, its activation ratios by position."""

        def measure() -> Frames:
            report = measure_sparsity(self.model, text.evaluation, "cett-ppl", PRICE, text.calibration, per_token=True)
            solved = _thresholds(text, PRICE, report.target_cett, report.thresholds, report.note)
            numbers = {"text": text.name, "dtype": self.dtype, **self.about(), **_numbers(text, report)}
            table = positions(report.per_token, delimiters).assign(text=text.name)
            return {"report": pd.DataFrame([numbers]), "thresholds": solved, "positions": table}

        calibration, evaluation = text.tokens
        return self.pieces.kept(f"report-{text.name}", SOLVING * calibration + 2 * evaluation, measure)

    def about(self) -> dict[str, object]:
        """What the model is."""
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        embeddings = {id(weight) for end in ends if end is not None for weight in end.parameters()}
        return {
            "model": Path(self.settings.model).name,
            "activation": getattr(self.model.config, "hidden_act", ""),
            "parameters": sum(weight.numel() for weight in self.model.parameters() if id(weight) not in embeddings),
            "n_layers": self.layers,
            "d_ff": self.d_ff,
        }

    def solved(self, text: Text, prices: list[float]) -> pd.DataFrame:
        """The thresholds of CETT-PPL-p% for each of `prices`: price, solved_on, cett, note, layer, threshold."""

        def measure() -> Frames:
            solver = Calibration(self.model, list(checked(self.model, text.calibration, text.name)), TOLERANCE, True)
            found = [solve_cett([solver], price) for price in prices]
            tables = [
                _thresholds(text, price, one.cett, solver.thresholds(one.cett), one.note)
                for price, one in zip(prices, found, strict=True)
            ]
            return {"thresholds": pd.concat(tables)}

        cost = SOLVING * text.tokens[0] * len(prices)
        return self.pieces.kept(f"thresholds-{text.name}-{self.dtype}", cost, measure)["thresholds"] if prices else None

    def prices(self, text: Text, thresholds: pd.DataFrame) -> pd.DataFrame:
        """What each setting costs on each document of a text. thresholds: of all texts, as `solved` gives them."""
        place, evaluation = f"{text.name}-{self.dtype}", text.tokens[1]
        predicted = partial(predictions, self.model, text.evaluation)
        dense = self.pieces.kept(f"dense-{place}", evaluation, lambda: {"tokens": predicted()})
        tables = []
        for setting in self.settings_of(text, thresholds):

            def measure(setting: Setting = setting) -> Frames:
                with sparse_neurons(self.model, setting.thresholds):
                    return {"documents": by_document(dense["tokens"], predicted())}

            name = f"sparse-{place}-{setting.metric}-{setting.price:g}-{setting.solved_on}"
            found = self.pieces.kept(name, evaluation, measure)["documents"]
            about = {"text": text.name, "dtype": self.dtype, **setting.about()}
            tables.append(found.assign(**about, activation_ratio=found["document"].map(setting.activity)))
        return pd.concat(tables)

    def settings_of(self, text: Text, thresholds: pd.DataFrame) -> list[Setting]:
        """What is left out on a text: by its own thresholds, those of the other text, and the rivals at equal ratio."""
        wanted = thresholds[(thresholds["solved_on"] == text.name) | (thresholds["price"] == PRICE)]
        groups = [group for _, group in wanted.groupby(["price", "solved_on"], sort=True)]
        rules = [Thresholds("cett", tuple(group.sort_values("layer")["threshold"])) for group in groups]
        place, evaluation = f"{text.name}-{self.dtype}", text.tokens[1]
        activity = self.pieces.kept(
            f"activity-{place}",
            evaluation,
            lambda: {"documents": document_activity(self.model, text.evaluation, rules)},
        )["documents"].set_index("document")
        found = [
            Setting("cett-ppl", first["price"], first["solved_on"], first["cett"], rule, activity[str(number)])
            for number, (rule, first) in enumerate(zip(rules, (group.iloc[0] for group in groups), strict=True))
        ]
        own = [one for one in found if one.solved_on == text.name and one.price >= PRICE]
        return found + (self.rivals(text, own) if self.dtype == "float32" else [])

    def rivals(self, text: Text, own: list[Setting]) -> list[Setting]:
        """Top-k by |s|, Top-k by ||n|| and FAT at the activation ratios that CETT has on the same documents."""
        ratios = [float(one.activity.mean()) for one in own]  # documents have equally many tokens

        def measure() -> Frames:
            rules, activity = fat_thresholds(self.model, text.evaluation, ratios)
            return {"eps": pd.DataFrame({"eps": [rule.values[0] for rule in rules]}), "documents": activity}

        fat = self.pieces.kept(f"fat-{text.name}-{self.dtype}", text.tokens[1], measure)
        activity, found = fat["documents"].set_index("document"), []
        for number, (one, ratio, eps) in enumerate(zip(own, ratios, fat["eps"]["eps"], strict=True)):
            k = max(1, round(ratio * self.d_ff))
            values = {"top-k": k, "top-k-norm": k, "fat": eps}
            for metric, value in values.items():
                share = activity[str(number)] if metric == "fat" else one.activity * 0 + k / self.d_ff
                rule = Thresholds(metric, (value,) * self.layers)
                found.append(Setting(metric, one.price, text.name, value, rule, share))
        return found

    def shown(self, texts: list[Text]) -> AbstractContextManager:
        """`Pieces.shown`, with all tokens that are expected to pass the model."""
        prices, rivals = len(self.settings.prices), 3 * sum(price >= PRICE for price in self.settings.prices)
        cost = sum(SOLVING * text.tokens[0] * prices + (6 + prices + rivals) * text.tokens[1] for text in texts)
        cost += SOLVING * texts[0].tokens[0] + 3 * texts[0].tokens[1]
        return self.pieces.shown(self.model.base_model, cost)


def _thresholds(text: Text, price: float, cett: float, solved: Thresholds, note: str) -> pd.DataFrame:
    columns = {"price": price, "solved_on": text.name, "cett": cett, "note": note}
    return pd.DataFrame({**columns, "layer": range(len(solved.values)), "threshold": solved.values})


def _numbers(text: Text, report: SparsityReport) -> dict[str, object]:
    """The numbers of a report that are stored."""
    (low, high), (low_ppl, high_ppl) = report.interval, report.ppl_ratio_interval
    return {
        "window": text.window,
        "calibration_tokens": text.tokens[0],
        "tokens": report.tokens,
        "documents": report.documents,
        "p": PRICE,
        "activation_ratio": report.activation_ratio,
        "low": low,
        "high": high,
        "cett": report.target_cett,
        "ppl_ratio": report.ppl_ratio,
        "low_ppl_ratio": low_ppl,
        "high_ppl_ratio": high_ppl,
        "loss": report.loss_dense,
        "note": report.note,
    }


def positions(per_token: pd.DataFrame, delimiters: np.ndarray) -> pd.DataFrame:
    """Mean activation ratio of each layer over the tokens of each class of position, in each document.

    Classes, the first that fits: first (position 0), first delimiter (of the window, behind position 0), delimiter,
    early (positions 1 to 3), other. One row per document, layer and class: document, layer, position, tokens,
    activation_ratio.

    per_token: as of a `SparsityReport`, one window of each document. delimiters: whether each token id is one, bool.
    """
    place, document = per_token["position"], per_token["document"]
    delimiter = pd.Series(delimiters[per_token["token_id"]], per_token.index) & (place > 0)
    first = place.where(delimiter).groupby(document).transform("min")
    known = [place == 0, place == first, delimiter, place < EARLY]
    kind = np.select(known, ["first", "first delimiter", "delimiter", "early"], "other")
    layers = [column for column in per_token if column.startswith("layer_")]
    grouped = per_token.assign(kind=kind).groupby(["document", "kind"])
    means = grouped[layers].mean().set_axis(range(len(layers)), axis=1)
    table = means.rename_axis(columns="layer").stack().rename("activation_ratio").reset_index()
    sizes = grouped.size().rename("tokens").reset_index()
    table = table.merge(sizes, on=["document", "kind"]).rename(columns={"kind": "position"})
    return table[["document", "layer", "position", "tokens", "activation_ratio"]]


def _tables(study: Asked) -> Frames:
    settings = study.profile.pretrained
    return measured(*opened(settings.model), settings, study.output / "pretrained")


def _missing(profile: Profile) -> str:
    return not_here(profile.pretrained.model)


MAKERS = [Maker(PRETRAINED, _tables, _missing)]
