"""Where the elements of a flat buffer go in the compute dtype: the borders of the bordered weights."""

from __future__ import annotations

from collections.abc import Sequence

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
        self.views: list[tuple[slice, Tensor]] = []
        rows: list[tuple[int, ...]] = []
        start, dtypes = 0, set()
        for count, view in pieces:
            if view is not None:
                if view.dim() != 2 or view.numel() != count or (view.shape[1] > 1 and view.stride(1) != 1):
                    raise ValueError(
                        f"pieces: expected a view [rows, columns] of {count} elements with unit column stride, got "
                        f"{list(view.shape)} with strides {view.stride()} (Places, element {start})"
                    )
                if view.device != torch.device(device):
                    raise ValueError(f"pieces: expected views on {device}, got one on {view.device} (Places)")
                self.views.append((slice(start, start + count), view))
                dtypes.add(view.dtype)
            if len(dtypes) > 1:
                raise ValueError(f"pieces: expected views of one dtype, got {sorted(map(str, dtypes))} (Places)")
            geometry = (1, 0, 0) if view is None else (view.shape[1], view.stride(0), view.data_ptr())
            rows += [(at, start + count, start, *geometry) for at in range(start, start + count, BLOCK)]
            start += count
        self.size = start
        self.dtype = dtypes.pop() if dtypes else torch.bfloat16
        self.table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 6).to(device)
