"""Checks of op arguments: the error names the argument, what was expected, what came and the op."""

from __future__ import annotations

import torch


def tensor(op: str, name: str, t: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless ``t`` has exactly this shape and dtype."""
    if t.shape != shape or t.dtype is not dtype:
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {t.dtype} {list(t.shape)} ({op})")


def packed(op: str, name: str, t: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The same, also unless its rows are without gaps: for what a face reads or writes by its address, unasked."""
    tensor(op, name, t, shape, dtype)
    if shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(f"{name}: expected rows without gaps, got strides {list(t.stride())} ({op})")


def matrix(op: str, name: str, t: torch.Tensor) -> tuple[int, int]:
    """(rows, columns) of a 2-D tensor; raise ValueError for any other rank."""
    if t.dim() != 2:
        raise ValueError(f"{name}: expected 2 dimensions, got shape {list(t.shape)} ({op})")
    return t.shape[0], t.shape[1]


def writable(op: str, name: str, t: torch.Tensor | None, like: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """``t`` after a check of shape and dtype, or a new tensor of that shape with ``like``'s dtype and device."""
    if t is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    tensor(op, name, t, shape, like.dtype)
    return t


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and accumulators are fp32; in a float64 reference they are float64."""
    return torch.float64 if dtype is torch.float64 else torch.float32
