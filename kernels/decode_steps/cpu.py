"""Decode steps in one call to C++ (csrc/decode_steps.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mint_engine.kernels.decode_step.cpu import supports, words_of
from mint_engine.kernels.op import NATIVE_DTYPES, native

__all__ = ["decode_steps", "supports"]

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
    (steps, rows), vocab = draws.uniforms.shape, len(model.embedding)
    drawn, logprobs = torch.empty((steps + 1, rows), dtype=torch.int64), torch.empty((steps, rows), dtype=torch.float32)
    drawn[0] = tokens
    logits = torch.empty((rows, vocab), dtype=torch.float32)
    lengths, everything = lengths.clone(), torch.arange(rows)
    temperature, top_k, top_p, uniforms, stops = (
        t.contiguous() for t in (draws.temperature, draws.top_k, draws.top_p, draws.uniforms, draws.stops)
    )
    seated = (0, 0, 0, 0)
    if adapters is not None:
        segments, scales = adapters.segments.contiguous(), adapters.scales.contiguous()
        seated = segments.data_ptr(), scales.data_ptr(), len(scales), words_of(adapters)
    layers, head = model.addresses
    done = torch.zeros(1, dtype=torch.int64)
    native.decode_steps(
        NATIVE_DTYPES[model.norm.dtype], drawn.data_ptr(), model.embedding.data_ptr(), model.embedding.stride(0),
        layers, len(model.layers), head, model.word_columns, cos.data_ptr(), cos.stride(0),
        sin.data_ptr(), sin.stride(0), len(cos), k_pool.data_ptr(), v_pool.data_ptr(), k_pool.shape[1], k_pool.shape[2],
        block_table.data_ptr(), block_table.stride(0), block_table.shape[1], lengths.data_ptr(),
        *seated, everything.data_ptr(), logits.data_ptr(), rows, model.hidden, model.ffn, model.n_q, model.n_kv,
        model.d, vocab, model.eps, scale, temperature.data_ptr(), top_k.data_ptr(), top_p.data_ptr(),
        uniforms.data_ptr(), stops.data_ptr(), stops.shape[1], 0 if interrupted is None else interrupted.data_ptr(),
        seconds, steps, logprobs.data_ptr(), done.data_ptr(),
    )  # fmt: skip
    count = int(done)
    return drawn[1 : 1 + count], logprobs[:count]
