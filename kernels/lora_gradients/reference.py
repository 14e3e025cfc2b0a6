"""The adapter's gradients in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


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
        wide, columns = db_j.dtype, slice(j * r, (j + 1) * r)
        dy_j = dy[:, row : row + len(b_j)].to(wide)
        ds[:, columns] = (scale * (dy_j @ b_j.to(wide))).to(ds.dtype)
        db_j.addmm_(dy_j.T, s[:, columns].to(wide))
        row += len(b_j)
    if x is not None and da is not None:
        da.addmm_(ds.to(da.dtype).T, x.to(da.dtype))
