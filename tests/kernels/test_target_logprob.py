"""target_logprob, its gradient, and logits."""

from __future__ import annotations

import math

import pytest
import torch
from check import normal, strided, within_budget

from mint_engine.kernels import BorderShare, logits, target_logprob, target_logprob_backward

CASES = [  # M, H, V, K: dot-product rows (M <= 8), packed rows, several vocabulary blocks, odd everything
    (1, 5, 3, 1),
    (3, 63, 100, 2),
    (8, 100, 2000, 1),
    (9, 33, 63, 3),
    (63, 100, 2000, 1),
    (100, 592, 1100, 2),
    (13, 1100, 700, 1),
]


def inputs(case: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, h, v, k = case
    x, weight = normal(m, h, seed=1, dtype=dtype), normal(v, h, seed=2, dtype=dtype, scale=3 / h**0.5)
    targets = torch.randint(-1, v, (m, k), generator=torch.Generator("cpu").manual_seed(3), device="cpu").to(x.device)
    targets[0, 0], targets[-1, -1] = v - 1, 0
    return x, weight, targets


def plain_logprob(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Whole logits in the dtype given, skipped targets 0."""
    logp = torch.log_softmax(x @ weight.T, dim=-1).gather(1, targets.clamp(min=0))
    return logp.masked_fill(targets < 0, 0.0)


@pytest.mark.parametrize("case", CASES)
def test_forward_matches_float64(face: str, dtype: torch.dtype, case: tuple[int, int, int, int]) -> None:
    x, weight, targets = inputs(case, dtype)
    logprob, lse = target_logprob(strided(x), strided(weight), targets, face=face)
    exact = plain_logprob(x.double(), weight.double(), targets)
    # The promise is fp32 whatever the inputs: budget against plain torch in fp32 on the same (rounded) inputs.
    within_budget("logprob", logprob, exact, plain_logprob(x.float(), weight.float(), targets))
    exact_lse = torch.logsumexp(x.double() @ weight.double().T, -1)
    within_budget("lse", lse, exact_lse, torch.logsumexp(x.float() @ weight.float().T, -1))
    assert (logprob[targets < 0] == 0).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("border", [0, 3, 16])
def test_gradient_matches_float64_autograd(
    face: str, dtype: torch.dtype, case: tuple[int, int, int, int], border: int
) -> None:
    x, weight, targets = inputs(case, dtype)
    h = x.shape[1]
    border = min(border, h)
    dlogprob = normal(*targets.shape, seed=4)

    leaf, w = x.double().requires_grad_(), weight.double().requires_grad_()
    plain_logprob(leaf, w, targets).backward(dlogprob.double())
    assert leaf.grad is not None
    assert w.grad is not None
    _, lse = target_logprob(x, weight, targets, face=face)
    dx, dborder = target_logprob_backward(strided(x), strided(weight), targets, dlogprob, lse, border=border, face=face)
    # Plain torch from the same lse, which is part of the contract: its own rounding to fp32 moves every probability.
    dlogits = -dlogprob.masked_fill(targets < 0, 0).sum(-1, keepdim=True) * torch.exp((x @ weight.T) - lse[:, None])
    for m, k in (targets >= 0).nonzero().tolist():
        dlogits[m, targets[m, k]] += dlogprob[m, k]
    dlogits = dlogits.to(dtype)
    within_budget("dx", dx, leaf.grad, dlogits @ weight)
    within_budget("dborder", dborder, w.grad[:, h - border :], dlogits.T @ x[:, h - border :])


@pytest.mark.parametrize("case", CASES)
def test_logits_are_fp32_sums(face: str, dtype: torch.dtype, case: tuple[int, int, int, int]) -> None:
    x, weight, _ = inputs(case, dtype)
    got = logits(strided(x), strided(weight), face=face)
    assert got.dtype is torch.float32
    within_budget("logits", got, x.double() @ weight.double().T, x.float() @ weight.float().T)


def test_one_row_alone_equals_the_row_in_a_batch(face: str, dtype: torch.dtype) -> None:
    # Sampling scores one row, training many: the two must agree to fp32 rounding.
    x, weight, targets = inputs((40, 100, 2000, 1), dtype)
    batch, _ = target_logprob(x, weight, targets, face=face)
    rows = [0, 17, 39] if face == "triton" else list(range(40))  # the interpreter is slow
    alone = torch.cat([target_logprob(x[i : i + 1], weight, targets[i : i + 1], face=face)[0] for i in rows])
    within_budget("logprob", alone, plain_logprob(x.double(), weight.double(), targets)[rows], batch[rows])


def test_those_who_share_the_border_get_their_own_gradients(face: str, dtype: torch.dtype) -> None:
    """Neighbours with the same columns or others, rows of nobody, one row that uses all of them; added to what is."""
    x, weight, targets = inputs((150, 60, 300, 2), dtype)
    dlogprob, border = normal(150, 2, seed=4), 24
    rows = [(0, 70, 0, 16), (70, 75, 16, 19), (75, 120, 16, 19), (149, 150, 0, 24)]
    owned = torch.zeros(150, border, dtype=torch.bool)
    for start, stop, column, end in rows:
        owned[start:stop, column:end] = True
    x[:, 60 - border :][~owned] = 0
    grads = [strided(normal(300, end - column, seed=5 + i)) for i, (_, _, column, end) in enumerate(rows)]
    before = [g.clone() for g in grads]
    shares = [BorderShare(start, stop, column, g) for (start, stop, column, _), g in zip(rows, grads, strict=True)]
    _, lse = target_logprob(x, weight, targets, face=face)
    dx, none = target_logprob_backward(x, weight, targets, dlogprob, lse, border=border, shares=shares, face=face)
    whole, _ = target_logprob_backward(x, weight, targets, dlogprob, lse, border=border, face=face)
    assert torch.equal(dx, whole)
    assert none.shape == (300, 0)
    for s, first in zip(shares, before, strict=True):
        some = slice(s.start, s.stop)
        part = x[some], weight, targets[some], dlogprob[some], lse[some]
        columns = slice(s.column, s.column + s.grad.shape[1])
        exact = target_logprob_backward(*(t.double() if t.is_floating_point() else t for t in part), border=border)[1]
        alone = target_logprob_backward(*part, border=border, face=face)[1]
        within_budget("grad", s.grad, first.double() + exact[:, columns], first + alone[:, columns])


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (BorderShare(0, 3, 0, torch.zeros(9, 4)), r"shares\[0\]: expected rows within \[0, 2\], got 0 to 3"),
        (BorderShare(0, 2, 1, torch.zeros(9, 4)), r"shares\[0\]: expected columns within \[0, 4\], got 1 to 5"),
        (BorderShare(0, 2, 0, torch.zeros(8, 4)), r"shares\[0\].grad: expected torch.float32 \[9, 4\]"),
        (BorderShare(0, 2, 0, torch.zeros(4, 9).T), r"shares\[0\].grad: expected contiguous rows"),
    ],
)
def test_a_share_that_does_not_fit_is_refused(share: BorderShare, said: str) -> None:
    x, weight, targets = inputs((2, 12, 9, 1), torch.float32)
    args = x, weight, targets, torch.ones(2, 1), torch.zeros(2)
    with pytest.raises(ValueError, match=said):
        target_logprob_backward(*args, border=4, shares=[share])
    with pytest.raises(ValueError, match="dborder: expected None beside shares"):
        target_logprob_backward(*args, border=4, shares=[], dborder=torch.zeros(9, 4))


def test_threads_do_not_change_a_bit(face: str, dtype: torch.dtype) -> None:
    if face != "cpu":
        pytest.skip("neither plain torch nor numpy, which interprets Triton, promises that")
    x, weight, targets = inputs((33, 200, 1500, 2), dtype)
    dlogprob = normal(33, 2, seed=4)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logprob, lse = target_logprob(x, weight, targets, face=face)
            gradients = target_logprob_backward(x, weight, targets, dlogprob, lse, border=8, face=face)
            # Interpreted, the library that makes dx is the CPU's, which promises nothing about threads.
            results.append((logprob, lse, *gradients[face == "triton" :]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_large_logits_do_not_overflow(face: str) -> None:
    x, weight = torch.full((10, 1), 200.0), torch.linspace(-10, 10, 70)[:, None]
    targets = torch.full((10, 1), 69)
    logprob, lse = target_logprob(x, weight, targets, face=face)
    exact = plain_logprob(x.double(), weight.double(), targets)
    assert lse.isfinite().all()
    torch.testing.assert_close(logprob.double(), exact, rtol=0, atol=2000 * 2**-23)  # an ulp of lse = 2000


@pytest.mark.parametrize("rows", [3, 20])
def test_a_nan_row_is_nan_and_alone(face: str, dtype: torch.dtype, rows: int) -> None:
    x, weight, targets = inputs((rows, 40, 300, 1), dtype)
    x[1, 5] = float("nan")
    targets[1, 0] = 7
    logprob, lse = target_logprob(x, weight, targets, face=face)
    assert lse[1].isnan()
    assert logprob[1].isnan().all()
    others = [i for i in range(rows) if i != 1]
    assert lse[others].isfinite().all()


def test_a_block_of_impossible_tokens_leaves_the_others_alone(face: str) -> None:
    """Whole vocabulary blocks at -inf take part with probability zero."""
    x, weight = torch.full((2, 3), 10.0), torch.zeros(5000, 3)
    weight[:4000, 0] = -1e38  # times 10 is -inf
    targets = torch.tensor([[4500], [10]])
    logprob, lse = target_logprob(x, weight, targets, face=face)
    torch.testing.assert_close(lse, torch.full((2,), math.log(1000.0)))
    assert logprob[0, 0] == pytest.approx(-math.log(1000.0), rel=1e-6)
    assert logprob[1, 0] == -torch.inf


def test_rows_without_a_gradient_get_none(face: str, dtype: torch.dtype) -> None:
    """Whole tiles of such rows are skipped; their lse, however small, must not make 0 * inf."""
    x, weight, targets = inputs((150, 40, 200, 2), dtype)
    dlogprob = normal(150, 2, seed=4)
    dlogprob[:140] = 0
    x[:100], weight[:, 0] = 0, -200
    x[:100, 0] = 1
    _, lse = target_logprob(x, weight, targets, face=face)
    assert (lse[:100] < -100).all()
    dx, dborder = target_logprob_backward(x, weight, targets, dlogprob, lse, border=8, face=face)
    assert (dx[:140] == 0).all()
    assert dx[140:].isfinite().all()
    assert (dx[140:] != 0).any(-1).all()
    assert dborder.isfinite().all()


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"targets: expected -1 .skip. to 9, got 0 to 10"):
        target_logprob(torch.zeros(2, 4), torch.zeros(10, 4), torch.tensor([[0], [10]]))
