"""Products with few rows give every row the sums of the large GEMM, to the bit, whatever rows stand beside it."""

from __future__ import annotations

import pytest
import torch
from check import normal, strided
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mint_engine.kernels import logits, target_logprob
from mint_engine.kernels.gemm import mm


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.sampled_from([2, 3, 8, 9, 16, 17, 33, 64, 65, 130]), n=st.sampled_from([1, 15, 16, 48, 50, 100]),
    k=st.sampled_from([1, 2, 31, 64, 66, 255, 256, 600, 2051]), threads=st.integers(1, 3), seed=st.integers(0, 99),
    bf16=st.sampled_from([0, 40, 3000]),
)  # fmt: skip
def test_a_row_has_the_same_bits_alone_and_in_company(face, dtype, rows, n, k, threads, seed, bf16) -> None:
    """Whatever the weight: its first `bf16` columns are bf16 in any dtype, of which tiles make fewer products."""
    if face in ("reference", "triton"):
        pytest.skip("is about the C++ products")
    x, w = strided(normal(rows, k, seed=seed, dtype=dtype)), strided(normal(n, k, seed=seed + 1, dtype=dtype))
    w[:, :bf16] = w[:, :bf16].to(torch.bfloat16).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together, scores = mm(x, w.T, scale=0.5), logits(x, w, face=face)
        torch.set_num_threads(1)
        targets = torch.arange(rows)[:, None] % n
        trained = target_logprob(x, w, targets, face=face)[0]
        for i in {0, rows // 2, rows - 1}:
            one = x[i : i + 1]
            assert torch.equal(mm(one, w.T, scale=0.5)[0], together[i])
            assert torch.equal(logits(one, w, face=face)[0], scores[i])
            assert torch.equal(target_logprob(one, w, targets[i : i + 1], face=face)[0][0], trained[i])
    finally:
        torch.set_num_threads(before)
