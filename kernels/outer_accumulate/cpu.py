"""The adapter gradients' product in C++ (csrc/outer_accumulate.h)."""

from __future__ import annotations

import torch

from mint_engine.kernels.op import NATIVE_DTYPES, native, native_reason


def supports(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> str | None:
    """Why this face cannot run on these tensors, or None."""
    return native_reason(a, b) or native_reason(out)


def outer_accumulate(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
    native.outer_accumulate(
        NATIVE_DTYPES[a.dtype], a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0),
        out.data_ptr(), out.stride(0), a.shape[0], a.shape[1], b.shape[1], alpha,
    )  # fmt: skip
