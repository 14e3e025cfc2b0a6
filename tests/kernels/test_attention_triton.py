"""What only the Triton face of attention has: sequences whose first tokens have no queries, and a table of tiles."""

from __future__ import annotations

import pytest
import torch
from check import TRITON, normal, within_budget
from test_attention import bounds, plain

pytestmark = [
    pytest.mark.skipif(not TRITON, reason="triton is not installed"),
    pytest.mark.usefixtures("for_triton"),
]

# (keys, queries, n_q, n_kv, d): whole sequences beside tails, single queries, none, tails longer than a tile.
LAYOUTS = [([30, 24, 7], [6, 24, 1], 2, 1, 16), ([0, 130, 5, 99], [0, 3, 0, 98], 1, 1, 34), ([300], [170], 2, 2, 16)]


def tails(x: torch.Tensor, keys: list[int], queries: list[int]) -> torch.Tensor:
    """The last rows of each sequence."""
    return torch.cat([part[len(part) - n :] for part, n in zip(x.split(keys), queries, strict=True)])


@pytest.mark.parametrize(("keys", "queries", "n_q", "n_kv", "d"), LAYOUTS)
def test_the_queries_are_the_last_tokens(
    dtype: torch.dtype, keys: list[int], queries: list[int], n_q: int, n_kv: int, d: int
) -> None:
    from mint_engine.kernels.attention.triton import attention

    q, k, v = (normal(sum(keys), n * d, seed=i, dtype=dtype) for i, n in enumerate((n_q, n_kv, n_kv)))
    own = tails(q, keys, queries)
    o, lse = torch.full_like(own, torch.nan), torch.full((n_q, len(own)), torch.nan)
    heads = n_q, n_kv, d**-0.5
    attention(own, k, v, bounds(queries), bounds(keys), *heads, o, lse)
    exact, exact_lse = plain(q.double(), k.double(), v.double(), keys, *heads)
    same, same_lse = plain(q, k, v, keys, *heads)[0], plain(q.float(), k.float(), v.float(), keys, *heads)[1]
    within_budget("o", o, tails(exact, keys, queries), tails(same, keys, queries))
    within_budget("lse", lse.T, tails(exact_lse.T, keys, queries), tails(same_lse.T, keys, queries))


def test_a_row_has_the_same_bits_however_its_sequence_is_cut(dtype: torch.dtype) -> None:
    from mint_engine.kernels.attention.triton import attention

    q, k, v = (normal(250, 16, seed=i, dtype=dtype) for i in range(3))

    def rows(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        o, lse = torch.empty(last - first, 16, dtype=dtype), torch.empty(1, last - first)
        cu = bounds([last - first]), bounds([last])
        attention(q[first:last], k[:last], v[:last], *cu, 1, 1, 0.25, o, lse)
        return o, lse

    whole, lse = rows(0, 250)
    for cut in (1, 63, 129, 249):
        (o1, lse1), (o2, lse2) = rows(0, cut), rows(cut, 250)
        assert torch.equal(torch.cat([o1, o2]), whole)
        assert torch.equal(torch.cat([lse1, lse2], 1), lse)


def test_a_query_without_a_key_is_refused() -> None:
    from mint_engine.kernels.attention.triton import attention

    x, lse = torch.zeros(5, 8), torch.zeros(1, 5)
    with pytest.raises(ValueError, match=r"cu_keys: expected at least 3 keys, got 2 \(attention, sequence 1\)"):
        attention(x, x, x, bounds([2, 3]), bounds([3, 2]), 1, 1, 1.0, x, lse)


def test_tiles_cover_each_row_once_and_the_longest_work_comes_first() -> None:
    from mint_engine.kernels.attention.triton import _table

    cu = bounds([3, 0, 70, 33]).numpy()
    for by_keys in (False, True):
        tiles = torch.from_numpy(_table(cu, cu, 32, by_keys))
        rows = [r for _, end, start, _ in tiles.tolist() for r in range(start, min(start + 32, end))]
        assert sorted(rows) == list(range(106))
        work = tiles[:, 1] - tiles[:, 2] if by_keys else tiles[:, 2] - tiles[:, 0]
        assert (work.diff() <= 0).all()
