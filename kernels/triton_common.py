"""What the Triton faces share: when they can run, and the device functions they have in common.

Imported by the ``triton.py`` of the ops only, when one is asked for: nothing else in the engine needs Triton.

Interpreter: with ``TRITON_INTERPRET=1`` set before Triton is imported, kernels run as Python on CPU tensors
(DESIGN.md section 5). Its ``tl.dot`` multiplies bfloat16 bit patterns, so kernels take ``UPCAST``, which widens the
operands first; on a GPU it is False and the product runs on the tensor cores.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
UPCAST = INTERPRETED

DEVICES = {"cuda", "cpu"} if INTERPRETED else {"cuda"}  # the offline compiler adds "meta"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton_reason(*tensors: torch.Tensor | None) -> str | None:
    """``None`` if the Triton kernels can take these tensors, else why not. ``None`` tensors are skipped.

    The first tensor gives dtype and device; tensors of another meaning (fp32 statistics, indices) are not passed here.
    """
    first = None
    for t in tensors:
        if t is None:
            continue
        if first is None:
            first = t
            if t.dtype not in DTYPES:
                return f"dtype {t.dtype} (bfloat16, float16 and float32 only)"
            if t.device.type not in DEVICES:
                return f"device {t.device} ({' or '.join(sorted(DEVICES))} only)"
        elif t.dtype is not first.dtype:
            return f"mixed dtypes {first.dtype} and {t.dtype}"
        elif t.device != first.device:
            return f"mixed devices {first.device} and {t.device}"
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            return f"last dimension has stride {t.stride(-1)}, not 1"
    return None


def architecture() -> int:
    """The compute capability whose plans and kernels are used, 90 for a Hopper."""
    return 90 if INTERPRETED else planned_for(int(triton.runtime.driver.active.get_current_target().arch))


def planned_for(capability: int) -> int:
    """12.x (GeForce) has the shared memory and the matrix instructions of 8.x: neither 9.0's tiles nor 10.0's fit."""
    return 80 if capability >= 120 else capability


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; interpreted, few, so that a persistent program has more than one tile to do."""
    return 3 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def tma_reason(*matrices: torch.Tensor) -> str | None:
    """``None`` if TMA can move tiles of these matrices, else why not."""
    for t in matrices:
        if t.data_ptr() % 16 or t.stride(0) * t.element_size() % 16:
            return f"a matrix begins or continues off a multiple of 16 bytes: row stride {t.stride(0)} of {t.dtype}"
    return None


def power_of_2(n: int, least: int = 1) -> int:
    """The next power of two, at least ``least``."""
    return max(least, triton.next_power_of_2(n))


def row_warps(block: int) -> int:
    """Warps for a program of ``block`` elements: eight (16 bytes of bfloat16) a thread, one to sixteen warps."""
    return min(max(block // 256, 1), 16)


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """``acc + a @ b`` with fp32 sums; float32 operands are not cut to TF32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tile_of(tiles_m, tiles_n, GROUP: tl.constexpr):
    """This program's tile (row, column): GROUP rows of tiles pass over the same columns of w while they are in L2."""
    group, inner = tl.program_id(0) // (GROUP * tiles_n), tl.program_id(0) % (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    return group * GROUP + inner % height, inner // height


@triton.jit
def product(
    x, x_row, w, w_row, row, column, m, n, k, tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``x[row] @ w[column].T`` over the first ``tiles`` tiles of k, fp32 ``[BM, BN]``.

    Rows and columns past the end (m, n) read valid ones again: their results must not be used.
    """
    step = tl.arange(0, BK)
    x_tile = x + (row % m).to(tl.int64)[:, None] * x_row
    w_tile = w + (column % n).to(tl.int64)[None, :] * w_row
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(tiles):
        at = i * BK + step
        a = tl.load(x_tile + at[None, :], mask=(at < k)[None, :], other=0.0)
        b = tl.load(w_tile + at[:, None], mask=(at < k)[:, None], other=0.0)
        acc = dot(a, b, acc, UPCAST)
    return acc


@triton.jit
def product_tma(
    x, w, tile_m, tile_n, tiles, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr
):
    """``product`` of two descriptors: what lies past their ends is 0."""
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(tiles):
        acc = dot(x.load([tile_m * BM, i * BK]), w.load([tile_n * BN, i * BK]).T, acc, UPCAST)
    return acc
