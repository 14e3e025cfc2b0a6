"""SwiGLU in plain torch."""

from __future__ import annotations

import torch

from mint_engine.kernels.args import statistics_dtype
from mint_engine.kernels.bordered_linear import Shrink


def swiglu(gate_up: torch.Tensor, out: torch.Tensor, shrink: Shrink | None) -> None:
    gate, up = gate_up.to(statistics_dtype(gate_up.dtype)).chunk(2, dim=-1)
    out.copy_(gate * torch.sigmoid(gate) * up)
    if shrink is not None:
        shrink.s.copy_(shrink.scale * (out.to(gate.dtype) @ shrink.a.to(gate.dtype).T))


def swiglu_backward(da: torch.Tensor, gate_up: torch.Tensor, dgate_up: torch.Tensor, a: torch.Tensor) -> None:
    gate, up = gate_up.to(statistics_dtype(gate_up.dtype)).chunk(2, dim=-1)
    da = da.to(gate.dtype)
    s = torch.sigmoid(gate)
    a.copy_(gate * s * up)
    dgate_up.copy_(torch.cat([da * up * s * (1 + gate * (1 - s)), da * gate * s], dim=-1))
