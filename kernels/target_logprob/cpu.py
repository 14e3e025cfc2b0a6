"""Fused unembedding + log-softmax in C++ (csrc/target_logprob.h, csrc/logits.h)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mint_engine.kernels.op import NATIVE_DTYPES, native
from mint_engine.kernels.op import native_reason as supports  # noqa: F401
from mint_engine.kernels.target_logprob.labels import Labels, resolve

_SCRATCH_BYTES = 64 << 20  # dlogits held at once in the backward


def logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (m, h), v = x.shape, weight.shape[0]
    out = torch.empty((m, v), dtype=torch.float32)
    native.logits(
        NATIVE_DTYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
        out.data_ptr(), v, m, v, h,
    )  # fmt: skip
    return out


def target_logprob(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor | Labels, logprob: torch.Tensor, lse: torch.Tensor
) -> None:
    (m, h), v, targets = x.shape, weight.shape[0], resolve(targets)
    native.target_logprob(
        NATIVE_DTYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
        targets.data_ptr(), targets.shape[1], logprob.data_ptr(), lse.data_ptr(), m, v, h,
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
    targets = resolve(targets)
    target_logprob(x, weight, targets, logprob, lse)
    d = gradient(slice(0, len(x)), logprob)
    target_logprob_backward(x, weight, targets, d, lse, border, None, dx, dborder)


def target_logprob_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor | Labels,
    dlogprob: torch.Tensor,
    lse: torch.Tensor,
    border: int,
    spans: torch.Tensor | None,
    dx: torch.Tensor,
    dborder: torch.Tensor,
) -> None:
    (m, h), v, targets = x.shape, weight.shape[0], resolve(targets)
    k, code = targets.shape[1], NATIVE_DTYPES[x.dtype]
    dlogprob, lse = dlogprob.masked_fill(targets < 0, 0.0), lse.contiguous()
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
            dx[start:].data_ptr(), dx.stride(0), n, h, v, 1.0,
        )  # fmt: skip
