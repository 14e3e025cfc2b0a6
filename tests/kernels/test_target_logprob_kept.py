"""A backward of target_logprob from what its forward kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from check import normal, poisoned, strided, surroundings_untouched, within_budget
from test_target_logprob import inputs, plain_logprob

from mint_engine.kernels import BorderShare, Kept, target_logprob, target_logprob_backward

ROWS = [0, 2, 3, 7, 40, 41, 99, 100, 140, 149]  # with a gradient, of 150
CASE = (150, 160, 900, 2)  # M, H, V, K: several blocks of the vocabulary


def room(rows: list[int], x: torch.Tensor, vocab: int) -> Kept:
    return Kept(torch.tensor(rows, dtype=torch.int64), poisoned(len(rows), vocab, x.dtype))


@pytest.mark.parametrize("kept_rows", [ROWS, list(range(150)), ROWS[:4], [1], []])
@pytest.mark.parametrize("border", [0, 24])
def test_matches_float64_autograd(face: str, dtype: torch.dtype, kept_rows: list[int], border: int) -> None:
    """More rows kept than have a gradient, the same, fewer, none of them."""
    x, weight, targets = inputs(CASE, dtype)
    if border:
        x[:100, 160 - 8 :], x[100:, 160 - 24 : 160 - 8], x[100:, 160 - 5 :] = 0, 0, 0
    targets[7] = 5  # the same target twice
    dlogprob, rows = normal(len(ROWS), 2, seed=4), torch.tensor(ROWS)
    leaf, w = x.double().requires_grad_(), weight.double().requires_grad_()
    plain_logprob(leaf[rows], w, targets[rows]).backward(dlogprob.double())
    assert leaf.grad is not None
    assert w.grad is not None

    kept = room(kept_rows, x, len(weight))
    logprob, lse = target_logprob(strided(x), strided(weight), targets, kept=kept, face=face)
    for a, b in zip((logprob, lse), target_logprob(x, weight, targets, face=face), strict=True):
        assert torch.equal(a, b)  # keeping changes nothing
    assert surroundings_untouched(kept.values)
    dx, before = poisoned(len(ROWS), 160, dtype), normal(len(weight), border, seed=5)
    dborder = before.clone()
    shares = [BorderShare(0, 7, 0, dborder[:, :16]), BorderShare(7, len(ROWS), 16, dborder[:, 16:19])] if border else []
    target_logprob_backward(
        strided(x[rows]), strided(weight), targets[rows], dlogprob, lse[rows], border=border, shares=shares, kept=kept,
        rows=rows, dx=dx, face=face,
    )  # fmt: skip
    assert surroundings_untouched(dx)
    assert surroundings_untouched(kept.values)
    raw = x[rows].float() @ weight.float().T
    d = dlogprob.masked_fill(targets[rows] < 0, 0)
    # Plain torch in the working dtype: exponentials, then dlogits, each rounded once.
    p = torch.exp(raw - raw.amax(1, keepdim=True)).to(dtype).float() * torch.exp(raw.amax(1) - lse[rows])[:, None]
    dlogits = -d.sum(-1, keepdim=True) * p
    for m, k in (targets[rows] >= 0).nonzero().tolist():
        dlogits[m, targets[ROWS[m], k]] += d[m, k]
    dlogits = dlogits.to(dtype)
    within_budget("dx", dx, leaf.grad[rows], dlogits @ weight)
    exact = before.double() + w.grad[:, 160 - border :]
    within_budget("dborder", dborder, exact, before + dlogits.T @ x[rows, 160 - border :])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_do_not_change_a_bit(dtype: torch.dtype, threads: None) -> None:
    x, weight, targets = inputs(CASE, dtype)
    dlogprob, rows, found = normal(150, 2, seed=4), torch.arange(150), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        kept = room(rows.tolist(), x, len(weight))
        _, lse = target_logprob(x, weight, targets, kept=kept)
        found.append(target_logprob_backward(x, weight, targets, dlogprob, lse, border=8, kept=kept, rows=rows))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_token_that_is_nearly_certain_keeps_its_gradient(face: str, dtype: torch.dtype) -> None:
    """1 - p is far below a rounding of p to bfloat16."""
    x, weight = torch.ones(1, 2, dtype=dtype), torch.zeros(64, 2, dtype=dtype)
    weight[3, 0] = 12
    targets, kept = torch.tensor([[3]]), room([0], x, 64)
    _, lse = target_logprob(x, weight, targets, kept=kept, face=face)
    _, dborder = target_logprob_backward(
        x, weight, targets, torch.ones(1, 1), lse, border=1, kept=kept, rows=torch.tensor([0]), face=face
    )
    exact = -torch.expm1(torch.log_softmax(weight[:, 0].double(), 0)[3])  # 3.9e-4
    assert abs(dborder[3, 0].double() / exact - 1) < 1e-2


def test_what_does_not_fit_is_named() -> None:
    x, weight, targets = torch.zeros(4, 2), torch.zeros(5, 2), torch.zeros(4, 1, dtype=torch.int64)
    for rows, values, message in (
        (torch.tensor([0.0]), torch.zeros(1, 5), r"kept.rows: expected torch.int64 \[N\], got torch.float32 \[1\]"),
        (torch.tensor([0, 1]), torch.zeros(1, 5), r"kept.values: expected torch.float32 \[2, 5\] .* got .* \[1, 5\]"),
        (torch.tensor([0]), torch.zeros(5, 1).T[:, ::2], r"kept.values: .* got torch.float32 \[1, 3\]"),
        (torch.tensor([1, 1]), torch.zeros(2, 5), r"kept.rows: expected ascending rows in \[0, 4\), got \[1, 1\]"),
        (torch.tensor([3, 4]), torch.zeros(2, 5), r"kept.rows: expected ascending rows in \[0, 4\), got \[3, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            target_logprob(x, weight, targets, kept=Kept(rows, values))
    kept = Kept(torch.tensor([0]), torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"rows: expected the rows of the forward that these are, beside kept"):
        target_logprob_backward(x, weight, targets, torch.zeros(4, 1), torch.zeros(4), kept=kept)
