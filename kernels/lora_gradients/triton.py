"""The adapter's gradients from the Triton kernels of their parts: dy is read twice."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mint_engine.kernels.bordered_linear.triton import expand_backward
from mint_engine.kernels.outer_accumulate.triton import outer_accumulate
from mint_engine.kernels.triton_common import triton_reason as supports  # noqa: F401


def lora_gradients(
    dy: Tensor,
    s: Tensor,
    b: Sequence[Tensor],
    scale: float,
    ds: Tensor,
    db: Sequence[Tensor],
    x: Tensor | None,
    da: Tensor | None,
) -> None:
    row, r = 0, b[0].shape[1]
    for j, (b_j, db_j) in enumerate(zip(b, db, strict=True)):
        columns = slice(j * r, (j + 1) * r)
        dy_j = dy[:, row : row + len(b_j)]
        expand_backward(dy_j, b_j, scale, ds[:, columns])
        outer_accumulate(dy_j, s[:, columns], db_j, 1.0)
        row += len(b_j)
    if x is not None and da is not None:
        outer_accumulate(ds, x, da, 1.0)
