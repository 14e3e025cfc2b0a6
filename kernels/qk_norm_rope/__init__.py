"""Per-head RMSNorm (optional) and rotary embedding of the query and key heads of a stacked qkv projection."""

from __future__ import annotations

import torch

from mint_engine.kernels import args
from mint_engine.kernels.op import Op

_op = Op("qk_norm_rope")


def _check(
    op: str,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n_q: int,
    n_kv: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
) -> tuple[int, int]:
    m, width = args.matrix(op, "qkv", qkv)
    d, rest = divmod(width, n_q + 2 * n_kv)
    if rest or d % 2:
        raise ValueError(f"qkv: expected (n_q + 2 n_kv) * d = {n_q + 2 * n_kv} * d columns, d even, got {width} ({op})")
    table = args.statistics_dtype(qkv.dtype)
    args.tensor(op, "cos", cos, (m, d // 2), table)
    args.tensor(op, "sin", sin, (m, d // 2), table)
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"k_weight: expected q_weight and k_weight both given or both None ({op})")
    if q_weight is not None and k_weight is not None:
        args.tensor(op, "q_weight", q_weight, (d,), qkv.dtype)
        args.tensor(op, "k_weight", k_weight, (d,), qkv.dtype)
    return m, (n_q + n_kv) * d


def qk_norm_rope(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n_q: int,
    n_kv: int,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    face: str | None = None,
) -> torch.Tensor:
    """For each q and k head ``x``: RMSNorm with a weight if given (Qwen3), then rotate-half RoPE (arXiv:2104.09864).

    ``[x1, x2] = halves of x;  out = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]``, in fp32, rounded once.

    Args:
        qkv: ``[M, (n_q + 2 n_kv) * d]`` float32 or bfloat16, any row stride; heads in the order q, k, v.
        cos, sin: ``[M, d/2]`` float32 (any row stride), already multiplied by yarn's attention factor: their
            squares need not add to 1.
        n_q, n_kv: heads.
        q_weight, k_weight: ``[d]`` in the dtype of ``qkv``, both or neither.
        eps: of the norm.
        out: ``[M, (n_q + n_kv) * d]`` to write into, or None.
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        ``qk [M, (n_q + n_kv) * d]``; v is not touched.

    Bytes moved: 2 M (n_q + n_kv) d elements and cos, sin once.

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
    """
    m, width = _check("qk_norm_rope", qkv, cos, sin, n_q, n_kv, q_weight, k_weight)
    out = args.writable("qk_norm_rope", "out", out, qkv, (m, width))
    _op.pick(face, qkv, cos, sin, q_weight, k_weight, out).qk_norm_rope(
        qkv, cos, sin, n_q, n_kv, q_weight, k_weight, eps, out
    )
    return out


def qk_norm_rope_cached(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n_q: int,
    n_kv: int,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    face: str | None = None,
) -> torch.Tensor:
    """``qk_norm_rope`` of a decode step: q comes back, k and v go into the cells of a paged cache.

    Args:
        qkv, cos, sin, n_q, n_kv, q_weight, k_weight, eps: as in :func:`qk_norm_rope`.
        k_pool, v_pool: ``[n_blocks, block, n_kv * d]``, the dtype of qkv, last dimension contiguous; written to.
        slots: ``[M]`` int64: row m's cell is ``slots[m] // block, slots[m] % block``; below 0 nothing is written (a row
            that only fills up a shape). No two rows have the same. One that is too large is refused on the CPU, and
            writes nothing on a GPU, which nobody waits for.
        out: ``[M, n_q * d]`` to write into, or None.
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        ``q [M, n_q * d]``.

    Raises:
        ValueError: a shape or dtype does not match, a slot is too large, or ``face`` cannot run.
    """
    op = "qk_norm_rope_cached"
    m, width = _check(op, qkv, cos, sin, n_q, n_kv, q_weight, k_weight)
    d = width // (n_q + n_kv)
    if k_pool.dim() != 3:
        raise ValueError(f"k_pool: expected 3 dimensions, got shape {list(k_pool.shape)} ({op})")
    cells = (k_pool.shape[0], k_pool.shape[1], n_kv * d)
    args.tensor(op, "k_pool", k_pool, cells, qkv.dtype)
    args.tensor(op, "v_pool", v_pool, cells, qkv.dtype)
    args.tensor(op, "slots", slots, (m,), torch.int64)
    if slots.is_cpu and m and int(slots.max()) >= cells[0] * cells[1]:
        raise ValueError(f"slots: expected less than {cells[0] * cells[1]}, got {int(slots.max())} ({op})")
    out = args.writable(op, "out", out, qkv, (m, n_q * d))
    _op.pick(face, qkv, cos, sin, q_weight, k_weight, k_pool, v_pool, out).qk_norm_rope_cached(
        qkv, cos, sin, n_q, n_kv, k_pool, v_pool, slots.contiguous(), q_weight, k_weight, eps, out
    )
    return out


def qk_norm_rope_backward(
    dqk: torch.Tensor,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n_q: int,
    n_kv: int,
    *,
    dqkv: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    face: str | None = None,
) -> torch.Tensor:
    """The gradient of ``qk_norm_rope``, written into the first ``(n_q + n_kv) * d`` columns of ``dqkv``.

    The rotation's transpose first (``[g1 cos + g2 sin, g2 cos - g1 sin]``), then the norm's gradient.

    Args:
        dqk: ``[M, (n_q + n_kv) * d]``, any row stride.
        qkv, cos, sin, n_q, n_kv, q_weight, k_weight, eps: as in the forward.
        dqkv: ``[M, (n_q + 2 n_kv) * d]``; its v columns are left alone.
        face: run this face or raise.

    Returns:
        ``dqkv``.

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
    """
    m, width = _check("qk_norm_rope_backward", qkv, cos, sin, n_q, n_kv, q_weight, k_weight)
    args.tensor("qk_norm_rope_backward", "dqk", dqk, (m, width), qkv.dtype)
    args.tensor("qk_norm_rope_backward", "dqkv", dqkv, (m, qkv.shape[1]), qkv.dtype)
    _op.pick(face, qkv, cos, sin, q_weight, k_weight, dqk, dqkv).qk_norm_rope_backward(
        dqk, qkv, cos, sin, n_q, n_kv, q_weight, k_weight, eps, dqkv
    )
    return dqkv
