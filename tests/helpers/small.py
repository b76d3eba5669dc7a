"""A corpus and a profile small enough to train in a second, for the tests of the run store and the study."""

import random
from pathlib import Path

import yaml

from sparsity_utils.study.study import Study


def write_text(folder: Path) -> Path:
    """Forty short documents of made-up sentences."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(200)]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        sentences = (" ".join(rng.choices(words, k=8)) for _ in range(60))
        (folder / f"{number:02d}.txt").write_text(".\n".join(sentences), encoding="utf-8")
    return folder


def one_size(shape: str, tokens: int = 5000, seeds: tuple[int, ...] = (0,), **others) -> dict:
    """One size of a profile."""
    return {"shape": shape, "tokens": tokens, "seeds": list(seeds), **others}


def profile_content(text: Path) -> dict:
    """A profile of two sizes, two activation functions and two ratios on that text."""
    return {
        "about": "tests",
        "corpus": {"source": "path", "path": str(text), "vocabulary": 300, "validation_share": 0.2},
        "model": {"context": 32, "head_size": 8, "base_width": 16},
        "train": {"batch_tokens": 256, "checkpoints": 8, "validation_tokens": 512},
        "study": {
            "sizes": [one_size("8x1"), one_size("16x2")],
            "ratio_parameters": 3000,
            "ratios": [16, 2],  # 16x1 and 8x4
            "ratio_tokens": 5000,
            "ratio_seeds": [0],
        },
        "measure": {"calibration_tokens": 256, "evaluation_tokens": 512},
        "speed": {
            "shapes": ["0.1B"],
            "rounds": 1,
            "megabytes": 1,
            "compiled": False,
            "published_decoder": False,
            "new_tokens": 4,
        },
        "trained_decoding": {"prompt": 4, "new_tokens": 4, "rounds": 1},
        "digits": {"seeds": 1, "tuning_seeds": 1, "rates": [0.01], "epochs": 1, "transformer_epochs": 1},
        "workers": 2,
        "threads": 1,
    }


def write_profile(folder: Path, content: dict, name: str = "tiny") -> str:
    """Write a profile; return its path as `read_profile` takes it."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(file)


def tiny_study(folder: Path, **sections) -> Study:
    """A study of `profile_content`, with further sections of the profile or others in their place."""
    content = profile_content(write_text(folder / "text"))
    return Study.from_profile(write_profile(folder, content | sections))
