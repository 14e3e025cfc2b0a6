"""The adapter's gradients in Triton: dY is read once for dS and dB, X once for dA.

A program owns a tile of dY's rows and a part of its columns: it sums dS over the columns in registers and leaves dB of
its rows. What programs leave is scratch, which a second kernel adds up in order: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from mint_engine.kernels.bordered_linear.triton import expand_backward
from mint_engine.kernels.gpu_plan import Row, Tunable
from mint_engine.kernels.outer_accumulate.triton import outer_accumulate
from mint_engine.kernels.triton_common import UPCAST, architecture, dot, power_of_2, processors
from mint_engine.kernels.triton_common import triton_reason as supports  # noqa: F401

MODULES = 3  # q, k and v
WIDEST = 64  # ranks of a module that fit beside the tiles; more go through the kernels of the parts


def _shared(row: Row, rank: int) -> int:
    return 2 * row["stages"] * row["BN"] * (row["BM"] + rank) + 2 * row["BM"] * rank


PASS = Tunable(
    "lora_gradients.pass", {"BM": (64, 128, 256), "BN": (64, 128), "warps": (4, 8), "stages": (2, 3, 4)},
    cases=(16, 32, 64), shared=_shared,
)  # fmt: skip
ADD = Tunable("lora_gradients.add", {"BLOCK": (256, 512, 1024), "warps": (4, 8), "stages": (1,)})


@triton.jit
def _between(j, zero, one, two):
    return tl.where(j == 0, zero, tl.where(j == 1, one, two))


@triton.jit(do_not_specialize=["side1", "side2"])
def _pass(
    dy, dy_row, s, s_row, b, b_row, ds_parts, db_parts, m, n, r, part, n1, n2, side1, side2,
    BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``ds_parts [parts of columns, M, r]`` and ``db_parts [tiles of rows, N, r]``, fp32.

    Modules begin at columns 0, ``n1`` and ``n2`` of dY, with parts 0, ``side1`` and ``side2``; no part has two.
    """
    tile, side = tl.program_id(0), tl.program_id(1)
    j = (side >= side1).to(tl.int32) + (side >= side2).to(tl.int32)
    first = _between(j, 0, n1, n2) + (side - _between(j, 0, side1, side2)) * part
    last = min(first + part, _between(j, n1, n2, n))
    row, rank = tile * BM + tl.arange(0, BM), tl.arange(0, R)
    inside, ranks = row < m, rank < r
    at = row.to(tl.int64)[:, None]
    s_tile = tl.load(s + at * s_row + j * r + rank[None, :], mask=inside[:, None] & ranks[None, :], other=0.0)
    acc = tl.zeros((BM, R), tl.float32)
    for start in range(first, last, BN):
        column = start + tl.arange(0, BN)
        known = column < last
        tile_dy = tl.load(dy + at * dy_row + column[None, :], mask=inside[:, None] & known[None, :], other=0.0)
        where = column.to(tl.int64)[:, None]
        tile_b = tl.load(b + where * b_row + j * r + rank[None, :], mask=known[:, None] & ranks[None, :], other=0.0)
        acc = dot(tile_dy, tile_b, acc, UPCAST)
        db = dot(tl.trans(tile_dy), s_tile, tl.zeros((BN, R), tl.float32), UPCAST)
        place = db_parts + (tile.to(tl.int64) * n + where) * r + rank[None, :]
        tl.store(place, db, mask=known[:, None] & ranks[None, :])
    place = ds_parts + (side.to(tl.int64) * m + at) * r + rank[None, :]
    tl.store(place, acc, mask=inside[:, None] & ranks[None, :])


@triton.jit
def _total(block, parts, count, out, out_row, elements, r, scale, START: tl.constexpr, BLOCK: tl.constexpr):
    """``out [.., r] = scale * sum of parts [count, .., r]`` in order, on top of what is there if START."""
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(count):
        total += tl.load(parts + at, mask=inside, other=0.0)
        parts += elements
    total *= scale
    where = out + at // r * out_row + at % r
    if START:
        total += tl.load(where, mask=inside, other=0.0)
    tl.store(where, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["side1", "side2", "sides"])
def _add(
    ds_parts, side1, side2, sides, ds, ds_row, ds_elements, ds_blocks, modules, db_parts, tiles, db, db_row,
    db_elements, r, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """What programs left, summed: ``ds`` of each module, ``ds_elements`` in ``ds_blocks``; on top of what is there
    ``db`` of all."""
    block = tl.program_id(0)
    if block < ds_blocks * modules:
        j = block // ds_blocks
        first = _between(j, 0, side1, side2)
        _total(
            block % ds_blocks, ds_parts + first.to(tl.int64) * ds_elements, _between(j, side1, side2, sides) - first,
            ds + j * r, ds_row, ds_elements, r, scale, False, BLOCK,
        )  # fmt: skip
    else:
        _total(block - ds_blocks * modules, db_parts, tiles, db, db_row, db_elements, r, 1.0, True, BLOCK)


def _modules(dy: Tensor, s: Tensor, b: Tensor, widths: Sequence[int], scale: float, ds: Tensor, db: Tensor) -> None:
    """Of modules stacked on N, ``widths`` columns of dY each. Module j's B is in columns ``j r`` and on of ``b``, from
    its row of N on, and its dB that many rows of ``db [N, r]``."""
    (m, n), r = dy.shape, db.shape[1]
    meta = PASS.meta(architecture(), power_of_2(r, 16))
    meta["BM"] = min(meta["BM"], power_of_2(m, 16))
    if dy.dtype is torch.float32:  # for tests: twice as wide
        meta["num_stages"], meta["BM"] = 2, min(meta["BM"], 64)
    tiles = triton.cdiv(m, meta["BM"])
    # Parts of columns: enough programs for every multiprocessor, each with more than one step to load ahead.
    parts = max(1, min(4 * processors(dy.device) // tiles, n // (4 * meta["BN"])))
    part = triton.cdiv(triton.cdiv(n, parts), meta["BN"]) * meta["BN"]
    ends = list(accumulate(widths)) + [n] * (MODULES - len(widths))
    sides = list(accumulate([triton.cdiv(width, part) for width in widths]))
    sides += sides[-1:] * (MODULES - len(widths))
    ds_parts = torch.empty((sides[-1], m, r), dtype=torch.float32, device=dy.device)
    db_parts = torch.empty((tiles, n, r), dtype=torch.float32, device=dy.device)
    _pass[(tiles, sides[-1])](
        dy, dy.stride(0), s, s.stride(0), b, b.stride(0), ds_parts, db_parts, m, n, r, part, *ends[:2], *sides[:2],
        R=power_of_2(r, 16), UPCAST=UPCAST, **meta,
    )  # fmt: skip
    meta = ADD.meta(architecture())
    ds_blocks, db_blocks = (triton.cdiv(elements, meta["BLOCK"]) for elements in (m * r, n * r))
    _add[(ds_blocks * len(widths) + db_blocks,)](
        ds_parts, *sides, ds, ds.stride(0), m * r, ds_blocks, len(widths), db_parts, tiles, db, db.stride(0), n * r, r,
        float(scale), **meta,
    )  # fmt: skip


def _one_border(b: Sequence[Tensor], db: Sequence[Tensor]) -> Tensor | None:
    """dB of all modules as one matrix, if their B are the diagonal blocks of one border and their dB one after the
    other in memory, as the decoder's are."""
    r, row = b[0].shape[1], 0
    if len(b) > MODULES or db[0].stride() != (r, 1):
        return None
    for j, (b_j, db_j) in enumerate(zip(b, db, strict=True)):
        if not _follows(b[0], b_j, row * b[0].stride(0) + j * r) or not _follows(db[0], db_j, row * r):
            return None
        row += len(b_j)
    return db[0].as_strided((row, r), (r, 1))


def _follows(first: Tensor, other: Tensor, elements: int) -> bool:
    """Whether ``other`` lies in the same memory, so many elements behind ``first``, with the same strides."""
    same = first.untyped_storage()._cdata == other.untyped_storage()._cdata and first.stride() == other.stride()
    return same and other.storage_offset() == first.storage_offset() + elements


def lora_gradients(
    dy: Tensor,
    s: Tensor,
    b: Sequence[Tensor],
    scale: float,
    ds: Tensor,
    db: Sequence[Tensor],
    x: Tensor | None,
    da: Tensor | None,
) -> None:
    (m, n), r, row = dy.shape, b[0].shape[1], 0
    if not (m and n and r):
        ds.zero_()
    elif r <= WIDEST and (stacked := _one_border(b, db)) is not None:
        _modules(dy, s, b[0], [len(b_j) for b_j in b], scale, ds, stacked)
    else:
        for j, (b_j, db_j) in enumerate(zip(b, db, strict=True)):
            columns = slice(j * r, (j + 1) * r)
            part = dy[:, row : row + len(b_j)], s[:, columns], b_j, ds[:, columns]
            row += len(b_j)
            if not len(b_j):
                part[3].zero_()
            elif r <= WIDEST:
                _modules(*part[:3], [len(b_j)], scale, part[3], db_j)
            else:
                expand_backward(part[0], b_j, scale, part[3])
                outer_accumulate(part[0], part[1], db_j, 1.0)
    if x is not None and da is not None:
        outer_accumulate(ds, x, da, 1.0)
