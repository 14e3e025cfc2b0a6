"""Sequence bounds that are data: for passes whose launches may not depend on them, such as those of a CUDA graph.

The bounds of a plain pass are an int32 tensor on the CPU, read when a kernel is launched. `Bounds` are buffers of fixed
size: the kernels are launched for as many tiles as ``rows`` rows in ``sequences`` sequences could ever need, and a tile
that this batch does not have is an empty one. ``write`` fills them for the next batch; the launches stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

TileTable = Callable[[np.ndarray, int, bool], np.ndarray]


class Bounds:
    """Room for the bounds of up to ``sequences`` sequences over exactly ``rows`` rows, on the host and on a device.

    ``host`` and ``device`` are int32 ``[sequences + 1]``; what is not used repeats the last bound (empty sequences).
    """

    def __init__(self, rows: int, sequences: int, device: torch.device) -> None:
        self.rows, self.sequences = rows, sequences
        self.host = torch.full((sequences + 1,), rows, dtype=torch.int32)
        self.host[0] = 0
        self.device = self.host.to(device, copy=True)
        self._tables: dict[tuple[int, bool], tuple[TileTable, Tensor]] = {}

    def __len__(self) -> int:
        return self.sequences + 1

    def tiles(self, tile_rows: int, by_keys: bool, make: TileTable) -> Tensor:
        """The table of tiles on the device, int32 ``[rows // tile_rows + sequences, 4]``, kept up to date by `write`.

        ``make(bounds, tile_rows, by_keys)`` gives the rows of the table that a batch has. A new table is copied to the
        device at once, so ask for each once before capturing.
        """
        key = (tile_rows, by_keys)
        if key not in self._tables:
            table = self._padded(make, tile_rows, by_keys)
            self._tables[key] = (make, torch.from_numpy(table).to(self.device.device, copy=True))
        return self._tables[key][1]

    def write(self, bounds: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Take the bounds of another batch, int32 rising from 0 to ``rows``: (new contents, device buffer) of each.

        Whoever calls copies them, when and how it likes.

        Raises:
            ValueError: they are too many, or do not rise from 0 to ``rows``.
        """
        if len(bounds) > len(self) or bounds[0] != 0 or bounds[-1] != self.rows or (np.diff(bounds) < 0).any():
            raise ValueError(
                f"bounds: expected at most {len(self)} that rise from 0 to {self.rows}, got {len(bounds)} from "
                f"{bounds[0]} to {bounds[-1]}"
            )
        host = self.host.numpy()
        host[: len(bounds)], host[len(bounds) :] = bounds, self.rows
        yield host, self.device
        for (tile_rows, by_keys), (make, table) in self._tables.items():
            yield self._padded(make, tile_rows, by_keys), table

    def _padded(self, make: TileTable, tile_rows: int, by_keys: bool) -> np.ndarray:
        table = np.zeros((self.rows // tile_rows + self.sequences, 4), dtype=np.int32)
        found = make(self.host.numpy(), tile_rows, by_keys)
        table[: len(found)] = found
        return table
