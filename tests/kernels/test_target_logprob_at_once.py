"""target_logprob with its gradient in one call, and targets as raw labels."""

from __future__ import annotations

import math

import pytest
import torch
from check import normal, poisoned, strided, surroundings_untouched, within_budget
from test_target_logprob import inputs, plain_logprob

from mint_engine.kernels import Labels, target_logprob, target_logprob_backward, target_logprob_with_gradient

CASES = [(1, 5, 3, 1), (9, 33, 63, 3), (63, 100, 2000, 1), (150, 160, 300, 2)]  # M, H, V, K


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("border", [0, 3, 140])  # the last is wider than rebuild takes at once
def test_matches_float64_autograd(
    face: str, dtype: torch.dtype, case: tuple[int, int, int, int], border: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of any sign that looks at the log-probabilities; some rows have no gradient; chunks of 128 rows."""
    if face == "triton":
        from mint_engine.kernels.target_logprob import triton as module

        monkeypatch.setattr(module, "SCRATCH_BYTES", 1)
    x, weight, targets = inputs(case, dtype)
    border = min(border, x.shape[1])
    share = normal(*targets.shape, seed=4)
    share[1::5] = 0
    asked = []

    def gradient(rows: slice, logprob: torch.Tensor) -> torch.Tensor:
        asked.append(rows)
        return share[rows] * torch.exp(0.1 * logprob)

    leaf, w = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = plain_logprob(leaf, w, targets)
    exact.backward(share.double() * torch.exp(0.1 * exact.detach()))
    dx, before = poisoned(*x.shape, dtype), normal(len(weight), border, seed=5)
    logprob, lse, _, dborder = target_logprob_with_gradient(
        strided(x), strided(weight), targets, gradient, border=border, dx=dx, dborder=before.clone(), face=face
    )  # fmt: skip
    assert [r for rows in asked for r in range(rows.start, rows.stop)] == list(range(len(x)))
    assert surroundings_untouched(dx)
    within_budget("logprob", logprob, exact.detach(), plain_logprob(x.float(), weight.float(), targets))
    assert leaf.grad is not None
    assert w.grad is not None
    # Plain torch in the working dtype: exponentials, then dlogits, each rounded once.
    d = share * torch.exp(0.1 * logprob)
    d = d.masked_fill(targets < 0, 0)
    raw = x.float() @ weight.float().T
    p = torch.exp(raw - raw.amax(1, keepdim=True)).to(dtype).float() * torch.exp(raw.amax(1) - lse)[:, None]
    dlogits = -d.sum(-1, keepdim=True) * p
    for m, k in (targets >= 0).nonzero().tolist():
        dlogits[m, targets[m, k]] += d[m, k]
    dlogits = dlogits.to(dtype)
    within_budget("dx", dx, leaf.grad, dlogits @ weight)
    tail = x[:, x.shape[1] - border :]
    within_budget("dborder", dborder, before.double() + w.grad[:, x.shape[1] - border :], before + dlogits.T @ tail)


def test_a_row_without_a_gradient_gets_none_whatever_is_in_it(face: str, dtype: torch.dtype) -> None:
    x, weight, targets = inputs((20, 40, 300, 1), dtype)
    share = normal(20, 1, seed=4)
    share[3], share[5] = 0, float("nan")
    weight[:, 0] = -200  # lse of a row far below 0, and one row of nothing but -inf
    x[:, 0], x[3, 0] = 0, 1
    *_, dx, dborder = target_logprob_with_gradient(x, weight, targets, lambda rows, _: share[rows], border=8, face=face)
    assert (dx[3] == 0).all()
    assert dx[5].isnan().all()  # a gradient that is not a number must not be lost
    assert dborder.isnan().any()
    assert dx[[i for i in range(20) if i != 5]].isfinite().all()


def test_a_chunk_of_impossible_tokens_has_no_gradient(face: str) -> None:
    x, weight = torch.full((2, 3), 10.0), torch.zeros(500, 3)
    weight[:400, 0] = -1e38  # times 10 is -inf
    targets = torch.tensor([[450], [460]])
    seen = {}

    def gradient(rows: slice, logprob: torch.Tensor) -> torch.Tensor:
        seen["logprob"] = logprob
        return torch.ones_like(logprob)

    *_, dborder = target_logprob_with_gradient(x, weight, targets, gradient, border=1, face=face)
    torch.testing.assert_close(seen["logprob"], torch.full((2, 1), -math.log(100.0)))
    assert (dborder[:400] == 0).all()
    torch.testing.assert_close(dborder[450, 0], torch.tensor(10 * (1 - 2 / 100)))


LENGTHS = [1, 5, 0, 2, 70, 0]
BOUNDS = torch.tensor([0, 1, 6, 6, 8, 78, 78], dtype=torch.int32)


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("some", [False, True])
def test_labels_are_targets_of_their_own_sequence(face: str, shift: int, some: bool) -> None:
    """The last rows of a sequence have no target: never the first of the next."""
    v = 90
    x, weight = normal(78, 20, seed=1), normal(v, 20, seed=2)
    tokens = torch.randint(0, v, (78,), generator=torch.Generator("cpu").manual_seed(3), device="cpu").to(x.device)
    tokens[7] = -1  # nothing is to be learnt there
    rows = torch.tensor([0, 3, 5, 6, 8, 40, 77]) if some else torch.arange(78)
    expected = []
    for row in rows.tolist():
        end = next(int(b) for b in BOUNDS[1:] if b > row)
        expected.append(int(tokens[row + shift]) if row + shift < end else -1)
    targets = torch.tensor(expected)[:, None]
    labels = Labels(tokens, BOUNDS.to(x.device), rows if some else None, shift)
    assert torch.equal(labels.targets(), targets)

    x = x[rows]
    share = normal(len(rows), 1, seed=4)
    got, want = target_logprob(x, weight, labels, face=face), target_logprob(x, weight, targets, face=face)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    lse = want[1]
    got = target_logprob_backward(x, weight, labels, share, lse, border=4, face=face)
    want = target_logprob_backward(x, weight, targets, share, lse, border=4, face=face)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    got = target_logprob_with_gradient(x, weight, labels, lambda r, _: share[r], border=4, face=face)
    want = target_logprob_with_gradient(x, weight, targets, lambda r, _: share[r], border=4, face=face)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_does_not_fit_is_named() -> None:
    tokens = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected contiguous torch.int32 of one dimension"):
        Labels(tokens, torch.tensor([0, 4]))
    labels = Labels(tokens, torch.tensor([0, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"targets: expected labels for 3 rows, got 4 \(target_logprob\)"):
        target_logprob(torch.zeros(3, 2), torch.zeros(5, 2), labels)
    x, weight = torch.zeros(4, 2), torch.zeros(5, 2)
    with pytest.raises(ValueError, match=r"gradient's result: expected torch.float32 \[4, 1\], got .* \[4\]"):
        target_logprob_with_gradient(x, weight, labels, lambda rows, _: torch.zeros(4))
