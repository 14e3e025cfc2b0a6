"""What only the Triton face of target_logprob has: scratch for a chunk of rows, targets that nobody checks."""

from __future__ import annotations

import pytest
import torch
from check import TRITON, normal

from mint_engine.kernels import target_logprob, target_logprob_backward

pytestmark = [
    pytest.mark.skipif(not TRITON, reason="triton is not installed"),
    pytest.mark.usefixtures("for_triton"),
]
V = 200


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight = normal(rows, 40, seed=1), normal(V, 40, seed=2)
    return x, weight, torch.randint(0, V, (rows, 1), generator=torch.Generator("cpu"), device="cpu").to(x.device)


def test_chunks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch for 128 rows at a time and a rest: the same sums, in another order."""
    from mint_engine.kernels.target_logprob import triton as module

    x, weight, targets = inputs(300)
    dlogprob = normal(300, 1, seed=4)
    _, lse = target_logprob(x, weight, targets, face="triton")
    dx, dborder = target_logprob_backward(x, weight, targets, dlogprob, lse, border=8, face="triton")
    monkeypatch.setattr(module, "SCRATCH_BYTES", 4 * V * 128)
    dx2, dborder2 = target_logprob_backward(x, weight, targets, dlogprob, lse, border=8, face="triton")
    torch.testing.assert_close(dx2, dx, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dborder2, dborder, rtol=1e-5, atol=1e-5)


def test_a_target_outside_the_vocabulary_is_nan_where_it_cannot_be_refused() -> None:
    from mint_engine.kernels.target_logprob import triton as module

    x, weight, targets = inputs(3)
    targets[0], targets[2] = V, -1
    logprob, lse = torch.full((3, 1), torch.nan), torch.full((3,), torch.nan)
    module.target_logprob(x, weight, targets, logprob, lse, None)
    assert logprob[0].isnan()
    assert logprob[1].isfinite()
    assert logprob[2] == 0
    assert lse.isfinite().all()
