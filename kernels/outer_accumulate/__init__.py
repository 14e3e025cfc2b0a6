"""The adapter gradients' product: ``out += alpha * a.T @ b`` with fp32 accumulation."""

from __future__ import annotations

import torch

from mint_engine.kernels import args
from mint_engine.kernels.op import Op

_op = Op("outer_accumulate")


def outer_accumulate(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, alpha: float = 1.0, face: str | None = None
) -> torch.Tensor:
    """``out += alpha * a.T @ b``: a sum of M outer products (``dA = dS.T X``, ``dB = dY.T S``).

    Products and sums are fp32, also for bfloat16 inputs, and the result does not depend on the number of threads.

    Args:
        a: ``[M, P]`` float32 or bfloat16, any row stride.
        b: ``[M, Q]`` of the same dtype, any row stride.
        out: ``[P, Q]`` float32 (float64 for float64 inputs), any row stride; added to.
        alpha: scale of the product.
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        ``out``.

    Bytes moved: ``a`` and ``b`` once, ``out`` read and written; one of P, Q is a rank, so the wide operand dominates.

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
    """
    m, p = args.matrix("outer_accumulate", "a", a)
    q = args.matrix("outer_accumulate", "b", b)[1]
    args.tensor("outer_accumulate", "b", b, (m, q), a.dtype)
    args.tensor("outer_accumulate", "out", out, (p, q), args.statistics_dtype(a.dtype))
    _op.pick(face, a, b, out).outer_accumulate(a, b, out, alpha)
    return out
