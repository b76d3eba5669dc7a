"""The two tables of notebook 06, measured on this machine: single FFNs, and decoding end to end."""

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor, nn

from kernels.bench import ffn_speeds, grid
from sparsity_utils.console import progress
from sparsity_utils.decoding.speed import decode_pattern, decode_speeds
from sparsity_utils.models.config import ACTIVATIONS, ModelConfig
from sparsity_utils.models.decoder import build_model
from sparsity_utils.neurons.find import FFN, find_ffns, layer_count
from sparsity_utils.neurons.hooks import observe_neurons
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.metrics import measure_sparsity
from sparsity_utils.study.profiles import SpeedConfig

SEQUENCES = (1, 4, 16)  # decoded side by side
PROMPT = 32  # tokens
DECODING_ROUNDS = 5  # at most
SMALLEST_PUBLISHED = ModelConfig(
    768, 16, "relu", vocabulary=65_536, base_width=256, head_size=64
)  # the 0.1B of 2411.02335
PUBLISHED_SPARSITIES = (0.9, 0.97)


def thresholds_at(model: nn.Module, calibration: list, p: float) -> Thresholds:
    """Of CETT-PPL-p%."""
    return measure_sparsity(model, calibration, "cett-ppl", p=p, show_progress=False).thresholds


def ffn_table(
    models: Mapping[str, nn.Module], calibration: list, windows: Tensor, p: float, settings: SpeedConfig
) -> pd.DataFrame:
    """Speeds of single FFNs with random patterns and with those of trained models, table sparse_ffn.

    Args:
        models: one of each activation function, on the device to measure.
        windows: ids, (windows, length), there too; their last tokens give the patterns.
    """
    patterns = [
        decode_pattern(f"trained {ACTIVATIONS[name]}", model, thresholds_at(model, calibration, p), windows)
        for name, model in models.items()
    ]
    return ffn_speeds(
        grid(settings.shapes, patterns),
        compiled=settings.compiled,
        rounds=settings.rounds,
        megabytes=settings.megabytes,
        device=windows.device.type,
    )


def decoding_table(
    models: Mapping[str, nn.Module], calibration: list, windows: Tensor, p: float, settings: SpeedConfig
) -> pd.DataFrame:
    """Speeds of greedy decoding, table sparse_decoding."""
    tables, options = [], decode_options(settings)
    for name, model in models.items():
        thresholds, shape = thresholds_at(model, calibration, p), shape_of(model)
        for count in SEQUENCES:
            speeds = decode_speeds(model, windows[:count, :PROMPT], thresholds, **options)
            about = {"model": "trained", "activation": name, "shape": shape, "rule": thresholds.rule, "setting": p}
            tables.append(speeds.assign(**about))
    if settings.published_decoder:
        tables += _published(settings, windows.device)
    first = ["model", "activation", "shape", "rule", "setting"]
    table = pd.concat(tables, ignore_index=True)
    return table[first + [column for column in table.columns if column not in first]]


def decode_options(settings: SpeedConfig) -> dict[str, int]:
    """How much is decoded: fewer rounds than of single FFNs, which are far shorter."""
    return {"new_tokens": settings.new_tokens, "rounds": min(settings.rounds, DECODING_ROUNDS)}


def shape_of(model: nn.Module) -> str:
    """d_model x n_layers."""
    ffns = find_ffns(model)
    return f"{ffns[0].down_weight.shape[0]}x{layer_count(ffns)}"


def _published(settings: SpeedConfig, device: torch.device) -> list[pd.DataFrame]:
    """A decoder of the published shape with random weights: what sparsity would buy if training gave it."""
    model = build_model(SMALLEST_PUBLISHED, seed=0).eval().to(device)
    prompt = torch.randint(
        0, SMALLEST_PUBLISHED.vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0)
    ).to(device)
    tables = []
    for sparsity in progress(PUBLISHED_SPARSITIES, "decoding at the published 0.1B shape"):
        thresholds = quantile_thresholds(model, prompt, sparsity)
        speeds = decode_speeds(model, prompt, thresholds, **decode_options(settings))
        about = {"model": "random weights", "activation": "relu", "shape": shape_of(model)}
        tables.append(speeds.assign(**about, rule="fat", setting=100 * sparsity))
    return tables


def quantile_thresholds(model: nn.Module, ids: Tensor, sparsity: float) -> Thresholds:
    """One threshold on |s| per layer, below which `sparsity` of its values on `ids` lie."""
    values: dict[int, float] = {}

    def keep(ffn: FFN, s: Tensor, h: Tensor, tokens: Tensor) -> None:
        values[ffn.layer] = s.abs().flatten().float().quantile(sparsity).item()

    with evaluating(model), observe_neurons(model, keep):
        model(input_ids=ids, use_cache=False)
    return Thresholds("fat", tuple(values[layer] for layer in sorted(values)))
