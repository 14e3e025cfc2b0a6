"""Where scratch memory ends in the middle of an op, in whichever thread: MemoryError, and the next call is right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check import normal
from check_isas import ISAS, using
from scarce_memory import until_there_is_enough
from test_decode_step import EIGHTS, SCALE, batch, model, run
from test_decode_steps import batch_with_room, draws_of
from test_grouped_linear import ADAPTERS, K, buffer, shrink_table
from test_paged_attention import cache
from torch import Tensor

from mint_engine.kernels import (
    BorderShare,
    Kept,
    attention,
    attention_backward,
    decode_steps,
    grouped_linear,
    lora_gradients,
    outer_accumulate,
    paged_attention,
    sample_rows,
    shrink,
    target_logprob,
    target_logprob_backward,
    top_logprobs,
)
from mint_engine.kernels.gemm import mm


def products(dtype: torch.dtype) -> list[Tensor]:
    """Of a few rows, turned, straight with k first or last, and with a long sum."""
    x, few, long = (normal(m, k, seed=m, dtype=dtype) for m, k in ((200, 128), (9, 128), (16, 16384)))
    w, tall = normal(192, 128, seed=2, dtype=dtype), normal(16384, 32, seed=3, dtype=dtype)
    wide = normal(900, 128, seed=4, dtype=dtype)
    return [mm(few, wide.T), mm(x, w.T), mm(x[:70], wide.T), mm(x, w.T.contiguous()), mm(long, tall)]


def attentions(dtype: torch.dtype) -> list[Tensor]:
    q, k, v, d_out = (normal(90, n, seed=n, dtype=dtype) for n in (64, 32, 32, 64))
    bounds = torch.tensor([0, 40, 90], dtype=torch.int32)
    out, lse = attention(q, k, v, bounds, 4, 2, 0.25, face="cpu")
    return [out, *attention_backward(d_out, q, k, v, out, lse, bounds, 4, 2, 0.25, face="cpu")]


def paged(dtype: torch.dtype) -> list[Tensor]:
    k_pool, v_pool, table, _, _ = cache([70, 3, 130, 65], 16, 64, dtype)
    lengths = torch.tensor([70, 3, 130, 65], dtype=torch.int32)
    return [paged_attention(normal(4, 192, seed=3, dtype=dtype), k_pool, v_pool, table, lengths, 6, 2, 0.2, face="cpu")]


def steps(dtype: torch.dtype) -> list[Tensor]:
    """Twenty rows with adapters; three rows, one step after the other."""
    m, b = model(dtype), batch_with_room(3, dtype)
    got = decode_steps(model(dtype), **b, scale=SCALE, draws=draws_of(3, 2), face="cpu")
    return [run(m, batch(20, dtype), EIGHTS, "cpu")[0], *(t for t in got if isinstance(t, Tensor))]


def adapters(dtype: torch.dtype) -> list[Tensor]:
    rows, ranks = sum(m for m, _ in ADAPTERS), max(r for _, r in ADAPTERS)
    x, tail = normal(rows, K + ranks, seed=1, dtype=dtype), torch.zeros(600, 8, dtype=dtype)
    out = torch.zeros_like(x)
    grouped_linear(x, buffer(ADAPTERS, dtype), out, shrink_table(ADAPTERS, K + ranks), face="cpu")
    shrink(normal(600, 96, seed=2, dtype=dtype), normal(8, 96, seed=3, dtype=dtype), 0.5, out=tail, face="cpu")
    return [out, tail]


def gradients(dtype: torch.dtype) -> list[Tensor]:
    dy, s, x = (normal(600, n, seed=n, dtype=dtype) for n in (128, 16, 96))
    b = [normal(64, 8, seed=5 + j, dtype=dtype) for j in range(2)]
    ds, da, db = torch.zeros_like(s), torch.zeros(16, 96), [torch.zeros(64, 8) for _ in b]
    lora_gradients(dy, s, b, 0.5, ds=ds, db=db, x=x, da=da, face="cpu")
    tall, wide = torch.zeros(128, 16), torch.zeros(16, 96)
    outer_accumulate(dy, s, tall, face="cpu")
    outer_accumulate(s, x, wide, face="cpu")
    return [ds, da, *db, tall, wide]


def losses(dtype: torch.dtype) -> list[Tensor]:
    """The gradient from what the forward has kept, and from logits that are computed again."""
    x, weight = normal(120, 96, seed=1, dtype=dtype), normal(900, 96, seed=2, dtype=dtype, scale=0.1)
    targets, d, rows = torch.arange(120)[:, None] * 7 % 900, normal(120, 1, seed=3), torch.arange(120)
    kept, made = Kept(rows, torch.zeros(120, 900, dtype=dtype)), []
    for room in (None, kept):
        logprob, lse = target_logprob(x, weight, targets, kept=room, face="cpu")
        dx, border = torch.zeros_like(x), torch.zeros(900, 8)
        target_logprob_backward(
            x, weight, targets, d, lse, border=8, shares=[BorderShare(0, 120, 0, border)], kept=room,
            rows=None if room is None else rows, dx=dx, face="cpu",
        )  # fmt: skip
        made += [logprob, lse, dx, border]
    return made


def draws(dtype: torch.dtype) -> list[Tensor]:
    z, t = normal(40, 900, seed=1, dtype=dtype), torch.full((40,), 0.7)
    uniforms = torch.linspace(0, 0.99, 40, dtype=torch.float64)
    drawn = sample_rows(z.float(), t, torch.full((40,), 5), torch.full((40,), 0.9, dtype=torch.float64), uniforms)
    return [*drawn, *top_logprobs(z.float(), t, 4, face="cpu")]


CASES = [products, attentions, paged, steps, adapters, gradients, losses, draws]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES)
def test_memory_that_ends_anywhere_is_an_error_and_leaves_no_trace(
    case: Callable[[torch.dtype], list[Tensor]], isa: str, dtype: torch.dtype
) -> None:
    with using(isa, 3):
        right = case(dtype)
        got, failed = until_there_is_enough(lambda: case(dtype), thinner=4)
    assert failed > 1
    for a, b in zip(got, right, strict=True):
        assert torch.equal(a, b)
