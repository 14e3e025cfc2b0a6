"""Fused unembedding + log-softmax in C++ (csrc/target_logprob.h, csrc/logits.h)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mint_engine.kernels.op import NATIVE_DTYPES, native
from mint_engine.kernels.op import native_reason as supports  # noqa: F401
from mint_engine.kernels.target_logprob.border_share import BorderShare
from mint_engine.kernels.target_logprob.kept import Kept
from mint_engine.kernels.target_logprob.labels import Labels, resolve

SCRATCH_BYTES = 64 << 20  # dlogits held at once in the backward


def logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (m, h), v = x.shape, weight.shape[0]
    out = torch.empty((m, v), dtype=torch.float32)
    native.logits(
        NATIVE_DTYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
        out.data_ptr(), v, m, v, h,
    )  # fmt: skip
    return out


def target_logprob(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor | Labels,
    logprob: torch.Tensor,
    lse: torch.Tensor,
    kept: Kept | None,
) -> None:
    (m, h), v, targets, code = x.shape, weight.shape[0], resolve(targets), NATIVE_DTYPES[x.dtype]
    keeping = (0, 0, 0, 0)
    if kept is not None and len(kept.rows):
        columns = torch.empty(1, dtype=torch.int64)
        native.logit_block(code, h, columns.data_ptr())
        kept.block = int(columns)
        kept.tops = torch.empty((len(kept.rows), -(-v // kept.block)), dtype=torch.float32)
        kept.logprob = logprob
        at = torch.full((m,), -1)
        at[kept.rows] = torch.arange(len(kept.rows))
        keeping = (at.data_ptr(), kept.values.data_ptr(), kept.values.stride(0), kept.tops.data_ptr())
    native.target_logprob(
        code, x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
        targets.data_ptr(), targets.shape[1], logprob.data_ptr(), lse.data_ptr(), *keeping, m, v, h,
    )  # fmt: skip


def target_logprob_with_gradient(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor | Labels,
    gradient: Callable[[slice, torch.Tensor], torch.Tensor],
    border: int,
    logprob: torch.Tensor,
    lse: torch.Tensor,
    dx: torch.Tensor,
    dborder: torch.Tensor,
) -> None:
    m, v, targets = len(x), weight.shape[0], resolve(targets)
    chunk = max(1, min(m, SCRATCH_BYTES // (x.element_size() * v)))
    values = torch.empty((chunk, v), dtype=x.dtype)
    for start in range(0, m, chunk):
        rows = slice(start, min(start + chunk, m))
        every = torch.arange(rows.stop - start)
        kept = Kept(every, values[: len(every)])
        target_logprob(x[rows], weight, targets[rows], logprob[rows], lse[rows], kept)
        target_logprob_backward(
            x[rows], weight, targets[rows], gradient(rows, logprob[rows]), lse[rows], border,
            [BorderShare(0, len(every), 0, dborder)], kept, every, dx[rows],
        )  # fmt: skip


def target_logprob_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor | Labels,
    dlogprob: torch.Tensor,
    lse: torch.Tensor,
    border: int,
    shares: Sequence[BorderShare],
    kept: Kept | None,
    rows: torch.Tensor | None,
    dx: torch.Tensor,
) -> None:
    (m, h), v, targets = x.shape, weight.shape[0], resolve(targets)
    k, code = targets.shape[1], NATIVE_DTYPES[x.dtype]
    dlogprob, lse = dlogprob.masked_fill(targets < 0, 0.0), lse.contiguous()
    table = np.array(
        [(s.start, s.stop, s.column, s.grad.shape[1], s.grad.data_ptr(), s.grad.stride(0)) for s in shares], np.int64
    ).reshape(-1, 6)

    def product(dlogits: torch.Tensor, start: int, n: int) -> None:
        native.matmul(
            code, dlogits.data_ptr(), dlogits.stride(0), weight.data_ptr(), 1, weight.stride(0), 0,
            dx[start:].data_ptr(), dx.stride(0), n, h, v, 1.0,
        )  # fmt: skip

    begin, dlogits = 0, None
    if kept is not None and rows is not None and kept.tops is not None:
        assert kept.logprob is not None
        at, dlogits = kept.among(rows), kept.values
        begin = len(at)
        logprob = kept.logprob[rows[:begin]]
        native.target_dlogits_kept(
            code, at.data_ptr(), dlogits.data_ptr(), dlogits.stride(0), kept.tops.data_ptr(), kept.block,
            targets.data_ptr(), k, logprob.data_ptr(), dlogprob.data_ptr(), lse.data_ptr(),
            x[:, h - border :].data_ptr(), x.stride(0), border, table.ctypes.data, len(table), begin, v,
        )  # fmt: skip
        product(dlogits, 0, begin)
    if begin == m:
        return
    if dlogits is None:
        chunk = max(1, min(m - begin, SCRATCH_BYTES // (x.element_size() * v)))
        dlogits = torch.empty((chunk, v), dtype=x.dtype)
    for start in range(begin, m, len(dlogits)):
        n = min(len(dlogits), m - start)
        moved = table - np.array([start, start, 0, 0, 0, 0])
        native.target_dlogits(
            code, x[start:].data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
            targets[start:].data_ptr(), k, dlogprob[start:].data_ptr(), lse[start:].data_ptr(),
            dlogits.data_ptr(), dlogits.stride(0), border, moved.ctypes.data, len(table), n, v, h,
        )  # fmt: skip
        product(dlogits, start, n)
