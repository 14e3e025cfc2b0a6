"""One decoder layer of the decode step, whole: a few rows, each one token of its own cached sequence.

    h1 = residual + x         x1 = norm(h1)   [q k v] = x1 Wqkv   q, k = rope(qk_norm(q, k));  k, v into the cache
    delta = attention(q) Wo   h = h1 + delta  x2 = norm(h)        out = (silu(gate) * up) Wd,  [gate up] = x2 Wgu

Every W is bordered (``bordered_linear``), with each row's adapter in it. Bytes moved: the weights once, K and V of
every row's context once; nothing else counts. The cpu face takes a few rows only (``cpu.MOST_ROWS``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mint_engine.kernels import args
from mint_engine.kernels.op import Op

__all__ = ["LayerAdapters", "decode_layer", "decode_layer_supported"]

_op = Op("decode_layer")

GROUPS = ("qkv", "o", "gate_up", "down")


class Linear(Protocol):
    """``buf`` ``[[W, B], [A, 0]]`` with W [n, k] of m stacked modules; ``bias`` [n] or None."""

    buf: Tensor
    bias: Tensor | None
    n: int
    k: int
    m: int


class Layer(Protocol):
    """The layer's weights, all of one dtype: norms [H]; ``q_norm``, ``k_norm`` [d] or both None."""

    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None

    @property
    def qkv(self) -> Linear: ...

    @property
    def o(self) -> Linear: ...

    @property
    def gate_up(self) -> Linear: ...

    @property
    def down(self) -> Linear: ...


@dataclass(frozen=True)
class LayerAdapters:
    """Who sits in the border.

    ``segments`` int64 [n, 5], in row order: first row, last row + 1, rank offset, rank, and the groups of GROUPS that
    the adapter trains, as bits. ``scales`` float32 [n]. ``ranks``: of border in use.
    """

    segments: Tensor
    scales: Tensor
    ranks: int


def decode_layer_supported(*tensors: Tensor) -> bool:
    """Whether the cpu face takes these (x first). Where it does not, the ops one by one beat the reference."""
    return _op.cpu.supports(*tensors) is None


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
    *,
    adapters: LayerAdapters | None = None,
    face: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer over M rows.

    Args:
        layer: the weights.
        x: ``[M, H]`` float32 or bfloat16 (the reference takes float64 too): what the previous layer adds to the stream.
        residual: the stream ``[M, H]``, or None: x is the stream.
        cos, sin: ``[M, d/2]`` float32, as in ``qk_norm_rope``.
        k_pool, v_pool: this layer's ``[n_blocks, block, n_kv*d]``, contiguous; the rows' k and v are written to them.
        slots: ``[M]`` int64, the cell (block * block size + offset) of each row's own k and v.
        block_table, lengths: as in ``paged_attention``; a row's own token is the last of its length.
        n_q, n_kv: heads.
        eps: of the norms.
        scale: of the attention scores.
        adapters: None for the base model alone.
        face: run this face ("cpu", "reference") or raise.

    Returns:
        ``(out, h)``, new tensors [M, H]: what this layer adds, and the stream before that.

    Raises:
        ValueError: an argument does not fit, or ``face`` cannot run.
    """
    op = "decode_layer"
    m, width = args.matrix(op, "x", x)
    if residual is not None:
        args.tensor(op, "residual", residual, (m, width), x.dtype)
    for name, norm in (("attention_norm", layer.attention_norm), ("mlp_norm", layer.mlp_norm)):
        args.tensor(op, name, norm, (width,), x.dtype)
    d = layer.o.k // n_q
    table = args.statistics_dtype(x.dtype)
    for name, t in (("cos", cos), ("sin", sin)):
        args.tensor(op, name, t, (m, d // 2), table)
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        if pool.dim() != 3 or not pool.is_contiguous():
            raise ValueError(
                f"{name}: expected [n_blocks, block, {n_kv * d}], contiguous, got {list(pool.shape)} ({op})"
            )
        args.tensor(op, name, pool, (*k_pool.shape[:2], n_kv * d), x.dtype)
    args.tensor(op, "slots", slots, (m,), torch.int64)
    args.tensor(op, "lengths", lengths, (m,), torch.int32)
    args.tensor(op, "block_table", block_table, (m, args.matrix(op, "block_table", block_table)[1]), torch.int32)
    ranks = 0 if adapters is None else adapters.ranks
    sizes = ((n_q + 2 * n_kv) * d, width, 3), (width, n_q * d, 1), (layer.gate_up.n, width, 2), (width, layer.down.k, 1)
    for name, (n, k, modules) in zip(GROUPS, sizes, strict=True):
        w: Linear = getattr(layer, name)
        border = modules * ranks
        if (w.n, w.k, w.m) != (n, k, modules) or w.buf.shape[0] < n + border or w.buf.shape[1] < k + border:
            raise ValueError(
                f"{name}: expected {modules} modules of [{n}, {k}] with {border} of border, got {w.m} of "
                f"[{w.n}, {w.k}] in {list(w.buf.shape)} ({op})"
            )
    run = _op.pick(face, x, residual, k_pool, v_pool, layer.qkv.buf, layer.o.buf, layer.gate_up.buf, layer.down.buf)
    result: tuple[Tensor, Tensor] = run.decode_layer(
        layer, x, residual, cos, sin, k_pool, v_pool, slots, block_table, lengths, n_q, n_kv, eps, scale, adapters
    )
    return result
