"""Threads of the kernels for CPUs: those of torch, for one call at a time, and none in a process that was forked."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import numba
import torch
from torch import Tensor

BYTES_PER_THREAD = 2**18  # of weights; below, starting a thread costs more than it saves
CALLS = Lock()  # one call at a time: numba's threading layer workqueue ends the process at two


@contextmanager
def on_threads(nbytes: int) -> Iterator[int]:
    """Inside the block numba runs on as many threads as torch does, fewer for few bytes; their number is given."""
    with CALLS:
        wanted = torch.get_num_threads()
        count = max(min(wanted, numba.config.NUMBA_NUM_THREADS, nbytes // BYTES_PER_THREAD), 1)
        choose_threads()
        before = numba.get_num_threads()
        numba.set_num_threads(count)
        try:
            yield count
        finally:
            numba.set_num_threads(before)
            if torch.get_num_threads() != wanted:  # numba's first start of threads sets the number for all of OpenMP
                torch.set_num_threads(wanted)


@cache  # once, before numba starts its threads
def choose_threads() -> None:
    """Have numba's threads come from the pool of torch's own, where both load the same libgomp.

    With a pool of its own numba waits for torch's threads, which spin after each operation: 20 against 32 GB/s on 2
    cores.
    """
    if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
        numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]


def alone(dense: Callable[[], Tensor]) -> Tensor:
    """What `dense` computes without kernels, on one thread: the threads of OpenMP do not survive a fork.

    Numba would end the process and torch would wait for ever.
    """
    warnings.warn(
        "Sparse kernels run densely in a forked process, with a mask and on one thread: start it with spawn instead.",
        stacklevel=5,  # the caller of the FFN
    )
    wanted = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return dense()
    finally:
        torch.set_num_threads(wanted)
