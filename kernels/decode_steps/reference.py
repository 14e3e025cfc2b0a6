"""The two ops' references in turn: the specification."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mint_engine.kernels.decode_step.reference import decode_step
from mint_engine.kernels.sample_rows.reference import sample_rows

if TYPE_CHECKING:
    from mint_engine.kernels.decode_step import StepAdapters, StepModel
    from mint_engine.kernels.decode_steps import StepDraws


def decode_steps(
    model: StepModel,
    tokens: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    draws: StepDraws,
    adapters: StepAdapters | None,
    interrupted: Tensor | None,
    seconds: float,
) -> tuple[Tensor, Tensor]:
    begun, everything, drawn, logprobs = time.monotonic(), torch.arange(len(tokens)), [], []
    for uniforms in draws.uniforms:
        logits = decode_step(model, tokens, cos, sin, k_pool, v_pool, block_table, lengths, everything, scale, adapters)
        tokens, logprob = sample_rows(logits, draws.temperature, draws.top_k, draws.top_p, uniforms)
        drawn.append(tokens)
        logprobs.append(logprob)
        lengths = lengths + 1
        ended = (draws.stops == tokens[:, None]).any() or not logprob.isfinite().all()
        if ended or (interrupted is not None and bool(interrupted)) or time.monotonic() - begun >= seconds:
            break
    return torch.stack(drawn), torch.stack(logprobs)
