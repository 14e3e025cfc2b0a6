"""Unembedding and draw on a CPU: two C++ ops, whose logits stay in cache for a few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mint_engine.kernels.op import native_reason as supports  # noqa: F401
from mint_engine.kernels.sample_rows import cpu as rows_cpu
from mint_engine.kernels.target_logprob import cpu as head_cpu


def sample_head(x: Tensor, weight: Tensor, temperature: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    off = torch.full((len(x),), -1), torch.ones(len(x), dtype=torch.float64)
    return rows_cpu.sample_rows(head_cpu.logits(x, weight), temperature, *off, uniforms)
