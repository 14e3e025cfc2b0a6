"""decode_steps against decode_step and sample_rows in turn: the same bits, and an end where one is asked for."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from check_isas import ISAS, using
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_decode_step import LAYERS, MIXED, N_KV, SCALE, D, batch, clear_foreign_blocks, model, with_words
from torch import Tensor

from mint_engine.kernels import StepAdapters, StepDraws, StepModel, decode_step, decode_steps, sample_rows

ROOM = 3  # steps that the rows' blocks have room for


def batch_with_room(rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Whole blocks for every row, and so for two tokens more of a row of ten."""
    b = batch(rows, dtype)
    del b["wanted"]
    b["block_table"] = torch.arange(3 * rows, dtype=torch.int32).view(rows, 3)
    shape = LAYERS, 3 * rows, b["k_pool"].shape[2], N_KV * D
    for seed, name in enumerate(("k_pool", "v_pool")):
        b[name] = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return b


def draws_of(rows: int, steps: int, *, stops: Tensor | None = None, seed: int = 0) -> StepDraws:
    """Greedy rows, rows with filters, and plain ones."""
    uniforms = torch.rand(steps, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return StepDraws(
        torch.tensor([(1.0, 0.0, 0.7)[i % 3] for i in range(rows)]),
        torch.tensor([(-1, 3, 5, -1)[i % 4] for i in range(rows)]),
        torch.tensor([(1.0, 0.8)[i % 2] for i in range(rows)], dtype=torch.float64),
        uniforms,
        torch.full((rows, 0), 0) if stops is None else stops,
    )


def at_once(
    m: StepModel, b: dict[str, Any], draws: StepDraws, adapters: StepAdapters | None = None, **options: Any
) -> tuple[Tensor, ...]:
    b = {name: t.clone() if name.endswith("pool") else t for name, t in b.items()}
    found = decode_steps(m, **b, scale=SCALE, draws=draws, adapters=adapters, **options)
    return *found, b["k_pool"], b["v_pool"]


def one_by_one(
    m: StepModel, b: dict[str, Any], draws: StepDraws, adapters: StepAdapters | None = None, face: str = "cpu"
) -> tuple[Tensor, ...]:
    b = {name: t.clone() if name.endswith("pool") else t for name, t in b.items()}
    found = []
    for uniforms in draws.uniforms:
        wanted = torch.arange(len(b["tokens"]))
        z = decode_step(m, **b, wanted=wanted, scale=SCALE, adapters=adapters, face=face)
        found.append(sample_rows(z, draws.temperature, draws.top_k, draws.top_p, uniforms, face=face))
        b = {**b, "tokens": found[-1][0], "lengths": b["lengths"] + 1}
    tokens, logprobs = zip(*found, strict=True)
    return torch.stack(tokens), torch.stack(logprobs), b["k_pool"], b["v_pool"]


@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("seats", [None, MIXED], ids=["base", "adapters"])
def test_steps_have_the_bits_of_the_ops_in_turn(dtype: torch.dtype, rows: int, seats: StepAdapters | None) -> None:
    if rows < 5:
        seats = None
    m, b, draws = model(dtype, norms=True), batch_with_room(rows, dtype), draws_of(rows, ROOM)
    if seats is not None:
        clear_foreign_blocks(m, seats)
    for isa in ISAS:
        for threads in (1, 2):
            with using(isa, threads):
                kept = with_words(m)
                expected = one_by_one(m, b, draws, seats)
                for weights in (m, kept):
                    for got, wanted in zip(at_once(weights, b, draws, seats, face="cpu"), expected, strict=True):
                        assert torch.equal(got, wanted), isa


def test_both_faces_draw_the_same_in_float32() -> None:
    m, b, draws = model(torch.float32), batch_with_room(5, torch.float32), draws_of(5, ROOM)
    tokens, logprobs, *_ = at_once(m, b, draws, face="cpu")
    exact = one_by_one(m, b, draws, face="reference")
    for got, wanted in zip(at_once(m, b, draws, face="reference"), exact, strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(tokens, exact[0])
    torch.testing.assert_close(logprobs, exact[1], rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 7), row=st.integers(0, 6), step=st.integers(0, ROOM - 1), width=st.integers(1, 3))
def test_the_step_in_which_a_row_draws_one_of_its_stops_is_the_last(
    face: str, rows: int, row: int, step: int, width: int
) -> None:
    m, b, row = model(torch.float32), batch_with_room(rows, torch.float32), row % rows
    everything = at_once(m, b, draws_of(rows, ROOM), face=face)
    stops = torch.full((rows, width), -1)
    stops[row, width - 1] = everything[0][step, row]
    others = torch.full((rows, width), -1)
    others[:, 0] = 10**9  # nobody draws it
    stops = torch.where(stops < 0, others, stops)
    tokens, logprobs, *_ = at_once(m, b, draws_of(rows, ROOM, stops=stops), face=face)
    first = everything[0][:, row].tolist().index(everything[0][step, row])
    assert torch.equal(tokens, everything[0][: first + 1])
    assert torch.equal(logprobs, everything[1][: first + 1])


def test_a_row_without_a_distribution_ends_it(face: str) -> None:
    m, b = model(torch.float32), batch_with_room(3, torch.float32)
    b["k_pool"][0, b["block_table"][1, 0].item()] = math.nan
    tokens, logprobs, *_ = at_once(m, b, draws_of(3, ROOM), face=face)
    assert logprobs.shape == (1, 3)
    assert logprobs[0].isnan().tolist() == [False, True, False]
    assert tokens[0, 1] == 0


def test_a_flag_or_the_time_ends_it_after_a_step(face: str) -> None:
    m, b, draws = model(torch.float32), batch_with_room(2, torch.float32), draws_of(2, ROOM)
    everything = at_once(m, b, draws, face=face)
    flag = torch.zeros(1, dtype=torch.int32)
    assert len(at_once(m, b, draws, face=face, interrupted=flag)[0]) == ROOM
    flag[0] = 1
    for options in ({"interrupted": flag}, {"seconds": 0.0}):
        tokens, logprobs, *_ = at_once(m, b, draws, face=face, **options)
        assert torch.equal(tokens, everything[0][:1])
        assert torch.equal(logprobs, everything[1][:1])


def test_another_thread_ends_it_meanwhile() -> None:
    m, b, steps = model(torch.float32), batch_with_room(1, torch.float32), 50_000
    b["block_table"] = torch.arange(-(-steps // 4) + 1, dtype=torch.int32)[None]
    b["k_pool"], b["v_pool"] = (torch.zeros(LAYERS, b["block_table"].shape[1], 4, N_KV * D) for _ in range(2))
    b["cos"], b["sin"] = (torch.ones(steps + 8, D // 2) for _ in range(2))
    flag, draws = torch.zeros(1, dtype=torch.int32), draws_of(1, steps)
    timer = threading.Timer(0.2, flag.fill_, [1])
    begun = time.monotonic()
    timer.start()
    done = len(at_once(m, b, draws, face="cpu", interrupted=flag)[0])
    timer.join()
    assert 1 <= done < steps
    assert time.monotonic() - begun < 10  # all of them attend to 25 000 tokens on average, and take minutes


def test_arguments_that_do_not_fit_are_named() -> None:
    m, b, draws = model(torch.float32), batch_with_room(2, torch.float32), draws_of(2, ROOM)
    with pytest.raises(
        ValueError, match=r"uniforms: expected torch.float64 \[1, 2\], got torch.float64 \[0, 2\] \(decode_steps\)"
    ):
        at_once(m, b, draws_of(2, 0))
    with pytest.raises(ValueError, match=r"top_k: expected torch.int64 \[2\], got torch.int64 \[3\] \(decode_steps\)"):
        at_once(m, b, replace(draws, top_k=torch.ones(3, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"stops: expected torch.int64 \[2, 1\], got torch.int64 \[1, 1\]"):
        at_once(m, b, replace(draws, stops=torch.ones(1, 1, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"interrupted: expected torch.int32 \[1\], got torch.float32 \[1\]"):
        at_once(m, b, draws, interrupted=torch.zeros(1))
    with pytest.raises(
        ValueError, match=r"lengths: expected torch.int32 \[2\], got torch.int64 \[2\] \(decode_steps\)"
    ):
        at_once(m, {**b, "lengths": b["lengths"].long()}, draws)
    before = b["k_pool"].clone()
    long = {**b, "lengths": torch.tensor([1, 11], dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"tokens that block_table has room for: expected 13 or more, got 12"):
        decode_steps(
            m,
            **{**long, "cos": torch.ones(20, D // 2), "sin": torch.ones(20, D // 2)},
            scale=SCALE,
            draws=draws,
            face="cpu",
        )
    with pytest.raises(ValueError, match=r"positions of cos and sin: expected 13 or more, got 12"):
        decode_steps(m, **long, scale=SCALE, draws=draws, face="cpu")
    table = b["block_table"].clone()
    table[0, 1:] = -1
    with pytest.raises(ValueError, match=r"block_table: expected 0 or more, got -1"):
        decode_steps(
            m,
            **{**b, "block_table": table, "lengths": torch.tensor([3, 3], dtype=torch.int32)},
            scale=SCALE,
            draws=draws,
            face="cpu",
        )
    assert torch.equal(b["k_pool"], before), "nothing was begun"
