"""RMSNorm with an optional residual add, optionally with an adapter's S, and its gradient (the weight is frozen)."""

from __future__ import annotations

import torch

from mint_engine.kernels import args
from mint_engine.kernels.bordered_linear import Shrink, check_shrink
from mint_engine.kernels.op import Op

_op = Op("rms_norm")


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    shrink: Shrink | None = None,
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
        h: ``[M, H]`` to write into, or None. Only with ``residual``.
        shrink: write the S of the adapter of the linear that reads ``y`` (DESIGN.md 2.2), or None.
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        ``(y, h)``, both ``[M, H]`` in the dtype of ``x``.

    Bytes moved: ``x``, ``residual`` read, ``h``, ``y`` written: 4 M H elements (2 M H without residual).

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
    """
    op = "rms_norm"
    m, width = args.matrix(op, "x", x)
    args.tensor(op, "weight", weight, (width,), x.dtype)
    if residual is not None:
        args.tensor(op, "residual", residual, (m, width), x.dtype)
        h = args.writable(op, "h", h, x, (m, width))
    elif h is not None:
        raise ValueError(f"h: expected None without a residual: it is x itself ({op})")
    else:
        h = x
    y = args.writable(op, "y", y, x, (m, width))
    check_shrink(op, shrink, x)
    tensors = (None, None) if shrink is None else (shrink.a, shrink.s)
    _op.pick(face, x, weight, residual, y, h, *tensors).rms_norm(x, weight, eps, residual, y, h, shrink)
    return y, h


def rms_norm_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    dresidual: torch.Tensor | None = None,
    dh: torch.Tensor | None = None,
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
        dh: ``[M, H]`` to write into, or None. It may be ``dresidual`` itself.
        face: run this face or raise.

    Returns:
        ``dh [M, H]`` in the dtype of ``h``, rounded once.

    Bytes moved: ``dy``, ``h``, ``dresidual`` read, ``dh`` written: 4 M H elements.

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
    """
    m, width = args.matrix("rms_norm_backward", "h", h)
    args.tensor("rms_norm_backward", "dy", dy, (m, width), h.dtype)
    args.tensor("rms_norm_backward", "weight", weight, (width,), h.dtype)
    if dresidual is not None:
        args.tensor("rms_norm_backward", "dresidual", dresidual, (m, width), h.dtype)
    dh = args.writable("rms_norm_backward", "dh", dh, h, (m, width))
    _op.pick(face, h, dy, weight, dresidual, dh).rms_norm_backward(dy, h, weight, eps, dresidual, dh)
    return dh
