"""Tensors of an arena are tensors like others, in memory that Linux was asked to give in large pages."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mint_engine.kernels import Arena
from mint_engine.kernels import pages as pages_of_kernels

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
DTYPES = [torch.bfloat16, torch.float32, torch.int8, torch.int32]


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 70), st.integers(1, 900)), max_size=12))
def test_tensors_are_zero_aligned_and_nobody_else_s(shapes: list[tuple[torch.dtype, int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages_of_kernels, "CHUNK", 1 << 16)  # so that mappings are full, and tensors larger than one
        arena = Arena()
        tensors = [arena.zeros(*shape, dtype=dtype) for dtype, *shape in shapes]
    for i, (tensor, (dtype, *shape)) in enumerate(zip(tensors, shapes, strict=True)):
        assert (tensor.dtype, list(tensor.shape), tensor.is_contiguous()) == (dtype, shape, True)
        assert not tensor.any()
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0
        tensor.fill_(i + 1)
    for i, tensor in enumerate(tensors):
        assert bool((tensor == i + 1).all())


def mapping_of(tensor: Tensor) -> list[str] | None:
    """What the system says of the mapping that a tensor lies in."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    heads = [(i, found) for i, line in enumerate(lines) if (found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line))]
    for (i, head), (end, _) in zip(heads, [*heads[1:], (len(lines), None)], strict=True):
        if int(head[1], 16) <= tensor.data_ptr() < int(head[2], 16):
            return lines[i:end]
    return None


@pytest.mark.skipif(not LARGE_PAGES.exists(), reason="this system has no large pages")
def test_large_pages_were_asked_for() -> None:
    tensor = Arena().zeros(8 << 20, dtype=torch.int8)
    mapping = mapping_of(tensor)
    assert mapping is not None
    flags = next(line for line in mapping if line.startswith("VmFlags:")).split()
    assert "hg" in flags


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mapping_lives_as_long_as_the_last_tensor_in_it() -> None:
    arena = Arena()
    first, second = (arena.zeros(pages_of_kernels.CHUNK // 2, dtype=torch.int8) for _ in range(2))
    third = arena.zeros(1, dtype=torch.int8)  # in a mapping of its own
    del arena, first
    gc.collect()
    assert mapping_of(second) is not None
    assert not second.any()
    gone = second.view(-1)
    del second
    gc.collect()
    assert not gone.any()
    resident = pages_resident()
    gone.fill_(1)
    grown = pages_resident() - resident
    del gone
    gc.collect()
    assert pages_resident() < resident + grown // 2
    assert not third.any()


def pages_resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_another_device_s_tensors_are_torch_s_own() -> None:
    assert Arena(torch.device("meta")).zeros(3, 4, dtype=torch.float32).device.type == "meta"


def test_memory_that_is_not_there_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match=r"no room for \d+ bytes"):
        Arena().zeros(1 << 60, dtype=torch.int8)
