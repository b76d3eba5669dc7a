"""What every test stands on: no network, no bars, one thread, and nothing written into the project's own build/."""

import os

import pytest

# Set before torch and the libraries of the hub are imported, which read them once.
os.environ.update(
    CI="1",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    MPLBACKEND="Agg",
    NUMBA_NUM_THREADS="2",  # the most that a test asks for
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


@pytest.fixture(scope="session", autouse=True)
def build_folder(tmp_path_factory: pytest.TempPathFactory):
    """The build folder of the whole test session; a test that needs its own sets SPARSITY_BUILD again."""
    folder = tmp_path_factory.mktemp("build")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSITY_BUILD", str(folder))
        yield folder
