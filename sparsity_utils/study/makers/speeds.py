"""Speeds measured on this machine: FFNs and decoding (notebook 06), training steps by shape (notebook 03)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from kernels import MAX_TOKENS
from kernels.bench import ffn_speeds, grid
from kernels.timing import alternate, median_interval, timed
from sparsity_utils.console import InputError, progress
from sparsity_utils.decoding.speed import decode_pattern, decode_speeds
from sparsity_utils.models.config import ACTIVATIONS, ModelConfig, TrainConfig
from sparsity_utils.models.decoder import build_model, default_device
from sparsity_utils.models.shapes import non_embedding_parameters, training_flops_per_token
from sparsity_utils.models.training import Training, validation_loss
from sparsity_utils.neurons.find import FFN, find_ffns, layer_count
from sparsity_utils.neurons.hooks import observe_neurons
from sparsity_utils.neurons.modes import evaluating
from sparsity_utils.neurons.thresholds import Thresholds
from sparsity_utils.sparsity.metrics import measure_sparsity
from sparsity_utils.study.makers.maker import Asked, Maker
from sparsity_utils.study.makers.pieces import Frames
from sparsity_utils.study.plan import SPEEDS, planned
from sparsity_utils.study.profiles import Profile, SpeedConfig
from sparsity_utils.text.windows import measurement_batches

SEQUENCES = (1, 4, 16)  # decoded side by side
PROMPT = 32  # tokens
DECODING_ROUNDS = 5  # at most
# The 0.1B model of arXiv 2411.02335
SMALLEST_PUBLISHED = ModelConfig(768, 16, "relu", vocabulary=65_536, base_width=256, head_size=64)
PUBLISHED_SPARSITIES = (0.9, 0.97)
PASSES = ("training", "forward")


def thresholds_at(model: nn.Module, calibration: list, p: float) -> Thresholds:
    """The thresholds of CETT-PPL-p% on `calibration`."""
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
    """Speeds of greedy decoding with the trained models and at a published shape, table sparse_decoding."""
    tables, options = [], decode_options(settings)
    for name, model in models.items():
        thresholds, shape = thresholds_at(model, calibration, p), shape_of(model)
        for count in SEQUENCES:
            prompts = windows[:count, : min(PROMPT, windows.shape[1] - settings.new_tokens)]
            speeds = decode_speeds(model, prompts, thresholds, **options)
            about = {"model": "trained", "activation": name, "shape": shape, "rule": thresholds.rule, "setting": p}
            tables.append(speeds.assign(**about))
    if settings.published_decoder:
        tables += _published(settings, windows.device)
    first = ["model", "activation", "shape", "rule", "setting"]
    table = pd.concat(tables, ignore_index=True)
    return table[first + [column for column in table.columns if column not in first]]


def decode_options(settings: SpeedConfig) -> dict[str, int]:
    """How many tokens are decoded, and in how many rounds: fewer than for single FFNs, which take far less time."""
    return {"new_tokens": settings.new_tokens, "rounds": min(settings.rounds, DECODING_ROUNDS)}


def shape_of(model: nn.Module) -> str:
    """The shape of a model as text, `48x4`."""
    ffns = find_ffns(model)
    return f"{ffns[0].down_weight.shape[0]}x{layer_count(ffns)}"


def _published(settings: SpeedConfig, device: torch.device) -> list[pd.DataFrame]:
    """Speeds of a published shape with random weights, which show what sparsity would buy if training gave it."""
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
    """For each layer the quantile of |s| on `ids`: the share `sparsity` of its values lies below it."""
    values: dict[int, float] = {}

    def keep(ffn: FFN, s: Tensor, h: Tensor, tokens: Tensor) -> None:
        values[ffn.layer] = s.abs().flatten().float().quantile(sparsity).item()

    with evaluating(model), observe_neurons(model, keep):
        model(input_ids=ids, use_cache=False)
    return Thresholds("fat", tuple(values[layer] for layer in sorted(values)))


def step_times(configs: Sequence[ModelConfig], batch_tokens: int, rounds: int) -> pd.DataFrame:
    """Measure the time of one optimizer step, and of one forward pass with its loss, per token and shape.

    Columns: d_model, n_layers, parameters, width_depth_ratio, flops_per_token (of training), training_us, training_low,
    training_high, forward_us, forward_low, forward_high (microseconds per token: median over rounds and its 90%
    interval, NaN below five rounds), rounds, threads (torch's, as they are). A step is that of the study's own runs,
    batch included. Raises InputError without shapes or rounds, or for a batch that is not whole windows.
    """
    if not configs or rounds < 1:
        raise InputError(f"{len(configs)} shapes and {rounds} rounds are too few to time; give at least one of each.")
    device = default_device().type
    works = {
        (place, name): partial(timed, work, device)
        for place, config in enumerate(configs)
        for name, work in _works(config, batch_tokens, rounds).items()
    }
    times = {key: 1e6 * seconds / batch_tokens for key, seconds in alternate(works, rounds, warm_up=True).items()}
    return pd.DataFrame(
        [_row(config, {name: times[place, name] for name in PASSES}) for place, config in enumerate(configs)]
    )


def _works(config: ModelConfig, batch_tokens: int, rounds: int) -> dict[str, Callable[[], object]]:
    """The two jobs that are timed of one shape. Every optimizer step lies in the stable stage."""
    tokens = np.random.default_rng(0).integers(config.vocabulary, size=batch_tokens + 1)
    settings = TrainConfig(tokens=max(6, rounds + 1) * batch_tokens, batch_tokens=batch_tokens)
    training = Training(config, settings, tokens, validation=[], folder=Path())
    batch = {"input_ids": torch.from_numpy(tokens[:-1]).view(-1, config.context)}  # (windows, context)
    return {"training": training.train_step, "forward": lambda: validation_loss(training.model, [batch])}


def _row(config: ModelConfig, times: dict[str, np.ndarray]) -> dict[str, float]:
    """A row of the table. times: microseconds per token of each pass, (rounds,)."""
    row = {
        "d_model": config.d_model,
        "n_layers": config.n_layers,
        "parameters": non_embedding_parameters(config.d_model, config.n_layers, config.ffn_ratio),
        "width_depth_ratio": config.d_model / config.n_layers,
        "flops_per_token": training_flops_per_token(config),
    }
    for name in PASSES:
        low, median, high = median_interval(times[name])
        row |= {f"{name}_us": median, f"{name}_low": low, f"{name}_high": high}
    return row | {"rounds": len(times[PASSES[0]]), "threads": torch.get_num_threads()}


def _with_models(question: str, table: Callable[..., pd.DataFrame], study: Asked) -> Frames:
    """A `table` of the study's own models, on a GPU where there is one."""
    profile, tokens, device = study.profile, study.corpus.tokens("validation"), default_device()
    models = {name: study.trained_model(name)[0].eval().to(device) for name in profile.study.activations}
    context = next(iter(models.values())).config.max_position_embeddings
    calibration = measurement_batches(tokens, context, "calibration", profile.measure.calibration_tokens)
    windows = measurement_batches(tokens, context, "evaluation", MAX_TOKENS * context)[0]["input_ids"]
    return {question: table(models, calibration, windows.to(device), profile.measure.p, profile.speed)}


def _depth_cost(study: Asked) -> Frames:
    """Times of the shapes of the width-depth line, untrained, on as many threads as their runs have."""
    profile, threads = study.profile, torch.get_num_threads()
    runs = planned(profile, SPEEDS["depth_cost"])
    shapes = list(dict.fromkeys(model for model, _ in runs))
    torch.set_num_threads(profile.threads)
    try:
        return {"depth_cost": step_times(shapes, runs[0][1].batch_tokens, profile.speed.rounds)}
    finally:
        torch.set_num_threads(threads)


def maker_of(question: str, make: Callable[[Asked], Frames]) -> Maker:
    """The maker of a table of speeds, which a profile leaves out where it has no runs to time (`plan.SPEEDS`)."""

    def missing(profile: Profile) -> str:
        if planned(profile, SPEEDS[question]):
            return ""
        return f"Profile {profile.name} has no runs of {SPEEDS[question]}, for which {question} is measured."

    return Maker((question,), make, missing, of_machine=True)


MAKERS = [
    maker_of("sparse_ffn", partial(_with_models, "sparse_ffn", ffn_table)),
    maker_of("sparse_decoding", partial(_with_models, "sparse_decoding", decoding_table)),
    maker_of("depth_cost", _depth_cost),
]
