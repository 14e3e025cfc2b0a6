"""Memory in large pages, for what every decode step reads from one end to the other.

With pages of 4 KB a step looks up 65,000 of them for the 270 MB of a small model, and waits for that. Linux gives pages
of 2 MB to whom asks for them (madvise), where a whole one fits into a mapping: so many small tensors share one.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

__all__ = ["Arena"]

CHUNK = 32 << 20  # bytes of a mapping. What is not written of it takes no memory
_ALIGNMENT = 64


class Arena:
    """Hands out tensors that lie one after the other. A mapping is given back when the last tensor in it is gone.

    The first byte that is written of a page makes 2 MB resident: for a few small tensors it is a waste.

    ``device``: where it is no CPU, or the system has no such pages, tensors are torch's own.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._own = hasattr(mmap, "MADV_HUGEPAGE") and (device is None or device.type == "cpu")
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor. Raises MemoryError if there is no room."""
        count = prod(shape)
        if not self._own or count == 0:
            return torch.zeros(shape, dtype=dtype, device=self._device)
        nbytes = count * dtype.itemsize
        if self._chunk is None or self._used + nbytes > len(self._chunk):
            self._chunk, self._used = _mapped(max(nbytes, CHUNK)), 0
        tensor = torch.frombuffer(self._chunk, dtype=dtype, count=count, offset=self._used)
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return tensor.view(shape)


def _mapped(nbytes: int) -> mmap.mmap:
    """So much memory of this process, all zero."""
    try:
        found = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no room for {nbytes} bytes: {error}") from error
    with suppress(OSError):  # a kernel that was built without them
        found.madvise(mmap.MADV_HUGEPAGE)
    return found
