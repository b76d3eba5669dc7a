"""Speeds of decoding with skipped inputs: every way judged by the masked model's text, counted bytes, kept pieces."""

from dataclasses import replace

import pytest
from small import write_text

from sparsity_utils.study import input_speeds
from sparsity_utils.study.profiles import InputSpeedConfig, PretrainedConfig

SETTINGS = InputSpeedConfig(
    rules=("teal", "wina", "cats", "cett"), sparsities=(0.5,), prices=(5.0,), window=32, calibration_tokens=128,
    evaluation_tokens=64, prompt=20, new_tokens=6, rounds=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A stand-in for SmolLM2, English documents, and the folder of the pieces."""
    folder = tmp_path_factory.mktemp("input_speeds")
    write_text(folder / "english")
    return folder


def measured(here, **changes):
    settings = replace(SETTINGS, **{"models": ("silu",), **changes})
    return input_speeds.input_speeds(settings, PretrainedConfig(english=str(here / "english")), here / "pieces")


@pytest.fixture(scope="module")
def table(here):
    return measured(here)


def test_one_row_for_each_way(table):
    kernels = table[table["engine"] == "kernels"]
    found = kernels.groupby(["rule", "setting"], dropna=False).size().to_dict()
    assert len(table) == 2 + 4 + 4 * 4 + 3 * 2 and list(table["engine"][:2]) == ["transformers"] * 2
    assert found["teal", "50%"] == found["wina", "5% of perplexity"] == 4  # float32 and 8 bits, both heads
    assert found["cats", "50%"] == found["cett", "5% of perplexity"] == 2
    print(table.to_string())
