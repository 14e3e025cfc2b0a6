"""The decode layer in one call to C++ (csrc/decode_layer.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mint_engine.kernels.op import NATIVE_DTYPES, native, native_reason

if TYPE_CHECKING:
    from mint_engine.kernels.decode_layer import Layer, LayerAdapters

# Beyond these oneDNN's GEMMs are faster than a dot product per row and weight row (README.md); in float32, where the
# sampler is held to the trainer's log-probabilities to 1e-5, the trainer's own GEMMs take over as soon as they may.
MOST_ROWS = {torch.bfloat16: 32, torch.float32: 8}


def supports(x: Tensor, *tensors: Tensor | None) -> str | None:
    reason = native_reason(x, *tensors)
    if reason is None and x.shape[0] > MOST_ROWS[x.dtype]:
        return f"{x.shape[0]} rows (at most {MOST_ROWS[x.dtype]})"
    return reason


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def decode_layer(
    layer: Layer,
    x: Tensor,
    residual: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    n_q: int,
    n_kv: int,
    eps: float,
    scale: float,
    adapters: LayerAdapters | None,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    if residual is not None:
        residual = residual.contiguous()
    out, h = torch.empty_like(x), torch.empty_like(x)
    qkv, o, gate_up, down = layer.qkv, layer.o, layer.gate_up, layer.down
    segments = (0, 0, 0, 0)
    if adapters is not None:
        segments = adapters.segments.data_ptr(), adapters.scales.data_ptr(), len(adapters.scales), adapters.ranks
    native.decode_layer(
        NATIVE_DTYPES[x.dtype], x.data_ptr(), _pointer(residual), h.data_ptr(), out.data_ptr(),
        layer.attention_norm.data_ptr(), layer.mlp_norm.data_ptr(), _pointer(layer.q_norm), _pointer(layer.k_norm),
        qkv.buf.data_ptr(), qkv.buf.stride(0), _pointer(qkv.bias), o.buf.data_ptr(), o.buf.stride(0), _pointer(o.bias),
        gate_up.buf.data_ptr(), gate_up.buf.stride(0), down.buf.data_ptr(), down.buf.stride(0),
        cos.data_ptr(), cos.stride(0), sin.data_ptr(), sin.stride(0), k_pool.data_ptr(), v_pool.data_ptr(),
        k_pool.shape[0], k_pool.shape[1], slots.data_ptr(), block_table.data_ptr(), block_table.stride(0),
        block_table.shape[1], lengths.data_ptr(), *segments, x.shape[0], x.shape[1], down.k, n_q, n_kv, o.k // n_q,
        eps, scale,
    )  # fmt: skip
    return out, h
