"""A frozen linear layer and its LoRA adapters as single GEMMs over one bordered buffer.

For a frozen weight ``W [N, K]`` and an adapter ``A [r, K]``, ``B [N, r]``, scale ``s = alpha / r``, one buffer holds
``[[W, B], [A, 0]]`` with ``p`` border rows and columns. Then

    forward    S = s * X Aᵀ,   Y  = [X | S]   @ buf[:N, :K+p]ᵀ
    backward   dS = s * dY B,  dX = [dY | dS] @ buf[:N+p, :K]

are algebraically exact, cost ``p / K`` more FLOPs, move no extra memory and round once. ``S`` lives in the tail
columns of X's own buffer and ``dS`` in dY's. Several adapters take disjoint columns, with zeros in the rows of the
others. All tensors are 2-D with unit stride in the last dimension and any row stride; sums are fp32 inside the GEMM.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mint_engine.kernels import args
from mint_engine.kernels.op import Op

__all__ = ["Shrink", "bordered_linear", "bordered_linear_backward", "expand_backward", "shrink"]

_op = Op("bordered_linear")


class Shrink(NamedTuple):
    """What an op that writes a linear's input ``x [M, K]`` needs to write S too, while x's rows are in cache:
    ``s[M, r] = scale * x @ a[r, K]ᵀ``, from the rounded x, in its dtype.
    """

    a: Tensor
    scale: float
    s: Tensor


def check_shrink(op: str, shrink: Shrink | None, x: Tensor) -> None:
    """Raise ValueError unless ``shrink`` fits ``x``."""
    if shrink is not None:
        r = args.matrix(op, "shrink.a", shrink.a)[0]
        args.tensor(op, "shrink.a", shrink.a, (r, x.shape[1]), x.dtype)
        args.tensor(op, "shrink.s", shrink.s, (x.shape[0], r), x.dtype)


def shrink(x: Tensor, a: Tensor, scale: float, *, out: Tensor, face: str | None = None) -> Tensor:
    """``out[M, r] = scale * x[M, K] @ a[r, K]ᵀ``, in the working dtype.

    Raises ValueError if shapes or dtypes do not fit, or ``face`` cannot run. So do the other functions of this op.
    """
    (m, k), (r, _) = args.matrix("shrink", "x", x), args.matrix("shrink", "a", a)
    args.tensor("shrink", "a", a, (r, k), x.dtype)
    args.tensor("shrink", "out", out, (m, r), x.dtype)
    done: Tensor = _op.pick(face, x, a, out).shrink(x, a, scale, out)
    return done


def bordered_linear(
    x: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None, face: str | None = None
) -> Tensor:
    """``y[M, N] = x[M, K+p] @ weight[N, K+p]ᵀ (+ bias[N])``: base and adapters in one GEMM.

    ``x`` carries S in its last p columns and ``weight`` carries B there. ``out`` takes y. Bytes moved: x, weight and y
    once.
    """
    (m, k), (n, _) = args.matrix("bordered_linear", "x", x), args.matrix("bordered_linear", "weight", weight)
    args.tensor("bordered_linear", "weight", weight, (n, k), x.dtype)
    if bias is not None:
        args.tensor("bordered_linear", "bias", bias, (n,), x.dtype)
    out = args.writable("bordered_linear", "out", out, x, (m, n))
    _op.pick(face, x, weight, bias, out).bordered_linear(x, weight, bias, out)
    return out


def bordered_linear_backward(
    dy: Tensor, weight: Tensor, *, out: Tensor | None = None, face: str | None = None
) -> Tensor:
    """``dx[M, K] = dy[M, N+p] @ weight[N+p, K]``.

    ``dy`` carries dS in its last p columns and ``weight`` A in its last p rows. ``out`` takes dx. Bytes moved: dy,
    weight and dx once.
    """
    op = "bordered_linear_backward"
    (m, n), (_, k) = args.matrix(op, "dy", dy), args.matrix(op, "weight", weight)
    args.tensor(op, "weight", weight, (n, k), dy.dtype)
    out = args.writable(op, "out", out, dy, (m, k))
    _op.pick(face, dy, weight, out).bordered_linear_backward(dy, weight, out)
    return out


def expand_backward(dy: Tensor, b: Tensor, scale: float, *, out: Tensor, face: str | None = None) -> Tensor:
    """``out[M, r] = scale * dy[M, N] @ b[N, r]``: the gradient of S."""
    (m, n), (_, r) = args.matrix("expand_backward", "dy", dy), args.matrix("expand_backward", "b", b)
    args.tensor("expand_backward", "b", b, (n, r), dy.dtype)
    args.tensor("expand_backward", "out", out, (m, r), dy.dtype)
    done: Tensor = _op.pick(face, dy, b, out).expand_backward(dy, b, scale, out)
    return done
