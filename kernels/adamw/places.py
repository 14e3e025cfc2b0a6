"""Where the elements of a flat buffer go in the compute dtype: the borders of the bordered weights."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024  # elements of a program; a program's are of one piece


class Places:
    """For consecutive pieces of a flat buffer, the 2-D view each is written to, or None.

    ``pieces``: (number of elements, view) from element 0 on; a view has unit stride in its last dimension, all views
    one dtype and the device of the buffer. They must stay where they are in memory: make new Places when they move.
    ``table`` (int64 on the device, a row a program of Triton's or a block of the C++): first element, the piece's end,
    the piece's first element, columns of the view, its row stride, its address.
    """

    def __init__(self, pieces: Sequence[tuple[int, Tensor | None]], device: torch.device | str) -> None:
        """Raises ValueError for a view that does not fit its piece."""
        self._pieces: list[tuple[slice, Tensor | None]] = []
        self._moved: Sequence[int] = [0] * len(pieces)
        geometry, start, dtypes = [], 0, set()
        for count, view in pieces:
            if view is not None:
                if view.dim() != 2 or view.numel() != count or (view.shape[1] > 1 and view.stride(1) != 1):
                    raise ValueError(
                        f"pieces: expected a view [rows, columns] of {count} elements with unit column stride, got "
                        f"{list(view.shape)} with strides {view.stride()} (Places, element {start})"
                    )
                if view.device != torch.device(device):
                    raise ValueError(f"pieces: expected views on {device}, got one on {view.device} (Places)")
                dtypes.add(view.dtype)
            if len(dtypes) > 1:
                raise ValueError(f"pieces: expected views of one dtype, got {sorted(map(str, dtypes))} (Places)")
            self._pieces.append((slice(start, start + count), view))
            where = (1, 0, 0) if view is None else (view.shape[1], view.stride(0), view.data_ptr())
            geometry.append((start, start + count, start, *where))
            start += count
        self.size = start
        self.dtype = dtypes.pop() if dtypes else torch.bfloat16
        counts = np.array([count for count, _ in pieces], dtype=np.int64)
        self._blocks = -(-counts // BLOCK)
        rows = np.repeat(np.array(geometry, dtype=np.int64).reshape(-1, 6), self._blocks, axis=0)
        firsts = np.cumsum(self._blocks) - self._blocks  # of each piece, its first row
        rows[:, 0] += (np.arange(len(rows)) - np.repeat(firsts, self._blocks)) * BLOCK
        self.table = torch.from_numpy(rows).to(device)

    def moved(self, by: Sequence[int]) -> Places:
        """The same pieces, the view of piece i ``by[i]`` elements further on in its storage, which it must fit in."""
        other = copy(self)
        other._moved = [old + new for old, new in zip(self._moved, by, strict=True)]
        steps = np.repeat(np.array(by, dtype=np.int64) * self.dtype.itemsize, self._blocks)
        other.table = self.table.clone()
        other.table[:, 5] += torch.from_numpy(steps).to(self.table.device)
        return other

    @property
    def views(self) -> list[tuple[slice, Tensor]]:
        """The pieces that go somewhere: the elements of each, and its view."""
        return [
            (part, view.as_strided(view.shape, view.stride(), view.storage_offset() + by))
            for (part, view), by in zip(self._pieces, self._moved, strict=True)
            if view is not None
        ]
