"""attention and its gradient."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import pytest
import torch
from check import normal, poisoned, strided, surroundings_untouched, within_budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mint_engine.kernels import attention, attention_backward

# (lengths, n_q, n_kv, head_dim): grouped short sequences, single tokens, empty ones, odd tails, tiles that end inside a
# group, more than one task for a sequence (400 * 3 rows), head dims around and between whole vectors.
LAYOUTS = [
    ([24] * 4, 9, 3, 64),
    ([1, 2, 1, 3], 4, 2, 64),
    ([0, 5, 0, 0, 1, 130, 0], 2, 1, 128),
    ([201], 3, 3, 16),
    ([400], 3, 1, 16),
    ([33, 66], 6, 2, 34),
    ([3, 97], 2, 1, 2),
    ([70], 8, 1, 256),
    ([63, 100], 2, 2, 80),
]


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")


def inputs(
    lengths: list[int], n_q: int, n_kv: int, d: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, do."""
    heads = (n_q, n_kv, n_kv, n_q)
    q, k, v, do = (normal(sum(lengths), n * d, seed=i, dtype=dtype) for i, n in enumerate(heads))
    return q, k, v, do


def plain(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], n_q: int, n_kv: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Masked softmax per head, every step in the dtype of q."""
    out, lse = torch.zeros_like(q), torch.zeros(n_q, len(q), dtype=q.dtype)
    d = q.shape[1] // n_q
    for a, b in pairwise(accumulate(lengths, initial=0)):
        for h in range(n_q):
            own, shared = slice(h * d, (h + 1) * d), slice(h // (n_q // n_kv) * d, (h // (n_q // n_kv) + 1) * d)
            scores = q[a:b, own] @ k[a:b, shared].T * scale
            scores = scores.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), -torch.inf)
            lse[h, a:b] = scores.logsumexp(-1)
            out[a:b, own] = scores.softmax(-1) @ v[a:b, shared]
    return out, lse


def plain_gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], n_q: int, n_kv: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's own formula per head, every step in the dtype of q.

    Not autograd's: its softmax gradient rounds once less, where do . v - do . o cancels.
    """
    o, lse = plain(q, k, v, lengths, n_q, n_kv, scale)
    dq, dk, dv, d = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), q.shape[1] // n_q
    for a, b in pairwise(accumulate(lengths, initial=0)):
        for h in range(n_q):
            own, shared = slice(h * d, (h + 1) * d), slice(h // (n_q // n_kv) * d, (h // (n_q // n_kv) + 1) * d)
            p = (q[a:b, own] @ k[a:b, shared].T * scale - lse[h, a:b, None]).exp().tril()
            delta = (do[a:b, own] * o[a:b, own]).sum(-1, keepdim=True)
            ds = p * (do[a:b, own] @ v[a:b, shared].T - delta) * scale
            dq[a:b, own] = ds @ k[a:b, shared]
            dk[a:b, shared] += ds.T @ q[a:b, own]
            dv[a:b, shared] += p.T @ do[a:b, own]
    return dq, dk, dv


@pytest.mark.parametrize(("lengths", "n_q", "n_kv", "d"), LAYOUTS)
def test_forward_matches_float64(
    face: str, dtype: torch.dtype, lengths: list[int], n_q: int, n_kv: int, d: int
) -> None:
    q, k, v, _ = inputs(lengths, n_q, n_kv, d, dtype)
    out = poisoned(len(q), n_q * d, dtype)
    o, lse = attention(strided(q), strided(k), strided(v), bounds(lengths), n_q, n_kv, d**-0.5, out=out, face=face)
    assert o is out
    assert surroundings_untouched(out)
    exact, exact_lse = plain(q.double(), k.double(), v.double(), lengths, n_q, n_kv, d**-0.5)
    within_budget("o", o, exact, plain(q, k, v, lengths, n_q, n_kv, d**-0.5)[0])
    assert lse.dtype is torch.float32
    in_fp32 = plain(q.float(), k.float(), v.float(), lengths, n_q, n_kv, d**-0.5)[1]
    within_budget("lse", lse, exact_lse, in_fp32)


@pytest.mark.parametrize(("lengths", "n_q", "n_kv", "d"), LAYOUTS)
def test_gradients_match_float64_autograd(
    face: str, dtype: torch.dtype, lengths: list[int], n_q: int, n_kv: int, d: int
) -> None:
    q, k, v, do = inputs(lengths, n_q, n_kv, d, dtype)

    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(plain(*leaves, lengths, n_q, n_kv, d**-0.5)[0], leaves, do.double())
    own = plain_gradients(do, q, k, v, lengths, n_q, n_kv, d**-0.5)
    o, lse = attention(q, k, v, bounds(lengths), n_q, n_kv, d**-0.5, face=face)
    dqkv = poisoned(len(q), (n_q + 2 * n_kv) * d, dtype)
    dq, dk, dv = dqkv.split([n_q * d, n_kv * d, n_kv * d], dim=1)
    got = attention_backward(
        strided(do), strided(q), strided(k), strided(v), strided(o), lse, bounds(lengths), n_q, n_kv, d**-0.5,
        dq=dq, dk=dk, dv=dv, face=face,
    )  # fmt: skip
    assert all(x is y for x, y in zip(got, (dq, dk, dv), strict=True))
    assert surroundings_untouched(dqkv)
    for name, g, e, p in zip(("dq", "dk", "dv"), got, exact, own, strict=True):
        within_budget(name, g, e, p)


def test_a_lone_token_has_no_gradient_through_its_only_weight(face: str, dtype: torch.dtype) -> None:
    # dS = do . v - do . o with o = v: exactly 0, but two sums of d products each, whose fp32 rounding is bounded by
    # d eps/2 sum |do v| (Higham 2002, 3.1).
    q, k, v, do = inputs([1, 1, 1], 4, 2, 64, dtype)
    o, lse = attention(q, k, v, bounds([1, 1, 1]), 4, 2, 0.125, face=face)
    assert torch.equal(o, v.unflatten(1, (2, 64)).repeat_interleave(2, 1).flatten(1))
    dq, dk, dv = attention_backward(do, q, k, v, o, lse, bounds([1, 1, 1]), 4, 2, 0.125, face=face)
    rounding = 64 * 2.0**-23 * (do * o).float().unflatten(1, (4, 64)).abs().sum(-1).max()
    assert dq.float().abs().max() <= 0.125 * rounding * k.float().abs().max()
    assert dk.float().abs().max() <= 2 * 0.125 * rounding * q.float().abs().max()
    within_budget("dv", dv, *(do.to(t).unflatten(1, (2, 2, 64)).sum(2).flatten(1) for t in (torch.float64, dtype)))


def same_bits_alone_and_packed(face: str, dtype: torch.dtype, lengths: list[int], n_kv: int, n_q: int) -> None:
    d = 16
    q, k, v, do = inputs(lengths, n_q, n_kv, d, dtype)

    def run(rows: slice, cu: Tensor) -> tuple[Tensor, ...]:
        x = [t[rows] for t in (q, k, v)]
        o, lse = attention(*x, cu, n_q, n_kv, 0.25, face=face)
        return o, lse.T, *attention_backward(do[rows], *x, o, lse, cu, n_q, n_kv, 0.25, face=face)

    packed = run(slice(None), bounds(lengths))
    for a, b in pairwise(accumulate(lengths, initial=0)):
        for whole, alone in zip(packed, run(slice(a, b), bounds([b - a])), strict=True):
            assert torch.equal(whole[a:b], alone)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    n_kv=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 2, 3]),
)
def test_a_sequence_gives_the_same_bits_alone_and_packed(
    face: str, dtype: torch.dtype, lengths: list[int], n_kv: int, group: int
) -> None:
    if face != "triton":  # the interpreter is slow: it has one batch, below
        same_bits_alone_and_packed(face, dtype, lengths, n_kv, n_kv * group)


def test_several_sequences_give_the_same_bits_alone_and_packed(face: str, dtype: torch.dtype) -> None:
    same_bits_alone_and_packed(face, dtype, [5, 0, 130, 1], 1, 2)


def test_later_tokens_change_nothing_before_them(face: str, dtype: torch.dtype) -> None:
    q, k, v, _ = inputs([120], 3, 1, 64, dtype)
    before, _ = attention(q, k, v, bounds([120]), 3, 1, 0.125, face=face)
    k[70:], v[70:] = 100.0, -100.0
    after, _ = attention(q, k, v, bounds([120]), 3, 1, 0.125, face=face)
    assert torch.equal(before[:70], after[:70])
    assert not torch.equal(before[70:], after[70:])


def test_results_do_not_depend_on_the_number_of_threads(face: str, dtype: torch.dtype) -> None:
    lengths = [400, 7, 60] if face != "triton" else [70, 7]  # the interpreter is slow
    q, k, v, do = inputs(lengths, 6, 2, 16, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            o, lse = attention(q, k, v, bounds(lengths), 6, 2, 0.25, face=face)
            results.append((o, lse, *attention_backward(do, q, k, v, o, lse, bounds(lengths), 6, 2, 0.25, face=face)))
    finally:
        torch.set_num_threads(threads)
    if face == "reference":  # torch.mm itself may split a sum by threads
        for other in results[1:]:
            for x, y in zip(results[0], other, strict=True):
                torch.testing.assert_close(x, y)
        return
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_scores_far_beyond_exp_range_are_a_hard_choice(face: str, dtype: torch.dtype) -> None:
    # Keys along one axis, the query on it: the largest key takes all the weight, forwards and backwards in order.
    k = torch.zeros(100, 16, dtype=dtype)
    k[:, 0] = torch.arange(100) * 64
    q, v = torch.zeros_like(k), normal(100, 16, seed=1, dtype=dtype)
    for sign, winner in ((16.0, torch.arange(100)), (-16.0, torch.zeros(100, dtype=torch.int64))):
        q[:, 0] = sign
        o, lse = attention(q, k, v, bounds([100]), 1, 1, 1.0, face=face)
        assert torch.equal(o, v[winner])
        assert torch.equal(lse[0], sign * k[winner, 0].float())
        for g in attention_backward(torch.ones_like(o), q, k, v, o, lse, bounds([100]), 1, 1, 1.0, face=face):
            assert g.isfinite().all()


def test_a_long_sum_of_small_weights_keeps_its_digits(face: str) -> None:
    """Key 0 scores 0, every other ln 0.3: the sum of 1 + 0.3 i must not be one chain of fp32 additions."""
    n = 8192 if face != "triton" else 1024  # the interpreter is slow
    q, k = torch.zeros(n, 2), torch.zeros(n, 2)
    q[:, 0], k[1:, 0] = 1.0, math.log(0.3)
    _, lse = attention(q, k, torch.zeros(n, 2), bounds([n]), 1, 1, 1.0, face=face)
    exact = torch.log1p(0.3 * torch.arange(n, dtype=torch.float64))
    ulp = 2.0**-21  # of values in [4, 8), where most are
    assert float((lse[0].double() - exact).abs().max()) < 8 * ulp


def test_nan_stays_in_its_sequence(face: str, dtype: torch.dtype) -> None:
    q, k, v, do = inputs([5, 6, 7], 2, 1, 16, dtype)
    q[7] = float("nan")
    o, lse = attention(q, k, v, bounds([5, 6, 7]), 2, 1, 0.25, face=face)
    assert o[7].isnan().all()
    grads = attention_backward(do, q, k, v, o, lse, bounds([5, 6, 7]), 2, 1, 0.25, face=face)
    for x in (o, lse.T, *grads):
        assert x[:5].isfinite().all()
        assert x[11:].isfinite().all()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_a_batch_without_tokens_is_harmless(face: str, dtype: torch.dtype, lengths: list[int]) -> None:
    q, k, v, do = inputs(lengths, 2, 1, 8, dtype)
    o, lse = attention(q, k, v, bounds(lengths), 2, 1, 1.0, face=face)
    assert o.shape == (0, 16)
    assert lse.shape == (2, 0)
    shapes = [g.shape for g in attention_backward(do, q, k, v, o, lse, bounds(lengths), 2, 1, 1.0, face=face)]
    assert shapes == [(0, 16), (0, 8), (0, 8)]


@pytest.mark.parametrize("cu", [[0, 4], [1, 5], [0, 3, 2, 5], [0]])
def test_bounds_that_do_not_cover_the_batch_are_refused(face: str, cu: list[int]) -> None:
    x = torch.zeros(5, 8)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected bounds that rise from 0 to 5 \(attention\)"):
        attention(x, x, x, torch.tensor(cu, dtype=torch.int32, device="cpu"), 1, 1, 1.0, face=face)


def test_arguments_that_do_not_fit_are_named() -> None:
    x, cu = torch.zeros(5, 12), bounds([5])
    with pytest.raises(ValueError, match=r"n_q: expected a multiple of n_kv = 2, got 3 \(attention\)"):
        attention(x, x, x, cu, 3, 2, 1.0)
    with pytest.raises(ValueError, match="q: expected n_q = 4 heads of an even dimension, got 12 columns"):
        attention(x, x, x, cu, 4, 4, 1.0)
    with pytest.raises(ValueError, match=r"k: expected torch.float32 \[5, 4\], got torch.float32 \[5, 12\]"):
        attention(x, x, x, cu, 3, 1, 1.0)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected torch.int32 \[n_seqs \+ 1\] on the CPU"):
        attention(x, x, x, cu.long(), 1, 1, 1.0)
    with pytest.raises(ValueError, match="scale: expected a finite number above 0, got 0"):
        attention(x, x, x, cu, 1, 1, 0)
    o, lse = attention(x, x, x, cu, 1, 1, 1.0)
    with pytest.raises(ValueError, match=r"lse: expected torch.float32 \[1, 5\]"):
        attention_backward(x, x, x, x, o, lse.T, cu, 1, 1, 1.0)


def test_a_face_refuses_what_it_cannot_read(face: str) -> None:
    x = torch.zeros(5, 16, dtype=torch.float64)[:, ::2]
    if face == "reference":
        assert attention(x, x, x, bounds([5]), 1, 1, 1.0, face=face)[0].dtype is torch.float64
        return
    with pytest.raises(ValueError, match=f"attention cannot run on '{face}'"):
        attention(x, x, x, bounds([5]), 1, 1, 1.0, face=face)
    y = x.float().repeat(1, 2)[:, ::2]
    with pytest.raises(ValueError, match="last dimension has stride 2"):
        attention(y, y, y, bounds([5]), 1, 1, 1.0, face=face)
