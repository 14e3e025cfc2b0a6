"""What one bordered linear's adapter needs in the backward: ``dS``, ``dA`` and ``dB``, together (DESIGN.md 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mint_engine.kernels import args
from mint_engine.kernels.op import Op

_op = Op("lora_gradients")


def lora_gradients(
    dy: Tensor,
    s: Tensor,
    b: Sequence[Tensor],
    scale: float,
    *,
    ds: Tensor,
    db: Sequence[Tensor],
    x: Tensor | None = None,
    da: Tensor | None = None,
    face: str | None = None,
) -> None:
    """``dS_j = scale * dY_j @ B_j;  dB_j += dY_jᵀ @ S_j;  dA += dSᵀ @ X`` for the m modules stacked on N.

    ``dY_j`` are the columns of ``dy`` that belong to module j, ``S_j`` and ``dS_j`` the j-th ``r`` columns of ``s`` and
    ``ds``. Sums are fp32; ``ds`` is rounded once, and ``dA`` is the sum over the rounded ``ds``. The result does not
    depend on the number of threads.

    Args:
        dy: ``[M, N]`` float32 or bfloat16, any row stride (so have all matrices here).
        s: ``[M, m r]`` of the same dtype, from the forward: scale is in it already.
        b: m matrices ``[N_j, r]`` of the same dtype; the N_j add up to N.
        scale: of the adapter.
        ds: ``[M, m r]`` to write into: the tail of dy's buffer.
        db: m matrices ``[N_j, r]`` float32 (float64 for float64 inputs), added to.
        x: ``[M, K]``, the linear's input; or None, where it is not known before the ``dX`` that needs ``dS``.
        da: ``[m r, K]`` float32, added to; given if and only if ``x`` is.
        face: run this face ("triton", "cpu", "reference") or raise.

    Bytes moved: ``dy`` and ``x`` once; everything else is narrow. 2 M r (2 N + m K) FLOP.

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
    """
    op = "lora_gradients"
    m, n = args.matrix(op, "dy", dy)
    if not b or len(b) != len(db):
        raise ValueError(f"db: expected one for each of at least one b, got {len(db)} for {len(b)} ({op})")
    wide, r = args.statistics_dtype(dy.dtype), args.matrix(op, "b[0]", b[0])[1]
    for j, (b_j, db_j) in enumerate(zip(b, db, strict=True)):
        rows = args.matrix(op, f"b[{j}]", b_j)[0]
        args.tensor(op, f"b[{j}]", b_j, (rows, r), dy.dtype)
        args.packed(op, f"db[{j}]", db_j, (rows, r), wide)
    if sum(len(b_j) for b_j in b) != n:
        raise ValueError(f"b: expected {n} rows in all, as many as dy has columns, got {[len(t) for t in b]} ({op})")
    args.tensor(op, "s", s, (m, len(b) * r), dy.dtype)
    args.tensor(op, "ds", ds, (m, len(b) * r), dy.dtype)
    if (x is None) != (da is None):
        raise ValueError(f"da: expected x and da both given or both None ({op})")
    if x is not None and da is not None:
        k = args.matrix(op, "x", x)[1]
        args.tensor(op, "x", x, (m, k), dy.dtype)
        args.packed(op, "da", da, (len(b) * r, k), wide)
    _op.pick(face, dy, s, ds, x, *b).lora_gradients(dy, s, b, scale, ds, db, x, da)
