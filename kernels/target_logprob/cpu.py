"""Fused unembedding + log-softmax in C++ (csrc/target_logprob.h, csrc/logits.h)."""

from __future__ import annotations

import torch

from mint_engine.kernels.op import NATIVE_DTYPES, native
from mint_engine.kernels.op import native_reason as supports  # noqa: F401

_SCRATCH_BYTES = 64 << 20  # dlogits held at once in the backward


def logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (m, h), v = x.shape, weight.shape[0]
    out = torch.empty((m, v), dtype=torch.float32)
    native.logits(
        NATIVE_DTYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
        out.data_ptr(), v, m, v, h,
    )  # fmt: skip
    return out


def target_logprob(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (m, h), v, k = x.shape, weight.shape[0], targets.shape[1]
    logprob = torch.empty((m, k), dtype=torch.float32)
    lse = torch.empty(m, dtype=torch.float32)
    targets = targets.contiguous()
    native.target_logprob(
        NATIVE_DTYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
        targets.data_ptr(), k, logprob.data_ptr(), lse.data_ptr(), m, v, h,
    )  # fmt: skip
    return logprob, lse


def target_logprob_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    dlogprob: torch.Tensor,
    lse: torch.Tensor,
    border: int,
    spans: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    (m, h), v, k = x.shape, weight.shape[0], targets.shape[1]
    code = NATIVE_DTYPES[x.dtype]
    dx = torch.empty((m, h), dtype=x.dtype)
    dborder = torch.zeros((v, border), dtype=torch.float32)
    targets, dlogprob, lse = targets.contiguous(), dlogprob.contiguous(), lse.contiguous()
    chunk = max(1, min(m, _SCRATCH_BYTES // (x.element_size() * v)))
    dlogits = torch.empty((chunk, v), dtype=x.dtype)
    for start in range(0, m, chunk):
        n = min(chunk, m - start)
        rows = x[start : start + n]
        columns = 0 if spans is None else spans[start:].data_ptr()
        native.target_dlogits(
            code, rows.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
            targets[start:].data_ptr(), k, dlogprob[start:].data_ptr(), lse[start:].data_ptr(),
            dlogits.data_ptr(), v, dborder.data_ptr(), border, columns, n, v, h,
        )  # fmt: skip
        native.matmul(
            code, dlogits.data_ptr(), v, weight.data_ptr(), 1, weight.stride(0), 0,
            dx[start:].data_ptr(), h, n, h, v, 1.0,
        )  # fmt: skip
    return dx, dborder
