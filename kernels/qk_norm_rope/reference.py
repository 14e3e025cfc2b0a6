"""Per-head RMSNorm and RoPE in plain torch."""

from __future__ import annotations

import torch

from mint_engine.kernels.args import statistics_dtype


def _heads(
    x: torch.Tensor, n_q: int, n_kv: int, heads: int, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The q and k heads as ``[M, n_q + n_kv, d]`` in the wide dtype, and their weights ``[n_q + n_kv, d]``."""
    wide = x.unflatten(1, (heads, -1))[:, : n_q + n_kv].to(statistics_dtype(x.dtype))
    if q_weight is None or k_weight is None:
        return wide, None
    weight = torch.cat([q_weight.expand(n_q, -1), k_weight.expand(n_kv, -1)])
    return wide, weight.to(wide.dtype)


def qk_norm_rope(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n_q: int,
    n_kv: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    x, weight = _heads(qkv, n_q, n_kv, n_q + 2 * n_kv, q_weight, k_weight)
    if weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    out.copy_(torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).flatten(1))


def qk_norm_rope_cached(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n_q: int,
    n_kv: int,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    qk = qkv.new_empty(len(qkv), out.shape[1] + k_pool.shape[2])
    qk_norm_rope(qkv, cos, sin, n_q, n_kv, q_weight, k_weight, eps, qk)
    store(qkv, qk, k_pool, v_pool, slots, out)


def store(
    qkv: torch.Tensor, qk: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """q of ``qk`` into ``out``, its k and the v of ``qkv`` into the rows' cells."""
    q, block = out.shape[1], k_pool.shape[1]
    out.copy_(qk[:, :q])
    rows = slots >= 0
    at = slots[rows]
    k_pool[at // block, at % block] = qk[rows, q:]
    v_pool[at // block, at % block] = qkv[rows, qk.shape[1] :]


def qk_norm_rope_backward(
    dqk: torch.Tensor,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n_q: int,
    n_kv: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    dqkv: torch.Tensor,
) -> None:
    x, weight = _heads(qkv, n_q, n_kv, n_q + 2 * n_kv, q_weight, k_weight)
    g1, g2 = dqk.unflatten(1, (n_q + n_kv, -1)).to(x.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    g = torch.cat([g1 * cos + g2 * sin, g2 * cos - g1 * sin], dim=-1)
    if weight is not None:
        g = g * weight
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        g = r * (g - x * (r * r * (g * x).mean(-1, keepdim=True)))
    dqkv[:, : dqk.shape[1]] = g.flatten(1).to(dqkv.dtype)
