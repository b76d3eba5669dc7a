"""Kernels for CPUs on two threads: the other tests run on one."""

import pytest
import torch

# cpu_layer has BYTES_PER_THREAD compiled in and must be imported before a test changes it.
from kernels import cpu_layer, cpu_threads  # noqa: F401


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch):
    """Every call of a kernel is shared by two threads, however few bytes it reads."""
    monkeypatch.setattr(cpu_threads, "BYTES_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with cpu_threads.on_threads(nbytes=2) as count:
            assert count == 2
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> None:
    """The test runs with every call on one thread, and again on two."""
    if request.param == 2:
        request.getfixturevalue("two_threads")
