"""SwiGLU on a stacked gate/up projection, optionally with an adapter's S, and its gradient."""

from __future__ import annotations

import torch

from mint_engine.kernels import args
from mint_engine.kernels.bordered_linear import Shrink, check_shrink
from mint_engine.kernels.op import Op

_op = Op("swiglu")


def _half(op: str, gate_up: torch.Tensor) -> tuple[int, int]:
    m, width = args.matrix(op, "gate_up", gate_up)
    if width % 2:
        raise ValueError(f"gate_up: expected an even number of columns, got {width} ({op})")
    return m, width // 2


def swiglu(
    gate_up: torch.Tensor, *, out: torch.Tensor | None = None, shrink: Shrink | None = None, face: str | None = None
) -> torch.Tensor:
    """``silu(gate) * up`` with ``gate = gate_up[:, :F]``, ``up = gate_up[:, F:]`` (Shazeer 2020, arXiv:2002.05202).

    Args:
        gate_up: ``[M, 2F]`` float32 or bfloat16, any row stride.
        out: ``[M, F]`` to write into, or None.
        shrink: write the S of the adapter of the linear that reads ``out`` (DESIGN.md 2.2), or None.
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        ``a [M, F]``, computed in fp32 and rounded once.

    Bytes moved: 3 M F elements.

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
    """
    m, f = _half("swiglu", gate_up)
    out = args.writable("swiglu", "out", out, gate_up, (m, f))
    check_shrink("swiglu", shrink, out)
    tensors = (None, None) if shrink is None else (shrink.a, shrink.s)
    _op.pick(face, gate_up, out, *tensors).swiglu(gate_up, out, shrink)
    return out


def swiglu_backward(
    da: torch.Tensor,
    gate_up: torch.Tensor,
    *,
    dgate_up: torch.Tensor | None = None,
    a: torch.Tensor | None = None,
    face: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of ``swiglu``, and its output once more (the adapter gradient of the next linear needs it).

    With ``s = sigmoid(gate)``: ``dup = da * gate * s``; ``dgate = da * up * s * (1 + gate * (1 - s))``.

    Args:
        da: ``[M, F]``, any row stride.
        gate_up: ``[M, 2F]``, the input of the forward.
        dgate_up: ``[M, 2F]`` to write into, or None.
        a: ``[M, F]`` to write into, or None.
        face: run this face or raise.

    Returns:
        ``(dgate_up [M, 2F], a [M, F])`` in the dtype of ``gate_up``, rounded once.

    Bytes moved: 6 M F elements.

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
    """
    m, f = _half("swiglu_backward", gate_up)
    args.tensor("swiglu_backward", "da", da, (m, f), gate_up.dtype)
    dgate_up = args.writable("swiglu_backward", "dgate_up", dgate_up, gate_up, (m, 2 * f))
    a = args.writable("swiglu_backward", "a", a, gate_up, (m, f))
    _op.pick(face, gate_up, da, dgate_up, a).swiglu_backward(da, gate_up, dgate_up, a)
    return dgate_up, a
