"""The decode step from the references of its ops: the specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mint_engine.kernels.bordered_linear import reference as bordered
from mint_engine.kernels.paged_attention.reference import paged_attention
from mint_engine.kernels.qk_norm_rope.reference import qk_norm_rope
from mint_engine.kernels.rms_norm.reference import rms_norm
from mint_engine.kernels.swiglu.reference import swiglu
from mint_engine.kernels.target_logprob import reference as target_logprob

if TYPE_CHECKING:
    from mint_engine.kernels.decode_step import Layer, Linear, StepAdapters, StepModel


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
    positions, block = lengths.long() - 1, k_pool.shape[2]
    own = block_table.gather(1, (positions // block)[:, None]).squeeze(1).long()
    slots, cos, sin = own * block + positions % block, cos[positions], sin[positions]
    x, h = model.embedding[tokens], None
    for i, layer in enumerate(model.layers):
        x, h = _layer(model, layer, x, h, cos, sin, k_pool[i], v_pool[i], slots, block_table, lengths, scale, adapters)
    assert h is not None
    out, h = torch.empty_like(x), h + x
    rms_norm(h, model.norm, model.eps, None, out, h, None)
    x, w = _with_tail(model.head, out, adapters, 16)
    return target_logprob.logits(x[wanted], w)


def _layer(
    model: StepModel,
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
    scale: float,
    adapters: StepAdapters | None,
) -> tuple[Tensor, Tensor]:
    m, n_q, n_kv, d, eps = len(x), model.n_q, model.n_kv, model.d, model.eps

    def linear(w: Linear, x: Tensor, group: int) -> Tensor:
        out = torch.empty(m, w.n, dtype=x.dtype)
        return bordered.bordered_linear(*_with_tail(w, x, adapters, group), w.bias, out)

    x1, x2 = torch.empty_like(x), torch.empty_like(x)
    h1, h = x if residual is None else torch.empty_like(x), torch.empty_like(x)
    rms_norm(x, layer.attention_norm, eps, residual, x1, h1, None)
    qkv = linear(layer.qkv, x1, 1)
    qk = torch.empty(m, (n_q + n_kv) * d, dtype=x.dtype)
    qk_norm_rope(qkv, cos, sin, n_q, n_kv, layer.q_norm, layer.k_norm, eps, qk)
    k_pool.view(-1, n_kv * d)[slots] = qk[:, n_q * d :]
    v_pool.view(-1, n_kv * d)[slots] = qkv[:, qk.shape[1] :]
    heads = torch.empty(m, n_q * d, dtype=x.dtype)
    paged_attention(qk[:, : n_q * d], k_pool, v_pool, block_table, lengths, n_q, n_kv, scale, heads)
    rms_norm(linear(layer.o, heads, 2), layer.mlp_norm, eps, h1, x2, h, None)
    gate_up = linear(layer.gate_up, x2, 4)
    a = torch.empty(m, layer.down.k, dtype=x.dtype)
    swiglu(gate_up, a, None)
    return linear(layer.down, a, 8), h


def _with_tail(w: Linear, x: Tensor, adapters: StepAdapters | None, group: int) -> tuple[Tensor, Tensor]:
    """``[x | S]`` and ``[W | B]``, S zero in the columns of other rows' adapters."""
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
    weight = w.buf[: w.n, :used]
    if w.int8 is not None:
        values, scales = w.int8
        weight = torch.cat([(values * scales[:, None].double()).to(x.dtype), weight[:, w.k :]], 1)
    return torch.cat([x, tail], 1)[:, :used], weight
