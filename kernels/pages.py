"""Weights in memory of large pages, where the system has them.

A row of 4 kB fills a page of 4 kB, so that reading every other row looks up an address in the page table for each. With
pages of 2 MB these look-ups are few: SmolLM2's maps, half of their inputs skipped, took one thread 0.91 of the time in
float32 and 0.89 in 8 bits.
"""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

PAGE, CHUNK = 2**21, 2**26  # bytes: of a large page, and of what is asked for at once
ALIGNED = 64  # bytes: a line of the cache


class LargePages:
    """Copies tensors into memory that is asked for in chunks, so that small ones share a large page."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)  # of the last chunk

    def copied(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of `tensor`; not on a CPU, or on a system without such pages, `tensor.contiguous()`."""
        if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
            return tensor.contiguous()
        size = -(-tensor.nbytes // ALIGNED) * ALIGNED
        if size > len(self._left):
            self._left = _chunk(max(CHUNK, size))
        own, self._left = self._left[: tensor.nbytes], self._left[size:]
        return own.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def _chunk(nbytes: int) -> Tensor:
    """Memory of `nbytes`, uint8, that begins with a large page. It is freed with the last tensor in it."""
    # Private: Linux gives shared memory no large pages by default, and a forked process would write into this one's.
    memory = mmap.mmap(-1, nbytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a Linux that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % PAGE
    return whole[first : first + nbytes]
