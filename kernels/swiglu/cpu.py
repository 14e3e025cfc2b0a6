"""SwiGLU in C++ (csrc/swiglu.h)."""

from __future__ import annotations

import torch

from mint_engine.kernels.bordered_linear import Shrink
from mint_engine.kernels.op import NATIVE_DTYPES, native
from mint_engine.kernels.op import native_reason as supports  # noqa: F401


def swiglu(gate_up: torch.Tensor, out: torch.Tensor, shrink: Shrink | None) -> None:
    (m, f), code = out.shape, NATIVE_DTYPES[out.dtype]
    both = (gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), out.stride(0))
    if shrink is None:
        native.swiglu(code, *both, m, f)
        return
    a, scale, s = shrink
    native.swiglu_shrink(code, *both, a.data_ptr(), a.stride(0), scale, s.data_ptr(), s.stride(0), m, f, len(a))


def swiglu_backward(da: torch.Tensor, gate_up: torch.Tensor, dgate_up: torch.Tensor, a: torch.Tensor) -> None:
    m, f = a.shape
    native.swiglu_backward(
        NATIVE_DTYPES[a.dtype], da.data_ptr(), da.stride(0), gate_up.data_ptr(), gate_up.stride(0),
        dgate_up.data_ptr(), dgate_up.stride(0), a.data_ptr(), a.stride(0), m, f,
    )  # fmt: skip
