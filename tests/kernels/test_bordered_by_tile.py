"""Rows of many adapters in one GEMM whose border is looked up per tile of rows."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from check import normal, poisoned, strided, surroundings_untouched, within_budget

from mint_engine.kernels import bordered_by_tile, bordered_by_tile_backward
from mint_engine.kernels.bordered_linear.reference import lora_linear

TILE = 16
K, N, SCALE = 63, 100, 1.5
# (rank, rows) of each adapter, in row order; rank 0 is the base model alone. Tiles end with an adapter.
GROUPS = [
    [(4, 16)],
    [(16, 32), (5, 16), (0, 16), (1, 48)],
    [(0, 16), (70, 16)],
    [(3, 37)],  # the last tile is not full
]


def pad(n: int) -> int:
    """Spans start and end at multiples of 16."""
    return -(-n // 16) * 16


def layout(groups: list[tuple[int, int]], inner: int) -> torch.Tensor:
    """Spans for S (or dS) of every adapter in the same columns, and B (or A) of each after the one before."""
    spans, at = [], pad(inner)
    for rank, rows in groups:
        spans += [(pad(inner), at, pad(rank))] * -(-rows // TILE)
        at += pad(rank)
    return torch.tensor(spans, dtype=torch.int32)


def adapters(groups: list[tuple[int, int]], dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (normal(r, K, seed=i, dtype=dtype, scale=K**-0.5), normal(N, r, seed=9 + i, dtype=dtype, scale=0.3))
        for i, (r, _) in enumerate(groups)
    ]


def border(w: torch.Tensor, factors: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """``[[W, B], [A, NaN]]``, each adapter's part padded with zeros: nothing else is read."""
    ranks = sum(pad(len(a)) for a, _ in factors)
    buf = torch.full((pad(N) + ranks, pad(K) + ranks), float("nan"), dtype=w.dtype)
    buf[:N, :K] = w
    row, column = pad(N), pad(K)
    for a, b in factors:
        seat = pad(len(a))
        buf[:N, column : column + seat] = torch.nn.functional.pad(b, (0, seat - len(a)))
        buf[row : row + seat, :K] = torch.nn.functional.pad(a, (0, 0, 0, seat - len(a)))
        row, column = row + seat, column + seat
    return strided(buf)


def by_adapter(t: torch.Tensor, groups: list[tuple[int, int]]) -> list[torch.Tensor]:
    return list(t.split([rows for _, rows in groups]))


def with_tail(x: torch.Tensor, tails: list[torch.Tensor], groups: list[tuple[int, int]]) -> torch.Tensor:
    """``[x | tail]``: each adapter's tail from the same column on, padded with zeros, NaN after it."""
    start = pad(x.shape[1])
    wide = torch.full((len(x), start + max(pad(r) for r, _ in groups)), float("nan"), dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    for rows, tail in zip(by_adapter(wide, groups), tails, strict=True):
        rows[:, start : start + pad(tail.shape[1])] = 0
        rows[:, start : start + tail.shape[1]] = tail
    return strided(wide)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_is_each_adapter_on_its_rows(face: str, dtype: torch.dtype, groups: list, with_bias: bool) -> None:
    rows = sum(n for _, n in groups)
    x, w = normal(rows, K, seed=1, dtype=dtype), normal(N, K, seed=2, dtype=dtype, scale=K**-0.5)
    bias = normal(N, seed=3, dtype=dtype) if with_bias else None
    factors, spans = adapters(groups, dtype), layout(groups, K)
    tails = [SCALE * part @ a.T for part, (a, _) in zip(by_adapter(x, groups), factors, strict=True)]
    y = bordered_by_tile(
        with_tail(x, tails, groups), border(w, factors)[:N], spans, k=K, tile_rows=TILE, bias=bias, face=face
    )

    def plain(to: torch.dtype) -> torch.Tensor:
        parts = zip(by_adapter(x.to(to), groups), factors, strict=True)
        out = torch.cat([lora_linear(p, w.to(to), a.to(to), b.to(to), SCALE) for p, (a, b) in parts])
        return out if bias is None else out + bias.to(to)

    within_budget("y", y, plain(torch.float64), plain(dtype))


@pytest.mark.parametrize("groups", GROUPS)
def test_backward_is_each_adapters_gradient(face: str, dtype: torch.dtype, groups: list) -> None:
    rows = sum(n for _, n in groups)
    dy, w = normal(rows, N, seed=1, dtype=dtype), normal(N, K, seed=2, dtype=dtype, scale=K**-0.5)
    factors, spans = adapters(groups, dtype), layout(groups, N)
    tails = [SCALE * part @ b for part, (_, b) in zip(by_adapter(dy, groups), factors, strict=True)]
    dx = bordered_by_tile_backward(
        with_tail(dy, tails, groups), border(w, factors)[:, :K], spans, n=N, tile_rows=TILE, face=face
    )

    def plain(to: torch.dtype) -> torch.Tensor:
        parts = zip(by_adapter(dy.to(to), groups), factors, strict=True)
        return torch.cat([p @ w.to(to) + SCALE * (p @ b.to(to)) @ a.to(to) for p, (a, b) in parts])

    within_budget("dx", dx, plain(torch.float64), plain(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [16 * 7, 16 * 6 + 5])
@pytest.mark.parametrize("step", [64, 16])
def test_tiles_that_tma_loads_give_the_same(
    face: str, dtype: torch.dtype, rows: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Persistent, with more tiles of y than programs, or with a loop for the border; forward and backward."""
    if dtype is torch.float16 and face.startswith("cpu"):
        pytest.skip("the C++ has no float16")
    if face == "triton":
        module = import_module("mint_engine.kernels.bordered_by_tile.triton")
        monkeypatch.setattr(module, "matmul", None)  # not the one with pointers
    k, n, seats = (
        128,
        192,
        [(0, 1), (1, 1), (0, 0), (0, 2), (1, 2), (2, 1), (0, 0)],
    )  # where a tile's border is, how wide
    spans = torch.tensor([(k, k + step * at, step * w) for at, w in seats])
    spans_back = torch.tensor([(n, n + step * at, step * w) for at, w in seats])
    x, dy = normal(rows, k + 128, seed=1, dtype=dtype), normal(rows, n + 128, seed=2, dtype=dtype)
    w, bias = normal(n + 192, k + 192, seed=3, dtype=dtype, scale=k**-0.5), normal(n, seed=4, dtype=dtype)
    y, dx = poisoned(rows, n, dtype, pad=8), poisoned(rows, k, dtype, pad=8)
    options = {"tile_rows": TILE, "step": step, "face": face}
    bordered_by_tile(x, w[:n], spans.int(), k=k, bias=bias, out=y, **options)
    bordered_by_tile_backward(dy, w[:, :k], spans_back.int(), n=n, out=dx, **options)
    for got, left, right, table, inner, plus in (
        (y, x, w[:n].T, spans, k, bias),
        (dx, dy, w[:, :k], spans_back, n, torch.zeros(k, dtype=dtype)),
    ):
        assert surroundings_untouched(got)

        def plain(to: torch.dtype, left=left, right=right, table=table, inner=inner, plus=plus) -> torch.Tensor:
            out = left[:, :inner].to(to) @ right[:inner].to(to)
            for i, (c, b, width) in enumerate(table.tolist()):
                rows = slice(i * TILE, (i + 1) * TILE)
                out[rows] += left[rows, c : c + width].to(to) @ right[b : b + width].to(to)
            return out + plus.to(to)

        within_budget("y or dx", got, plain(torch.float64), plain(dtype))


def test_a_tile_of_two_adapters_reads_both_spans(face: str, dtype: torch.dtype) -> None:
    """Rows of a tile may mix adapters if their columns lie side by side, zero in the other's rows."""
    groups = [(3, 10), (5, 22)]
    x, w = normal(32, K, seed=1, dtype=dtype), normal(N, K, seed=2, dtype=dtype, scale=K**-0.5)
    factors = adapters(groups, dtype)
    wide = torch.zeros(32, pad(K) + 32, dtype=dtype)
    wide[:, :K] = x
    wide[:10, pad(K) : pad(K) + 3] = x[:10] @ factors[0][0].T
    wide[10:, pad(K) + 16 : pad(K) + 21] = x[10:] @ factors[1][0].T
    spans = torch.tensor([[pad(K), pad(K), 32], [pad(K) + 16, pad(K) + 16, 16]], dtype=torch.int32)
    y = bordered_by_tile(strided(wide), border(w, factors)[:N], spans, k=K, tile_rows=TILE, face=face)

    def plain(to: torch.dtype) -> torch.Tensor:
        parts = zip(by_adapter(x.to(to), groups), factors, strict=True)
        return torch.cat([lora_linear(p, w.to(to), a.to(to), b.to(to), 1.0) for p, (a, b) in parts])

    within_budget("y", y, plain(torch.float64), plain(dtype))


def test_no_rows_is_no_work(face: str, dtype: torch.dtype) -> None:
    x, spans = torch.empty(0, 8, dtype=dtype), torch.empty(0, 3, dtype=torch.int32)
    assert bordered_by_tile(x, torch.ones(4, 8, dtype=dtype), spans, k=8, tile_rows=16, face=face).shape == (0, 4)


def test_spans_that_do_not_fit_are_named() -> None:
    x, w = torch.zeros(20, 32), torch.zeros(4, 48)
    good = torch.tensor([[16, 16, 16], [16, 32, 16]], dtype=torch.int32)
    bordered_by_tile(x, w, good, k=10, tile_rows=16)
    with pytest.raises(ValueError, match=r"spans: expected torch.int32 \[2, 3\], got torch.int32 \[1, 3\]"):
        bordered_by_tile(x, w, good[:1], k=10, tile_rows=16)
    for bad in ([16, 48, 16], [32, 32, 16], [16, 24, 16], [16, 32, 8], [-16, 16, 16]):
        good[1] = torch.tensor(bad)
        message = f"within 32 and 48 columns, got {bad[0]}, {bad[1]} and a width of {bad[2]} in row 1 .bordered_by_tile"
        with pytest.raises(ValueError, match=f"spans: expected multiples of 16 {message}"):
            bordered_by_tile(x, w, good, k=10, tile_rows=16)
    with pytest.raises(ValueError, match="tile_rows: expected a power of two of at least 16, got 24"):
        bordered_by_tile(x, w, good, k=10, tile_rows=24)
    with pytest.raises(ValueError, match=r"inner columns: expected 0 to 32, got 33"):
        bordered_by_tile(x, w, good, k=33, tile_rows=16)
