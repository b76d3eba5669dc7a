"""Copies in large pages hold the numbers, apart from each other, and outlive what made them."""

import mmap
import os

import pytest
import torch

from kernels import pages
from kernels.pages import PAGE, LargePages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_copies_hold_the_numbers_and_do_not_overlap(dtype, monkeypatch):
    monkeypatch.setattr(pages, "CHUNK", 4096)  # so that several are needed, and one tensor is larger
    made, random = LargePages(), torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7, 64), (63, 60), (1, 1), (200, 70)]
    given = [torch.randint(-99, 99, shape, generator=random).to(dtype) for shape in shapes]
    copies = [made.copied(tensor) for tensor in given]
    del made
    assert all(copy.is_contiguous() and copy.data_ptr() % 64 == 0 for copy in copies)
    assert all(torch.equal(copy, tensor) and copy.dtype == dtype for copy, tensor in zip(copies, given, strict=True))
    copies[1].zero_()
    assert all(
        torch.equal(copy, tensor) for copy, tensor in zip(copies[2:] + copies[:1], given[2:] + given[:1], strict=True)
    )


def test_a_transposed_tensor_becomes_contiguous_and_keeps_its_own_memory():
    weight = torch.randn(6, 4)
    copy = LargePages().copied(weight.T)
    copy[0] = 7
    assert copy.is_contiguous() and torch.equal(copy[1:], weight.T[1:]) and not (weight == 7).any()


def test_a_chunk_begins_with_a_page():
    assert LargePages().copied(torch.ones(8)).data_ptr() % PAGE == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_write_into_the_copies():
    made = LargePages()
    copies = [made.copied(torch.ones(8))]
    child = os.fork()
    if not child:
        copies[0].zero_()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and copies[0].tolist() == [1] * 8


def test_without_such_pages_the_tensor_is_kept(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    weight = torch.ones(8, 2)
    assert LargePages().copied(weight) is weight and LargePages().copied(weight.T).is_contiguous()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux")
def test_a_system_that_refuses_large_pages_gives_small_ones(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *given):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert LargePages().copied(torch.ones(8)).tolist() == [1] * 8
