"""The decode layer from the references of its steps: the specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mint_engine.kernels.bordered_linear import reference as bordered
from mint_engine.kernels.paged_attention.reference import paged_attention
from mint_engine.kernels.qk_norm_rope.reference import qk_norm_rope
from mint_engine.kernels.rms_norm.reference import rms_norm
from mint_engine.kernels.swiglu.reference import swiglu

if TYPE_CHECKING:
    from mint_engine.kernels.decode_layer import Layer, LayerAdapters, Linear


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
    m = len(x)
    d = layer.o.k // n_q
    x1, x2 = torch.empty_like(x), torch.empty_like(x)
    h1, h = x if residual is None else torch.empty_like(x), torch.empty_like(x)
    rms_norm(x, layer.attention_norm, eps, residual, x1, h1, None)
    qkv = _linear(layer.qkv, x1, adapters, 1)
    qk = torch.empty(m, (n_q + n_kv) * d, dtype=x.dtype)
    qk_norm_rope(qkv, cos, sin, n_q, n_kv, layer.q_norm, layer.k_norm, eps, qk)
    k_pool.view(-1, n_kv * d)[slots] = qk[:, n_q * d :]
    v_pool.view(-1, n_kv * d)[slots] = qkv[:, qk.shape[1] :]
    heads = torch.empty(m, n_q * d, dtype=x.dtype)
    paged_attention(qk[:, : n_q * d], k_pool, v_pool, block_table, lengths, n_q, n_kv, scale, heads)
    rms_norm(_linear(layer.o, heads, adapters, 2), layer.mlp_norm, eps, h1, x2, h, None)
    gate_up = _linear(layer.gate_up, x2, adapters, 4)
    a = torch.empty(m, layer.down.k, dtype=x.dtype)
    swiglu(gate_up, a, None)
    return _linear(layer.down, a, adapters, 8), h


def _linear(w: Linear, x: Tensor, adapters: LayerAdapters | None, group: int) -> Tensor:
    """``[x | S] @ [W | B]ᵀ``, S zero in the columns of other rows' adapters."""
    tail = torch.zeros(len(x), 0 if adapters is None else w.m * adapters.ranks, dtype=x.dtype)
    if adapters is not None:
        for (start, stop, offset, rank, trained), scale in zip(
            adapters.segments.tolist(), adapters.scales.tolist(), strict=True
        ):
            if trained & group:
                columns = slice(w.m * offset, w.m * (offset + rank))
                a = w.buf[w.n + columns.start : w.n + columns.stop, : w.k]
                tail[start:stop, columns] = (x[start:stop] @ a.T) * scale
    used = w.k + tail.shape[1] if bool(tail.any()) else w.k
    out = torch.empty(len(x), w.n, dtype=x.dtype)
    return bordered.bordered_linear(torch.cat([x, tail], 1)[:, :used], w.buf[: w.n, :used], w.bias, out)
