"""qk_norm_rope and its gradient."""

from __future__ import annotations

import pytest
import torch
from check import normal, poisoned, strided, surroundings_untouched, within_budget

from mint_engine.kernels import qk_norm_rope, qk_norm_rope_backward, qk_norm_rope_cached

EPS = 1e-6
CASES = [(1, 1, 1, 2), (3, 2, 1, 6), (7, 9, 3, 64), (20, 4, 2, 128), (5, 3, 3, 100)]  # rows, n_q, n_kv, d


def tables(rows: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    # Not on the unit circle: yarn multiplies both by its attention factor.
    angle = normal(rows, d // 2, seed=9, scale=2.0)
    return strided(angle.cos() * 1.2), strided(angle.sin() * 1.2)


def weights(d: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"q_weight": normal(d, seed=3, dtype=dtype), "k_weight": normal(d, seed=4, dtype=dtype)}


def plain(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n_q: int, n_kv: int, norm: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The op in ordinary torch, all in the dtype of ``qkv``."""
    cos, sin = (t.to(qkv.dtype)[:, None] for t in (cos, sin))
    q, k, _ = qkv.unflatten(1, (n_q + 2 * n_kv, -1)).split([n_q, n_kv, n_kv], dim=1)
    out = []
    for x, name in ((q, "q_weight"), (k, "k_weight")):
        if norm:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * norm[name].to(x.dtype)
        x1, x2 = x.chunk(2, dim=-1)
        out.append(torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1))
    return torch.cat(out, dim=1).flatten(1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_norm", [False, True])
def test_forward_matches_float64(
    face: str, dtype: torch.dtype, case: tuple[int, int, int, int], with_norm: bool
) -> None:
    rows, n_q, n_kv, d = case
    qkv = normal(rows, (n_q + 2 * n_kv) * d, seed=1, dtype=dtype)
    cos, sin = tables(rows, d)
    norm = weights(d, dtype) if with_norm else {}
    got = qk_norm_rope(strided(qkv), cos, sin, n_q, n_kv, eps=EPS, face=face, **norm)
    exact = plain(qkv.double(), cos, sin, n_q, n_kv, norm)
    within_budget("qk", got, exact, plain(qkv, cos, sin, n_q, n_kv, norm))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_norm", [False, True])
def test_gradient_matches_float64_autograd(
    face: str, dtype: torch.dtype, case: tuple[int, int, int, int], with_norm: bool
) -> None:
    rows, n_q, n_kv, d = case
    width = (n_q + n_kv) * d
    qkv = normal(rows, width + n_kv * d, seed=1, dtype=dtype)
    dqk = normal(rows, width, seed=2, dtype=dtype)
    cos, sin = tables(rows, d)
    norm = weights(d, dtype) if with_norm else {}

    def gradient(to: torch.dtype) -> torch.Tensor:
        leaf = qkv.to(to, copy=True).requires_grad_()
        plain(leaf, cos, sin, n_q, n_kv, norm).backward(dqk.to(to))
        assert leaf.grad is not None
        return leaf.grad[:, :width]

    dqkv = poisoned(*qkv.shape, dtype)
    got = qk_norm_rope_backward(strided(dqk), strided(qkv), cos, sin, n_q, n_kv, eps=EPS, dqkv=dqkv, face=face, **norm)
    assert got is dqkv
    assert surroundings_untouched(dqkv)
    assert dqkv[:, width:].isnan().all()  # the v columns belong to attention's backward
    within_budget("dqk", dqkv[:, :width], gradient(torch.float64), gradient(dtype))


def test_the_norm_needs_both_weights() -> None:
    table = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="k_weight: expected q_weight and k_weight both given or both None"):
        qk_norm_rope(torch.zeros(2, 12), table, table, 1, 1, q_weight=torch.ones(4))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_norm", [False, True])
def test_cached_is_the_forward_with_k_and_v_in_their_cells(
    face: str, dtype: torch.dtype, case: tuple[int, int, int, int], with_norm: bool
) -> None:
    """Pools are views; a row with a slot below 0 and every other cell are left alone."""
    rows, n_q, n_kv, d = case
    block = 4
    qkv = normal(rows, (n_q + 2 * n_kv) * d, seed=1, dtype=dtype)
    cos, sin = tables(rows, d)
    norm = weights(d, dtype) if with_norm else {}
    qk = qk_norm_rope(strided(qkv), cos, sin, n_q, n_kv, eps=EPS, face=face, **norm)
    pools = torch.full((rows, 2, block, n_kv * d), torch.nan, dtype=dtype)
    k_pool, v_pool = pools[:, 0], pools[:, 1]
    slots = torch.randperm(rows * block, generator=torch.Generator().manual_seed(rows), device="cpu")[:rows]
    slots[rows // 2] = -1
    out = poisoned(rows, n_q * d, dtype)
    arguments = strided(qkv), cos, sin, n_q, n_kv, k_pool, v_pool, slots.to(qkv.device)
    assert qk_norm_rope_cached(*arguments, eps=EPS, out=out, face=face, **norm) is out
    assert surroundings_untouched(out)
    assert torch.equal(out, qk[:, : n_q * d])
    expected = torch.full_like(pools, torch.nan)
    for m, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // block, 0, slot % block] = qk[m, n_q * d :]
            expected[slot // block, 1, slot % block] = qkv[m, (n_q + n_kv) * d :]
    assert torch.equal(pools.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_a_cell_that_is_not_there_is_refused() -> None:
    pool, qkv, table = torch.zeros(2, 4, 8), torch.zeros(2, 24), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"slots: expected less than 8, got 8 \(qk_norm_rope_cached\)"):
        qk_norm_rope_cached(qkv, table, table, 1, 1, pool, pool, torch.tensor([0, 8]))
    with pytest.raises(ValueError, match=r"v_pool: expected torch.float32 \[2, 4, 8\], got torch.float32 \[2, 3, 8\]"):
        qk_norm_rope_cached(qkv, table, table, 1, 1, pool, pool[:, :3], torch.tensor([0, 1]))
