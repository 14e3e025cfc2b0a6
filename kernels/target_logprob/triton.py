"""Fused unembedding + log-softmax in Triton: a GEMM over the vocabulary whose epilogue keeps a few numbers of a row.

Forward: a program owns a tile of logits in fp32 registers and leaves, for each of its rows, the maximum, the sum of
exponentials and the logits of the targets that fall into it; a second kernel merges the tiles of a row.
With a gradient: the epilogue leaves the scaled exponentials too, for a chunk of rows at a time; when the chunk's
log-probabilities are known, one pass turns them into dlogits and makes the border's gradient, and the library makes dx.
Backward alone, of a forward long gone: the same tiles again. The kernels are in `triton_kernels.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mint_engine.kernels.bordered_linear.triton import matmul
from mint_engine.kernels.gpu_plan import Row, Tunable
from mint_engine.kernels.outer_accumulate.triton import outer_accumulate
from mint_engine.kernels.target_logprob import triton_kernels as kernels
from mint_engine.kernels.target_logprob.border_share import BorderShare
from mint_engine.kernels.target_logprob.kept import Kept
from mint_engine.kernels.target_logprob.labels import Labels
from mint_engine.kernels.triton_common import UPCAST, architecture, power_of_2, tma_reason
from mint_engine.kernels.triton_common import triton_reason as supports  # noqa: F401

SCRATCH_BYTES = 1 << 30  # exponentials or dlogits held at once


def _shared(row: Row, _: int) -> int:
    return 2 * row["stages"] * row["BK"] * (row["BM"] + row["BN"])


GEMM = {
    "BM": (64, 128, 256), "BN": (64, 128, 256), "BK": (32, 64, 128), "GROUP": (4, 8, 16, 32), "warps": (4, 8),
    "stages": (2, 3, 4),
}  # fmt: skip
TILE = Tunable("target_logprob.tile", GEMM, shared=_shared)
DLOGITS = Tunable("target_logprob.dlogits", GEMM, shared=_shared)
MERGE = Tunable(
    "target_logprob.merge", {"ROWS": (4, 8, 16, 32), "TILES": (32, 64, 128), "warps": (2, 4, 8), "stages": (1, 2)}
)
REBUILD = Tunable(
    "target_logprob.rebuild", {"BM": (16, 32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3)}, cases=(16, 32, 64, 128)
)


def _matrix(x: Tensor, weight: Tensor, tunable: Tunable, tma: bool = True) -> tuple[tuple[Any, ...], Row]:
    """The first arguments of a kernel of logits, and its constexprs. The grid: `_grid`."""
    arch, row = architecture(), {}
    row = tunable.meta(arch)
    row["BM"] = min(row["BM"], power_of_2(len(x), 16))
    if x.dtype is torch.float32:  # for tests: twice as wide
        row["num_stages"] = 2
        row["BN"] = min(row["BN"], 128)
    use = arch >= 90 and x.dtype is not torch.float32 and tma_reason(x, weight) is None
    meta = {**row, "UPCAST": UPCAST, "TMA": use}
    if not use:
        return (x, x.stride(0), weight, weight.stride(0)), meta
    tiles = [TensorDescriptor.from_tensor(t, [row[b], row["BK"]]) for t, b in ((x, "BM"), (weight, "BN"))]
    return (tiles[0], 0, tiles[1], 0), meta


def _grid(m: int, v: int, meta: Row) -> tuple[int]:
    return (triton.cdiv(m, meta["BM"]) * triton.cdiv(v, meta["BN"]),)


def _where(targets: Tensor | Labels) -> tuple[Any, ...]:
    """What the kernels find a row's targets with."""
    if isinstance(targets, Labels):
        n = len(targets.cu_seqlens) - 1
        return targets.labels, 1, targets.cu_seqlens, n.bit_length(), n, targets.rows, targets.shift
    targets = targets.contiguous()
    return targets, targets.shape[1], None, 0, 0, None, 0


def logits(x: Tensor, weight: Tensor) -> Tensor:
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    return matmul(x, weight.T, out)


def _forward(
    x: Tensor, weight: Tensor, targets: Tensor | Labels, logprob: Tensor, lse: Tensor, kept: Tensor | None
) -> tuple[Tensor, int]:
    """Fill logprob and lse (and ``kept``). Returns each tile's maxima, and how many tokens a tile has."""
    (m, h), v, where = x.shape, weight.shape[0], _where(targets)
    k = where[1]
    matrix, meta = _matrix(x, weight, TILE)
    tiles = triton.cdiv(v, meta["BN"])
    top, total = torch.empty((2, tiles, m), dtype=torch.float32, device=x.device)
    # No tile holds a target outside the vocabulary: its logprob stays NaN.
    picked = torch.full((m, k), float("nan"), dtype=torch.float32, device=x.device)
    stride = 0 if kept is None else kept.stride(0)
    kernels.tile[_grid(m, v, meta)](*matrix, *where, top, total, picked, kept, stride, m, v, h, **meta)
    merged = MERGE.meta(architecture())
    kernels.merge[(triton.cdiv(m, merged["ROWS"]),)](top, total, picked, *where, logprob, lse, m, tiles, **merged)
    return top, meta["BN"]


def target_logprob(
    x: Tensor, weight: Tensor, targets: Tensor | Labels, logprob: Tensor, lse: Tensor, kept: Kept | None
) -> None:
    """Nothing is kept: a GPU's backward follows at once (:func:`target_logprob_with_gradient`)."""
    if len(x) and len(weight):
        _forward(x, weight, targets, logprob, lse, None)


def _scratch(x: Tensor, v: int) -> Tensor:
    """``[rows of a chunk, V]``; its rows begin at multiples of 16 bytes, so that the library loads it fast."""
    chunk = min(len(x), max(1, SCRATCH_BYTES // (x.element_size() * v * 128)) * 128)
    return torch.empty((chunk, -(-v // 8) * 8), dtype=x.dtype, device=x.device)[:, :v]


def target_logprob_with_gradient(
    x: Tensor, weight: Tensor, targets: Tensor | Labels, gradient: Callable[[slice, Tensor], Tensor], border: int,
    logprob: Tensor, lse: Tensor, dx: Tensor, dborder: Tensor,
) -> None:  # fmt: skip
    (m, h), v, arch = x.shape, weight.shape[0], architecture()
    if not (m and v):
        return
    scratch, own = _scratch(x, v), min(border, REBUILD.cases[-1])
    padded = power_of_2(own, 16)
    row = REBUILD.meta(arch, padded)
    for start in range(0, m, len(scratch)):
        rows = slice(start, min(start + len(scratch), m))
        part, kept, mine = x[rows], scratch[: rows.stop - start], targets[rows]
        top, tokens = _forward(part, weight, mine, logprob[rows], lse[rows], kept)
        d = gradient(rows, logprob[rows]).contiguous()
        kernels.rebuild[(triton.cdiv(v, tokens),)](
            kept, kept.stride(0), top, lse[rows], logprob[rows], d, *_where(mine), part[:, h - border :], x.stride(0),
            dborder, dborder.stride(0), len(part), v, own, BN=tokens, P=padded, BORDERED=border > 0,
            UPCAST=UPCAST, **{**row, "BM": min(row["BM"], power_of_2(len(part), 16))},
        )  # fmt: skip
        if border > own:  # more columns than fit beside a tile
            outer_accumulate(kept, part[:, h - border + own :], dborder[:, own:], 1.0)
        torch.mm(kept, weight, out=dx[rows])


def target_logprob_backward(
    x: Tensor, weight: Tensor, targets: Tensor | Labels, dlogprob: Tensor, lse: Tensor, border: int,
    shares: Sequence[BorderShare], kept: Kept | None, rows: Tensor | None, dx: Tensor,
) -> None:  # fmt: skip
    (m, h), v = x.shape, weight.shape[0]
    if not (m and v):
        return
    dlogprob, lse, scratch = dlogprob.contiguous(), lse.contiguous(), _scratch(x, v)
    for start in range(0, m, len(scratch)):
        some = slice(start, min(start + len(scratch), m))
        part, d = x[some], scratch[: some.stop - start]
        matrix, meta = _matrix(part, weight, DLOGITS)
        kernels.dlogits[_grid(len(part), v, meta)](
            *matrix, *_where(targets[some]), dlogprob[some], lse[some], d, d.stride(0), len(part), v, h, **meta
        )
        torch.mm(d, weight, out=dx[some])
        for s in shares:
            first, last = max(s.start, some.start) - start, min(s.stop, some.stop) - start
            if first < last:
                columns = part[first:last, h - border + s.column :][:, : s.grad.shape[1]]
                outer_accumulate(d[first:last], columns, s.grad, 1.0)
