"""What a profile costs on the device that it names, told from its settings alone: no text is read, nothing starts."""

from pathlib import Path

import pandas as pd

from sparsity_utils.models.config import ModelConfig
from sparsity_utils.models.memory import device_memory, stored_parameters
from sparsity_utils.models.shapes import training_flops_per_token
from sparsity_utils.models.training import Schedule
from sparsity_utils.study.jobs import Job
from sparsity_utils.study.plan import COVERING, QUESTIONS, planned
from sparsity_utils.study.profiles import Profile
from sparsity_utils.study.runs import RunConfig

WEIGHT, MOMENTS = 4, 8  # bytes of float32 per parameter


def planned_jobs(profile: Profile) -> dict[str, list[Job]]:
    """Of each line the jobs that it adds to those before it; they name no text, so their keys mean nothing."""
    measured: dict[RunConfig, dict[str, None]] = {}
    for question, (_, what, _) in QUESTIONS.items():
        for settings in planned(profile, question):
            config = RunConfig(*settings, corpus="", tokenizer="", threads=profile.threads)
            measured.setdefault(config, {}).update({what: None} if what else {})
    lines, seen = {}, set[RunConfig]()
    for question in COVERING:
        configs = [RunConfig(*settings, "", "", profile.threads) for settings in planned(profile, question)]
        fresh = [config for config in configs if config not in seen]
        seen |= set(fresh)
        if fresh:
            lines[question] = [Job(config, Path(), profile.measure, tuple(measured[config])) for config in fresh]
    return lines


def device_costs(profile: Profile) -> pd.DataFrame:
    """One row per line and shape of a profile with a section `device`, and one for all.

    Columns: question, shape, runs, parameters (non-embedding), billion_tokens (of one run, its decay included),
    exaflops (1e18 operations, of all runs, measuring included), device_hours (at the utilisation that the profile
    states), devices (of one run), memory_gb (on each of them, see `models.memory`), disk_gb (of all checkpoints, and of
    the state of one run), all in 1e9 bytes.
    """
    device, rows = profile.device, []
    for question, jobs in planned_jobs(profile).items():
        shapes: dict[tuple, list[Job]] = {}
        for job in jobs:
            model, train = job.config.model, job.config.train
            shape = f"{model.d_model}x{model.n_layers}"
            shapes.setdefault((shape, model.ffn_ratio, train.tokens, train.batch_tokens), []).append(job)
        for (shape, *_), same in shapes.items():
            config = same[0].config
            flops = sum(
                training_flops_per_token(job.config.model) * (job.config.work() + job.measuring_tokens())
                for job in same
            )
            rows.append(
                {
                    "question": question,
                    "shape": shape,
                    "runs": len(same),
                    "parameters": config.parameters,
                    "billion_tokens": config.tokens / 1e9,
                    "exaflops": flops / 1e18,
                    "device_hours": flops / (device.utilisation * device.teraflops * 1e12) / 3600,
                    "devices": config.train.devices,
                    "memory_gb": max(
                        sum(device_memory(job.config.model, job.config.train).values()) / 1e9 for job in same
                    ),
                    "disk_gb": (len(same) * checkpoint_bytes(config) + state_bytes(config.model)) / 1e9,
                }
            )
    return pd.DataFrame(rows)


def checkpoint_bytes(config: RunConfig) -> float:
    """What all checkpoints of a run take on disk."""
    return len(Schedule(config.train).checkpoints()) * WEIGHT * stored_parameters(config.model)


def state_bytes(model: ModelConfig) -> float:
    """What the saved state of a run takes while it is under way: weights and the two moments of AdamW."""
    return (WEIGHT + MOMENTS) * stored_parameters(model)


def tell_device_costs(profile: Profile) -> str:
    """`device_costs` as text, with totals and all that is assumed."""
    table, device = device_costs(profile), profile.device
    hours, largest = table["device_hours"].sum(), table["memory_gb"].max()
    tokens = (table["runs"] * table["billion_tokens"]).sum()
    days = max(table["device_hours"] / table["devices"] / table["runs"]) / 24
    fits = largest <= 0.8 * device.memory_gb
    too_large = "" if fits else f"; {largest:.0f} GB do not fit: raise train.devices or lower train.micro_tokens"
    shown = table.round({"billion_tokens": 2, "exaflops": 1, "device_hours": 1, "memory_gb": 1, "disk_gb": 0})
    return (
        f"{shown.to_string(index=False)}\n"
        f"All {table['runs'].sum()} runs: {tokens:,.1f} billion tokens, {table['exaflops'].sum():,.1f} exaflops, "
        f"{hours:,.0f} device hours, {table['disk_gb'].sum():,.0f} GB of disk; the longest run takes {days:.1f} days.\n"
        f"Device hours are those of {device.name} ({device.teraflops:g} teraflops, {device.memory_gb:g} GB) at an "
        f"assumed utilisation of {device.utilisation:.0%}; they were not measured. Memory is by arithmetic, a fifth of "
        f"a device to stay free{too_large}.\n"
        f"Text of up to {2 * table['billion_tokens'].max():,.1f} GB as tokens comes on top of the disk."
    )
