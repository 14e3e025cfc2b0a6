"""Unembedding and draw in plain torch: the logits, then `sample_rows` without filters."""

from __future__ import annotations

import torch
from torch import Tensor

from mint_engine.kernels.args import statistics_dtype
from mint_engine.kernels.sample_rows import reference


def sample_head(x: Tensor, weight: Tensor, temperature: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    wide = statistics_dtype(x.dtype)
    tokens, logprobs = reference.sample_rows(
        x.to(wide) @ weight.to(wide).T, temperature, torch.full((len(x),), -1, device=x.device),
        torch.ones(len(x), dtype=torch.float64, device=x.device), uniforms,
    )  # fmt: skip
    return tokens, logprobs.float()
