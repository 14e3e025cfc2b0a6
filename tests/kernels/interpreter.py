"""Triton's interpreter, made fit for bfloat16 (triton 3.7.1).

- It cuts fp32 to bfloat16 instead of rounding; a GPU rounds to nearest even, and so does this.
- It multiplies bfloat16 bit patterns in ``tl.dot``. That is refused here: kernels must widen the operands (``UPCAST``).
- It multiplies by numpy's library, which on some CPUs (Zen's first) sums a row in an order that depends on where it is
  in the tile. Tests compare bits, so products are summed in float64, where no order shows, and rounded once.
- It remaps the language at every call of a device function, which is most of its time; once a launch is enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _round(data: np.ndarray) -> np.ndarray:
    wide = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
    return wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def _widen(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _remap_once_a_launch() -> None:
    executor, function = interpreter.GridExecutor, interpreter.InterpretedFunction
    launch, remapped = executor.__call__, set()

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        remapped.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = {id(v) for v in self.fn.__globals__.values() if v is tl or v is tl.core}
        if not names <= remapped:
            interpreter._patch_lang(self.fn)
            remapped.update(names)
        return self.rewrite()(*args, **kwargs)

    executor.__call__, function.__call__ = launched, call


def repair() -> None:
    """Apply all of them, once per process."""
    _remap_once_a_launch()
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_round(src.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widen(src.data), tl.float32)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        for operand in (a, b):
            if operand.dtype.scalar == tl.bfloat16:
                raise TypeError("tl.dot: bfloat16 operands are wrong in the interpreter; widen them (UPCAST)")
            if operand.dtype.scalar.is_fp8():  # they lie there as bytes
                raise TypeError("tl.dot: expected operands of 16 or more bits, got fp8; widen them")
        product = np.matmul(a.data, b.data, dtype=np.float64)
        with np.errstate(over="ignore"):  # a GPU says nothing of it either
            return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
