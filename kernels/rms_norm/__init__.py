"""RMSNorm with an optional residual add, and its input gradient (the weight is frozen)."""

from __future__ import annotations

import torch

from mint_engine.kernels import args
from mint_engine.kernels.op import Op

_op = Op("rms_norm")


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    face: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``h = x + residual`` (rounded to the dtype); ``y = h * rsqrt(mean(h^2) + eps) * weight``.

    The norm is computed in fp32 from the rounded ``h`` and rounded once (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        x: ``[M, H]`` float32 or bfloat16, any row stride.
        weight: ``[H]`` of the same dtype.
        eps: added to the mean square.
        residual: ``[M, H]`` or None (then ``h`` is ``x`` itself, not a copy).
        y: ``[M, H]`` to write into, or None.
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        ``(y, h)``, both ``[M, H]`` in the dtype of ``x``.

    Bytes moved: ``x``, ``residual`` read, ``h``, ``y`` written: 4 M H elements (2 M H without residual).

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
    """
    m, h = args.matrix("rms_norm", "x", x)
    args.tensor("rms_norm", "weight", weight, (h,), x.dtype)
    if residual is not None:
        args.tensor("rms_norm", "residual", residual, (m, h), x.dtype)
    y = args.writable("rms_norm", "y", y, x, (m, h))
    out: tuple[torch.Tensor, torch.Tensor] = _op.pick(face, x, weight, residual, y).rms_norm(
        x, weight, eps, residual, y
    )
    return out


def rms_norm_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    dresidual: torch.Tensor | None = None,
    face: str | None = None,
) -> torch.Tensor:
    """The gradient of ``rms_norm`` for ``h``: ``dresidual + r * (g - h * r^2 * mean(g * h))``.

    ``g = dy * weight``, ``r = rsqrt(mean(h^2) + eps)``; ``dresidual`` is the gradient that reached ``h`` directly.

    Args:
        dy: ``[M, H]``, any row stride.
        h: ``[M, H]``, the second output of the forward.
        weight: ``[H]``.
        eps: as in the forward.
        dresidual: ``[M, H]`` or None.
        face: run this face or raise.

    Returns:
        ``dh [M, H]`` in the dtype of ``h``, a new tensor, rounded once.

    Bytes moved: ``dy``, ``h``, ``dresidual`` read, ``dh`` written: 4 M H elements.

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
    """
    m, width = args.matrix("rms_norm_backward", "h", h)
    args.tensor("rms_norm_backward", "dy", dy, (m, width), h.dtype)
    args.tensor("rms_norm_backward", "weight", weight, (width,), h.dtype)
    if dresidual is not None:
        args.tensor("rms_norm_backward", "dresidual", dresidual, (m, width), h.dtype)
    out: torch.Tensor = _op.pick(face, h, dy, weight, dresidual).rms_norm_backward(dy, h, weight, eps, dresidual)
    return out
