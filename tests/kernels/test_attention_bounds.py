"""Bounds that are data: launches made for one batch serve the next, whatever its sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from check import TRITON, normal

from mint_engine.kernels import attention, attention_backward
from mint_engine.kernels.attention import Bounds

ROWS, N_Q, N_KV, D = 96, 4, 2, 16
BATCHES = [[0, 96], [0, 1, 2, 70, 96], [0, 33, 33, 96], [0, 95, 96]]


@pytest.mark.parametrize("which", ["cpu", "reference", *TRITON])
@pytest.mark.usefixtures("for_triton")
def test_one_set_of_buffers_serves_every_batch(which: str) -> None:
    q, do = (normal(ROWS, N_Q * D, seed=i) for i in (1, 2))
    k, v = (normal(ROWS, N_KV * D, seed=i) for i in (3, 4))
    bounds = Bounds(ROWS, 6, q.device)
    pointers = None
    for batch in BATCHES:
        cu = np.array(batch, dtype=np.int32)
        for new, buffer in bounds.write(cu):
            buffer.copy_(torch.from_numpy(new))
        plain = torch.from_numpy(cu)
        found, wanted = [], []
        for given, results in ((bounds, found), (plain, wanted)):
            o, lse = attention(q, k, v, given, N_Q, N_KV, 0.25, face=which)
            results += [o, lse, *attention_backward(do, q, k, v, o, lse, given, N_Q, N_KV, 0.25, face=which)]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        before, pointers = pointers, [t.data_ptr() for _, t in bounds._tables.values()]
        assert before in (None, pointers), "a table was made again"


@pytest.mark.parametrize("batch", [[0, 95], [1, 96], [0, 50, 40, 96], [*range(8), 96]])
def test_bounds_that_do_not_fit_are_refused(batch: list[int]) -> None:
    with pytest.raises(ValueError, match=r"bounds: expected at most 7 that rise from 0 to 96"):
        list(Bounds(ROWS, 6, torch.device("cpu")).write(np.array(batch, dtype=np.int32)))
