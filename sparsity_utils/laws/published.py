"""The data laws as published, and the eleven curves that they were fitted to.

Coefficients are those of Figure 4 and section 4.1 of arXiv 2411.02335 v4, D in 1e9 tokens. ReLU: A(D) =
exp(-c D^alpha + b) + A0. SiLU: A(D) = -c / D^alpha + A0. These are "logspace" and "power" of `data_law.FORMS`.

The curves of activation ratio against tokens come from a folder, or from a download with checksums. They belong to the
authors of the paper and carry no licence, so nothing here ships them. The network is used by `download_curves` alone.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pooch
from numpy.typing import ArrayLike, NDArray

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.laws.data_law import TOKEN_UNIT
from sparsity_utils.laws.limits import published_form

TOKENS_PER_PARAMETER = 190  # of the published models, at least; "0.1B" and so on are non-embedding parameters


class PublishedLaw(NamedTuple):
    """One published fit; `b` is NaN for SiLU, whose form has none."""

    activation: str
    model: str
    d_model: int
    n_layers: int
    alpha: float
    b: float
    c: float
    limit: float  # A0

    def predict(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """Activation ratio after `tokens` training tokens, by the published coefficients."""
        d = np.asarray(tokens, dtype=float) / TOKEN_UNIT
        if published_form(self.activation) == "logspace":
            return np.exp(-self.c * d**self.alpha + self.b) + self.limit
        return -self.c / d**self.alpha + self.limit


NONE = float("nan")
PUBLISHED_LAWS = (
    PublishedLaw("relu", "0.1B", 768, 16, 0.101, -0.0151, 3.20, 0.0614),
    PublishedLaw("relu", "0.2B", 1024, 20, 0.449, -3.05, 0.286, 0.0674),
    PublishedLaw("relu", "0.4B", 1280, 24, 0.683, -3.46, 0.0790, 0.0690),
    PublishedLaw("relu", "0.8B", 1536, 28, 1.01, -3.49, 7.97e-3, 0.0721),
    PublishedLaw("relu", "1.2B", 1792, 32, 1.33, -3.89, 9.03e-4, 0.0782),
    PublishedLaw("relu", "2.4B", 2304, 40, 1.53, -3.46, 1.56e-4, 0.0648),
    PublishedLaw("silu", "0.1B", 768, 16, 0.479, NONE, 0.102, 0.409),
    PublishedLaw("silu", "0.2B", 1024, 20, 0.844, NONE, 0.208, 0.390),
    PublishedLaw("silu", "0.4B", 1280, 24, 1.03, NONE, 0.420, 0.385),
    PublishedLaw("silu", "0.8B", 1536, 28, 0.995, NONE, 0.562, 0.383),
    PublishedLaw("silu", "1.2B", 1792, 32, 0.967, NONE, 0.538, 0.382),
)
# The scripts beside the authors' curves (COMMIT below) hold the same coefficients but for this model.
REVISED_LAW = PublishedLaw("relu", "2.4B", 2304, 40, 2.11, -3.82, 9.04e-6, 0.0712)


class PublishedShare(NamedTuple):
    """A published share of ReLU neurons that are not zero; NaN: the shape is not known here."""

    model: str
    parameters: float  # as the model is named
    d_model: float
    n_layers: float
    d_ff: int
    share: float


# Calculated from section 1 of 2411.02335, 7.21% being 39% of what is not zero; and arXiv 2603.23198.
PUBLISHED_NONZEROS = (
    PublishedShare("0.8B", 0.8e9, 1536, 28, 3840, 0.0721 / 0.39),
    PublishedShare("1.5B", 1.5e9, NONE, NONE, 5632, 911 / 5632),
)


REPOSITORY = "https://github.com/Raincleared-Song/SparsingLawData"
COMMIT = "1cab4439cd22e2de9006d5fd4d798790cf89b305"
ADDRESS = f"https://raw.githubusercontent.com/Raincleared-Song/SparsingLawData/{COMMIT}/data/"
SHA256 = {
    "0.1b_relu.txt": "5c4b6c3b016f3b6e8896cf8d14c2cad0bc132ca02c8d78bbb3eff1613a3bce88",
    "0.2b_relu.txt": "16bf28f3866b0bde01d866d9795d63c116ad7e01e1ba117744f77c9c7a932155",
    "0.4b_relu.txt": "fa3659e2aa81edf67751c802179b6f3fd5162e399dd8ea49121c75f9c97915eb",
    "0.8b_relu.txt": "15752017548e3131b7f3cb26e7eab48a4d678e4c54a1e5bc805a4b4a948540a8",
    "1.2b_relu.txt": "5255980b5a3632492faa5a9f7d3a020fd1c19d0e35975d3534d426fbd982b052",
    "2.4b_relu.txt": "24c4ca4728aeb57922fa5622889466de54c80c441e292d5ccc6cba9d8ed05460",
    "0.1b_silu.txt": "2a9ddd5cdc855dd4319fc71dcb35577abbf7cc72ee3161a40d10e6c313b23ac8",
    "0.2b_silu.txt": "4cabcac2a369a279f310ef05e105573a8c5bb6cf14e5dd751e638c641640b54c",
    "0.4b_silu.txt": "3ef56a193533c95396a677c5056b51ee65cbc000770f753d833810c13d7648f8",
    "0.8b_silu.txt": "4507e8ff6126443f59b9095cc54b8195d93e52af54173232bbd1362791d15be2",
    "1.2b_silu.txt": "8108d896e2501a322922ecaa34f75faa4c975d5161db5bc2f69a9787dca66caf",
}
KEYS = ("token_passed", "activation_ratio")
COLUMNS = ["activation", "model", "tokens", "activation_ratio"]


def download_curves() -> Path:
    """Fetch the files that are not there yet (13 kB in all) and return their folder, build/published_curves.

    Raises InputError when a file cannot be fetched or is not the published one.
    """
    pooch.get_logger().setLevel("WARNING")  # it would print paths of this machine
    store = pooch.create(paths.published_curves(), ADDRESS, registry=SHA256)
    for name in SHA256:
        try:
            store.fetch(name)
        except (OSError, ValueError) as error:  # no network or file there; a wrong checksum
            raise InputError(
                f"{ADDRESS}{name} could not be fetched ({type(error).__name__}); get the folder data/ of {REPOSITORY} "
                "another way and name it."
            ) from error
    return paths.published_curves()


def read_curves(folder: Path) -> pd.DataFrame:
    """The curves in `folder`, one row per checkpoint: activation, model ("0.1B" and so on), tokens, activation_ratio.

    Raises InputError for a missing or damaged file, and for one that is not byte for byte the published one: what is
    said of the published curves must not rest on others.
    """
    curves = []
    for law in PUBLISHED_LAWS:
        tokens, ratio = _read(Path(folder) / file_name(law))
        about = {"activation": law.activation, "model": law.model}
        curves.append(pd.DataFrame({"tokens": tokens, "activation_ratio": ratio}).assign(**about))
    return pd.concat(curves, ignore_index=True)[COLUMNS]


def file_name(law: PublishedLaw) -> str:
    """Name of the file that holds a model's curve."""
    return f"{law.model.lower()}_{law.activation}.txt"


def _read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    if not file.exists():
        raise InputError(
            f"There is no {file.name} in {file.parent}; name a folder with the files data/ of {REPOSITORY}."
        )
    content = file.read_bytes()
    try:
        tokens, ratio = (np.array(json.loads(content)[key], dtype=float) for key in KEYS)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no JSON with the lists {' and '.join(KEYS)}; get the file again.") from error
    problem = _problem(tokens, ratio)
    if problem:
        raise InputError(f"{file} {problem}; get the file again.")
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[file.name]:
        raise InputError(
            f"{file} is not the published file (SHA-256 {found[:12]}… instead of {SHA256[file.name][:12]}…); get it "
            f"from {REPOSITORY} at commit {COMMIT[:7]}."
        )
    return tokens, ratio


def _problem(tokens: np.ndarray, ratio: np.ndarray) -> str:
    """What makes a curve unusable; empty if nothing does."""
    if tokens.ndim != 1 or tokens.shape != ratio.shape or not tokens.size:
        return f"has {tokens.size} numbers of tokens and {ratio.size} activation ratios"
    if not (np.isfinite(tokens).all() and np.isfinite(ratio).all()):
        return "holds NaN or infinity"
    if (np.diff(tokens) <= 0).any() or tokens[0] <= 0:
        return "names a number of tokens twice, or not in rising order"
    if (ratio < 0).any() or (ratio > 1).any():
        return "holds activation ratios outside 0 to 1"
    return ""
