"""Embedding lookup in Triton: a program copies a block of one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mint_engine.kernels.gpu_plan import Tunable
from mint_engine.kernels.triton_common import architecture, power_of_2
from mint_engine.kernels.triton_common import triton_reason as supports  # noqa: F401

GATHER = Tunable("embedding.gather", {"BLOCK": (512, 1024, 2048, 4096), "warps": (1, 2, 4, 8), "stages": (1,)})


@triton.jit
def _gather(tokens, table, table_row, out, out_row, v, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row)
    inside = columns < width
    known = (token >= 0) & (token < v)
    value = tl.load(table + token * table_row + columns, mask=inside & known, other=float("nan"))
    tl.store(out + row * out_row + columns, value, mask=inside)


def embedding(tokens: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    (m, h), meta = out.shape, GATHER.meta(architecture())
    meta["BLOCK"] = min(meta["BLOCK"], power_of_2(h))
    if m and h:
        _gather[(m, triton.cdiv(h, meta["BLOCK"]))](
            tokens, table, table.stride(0), out, out.stride(0), len(table), h, **meta
        )  # fmt: skip
