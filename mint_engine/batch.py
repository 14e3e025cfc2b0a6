"""Packing: sequences laid end to end with explicit boundaries (DESIGN.md 2.6). Built once, on the host, in numpy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """``tokens, positions`` int64 [M]; ``cu_seqlens`` int32 [n+1], sequence i is rows cu_seqlens[i]:cu_seqlens[i+1]."""

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()


def pack(sequences: Sequence[np.ndarray]) -> PackedBatch:
    """Lay int64 token arrays end to end. Nothing later infers a boundary from a position."""
    lengths = np.array([len(s) for s in sequences], dtype=np.int32)
    return PackedBatch(
        tokens=torch.from_numpy(np.concatenate(sequences).astype(np.int64, copy=False)),
        positions=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
    )


def micro_batches(
    lengths: Sequence[int], max_tokens: int, widths: Sequence[int] | None = None, max_cells: int = 0
) -> Iterator[range]:
    """Consecutive index ranges of at most ``max_tokens`` tokens each (one longer sequence is a range of its own).

    ``widths``: of each sequence's targets. A range is padded to its widest, to at most ``max_cells`` cells.
    """
    start, total, widest = 0, 0, 0
    for i, n in enumerate(lengths):
        width = 0 if widths is None else widths[i]
        if i > start and (total + n > max_tokens or (total + n) * max(widest, width) > max_cells > 0):
            yield range(start, i)
            start, total, widest = i, 0, 0
        total, widest = total + n, max(widest, width)
    yield range(start, len(lengths))
