"""The numbers a server's owner watches: counted once each, at the right moment, and never in the way of the work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_helpers import ADAM, VOCAB, new_model, open_engine
from helpers import make_data

from mint_engine.engine import Engine
from mint_engine.errors import EngineClosedError, SampleCancelledError, UserError
from mint_engine.types import Datum, ModelInput, ReverseKLDatum, SamplingParams


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with open_engine(tmp_path / "home") as made:
        yield made


def test_every_operation_is_counted_with_its_tokens(engine: Engine, tiny_tied: Path) -> None:
    told: list[tuple[str, float, int, bool]] = []
    engine.on_operation(lambda *event: told.append(event))
    model = new_model(engine, engine.create_session(), tiny_tied)
    data = make_data("cross_entropy", (6, 9), VOCAB)
    engine.forward(model, data, "cross_entropy").result()
    engine.forward_backward(model, data, "cross_entropy").result()
    engine.forward_backward_custom(model, data, lambda d, lps: (lps[0].sum(), {"tokens:sum": float("nan")})).result()
    pair = ReverseKLDatum(ModelInput.from_ints([1, 2, 3]), ModelInput.from_ints([4, 2, 3]), [2, 3], [1, 1])  # type: ignore[arg-type]
    engine.forward_backward_reverse_kl(model, [pair], reference_model_path=str(tiny_tied)).result()
    engine.optim_step(model, ADAM).result()
    with pytest.raises(UserError):
        engine.forward_backward(model, [], "cross_entropy").result()
    sampler = engine.save_weights_for_sampler(model).result().sampling_session_id or ""
    engine.sample(sampler, ModelInput.from_ints([1, 2, 3]), 2, SamplingParams(max_tokens=5)).result()
    with pytest.raises(UserError):
        engine.sample(sampler, ModelInput.empty(), 1, SamplingParams()).result()
    stats = engine.stats()
    assert stats.operations == {
        "create_model": 1, "forward": 1, "forward_backward": 2, "forward_backward_custom": 1,
        "forward_backward_reverse_kl": 1, "optim_step": 1, "save_weights_for_sampler": 1, "sample": 2,
    }  # fmt: skip
    assert {kind: n for kind, n in stats.failures.items() if n} == {"forward_backward": 1, "sample": 1}
    assert (stats.tokens_trained, stats.tokens_scored) == (15 + 15 + 3, 15)
    assert (stats.tokens_prefilled, stats.tokens_sampled) == (3, 10)
    assert (stats.resident_models, stats.samplers) == (1, 1)
    assert stats.rss_bytes > 10**8
    assert [(kind, tokens, ok) for kind, _, tokens, ok in told] == [
        ("create_model", 0, True), ("forward", 15, True), ("forward_backward", 15, True),
        ("forward_backward_custom", 15, True), ("forward_backward_reverse_kl", 3, True), ("optim_step", 0, True),
        ("forward_backward", 0, False), ("save_weights_for_sampler", 0, True), ("sample", 10, True),
        ("sample", 0, False),
    ]  # fmt: skip
    assert all(0 <= seconds < 60 for _, seconds, _, _ in told)


def test_a_listener_that_fails_harms_nobody(engine: Engine, tiny_tied: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(kind: str, seconds: float, tokens: int, ok: bool) -> None:
        raise ZeroDivisionError

    told: list[str] = []
    engine.on_operation(broken)
    engine.on_operation(lambda kind, *rest: told.append(kind))
    new_model(engine, engine.create_session(), tiny_tied)
    assert told == ["create_model"]
    assert "a listener for operations failed on create_model" in caplog.text


def test_what_waits_shows_in_the_gauges(engine: Engine, tiny_tied: Path) -> None:
    session = engine.create_session()
    model = new_model(engine, session, tiny_tied)
    sampler = engine.create_sampler(session, base_model=str(tiny_tied)).result()
    started, go = threading.Event(), threading.Event()

    def slow(data: list[Datum], lps: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        started.set()
        assert go.wait(30)
        return -lps[0].sum(), {}

    work = [engine.forward_backward_custom(model, make_data("cross_entropy", (5,), VOCAB), slow)]
    assert started.wait(30)
    work += [engine.optim_step(model, ADAM) for _ in range(3)]
    assert engine.stats().operations_waiting == 3
    go.set()
    for future in work:
        future.result()
    assert engine.stats().operations_waiting == 0

    # The device thread is held inside a token, so that what is asked meanwhile can only wait.
    held, free = threading.Event(), threading.Event()

    def hold(index: int, token: int, logprob: float) -> None:
        held.set()
        assert free.wait(30)

    params = SamplingParams(max_tokens=3)
    running = engine.sample(sampler, ModelInput.from_ints([1, 2]), 1, params, on_token=hold)
    assert held.wait(30)
    waiting = [engine.sample(sampler, ModelInput.from_ints([1, 2, 3]), 1, params) for _ in range(4)]
    stats = engine.stats()
    assert (stats.samples_running, stats.samples_waiting) == (1, 4)
    assert 0 < stats.kv_cache_bytes_used < stats.kv_cache_bytes_total <= 1 << 22
    assert engine.sampler_load() == (4, 12)
    assert engine.cancel_sample(waiting[0])
    assert engine.cancel_sample(running)
    assert engine.sampler_load() == (3, 9)
    free.set()
    for future in waiting[1:]:
        future.result()
    with pytest.raises(SampleCancelledError):
        running.result()
    stats = engine.stats()
    assert (stats.samples_running, stats.samples_waiting) == (0, 0)
    assert stats.operations["sample"] == 3, "what was cancelled was neither done nor did it fail"
    assert not engine.cancel_sample(waiting[1])
    assert not engine.cancel_sample(work[0])  # type: ignore[arg-type]


def test_a_cancelled_sample_gives_its_memory_back(engine: Engine, tiny_tied: Path) -> None:
    """Through the engine, from another thread: the next answer finds the cache as if it had never been asked."""
    sampler = engine.create_sampler(engine.create_session(), base_model=str(tiny_tied)).result()
    drawn = threading.Event()
    long = engine.sample(
        sampler, ModelInput.from_ints([1, 2]), 4, SamplingParams(max_tokens=500, stop=[]),
        on_token=lambda *token: drawn.set(),
    )  # fmt: skip
    assert drawn.wait(30)
    assert engine.cancel_sample(long)
    assert isinstance(long.exception(timeout=0), SampleCancelledError)
    engine.sample(sampler, ModelInput.from_ints([1]), 1, SamplingParams(max_tokens=1)).result()
    assert engine.stats().kv_cache_bytes_used == 0
    assert engine.stats().tokens_sampled < 4 * 500


def test_a_closed_engine_still_tells_its_numbers(tiny_tied: Path, tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine:
        model = new_model(engine, engine.create_session(), tiny_tied)
    with pytest.raises(EngineClosedError):
        engine.optim_step(model, ADAM).result()
    assert engine.stats().operations == {"create_model": 1}
