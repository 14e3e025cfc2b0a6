"""The decode step in one call to C++ (csrc/decode_step.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mint_engine.kernels.decode_step.words import Words
from mint_engine.kernels.op import NATIVE_DTYPES, native, native_reason
from mint_engine.kernels.pages import Arena

if TYPE_CHECKING:
    from mint_engine.kernels.decode_step import StepAdapters, StepModel


def supports(weight: Tensor, k_pool: Tensor | None = None, v_pool: Tensor | None = None, *tables: Tensor) -> str | None:
    """Why this face cannot run on these, or None. ``tables``: cos and sin."""
    return native_reason(weight, k_pool, v_pool) or native_reason(*tables)


def decode_step(
    model: StepModel,
    tokens: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    wanted: Tensor,
    scale: float,
    adapters: StepAdapters | None,
) -> Tensor:
    vocab = len(model.embedding)
    logits = torch.empty((len(wanted), vocab), dtype=torch.float32)
    seated = (0, 0, 0, 0, 0)
    if adapters is not None:
        segments, scales = adapters.segments.contiguous(), adapters.scales.contiguous()
        of_wanted = segments.clone()  # those of the rows that reach the head
        of_wanted[:, :2] = torch.searchsorted(wanted, segments[:, :2].contiguous())
        seated = segments.data_ptr(), of_wanted.data_ptr(), scales.data_ptr(), len(scales), words_of(adapters)
    layers, head = model.addresses
    native.decode_step(
        NATIVE_DTYPES[model.norm.dtype], tokens.data_ptr(), model.embedding.data_ptr(), model.embedding.stride(0),
        layers, len(model.layers), head, model.word_columns, cos.data_ptr(), cos.stride(0),
        sin.data_ptr(), sin.stride(0), len(cos), k_pool.data_ptr(), v_pool.data_ptr(), k_pool.shape[1], k_pool.shape[2],
        block_table.data_ptr(), block_table.stride(0), block_table.shape[1], lengths.data_ptr(),
        *seated, wanted.data_ptr(), len(wanted), logits.data_ptr(), len(tokens), model.hidden, model.ffn, model.n_q,
        model.n_kv, model.d, vocab, model.eps, scale,
    )  # fmt: skip
    return logits


def words_of(adapters: StepAdapters) -> int:
    """The address of their words' table; 0 without one."""
    return 0 if adapters.words is None else int(adapters.words.ctypes.data)


def words(weight: Tensor, parts: int, arena: Arena | None) -> Words | None:
    (n, k), code, found = weight.shape, NATIVE_DTYPES[weight.dtype], torch.zeros(2, dtype=torch.int64)
    native.word_panels(code, k, found.data_ptr())
    columns, depth = found.tolist()
    if not columns:
        return None
    rows = n // parts
    size = -(-rows // columns) * columns * depth
    if arena is None:
        all_parts = torch.empty(parts, size, dtype=torch.int32)
    else:
        all_parts = arena.zeros(parts, size, dtype=torch.int32)
    for i, out in enumerate(all_parts):
        part = weight[i * rows : (i + 1) * rows]
        native.weight_words(code, part.data_ptr(), part.stride(0), rows, k, out.data_ptr())
    return Words(columns, tuple(all_parts))
