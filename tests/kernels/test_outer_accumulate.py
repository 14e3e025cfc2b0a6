"""outer_accumulate: out += alpha * a.T @ b."""

from __future__ import annotations

import pytest
import torch
from check import normal, strided, surroundings_untouched, within_budget

from mint_engine.kernels import outer_accumulate

CASES = [(1, 1, 1), (7, 16, 63), (100, 63, 16), (130, 5, 200), (300, 257, 8), (3, 768, 70), (1100, 3, 2)]  # M, P, Q


@pytest.mark.parametrize("case", CASES)
def test_matches_float64(face: str, dtype: torch.dtype, case: tuple[int, int, int]) -> None:
    m, p, q = case
    a, b = normal(m, p, seed=1, dtype=dtype), normal(m, q, seed=2, dtype=dtype)
    start = normal(p, q, seed=3)
    out = strided(start)
    assert outer_accumulate(strided(a), strided(b), out, alpha=0.5, face=face) is out
    assert surroundings_untouched(out)
    exact = start.double() + 0.5 * a.double().T @ b.double()
    within_budget("out", out, exact, start + 0.5 * (a.float().T @ b.float()))


def test_many_small_calls_do_not_drift_from_one(face: str) -> None:
    # bf16 accumulation would lose a call's contribution once the sum is 256 times larger.
    a = torch.ones(2000, 4, dtype=torch.bfloat16)
    b = torch.ones(2000, 20, dtype=torch.bfloat16)
    out = torch.zeros(4, 20)
    for rows in range(0, 2000, 10):
        outer_accumulate(a[rows : rows + 10], b[rows : rows + 10], out, face=face)
    assert (out == 2000).all()


def test_no_rows_add_nothing(face: str, dtype: torch.dtype) -> None:
    out = torch.ones(3, 70)
    outer_accumulate(torch.empty(0, 3, dtype=dtype), torch.empty(0, 70, dtype=dtype), out, face=face)
    assert (out == 1).all()


def test_out_must_be_float32() -> None:
    with pytest.raises(ValueError, match=r"out: expected torch.float32 \[2, 3\]"):
        outer_accumulate(torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(2, 3, dtype=torch.bfloat16))
