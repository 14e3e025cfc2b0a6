"""Fused unembedding + log-softmax at the targets, its gradient, and plain fp32 logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mint_engine.kernels import args
from mint_engine.kernels.op import Op
from mint_engine.kernels.target_logprob.border_share import BorderShare, check
from mint_engine.kernels.target_logprob.kept import Kept
from mint_engine.kernels.target_logprob.labels import Labels

__all__ = [
    "BorderShare",
    "Kept",
    "Labels",
    "logits",
    "target_logprob",
    "target_logprob_backward",
    "target_logprob_with_gradient",
]

_op = Op("target_logprob")


def _check(op: str, x: torch.Tensor, weight: torch.Tensor) -> tuple[int, int]:
    m, h = args.matrix(op, "x", x)
    v = args.matrix(op, "weight", weight)[0]
    args.tensor(op, "weight", weight, (v, h), x.dtype)
    return m, v


def _check_targets(op: str, targets: torch.Tensor | Labels, m: int, v: int) -> int:
    if isinstance(targets, Labels):
        if len(targets) != m:
            raise ValueError(f"targets: expected labels for {m} rows, got {len(targets)} ({op})")
        labels = targets.labels[:, None]
        targets, m = labels, len(labels)
    k = args.matrix(op, "targets", targets)[1]
    args.tensor(op, "targets", targets, (m, k), torch.int64)
    if targets.is_cpu and targets.numel():
        low, high = (int(t) for t in targets.aminmax())
        if low < -1 or high >= v:
            raise ValueError(f"targets: expected -1 (skip) to {v - 1}, got {low} to {high} ({op})")
    return k


def _writable(op: str, name: str, t: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of statistics: ``t`` after a check, or a new one."""
    dtype = args.statistics_dtype(like.dtype)
    if t is None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    args.tensor(op, name, t, shape, dtype)
    if not t.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor ({op})")
    return t


def target_logprob(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor | Labels,
    *,
    logprob: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    kept: Kept | None = None,
    face: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``logits = x @ weight.T;  lse = logsumexp(logits, -1);  logprob[m, k] = logits[m, targets[m, k]] - lse[m]``.

    Logits are fp32 sums of exact products, never rounded to bfloat16 and never stored whole: a tile of them stays
    in cache while its maximum and its sum of exponentials are taken.

    Args:
        x: ``[M, H]`` float32 or bfloat16, any row stride (the head adapter's border columns are part of H).
        weight: ``[V, H]`` of the same dtype, any row stride.
        targets: ``[M, K]`` int64; -1 skips (its logprob is 0). Others outside the vocabulary are refused on the CPU;
            on a GPU, which would have to be waited for, their logprob is NaN. Or raw :class:`Labels` (K = 1).
        logprob, lse: float32 like what is returned, contiguous, to write into, or None.
        kept: room to keep some rows' exponentials in, for ``target_logprob_backward``; the CPU's face does so.
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        ``(logprob [M, K], lse [M])``, float32 (float64 for float64 inputs).

    Bytes moved: ``weight`` once, ``x`` once per block of columns (in cache). 2 M V H FLOP.

    Raises:
        ValueError: a shape or dtype does not match, a target is outside [-1, V), or ``face`` cannot run.
    """
    m, v = _check("target_logprob", x, weight)
    k = _check_targets("target_logprob", targets, m, v)
    logprob = _writable("target_logprob", "logprob", logprob, (m, k), x)
    lse = _writable("target_logprob", "lse", lse, (m,), x)
    if kept is not None:
        kept.check("target_logprob", x, v)
    _op.pick(face, x, weight).target_logprob(x, weight, targets, logprob, lse, kept)
    return logprob, lse


def target_logprob_with_gradient(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor | Labels,
    gradient: Callable[[slice, torch.Tensor], torch.Tensor],
    *,
    border: int = 0,
    logprob: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    dx: torch.Tensor | None = None,
    dborder: torch.Tensor | None = None,
    face: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``target_logprob`` and its gradient in one go: on a GPU the logits are computed once, not twice.

    A loss is a function of the log-probabilities (DESIGN.md 2.4): ``gradient(rows, logprob[rows])`` is asked for
    ``d loss / d logprob`` float32 ``[rows, K]`` of some rows (a slice, in order, together all of them) as soon as
    theirs are known. It may launch what it likes and must not wait for the device.

    Args:
        x, weight, targets: as in ``target_logprob``. Pass only rows that may get a gradient.
        gradient: the loss's derivative.
        border: trailing columns of ``weight`` that train (the head adapter's B), 0 for none.
        logprob, lse, dx: what is returned, to write into, or None.
        dborder: ``[V, border]`` float32 to add to, or None (starts from zeros).
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        ``(logprob [M, K], lse [M], dx [M, H] in the dtype of x, dborder [V, border] float32)``.

    Raises:
        ValueError: a shape or dtype does not match, a target is outside [-1, V), or ``face`` cannot run.
    """
    op = "target_logprob_with_gradient"
    m, v = _check(op, x, weight)
    k = _check_targets(op, targets, m, v)
    logprob, lse = _writable(op, "logprob", logprob, (m, k), x), _writable(op, "lse", lse, (m,), x)
    dx, dborder = _gradients(op, x, v, border, dx, dborder)

    def checked(rows: slice, of: torch.Tensor) -> torch.Tensor:
        d = gradient(rows, of)
        args.tensor(op, "gradient's result", d, tuple(of.shape), of.dtype)
        return d

    run = _op.pick(face, x, weight, dx).target_logprob_with_gradient
    run(x, weight, targets, checked, border, logprob, lse, dx, dborder)
    return logprob, lse, dx, dborder


def _gradients(
    op: str, x: torch.Tensor, v: int, border: int, dx: torch.Tensor | None, dborder: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if not 0 <= border <= x.shape[1]:
        raise ValueError(f"border: expected 0 to {x.shape[1]}, got {border} ({op})")
    wide = args.statistics_dtype(x.dtype)
    if dborder is None:
        dborder = torch.zeros((v, border), dtype=wide, device=x.device)
    args.tensor(op, "dborder", dborder, (v, border), wide)
    if not dborder.is_contiguous():
        raise ValueError(f"dborder: expected a contiguous tensor ({op})")
    return args.writable(op, "dx", dx, x, (x.shape[0], x.shape[1])), dborder


def target_logprob_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor | Labels,
    dlogprob: torch.Tensor,
    lse: torch.Tensor,
    *,
    border: int = 0,
    shares: Sequence[BorderShare] | None = None,
    kept: Kept | None = None,
    rows: torch.Tensor | None = None,
    dx: torch.Tensor | None = None,
    dborder: torch.Tensor | None = None,
    face: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of ``target_logprob`` for ``x`` and for the last ``border`` columns of ``weight``.

    ``dlogits[m, v] = sum_k dlogprob[m, k] [v == targets[m, k]] - (sum_k dlogprob[m, k]) exp(logits[m, v] - lse[m])``;
    ``dx = dlogits @ weight``; ``dborder = dlogits.T @ x[:, H - border:]``. Skipped targets count as dlogprob 0.
    Logits are computed again, but for the leading rows that the forward has ``kept``. Pass only rows with a nonzero
    gradient: every row given costs 4 V H FLOP, one that was kept half of it.

    Args:
        x, weight, targets: as in the forward.
        dlogprob: ``[M, K]`` float32.
        lse: ``[M]`` float32, from the forward.
        border: trailing columns of ``weight`` that train (the head adapter's B), 0 for none.
        shares: which columns of the border which rows use, where many adapters share it. x must be 0 in a row's other
            columns. The border's gradient goes to theirs, and ``dborder`` is not made.
        kept: what the forward filled. It is used up.
        rows: with it ``[M]`` int64, ascending, on the CPU: which rows these were of the forward's x.
        dx: ``[M, H]`` to write into, or None.
        dborder: ``[V, border]`` float32 to add to, or None (starts from zeros).
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        ``(dx [M, H] in the dtype of x, dborder [V, border] float32)``; with ``shares`` ``dborder`` is ``[V, 0]``.

    Raises:
        ValueError: a shape or dtype does not match, a target is outside [-1, V), a share does not fit, both ``shares``
            and ``dborder`` are given, or ``face`` cannot run.
    """
    op = "target_logprob_backward"
    m, v = _check(op, x, weight)
    k = _check_targets(op, targets, m, v)
    wide = args.statistics_dtype(x.dtype)
    args.tensor(op, "dlogprob", dlogprob, (m, k), wide)
    args.tensor(op, "lse", lse, (m,), wide)
    if shares is None:
        dx, dborder = _gradients(op, x, v, border, dx, dborder)
        shares = [BorderShare(0, m, 0, dborder)]
    elif dborder is not None:
        raise ValueError(f"dborder: expected None beside shares, got a tensor ({op})")
    else:
        dx, dborder = _gradients(op, x, v, 0, dx, None)
    check(op, shares, x, v, border)
    if kept is not None:
        if rows is None:
            raise ValueError(f"rows: expected the rows of the forward that these are, beside kept, got None ({op})")
        args.tensor(op, "rows", rows, (m,), torch.int64)
    run = _op.pick(face, x, weight, dx).target_logprob_backward
    run(x, weight, targets, dlogprob, lse, border, shares, kept, rows, dx)
    return dx, dborder


def logits(x: torch.Tensor, weight: torch.Tensor, *, face: str | None = None) -> torch.Tensor:
    """``x @ weight.T`` in float32, for sampling and top-k.

    Args:
        x: ``[M, H]`` float32 or bfloat16, any row stride.
        weight: ``[V, H]`` of the same dtype, any row stride.
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        ``[M, V]`` float32 (float64 for float64 inputs): fp32 sums, not rounded to bfloat16.

    Bytes moved: ``weight`` once, which is all of the time while M is small.

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
    """
    _check("logits", x, weight)
    out: torch.Tensor = _op.pick(face, x, weight).logits(x, weight)
    return out
