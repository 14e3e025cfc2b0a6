"""Causal attention over packed sequences on a GPU: an installed library's (`library.py`), or our own in Triton.

Ours is FlashAttention-2 (arXiv:2307.08691).
A table made on the host gives every tile of rows its sequence, the longest work first; nothing is padded but the last
tile of a sequence, and tiles begin where sequences do, so a sequence has the same bits alone and packed. No atomics.
The kernels are in `triton_kernels.py`.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mint_engine.kernels.attention import library
from mint_engine.kernels.attention.bounds import Bounds
from mint_engine.kernels.attention.triton_kernels import backward_kv, backward_q, forward
from mint_engine.kernels.gpu_plan import Row, Tunable
from mint_engine.kernels.triton_common import INTERPRETED, UPCAST, architecture, power_of_2, triton_reason


def _shared(row: Row, d: int) -> int:
    return 2 * d * (max(row["BM"], row["BN"]) + 2 * row["stages"] * min(row["BM"], row["BN"]))


def _tunable(name: str, **choices: tuple[int, ...]) -> Tunable:
    """The larger of BM (queries) and BN (keys) is the program's own tile; it is a multiple of the other."""
    return Tunable(f"attention.{name}", choices, cases=(64, 128, 256), shared=_shared)


FORWARD = _tunable("forward", BM=(64, 128), BN=(32, 64), warps=(4, 8), stages=(2, 3, 4))
BACKWARD_Q = _tunable("backward_q", BM=(64, 128), BN=(32, 64), warps=(4, 8), stages=(2, 3))
BACKWARD_KV = _tunable("backward_kv", BM=(16, 32, 64), BN=(64, 128), warps=(4, 8), stages=(1, 2, 3))


def supports(*tensors: Tensor | None) -> str | None:
    """Why this face cannot run on these tensors, or None."""
    return triton_reason(*tensors)


TAKES_BOUNDS = True  # sequence bounds that change between replays


def _table(cu: np.ndarray, cu_keys: np.ndarray, rows: int, by_keys: bool) -> np.ndarray:
    """``[tiles, 4]`` int32, most work first: first key, end of the queries, first row, keys - queries.

    A tile of queries works on the keys before it; one of keys (``by_keys``) on the queries after it. A tile of zeros
    is empty.
    """
    spans = [np.arange(a, b, rows, dtype=np.int32) for a, b in pairwise(cu)]
    counts = [len(s) for s in spans]
    start = np.concatenate(spans) if spans else np.empty(0, np.int32)
    first, end, shift = (np.repeat(x, counts) for x in (cu_keys[:-1], cu[1:], cu_keys[1:] - cu[1:]))
    order = np.argsort(start - end if by_keys else first - shift - start, kind="stable")
    return np.stack([first, end, start, shift], axis=1)[order]


@lru_cache(maxsize=64)
def _cached_tiles(queries: bytes, keys: bytes, rows: int, device: torch.device, by_keys: bool) -> Tensor:
    cu, cu_keys = (np.frombuffer(b, dtype=np.int32) for b in (queries, keys))
    return torch.from_numpy(_table(cu, cu_keys, rows, by_keys)).to(device)


def _tiles(op: str, bounds: Tensor | Bounds, cu_keys: Tensor | Bounds, q: Tensor, k: Tensor, rows: int, by_keys: bool
) -> Tensor:  # fmt: skip
    if isinstance(bounds, Bounds):
        return bounds.tiles(rows, by_keys, lambda cu, rows, by_keys: _table(cu, cu, rows, by_keys))
    assert not isinstance(cu_keys, Bounds)
    queries, keys = _bounds(op, "cu_seqlens", bounds, q.shape[0]), _bounds(op, "cu_keys", cu_keys, k.shape[0])
    return _cached_tiles(queries, keys, rows, q.device, by_keys)


def _bounds(op: str, name: str, cumulative: Tensor, rows: int) -> bytes:
    cu = cumulative.numpy()
    if cu[0] != 0 or cu[-1] != rows or (np.diff(cu) < 0).any():
        raise ValueError(f"{name}: expected bounds that rise from 0 to {rows} ({op})")
    return cu.tobytes()


def _meta(tunable: Tunable, d: int, dtype: torch.dtype) -> dict[str, int | bool]:
    width = power_of_2(d, 16)
    if width > tunable.cases[-1]:
        raise ValueError(f"q: expected heads of at most {tunable.cases[-1]}, got {d} (attention in Triton)")
    meta = tunable.meta(architecture(), width)
    if dtype is torch.float32 and not INTERPRETED:  # for tests: twice as wide, and not on the tensor cores
        meta |= {"BM": 32, "BN": 32, "num_warps": 8, "num_stages": 1}
    return {**meta, "D": width, "UPCAST": UPCAST}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | Bounds,
    cu_keys: Tensor | Bounds,
    n_q: int,
    n_kv: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Sequence i's keys are rows ``cu_keys[i]:cu_keys[i+1]`` of k and v; its queries are those of its last tokens."""
    m, d = q.shape[0], q.shape[1] // n_q
    if (use := library.library_for(q, d, cu_seqlens, cu_keys)) is not None:
        library.attention(use, q, k, v, cu_seqlens, n_q, n_kv, scale, out, lse)
        return
    meta = _meta(FORWARD, d, q.dtype)
    tiles = _tiles("attention", cu_seqlens, cu_keys, q, k, meta["BM"], False)
    if isinstance(cu_seqlens, Tensor) and isinstance(cu_keys, Tensor) and cu_keys is not cu_seqlens:
        for i, (n, own) in enumerate(zip(np.diff(cu_seqlens.numpy()), np.diff(cu_keys.numpy()), strict=True)):
            if own < n:
                raise ValueError(f"cu_keys: expected at least {n} keys, got {own} (attention, sequence {i})")
    if len(tiles):
        forward[(len(tiles), n_q)](
            q, q.stride(0), k, k.stride(0), v, v.stride(0), out, out.stride(0), lse, tiles, m, d, n_q // n_kv,
            float(scale), **meta,
        )  # fmt: skip


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | Bounds,
    n_q: int,
    n_kv: int,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    m, d = q.shape[0], q.shape[1] // n_q
    if (use := library.library_for(q, d, cu_seqlens, cu_seqlens, backward=True)) is not None:
        library.attention_backward(use, do, q, k, v, o, lse, cu_seqlens, n_q, n_kv, scale, dq, dk, dv)
        return
    meta = _meta(BACKWARD_Q, d, q.dtype)
    tiles = _tiles("attention_backward", cu_seqlens, cu_seqlens, q, k, meta["BM"], False)
    if not len(tiles):
        return
    delta = torch.empty_like(lse)  # do . o of each row, left by the first kernel for the second
    shared = (q, q.stride(0), k, k.stride(0), v, v.stride(0), do, do.stride(0))
    backward_q[(len(tiles), n_q)](
        *shared, o, o.stride(0), lse, delta, dq, dq.stride(0), tiles, m, d, n_q // n_kv, float(scale), **meta,
    )  # fmt: skip
    meta = _meta(BACKWARD_KV, d, q.dtype)
    tiles = _tiles("attention_backward", cu_seqlens, cu_seqlens, q, k, meta["BN"], True)
    backward_kv[(len(tiles), n_kv)](
        *shared, lse, delta, dk, dk.stride(0), dv, dv.stride(0), tiles, m, d, n_q // n_kv, float(scale), **meta,
    )  # fmt: skip
