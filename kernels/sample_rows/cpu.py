"""Sampling in C++ (csrc/sample_rows.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from mint_engine.kernels.op import NATIVE_DTYPES, native
from mint_engine.kernels.op import native_reason as supports  # noqa: F401


def sample_rows(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    temperature, top_k, top_p, uniforms = (t.contiguous() for t in (temperature, top_k, top_p, uniforms))
    native.sample_rows(
        NATIVE_DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), temperature.data_ptr(), top_k.data_ptr(),
        top_p.data_ptr(), uniforms.data_ptr(), tokens.data_ptr(), logprobs.data_ptr(), rows, vocab,
    )  # fmt: skip
    return tokens, logprobs


def top_logprobs(logits: Tensor, temperature: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    tokens, logprobs = torch.empty((rows, k), dtype=torch.int64), torch.empty((rows, k), dtype=torch.float32)
    temperature = temperature.contiguous()
    native.top_logprobs(
        NATIVE_DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), temperature.data_ptr(), tokens.data_ptr(),
        logprobs.data_ptr(), k, rows, vocab,
    )  # fmt: skip
    return tokens, logprobs
