"""grouped_linear, grouped_outer: many small products, each on its own rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from check import normal, within_budget
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_engine.kernels import grouped_linear, grouped_outer
from mint_engine.kernels.grouped_linear import LinearTable, Outer, OuterTable, Product

# Of each adapter: rows, rank. The weight's buffer holds a [rank, 70] and b [33, rank] of each, one after the other.
ADAPTERS = [(1, 1), (17, 16), (5, 3), (0, 4), (63, 8), (100, 17)]
K, N = 70, 33


def parts(adapters: list[tuple[int, int]]) -> list[tuple[int, int, int, int, int]]:
    """(first row, rows, rank, offset of a, offset of b) of each."""
    out, row, offset = [], 0, 0
    for rows, rank in adapters:
        out.append((row, rows, rank, offset, offset + rank * K))
        row, offset = row + rows, offset + rank * (K + N)
    return out


def buffer(adapters: list[tuple[int, int]], dtype: torch.dtype) -> torch.Tensor:
    return normal(1, sum(rank * (K + N) for _, rank in adapters), seed=5, dtype=dtype)


def shrink_table(adapters: list[tuple[int, int]], width: int) -> LinearTable:
    """x [M, K + widest rank]: the last columns take scale * x a.T."""
    products = [Product(row, m, 0, K, a, K, 1, K, r, 0.5) for row, m, r, a, _ in parts(adapters)]
    size = buffer(adapters, torch.float32).numel()
    return LinearTable.of(products, sum(m for m, _ in adapters), width, width, size)


def expand_table(adapters: list[tuple[int, int]], width: int) -> LinearTable:
    products = [Product(row, m, K, r, b, r, 1, 0, N) for row, m, r, _, b in parts(adapters)]
    size = buffer(adapters, torch.float32).numel()
    return LinearTable.of(products, sum(m for m, _ in adapters), width, N, size)


def test_each_product_matches_float64(face: str, dtype: torch.dtype) -> None:
    """Shrink into the tail of x itself, then add the expansion to y."""
    rows, width = sum(m for m, _ in ADAPTERS), K + 17
    x, y, weight = (
        normal(rows, width, seed=1, dtype=dtype),
        normal(rows, N, seed=2, dtype=dtype),
        buffer(ADAPTERS, dtype),
    )
    before, y0 = x.clone(), y.clone()
    grouped_linear(x, weight, x, shrink_table(ADAPTERS, width), face=face)
    assert grouped_linear(x, weight, y, expand_table(ADAPTERS, width), add=True, face=face) is y
    for row, m, r, at_a, at_b in parts(ADAPTERS):
        if m == 0:
            continue
        own = slice(row, row + m)
        a = weight[0, at_a : at_a + r * K].view(r, K)
        b = weight[0, at_b : at_b + N * r].view(N, r)
        s = 0.5 * before[own, :K].double() @ a.double().T
        within_budget("s", x[own, K : K + r], s, 0.5 * before[own, :K] @ a.T)
        assert torch.equal(x[own, K + r :], before[own, K + r :]), "columns of wider adapters"
        got = x[own, K : K + r]
        within_budget("y", y[own], y0[own].double() + got.double() @ b.double().T, y0[own] + got @ b.T)
    assert torch.equal(x[:, :K], before[:, :K])


def test_outer_products_match_float64(face: str, dtype: torch.dtype) -> None:
    rows = sum(m for m, _ in ADAPTERS)
    dy, s = normal(rows, N, seed=1, dtype=dtype), normal(rows, 17, seed=2, dtype=dtype)
    outs = [normal(1, 5 + N * r, seed=3 + i)[0] for i, (_, r) in enumerate(ADAPTERS)]
    starts = [out.clone() for out in outs]
    # Each adapter's dB [N, r] lies behind 5 other numbers, and so does its transpose in the second table.
    tall = [Outer(i, row, m, 0, N, 0, r, 5, r) for i, (row, m, r, _, _) in enumerate(parts(ADAPTERS))]
    grouped_outer(dy, s, outs, OuterTable.of(tall, rows, N, 17, len(outs)), face=face)
    wide = [Outer(i, row, m, 0, r, 0, N, 5, N) for i, (row, m, r, _, _) in enumerate(parts(ADAPTERS))]
    swapped = [start.clone() for start in starts]
    grouped_outer(s, dy, swapped, OuterTable.of(wide, rows, 17, N, len(outs)), face=face)
    for (row, m, r, _, _), out, other, start in zip(parts(ADAPTERS), outs, swapped, starts, strict=True):
        own = slice(row, row + m)
        product = dy[own].double().T @ s[own, :r].double()
        plain = dy[own].float().T @ s[own, :r].float()
        within_budget("tall", out[5:].view(N, r), start[5:].view(N, r) + product, start[5:].view(N, r) + plain)
        wanted = start[5:].view(r, N) + product.T
        within_budget("wide", other[5:].view(r, N), wanted, start[5:].view(r, N) + plain.T)
        assert torch.equal(out[:5], start[:5])


@settings(max_examples=20, deadline=None)
@given(
    adapters=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=6),
    which=st.integers(0, 5),
)
def test_a_product_has_the_same_bits_in_any_table(adapters: list[tuple[int, int]], which: int) -> None:
    """Alone or among others, and whatever the others' numbers are: infinite ones included."""
    rows, width = sum(m for m, _ in adapters), K + 20
    x, weight = normal(rows, width, seed=1), buffer(adapters, torch.float32)
    row, m, _, _, _ = parts(adapters)[which % len(adapters)]
    table = expand_table(adapters, width)
    alone = LinearTable.of([table.products[which % len(adapters)]], *table.shape)
    others = x.clone()
    others[:row], others[row + m :] = float("inf"), float("nan")
    results = []
    for given_x, given_table in ((x, table), (x, alone), (others, table)):
        y = torch.ones(rows, N)
        grouped_linear(given_x, weight, y, given_table, add=True)
        results.append(y[row : row + m])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_table_that_reaches_beyond_its_tensors_is_refused() -> None:
    good = Product(0, 4, 0, 8, 0, 8, 1, 0, 3)
    LinearTable.of([good], 4, 8, 3, 24)
    for changed in ({"rows": 5}, {"x_col": 1}, {"out_col": 1}, {"offset": 1}, {"start": -1}):
        with pytest.raises(ValueError, match="products: expected them inside x"):
            LinearTable.of([good._replace(**changed)], 4, 8, 3, 24)
    outer = Outer(0, 0, 4, 0, 8, 0, 3, 0, 3)
    OuterTable.of([outer], 4, 8, 3, 1)
    for changed in ({"which": 1}, {"rows": 5}, {"a_col": 1}, {"b_col": 1}, {"offset": -1}):
        with pytest.raises(ValueError, match="products: expected them inside a"):
            OuterTable.of([outer._replace(**changed)], 4, 8, 3, 1)


def test_tensors_other_than_the_tables_are_refused() -> None:
    table = LinearTable.of([Product(0, 4, 0, 8, 0, 8, 1, 0, 3)], 4, 8, 3, 24)
    x, weight, out = torch.zeros(4, 8), torch.zeros(3, 8), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"x: expected torch.float32 \[4, 8\]"):
        grouped_linear(x[:3], weight, out, table)
    with pytest.raises(ValueError, match=r"out: expected torch.float32 \[4, 3\]"):
        grouped_linear(x, weight, out.bfloat16(), table)
    with pytest.raises(ValueError, match="weight: expected a contiguous buffer of 24"):
        grouped_linear(x, weight.T, out, table)
    outer = OuterTable.of([Outer(0, 0, 4, 0, 8, 0, 3, 0, 3)], 4, 8, 3, 1)
    with pytest.raises(ValueError, match=r"outs: expected 1 of torch.float32"):
        grouped_outer(x, out, [torch.zeros(24, dtype=torch.bfloat16)], outer)
    with pytest.raises(ValueError, match=r"a: expected torch.float32 \[4, 8\]"):
        grouped_outer(out, out, [torch.zeros(24)], outer)


def test_an_empty_table_does_nothing(face: str) -> None:
    out = torch.ones(4, 3)
    grouped_linear(torch.ones(4, 8), torch.ones(24), out, LinearTable.of([], 4, 8, 3, 24), face=face)
    grouped_outer(torch.ones(4, 8), out, [], OuterTable.of([], 4, 8, 3, 0), face=face)
    assert np.array_equal(out.numpy(), np.ones((4, 3)))
