"""The eleven published curves of activation ratio against tokens: from a folder, or a download with checksums.

They belong to the authors of arXiv 2411.02335 and carry no licence, so nothing here ships them. The network is used
by `download_curves` alone.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pooch

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.laws.published_laws import PUBLISHED_LAWS, PublishedLaw

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
    """What makes a curve unusable, or nothing."""
    if tokens.ndim != 1 or tokens.shape != ratio.shape or not tokens.size:
        return f"has {tokens.size} numbers of tokens and {ratio.size} activation ratios"
    if not (np.isfinite(tokens).all() and np.isfinite(ratio).all()):
        return "holds NaN or infinity"
    if (np.diff(tokens) <= 0).any() or tokens[0] <= 0:
        return "names a number of tokens twice, or not in rising order"
    if (ratio < 0).any() or (ratio > 1).any():
        return "holds activation ratios outside 0 to 1"
    return ""
