"""The adapter's gradients in one C++ call (csrc/lora_gradients.h)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor

from mint_engine.kernels.op import NATIVE_DTYPES, native
from mint_engine.kernels.op import native_reason as supports  # noqa: F401


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
    modules = array("q")
    for b_j, db_j in zip(b, db, strict=True):
        modules.extend((len(b_j), b_j.data_ptr(), b_j.stride(0), db_j.data_ptr(), db_j.stride(0)))
    wide = (0, 0, 0, 0, 0)
    if x is not None and da is not None:
        wide = (x.data_ptr(), x.stride(0), x.shape[1], da.data_ptr(), da.stride(0))
    native.lora_gradients(
        NATIVE_DTYPES[dy.dtype], dy.data_ptr(), dy.stride(0), s.data_ptr(), s.stride(0), ds.data_ptr(), ds.stride(0),
        modules.buffer_info()[0], len(b), scale, *wide, len(dy), b[0].shape[1],
    )  # fmt: skip
