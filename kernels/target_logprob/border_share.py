"""Whose columns of the border some rows of x use, and where their gradient goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mint_engine.kernels import args


@dataclass(frozen=True)
class BorderShare:
    """Rows ``start:stop`` of x use ``grad.shape[1]`` columns of the border from ``column`` on: an adapter's.

    ``grad``: ``[V, r]`` of the dtype of the statistics, rows contiguous; the gradient of these columns is added to it.
    """

    start: int
    stop: int
    column: int
    grad: Tensor


def check(op: str, shares: Sequence[BorderShare], x: Tensor, vocab: int, border: int) -> None:
    """Raises ValueError if one does not fit ``x [M, H]``, the vocabulary or the border."""
    wide = args.statistics_dtype(x.dtype)
    for i, s in enumerate(shares):
        name, width = f"shares[{i}].grad", args.matrix(op, f"shares[{i}].grad", s.grad)[1]
        args.tensor(op, name, s.grad, (vocab, width), wide)
        if width and s.grad.stride(1) != 1:
            raise ValueError(f"{name}: expected contiguous rows, got strides {list(s.grad.stride())} ({op})")
        if not 0 <= s.start <= s.stop <= len(x):
            raise ValueError(f"shares[{i}]: expected rows within [0, {len(x)}], got {s.start} to {s.stop} ({op})")
        if not 0 <= s.column <= s.column + width <= border:
            got = f"{s.column} to {s.column + width}"
            raise ValueError(f"shares[{i}]: expected columns within [0, {border}], got {got} ({op})")
