"""All products of a table in one C++ call (csrc/grouped_linear.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from mint_engine.kernels.op import NATIVE_DTYPES, native
from mint_engine.kernels.op import native_reason as supports  # noqa: F401

if TYPE_CHECKING:
    from mint_engine.kernels.grouped_linear import LinearTable, OuterTable


def grouped_linear(x: Tensor, weight: Tensor, out: Tensor, table: LinearTable, add: bool) -> None:
    native.grouped_linear(
        NATIVE_DTYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), out.stride(0),
        table.table.ctypes.data, table.scales.ctypes.data, len(table.products), int(add),
    )  # fmt: skip


def grouped_outer(a: Tensor, b: Tensor, outs: Sequence[Tensor], table: OuterTable) -> None:
    addresses = np.array([out.data_ptr() for out in outs], dtype=np.int64)
    native.grouped_outer(
        NATIVE_DTYPES[a.dtype], a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), addresses.ctypes.data,
        table.table.ctypes.data, len(table.products),
    )  # fmt: skip
