"""paged_attention."""

from __future__ import annotations

import pytest
import torch
from check import normal, poisoned, strided, surroundings_untouched, within_budget
from torch import Tensor

from mint_engine.kernels import attention, paged_attention

NAN = float("nan")
# (lengths, block, n_q, n_kv, head_dim): one token, lengths around a block, a tile (64) and a chunk (256) of keys.
LAYOUTS = [
    ([1, 16, 17, 40], 16, 9, 3, 64),
    ([64, 65, 255, 256, 257], 16, 4, 2, 64),
    ([600], 32, 3, 1, 128),
    ([7, 0, 11], 5, 6, 2, 34),
    ([33], 1, 2, 2, 2),
    ([70, 3], 16, 8, 1, 256),
    ([90, 31], 8, 7, 1, 80),
]


def cache(
    lengths: list[int], block: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Pools, a block table with -1 tails, and every row's K and V. Cells no row owns are NaN."""
    need = [-(-n // block) for n in lengths]
    order = torch.randperm(sum(need) + 3, generator=torch.Generator().manual_seed(0)).tolist()
    k_pool, v_pool = (torch.full((len(order), block, width), NAN, dtype=dtype) for _ in range(2))
    table = torch.full((len(lengths), max(need) + 2), -1, dtype=torch.int32)
    ks, vs = [], []
    for m, n in enumerate(lengths):
        k, v = normal(n, width, seed=2 * m, dtype=dtype), normal(n, width, seed=2 * m + 1, dtype=dtype)
        for b in range(need[m]):
            cell = order.pop()
            table[m, b] = cell
            part = slice(b * block, min(n, (b + 1) * block))
            k_pool[cell, : part.stop - part.start], v_pool[cell, : part.stop - part.start] = k[part], v[part]
        ks.append(k)
        vs.append(v)
    return k_pool, v_pool, table, ks, vs


def plain(q: Tensor, ks: list[Tensor], vs: list[Tensor], n_q: int, n_kv: int, scale: float) -> Tensor:
    """Softmax attention of each row over its own K and V, every step in the dtype of q."""
    out, d = torch.zeros_like(q), q.shape[1] // n_q
    for m, (k, v) in enumerate(zip(ks, vs, strict=True)):
        for h in range(n_q):
            own, shared = slice(h * d, (h + 1) * d), slice(h // (n_q // n_kv) * d, (h // (n_q // n_kv) + 1) * d)
            out[m, own] = (q[m, own] @ k.to(q.dtype)[:, shared].T * scale).softmax(-1) @ v.to(q.dtype)[:, shared]
    return out


@pytest.mark.parametrize(("lengths", "block", "n_q", "n_kv", "d"), LAYOUTS)
def test_matches_float64_and_reads_nothing_else(
    face: str, dtype: torch.dtype, lengths: list[int], block: int, n_q: int, n_kv: int, d: int
) -> None:
    k_pool, v_pool, table, ks, vs = cache(lengths, block, n_kv * d, dtype)
    q = normal(len(lengths), n_q * d, seed=99, dtype=dtype)
    out = poisoned(len(lengths), n_q * d, dtype)
    got = paged_attention(
        strided(q),
        k_pool,
        v_pool,
        table,
        torch.tensor(lengths, dtype=torch.int32),
        n_q,
        n_kv,
        d**-0.5,
        out=out,
        face=face,
    )
    assert got is out
    assert surroundings_untouched(out)
    exact, own = (plain(q.to(to), ks, vs, n_q, n_kv, d**-0.5) for to in (torch.float64, dtype))
    within_budget("o", out, exact, own)


def test_pools_and_tables_may_be_views(face: str, dtype: torch.dtype) -> None:
    lengths = torch.tensor([20, 33], dtype=torch.int32)
    k_pool, v_pool, table, _, _ = cache(lengths.tolist(), 8, 32, dtype)
    both = torch.stack([k_pool, v_pool], dim=1)  # [n_blocks, 2, block, width]
    wide = torch.cat([table, torch.full_like(table, -7)], dim=1)[:, : table.shape[1]]
    q = normal(2, 64, seed=5, dtype=dtype)
    compact = paged_attention(q, k_pool, v_pool, table, lengths, 4, 2, 0.25, face=face)
    assert torch.equal(paged_attention(q, both[:, 0], both[:, 1], wide, lengths, 4, 2, 0.25, face=face), compact)


def test_a_length_of_zero_gives_zeros(face: str, dtype: torch.dtype) -> None:
    pool = torch.full((2, 4, 8), NAN, dtype=dtype)
    table, lengths = torch.full((1, 3), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    out = paged_attention(normal(1, 16, seed=1, dtype=dtype), pool, pool, table, lengths, 2, 1, 1.0, face=face)
    assert torch.equal(out, torch.zeros(1, 16, dtype=dtype))
    assert paged_attention(out[:0], pool, pool, table[:0], lengths[:0], 2, 1, 1.0, face=face).shape == (0, 16)


def test_a_row_gives_the_same_bits_alone_and_in_a_batch(face: str, dtype: torch.dtype) -> None:
    lengths = torch.tensor([300, 1, 65, 520], dtype=torch.int32)
    k_pool, v_pool, table, _, _ = cache(lengths.tolist(), 16, 64, dtype)
    q = normal(4, 6 * 32, seed=3, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            batch = paged_attention(q, k_pool, v_pool, table, lengths, 6, 2, 0.2, face=face)
            for m in range(4):
                row = slice(m, m + 1)
                alone = paged_attention(q[row], k_pool, v_pool, table[row], lengths[row], 6, 2, 0.2, face=face)
                assert torch.equal(batch[row], alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("d", [32, 34])
def test_rows_with_a_common_beginning_have_the_bits_they_have_alone(dtype: torch.dtype, d: int) -> None:
    """C++ loads a tile once for all rows that share its blocks; they part inside a tile and at its edge."""
    lengths = torch.tensor([230] * 5 + [192, 191, 40, 230] + [300] * 20, dtype=torch.int32)
    k_pool, v_pool, table, _, _ = cache(lengths.tolist(), 16, 2 * d, dtype)
    table[1:7, :12] = table[0, :12]  # two tiles of 96; row 6 has one and a part
    table[10:20, :6] = table[9, :6]
    table[20:, :18] = table[9, :18]
    q = normal(len(lengths), 6 * d, seed=3, dtype=dtype)
    batch = paged_attention(q, k_pool, v_pool, table, lengths, 6, 2, 0.2, face="cpu")
    for m in range(len(lengths)):
        row = slice(m, m + 1)
        alone = paged_attention(q[row], k_pool, v_pool, table[row], lengths[row], 6, 2, 0.2, face="cpu")
        assert torch.equal(batch[row], alone), m


@pytest.mark.parametrize(("n_kv", "d"), [(3, 32), (8, 256), (2, 34)])
def test_samples_of_several_prompts_have_the_bits_they_have_alone(
    face: str, dtype: torch.dtype, n_kv: int, d: int
) -> None:
    """C++ takes all kv heads of a cell with one claim, or as many as fit (8 of 256 do not)."""
    prompts, samples = (9 if face == "cpu" else 3), 3
    lengths = torch.arange(prompts * samples, dtype=torch.int32) * 5 % 13 + 96
    k_pool, v_pool, table, _, _ = cache(lengths.tolist(), 16, n_kv * d, dtype)
    for m in range(len(lengths)):
        table[m, :6] = table[m - m % samples, :6]
    q = normal(len(lengths), 2 * n_kv * d, seed=4, dtype=dtype)
    batch = paged_attention(q, k_pool, v_pool, table, lengths, 2 * n_kv, n_kv, 0.1, face=face)
    for m in range(0, len(lengths), 4):
        row = slice(m, m + 1)
        alone = paged_attention(q[row], k_pool, v_pool, table[row], lengths[row], 2 * n_kv, n_kv, 0.1, face=face)
        assert torch.equal(batch[row], alone), m


@pytest.mark.parametrize(("n", "n_q", "n_kv", "d"), [(90, 6, 2, 32), (300, 9, 3, 64), (97, 4, 1, 34), (193, 2, 2, 128)])
def test_decoding_token_by_token_is_the_packed_forward(
    face: str, dtype: torch.dtype, n: int, n_q: int, n_kv: int, d: int
) -> None:
    """In C++ to the bit: what was sampled is what training sees."""
    if face == "triton" and n > 90:
        pytest.skip("a minute in the interpreter; rows of several splits are above")
    q = normal(n, n_q * d, seed=7, dtype=dtype)
    k_pool, v_pool, table, ks, vs = cache([n], 16, n_kv * d, dtype)
    lengths = torch.arange(1, n + 1, dtype=torch.int32)
    decoded = paged_attention(q, k_pool, v_pool, table.expand(n, -1), lengths, n_q, n_kv, d**-0.5, face=face)
    cu = torch.tensor([0, n], dtype=torch.int32)
    exact, _ = attention(q.double(), ks[0].double(), vs[0].double(), cu, n_q, n_kv, d**-0.5, face="reference")
    packed, _ = attention(q, ks[0], vs[0], cu, n_q, n_kv, d**-0.5, face=face)
    within_budget("o", decoded, exact, packed)
    if face == "cpu":
        assert torch.equal(decoded, packed)


def test_large_scores_are_a_hard_choice(face: str, dtype: torch.dtype) -> None:
    lengths = torch.tensor([300], dtype=torch.int32)
    k_pool, v_pool, table, _, vs = cache([300], 16, 16, dtype)
    k_pool.fill_(0.0)
    q = torch.full((1, 16), 16.0, dtype=dtype)
    for best in (0, 63, 64, 255, 256, 299):
        k_pool.fill_(0.0)
        k_pool[int(table[0, best // 16]), best % 16] = 256.0
        out = paged_attention(q, k_pool, v_pool, table, lengths, 1, 1, 1.0, face=face)
        assert torch.equal(out[0], vs[0][best])


def test_a_needed_block_that_is_missing_is_refused(face: str) -> None:
    """On a GPU nobody waits for lengths and tables: the row is NaN, and its neighbours are not."""
    pool, q = torch.zeros(4, 2, 8), torch.zeros(1, 8)
    for row, length, error in (
        ([3, -1], 3, "block_table: "),
        ([3, 4], 4, "4"),
        ([3, 1], 5, "block_table"),
        ([3, 1], -1, "lengths"),
    ):
        table, lengths = torch.tensor([row], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
        if face == "triton":
            two, one = torch.tensor([row, [3, 1]], dtype=torch.int32), torch.tensor([length, 3], dtype=torch.int32)
            out = paged_attention(q.expand(2, -1), pool, pool, two, one, 1, 1, 1.0, face=face)
            assert out.isnan().all(1).tolist() == [True, False]
            continue
        with pytest.raises(ValueError, match=error):
            paged_attention(q, pool, pool, table, lengths, 1, 1, 1.0, face=face)
    ok = torch.tensor([[3, -1]], dtype=torch.int32)
    assert (
        paged_attention(q, pool, pool, ok, torch.tensor([2], dtype=torch.int32), 1, 1, 1.0, face=face).isfinite().all()
    )


def test_arguments_that_do_not_fit_are_named() -> None:
    pool, q = torch.zeros(4, 2, 8), torch.zeros(3, 16)
    table, lengths = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"v_pool: expected torch.float32 \[4, 2, 8\], got torch.float32 \[4, 1, 8\]"):
        paged_attention(q, pool, pool[:, :1], table, lengths, 2, 1, 1.0)
    with pytest.raises(ValueError, match=r"block_table: expected torch.int32 \[3, 2\], got torch.int64 \[3, 2\]"):
        paged_attention(q, pool, pool, table.long(), lengths, 2, 1, 1.0)
    with pytest.raises(ValueError, match=r"lengths: expected torch.int32 \[3\], got torch.int32 \[2\]"):
        paged_attention(q, pool, pool, table, lengths[:2], 2, 1, 1.0)
    with pytest.raises(ValueError, match="k_pool: expected blocks of at least one token"):
        paged_attention(q, pool[:, :0], pool[:, :0], table, lengths, 2, 1, 1.0)
    with pytest.raises(ValueError, match="n_q: expected a multiple of n_kv = 2, got 3"):
        paged_attention(q, pool, pool, table, lengths, 3, 2, 1.0)


def test_a_table_stored_by_columns_is_the_same_table(face: str) -> None:
    pool = normal(6, 8, seed=1).view(6, 2, 4)
    table = torch.tensor([[3, 1], [5, 0], [2, 4]], dtype=torch.int32)
    lengths = torch.tensor([4, 3, 2], dtype=torch.int32)
    q = normal(3, 4, seed=2)
    expected = paged_attention(q, pool, pool, table, lengths, 1, 1, 1.0, face=face)
    by_columns = table.T.contiguous().T
    assert torch.equal(paged_attention(q, pool, pool, by_columns, lengths, 1, 1, 1.0, face=face), expected)
