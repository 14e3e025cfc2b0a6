"""Triton's interpreter, made fit for bfloat16 (triton 3.7 to 3.9).

- It cuts fp32 to bfloat16 instead of rounding; a GPU rounds to nearest even, and so does this.
- It multiplies bfloat16 bit patterns in ``tl.dot``. That is refused here: kernels must widen the operands (``UPCAST``).
- It multiplies by numpy's library, which on some CPUs (Zen's first) sums a row in an order that depends on where it is
  in the tile. Tests compare bits, so products are summed in float64, where no order shows, and rounded once.
- It remaps the language at every call of a device function, which is most of its time; once a launch is enough.
- It works out the shape of every value and the numpy type of every constant anew, and whether integers overflow, which
  it tells nobody unless it debugs. The first two are remembered, the last left out: half of the time that remained.
- It calls the outcome of comparing two scalars by their type, and a block made of it has numbers, which 3.9 refuses as
  a mask. A block has what the scalar has.
"""

from __future__ import annotations

import dataclasses
import functools
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


def _remember_shapes() -> None:
    block, value = tl.core.block_type, tl.core.tensor
    init_block, init_value = block.__init__, value.__init__
    shapes: dict[tuple[int, ...], tuple[Any, int]] = {}
    of_values: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def new_block(self: Any, element_ty: tl.dtype, shape: Any) -> None:
        key = tuple(s.value if isinstance(s, tl.constexpr) else s for s in shape)
        if key not in shapes:
            init_block(self, element_ty, shape)
            shapes[key] = self.shape, self.numel
        self.element_ty, self.name = element_ty, f"<{key}, {element_ty}>"
        self.shape, self.numel = shapes[key]

    def new_value(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in of_values:
            init_value(self, handle, type)
            of_values[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_values[key]

    semantic = type(interpreter.interpreter_semantic)
    broadcast = semantic.broadcast_impl_value

    def new_broadcast(self: Any, a: Any, b: Any) -> tuple[Any, Any]:
        same = a.type.is_block() and b.type.is_block() and a.type.shape is b.type.shape
        return (a, b) if same else broadcast(self, a, b)

    block.__init__, value.__init__, semantic.broadcast_impl_value = new_block, new_value, new_broadcast


def _remember_types() -> None:
    of_scalar = functools.cache(interpreter._get_np_dtype)
    pointer = np.dtype(np.uint64)

    def of_type(type: Any) -> np.dtype:
        return pointer if type.scalar.is_ptr() else of_scalar(type.scalar)

    interpreter._get_np_dtype = of_type


def repair() -> None:
    """Apply all of them, once per process."""
    _remap_once_a_launch()
    _remember_shapes()
    _remember_types()
    quiet = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = quiet
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

    def create_splat(self: Any, block: Any, scalar: Any) -> Any:
        data = np.full(block.shape, scalar.data, dtype=scalar.data.dtype)
        return interpreter.TensorHandle(data, scalar.dtype.scalar)

    builder.cast_impl, builder.create_dot, builder.create_splat = cast_impl, create_dot, create_splat
