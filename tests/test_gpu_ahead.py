"""While a GPU is at one call the next is packed and queued, here with a device that is done when the test says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import ADAM, VOCAB, held, logprobs, new_model, open_engine, sampled
from helpers import make_data, relative

from mint_engine.engine import Engine
from mint_engine.errors import EngineClosedError, NonFiniteError
from mint_engine.gpu.run import Programs
from mint_engine.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput

# The same fp32 sums in another order, through three layers forwards and back, and some optimiser steps of 1e-2.
REORDERED = 1e-4
IMPOSSIBLE = Datum(
    ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "logprobs": [-3e4, -1.0], "advantages": [1.0, 1.0]}
)


class Device:
    """Computes at once, as a CPU does, and says so when it is told to."""

    def __init__(self) -> None:
        self._marks: list[threading.Event] = []
        self._free = False
        self.takes: Callable[[], float] = lambda: 0.0  # seconds for an operation
        self._more = threading.Condition()
        self.broken: set[int] = set()  # waits that fail

    def mark(self, device: torch.device) -> Callable[[], None]:
        event = threading.Event()
        with self._more:
            number = len(self._marks)
            self._marks.append(event)
            self._more.notify_all()
            if self._free:
                event.set()

        def wait() -> None:
            assert event.wait(30)
            time.sleep(self.takes())
            if number in self.broken:
                raise RuntimeError("the device is gone")

        return wait

    def has(self, count: int) -> bool:
        """Whether so many operations have been queued, and no more, however long one waits."""
        with self._more:
            reached = self._more.wait_for(lambda: len(self._marks) >= count, 10)
            return reached and not self._more.wait_for(lambda: len(self._marks) > count, 0.1)

    def reach(self, count: int) -> None:
        """Be done with the first ``count`` operations."""
        for event in self._marks[:count]:
            event.set()

    def go_on(self) -> None:
        """Be done with everything at once from now on, and with what has been queued."""
        with self._more:
            self._free = True
            self.reach(len(self._marks))

    def hold(self) -> None:
        """As at first: nothing has been queued."""
        with self._more:
            self._free = False
            self._marks.clear()


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device()
    yield made
    made.go_on()


@pytest.fixture
def engine(tmp_path: Path, tiny_tied: Path, device: Device) -> Iterator[Engine]:
    """Its training runs as on a GPU."""
    with open_engine(tmp_path / "home") as made:
        decoder = made._bases.get(str(tiny_tied)).decoder
        decoder.programs = Programs(decoder, mark=device.mark)
        yield made
        device.go_on()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Engine]:
    """Trains as on a CPU, one call after the other."""
    with open_engine(tmp_path / "plain") as made:
        yield made


def model_of(engine: Engine, directory: Path, seed: int = 0) -> str:
    return new_model(engine, engine.create_session(), directory, seed=seed)


def ask(engine: Engine, model: str, seed: int = 0) -> Future[ForwardBackwardOutput]:
    return engine.forward_backward(model, make_data("cross_entropy", (5, 6), VOCAB, seed), "cross_entropy")


def offend(engine: Engine, model: str) -> Future[ForwardBackwardOutput]:
    data = [*make_data("importance_sampling", (4,), VOCAB), IMPOSSIBLE]
    return engine.forward_backward(model, data, "importance_sampling")


def steps(engine: Engine, model: str) -> list[Future[Any]]:
    return [ask(engine, model, 0), engine.optim_step(model, ADAM), ask(engine, model, 1),
            engine.optim_step(model, ADAM), ask(engine, model, 2)]  # fmt: skip


def same(found: Any, expected: Any) -> None:
    assert found.metrics == pytest.approx(expected.metrics, rel=REORDERED, abs=REORDERED)


def test_the_next_call_is_queued_before_the_first_is_answered(engine: Engine, tiny_tied: Path, device: Device) -> None:
    """Of another client; a third has to wait, so that nobody is queued far ahead of the others."""
    models = [model_of(engine, tiny_tied, seed) for seed in range(3)]
    futures = [ask(engine, model) for model in models]
    assert device.has(2)
    assert not any(future.done() for future in futures)
    device.reach(1)
    futures[0].result(30)
    assert device.has(3)
    assert not any(future.done() for future in futures[1:])
    assert not engine._models[models[1]].state.has_grads
    device.reach(3)
    for future in futures:
        future.result(30)
    assert all(engine._models[model].state.has_grads for model in models)


def test_a_clients_steps_are_queued_one_behind_the_other(
    engine: Engine, plain: Engine, tiny_tied: Path, device: Device
) -> None:
    """And give what they give one after the other."""
    mine, theirs = model_of(engine, tiny_tied), model_of(plain, tiny_tied)
    futures = steps(engine, mine)
    assert device.has(3)  # two calls, and the step between them
    device.reach(1)
    futures[0].result(30)
    assert device.has(3)  # the second step waits to know what came of the first one
    device.reach(2)
    assert device.has(5)
    assert [future.done() for future in futures] == [True, True, False, False, False]
    device.go_on()
    for future, expected in zip(futures, steps(plain, theirs), strict=True):
        same(future.result(30), expected.result(30))
    mine_state, state = engine._models[mine].state, plain._models[theirs].state
    assert relative(mine_state.grads, state.grads) < REORDERED
    assert (mine_state.step, mine_state.has_grads) == (2, True)
    np.testing.assert_allclose(logprobs(engine, mine), logprobs(plain, theirs), atol=REORDERED)


@pytest.mark.parametrize("order", [(True, False), (False, True), (True, False, True), (False, False), (True, True)])
def test_a_refused_call_leaves_nothing_for_those_queued_behind_it(
    engine: Engine, tiny_tied: Path, device: Device, order: tuple[bool, ...]
) -> None:
    """Whether a call is refused is known when the next one has long been queued."""
    model, alone = model_of(engine, tiny_tied), model_of(engine, tiny_tied)
    futures = [ask(engine, model, i) if sound else offend(engine, model) for i, sound in enumerate(order)]
    assert device.has(2)
    device.go_on()
    for sound, future in zip(order, futures, strict=True):
        assert isinstance(future.exception(30), NonFiniteError) is not sound
    for i in (i for i, sound in enumerate(order) if sound):
        ask(engine, alone, i).result(30)
    state, expected = engine._models[model].state, engine._models[alone].state
    assert torch.equal(state.grads, expected.grads)
    assert state.has_grads == expected.has_grads == any(order)


def test_a_refused_step_is_known_to_the_next_one(
    engine: Engine, plain: Engine, tiny_tied: Path, device: Device
) -> None:
    """It keeps the gradients; the step behind it has its number, the call between is added to what was kept."""

    def work(one: Engine, model: str) -> list[Future[Any]]:
        too_much = AdamParams(learning_rate=1e37)
        return [ask(one, model, 0), one.optim_step(model, too_much), ask(one, model, 1),
                one.optim_step(model, ADAM), one.optim_step(model, ADAM)]  # fmt: skip

    mine, theirs = model_of(engine, tiny_tied), model_of(plain, tiny_tied)
    found, expected = work(engine, mine), work(plain, theirs)
    assert device.has(3)
    device.go_on()
    assert str(found[1].exception(30)) == str(expected[1].exception(30))
    assert "beyond fp32" in str(found[1].exception())
    for i in (0, 2, 3, 4):
        same(found[i].result(30), expected[i].result(30))
    assert engine._models[mine].state.step == 2
    assert not engine._models[mine].state.has_grads
    np.testing.assert_allclose(logprobs(engine, mine), logprobs(plain, theirs), atol=REORDERED)


def test_gradients_whose_norm_is_infinite_are_dropped_and_the_next_calls_are_kept(
    engine: Engine, tiny_tied: Path, device: Device
) -> None:
    model, alone = model_of(engine, tiny_tied), model_of(engine, tiny_tied)
    state = engine._models[model].state
    weights = engine._models[model].adapter.params.clone()
    state.grads.fill_(1e30)
    state.has_grads = True
    futures: list[Future[Any]] = [engine.optim_step(model, ADAM), ask(engine, model)]
    assert device.has(2)
    device.go_on()
    assert "its norm is inf" in str(futures[0].exception(30))
    futures[1].result(30)
    ask(engine, alone).result(30)
    assert torch.equal(state.grads, engine._models[alone].state.grads)
    assert torch.equal(engine._models[model].adapter.params, weights)
    assert (state.step, state.has_grads) == (0, True)


def test_what_reads_a_model_waits_for_what_is_in_flight(engine: Engine, tiny_tied: Path, device: Device) -> None:
    """And keeps only its own model waiting."""
    model, other = model_of(engine, tiny_tied), model_of(engine, tiny_tied, 1)
    call, step = ask(engine, model), engine.optim_step(model, ADAM)
    saved, after = engine.save_weights(model, "now"), ask(engine, model, 1)
    assert device.has(2)
    engine.save_weights(other, "other").result(30)
    assert not saved.done()
    device.reach(1)
    call.result(30)
    assert not saved.done()
    device.reach(2)
    assert step.result(30).metrics == pytest.approx({"step": 1.0, "grad_norm": step.result().metrics["grad_norm"]})
    path = saved.result(30).path
    device.go_on()
    after.result(30)
    again = engine.create_model_from_state(engine.create_session(), path, optimizer=True).result(30)
    assert engine._models[again].state.step == 1
    assert not engine._models[again].state.has_grads


@pytest.mark.parametrize("drain", [False, True])
def test_closing_answers_what_is_in_flight(engine: Engine, tiny_tied: Path, device: Device, drain: bool) -> None:
    """What waits is refused, or done first."""
    model = model_of(engine, tiny_tied)
    futures = [ask(engine, model, i) for i in range(3)]
    saved = engine.save_weights(model, "last")
    assert device.has(2)
    closing = threading.Thread(target=lambda: engine.close(drain=drain))
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    device.go_on()
    closing.join(30)
    assert not closing.is_alive()
    for future in futures[:2]:
        future.result(0)
    for waited in (futures[2], saved):
        assert isinstance(waited.exception(0), EngineClosedError) is not drain
    assert not [t for t in threading.enumerate() if t.name == "mint-engine-in-flight" and t.is_alive()]


def test_a_device_that_fails_fails_those_who_wait_for_it(engine: Engine, tiny_tied: Path, device: Device) -> None:
    models = [model_of(engine, tiny_tied, seed) for seed in range(2)]
    device.broken.add(0)
    futures = [ask(engine, model) for model in models]
    assert device.has(2)
    device.go_on()
    assert "the device is gone" in str(futures[0].exception(30))
    futures[1].result(30)
    assert not engine._models[models[0]].state.has_grads
    ask(engine, models[0]).result(30)


def test_a_call_that_is_wrong_is_answered_while_another_is_in_flight(
    engine: Engine, tiny_tied: Path, device: Device
) -> None:
    model = model_of(engine, tiny_tied)
    call, wrong = ask(engine, model), engine.forward_backward(model, [], "cross_entropy")
    assert "expected at least one datum" in str(wrong.exception(30))
    assert not call.done()
    stats = engine.stats()
    assert (stats.operations["forward_backward"], stats.failures["forward_backward"]) == (1, 1)
    later = ask(engine, model, 1)
    last = ask(engine, model, 2)
    assert device.has(2)
    assert not later.cancel(), "it has begun"
    assert last.cancel()
    device.go_on()
    call.result(30)
    later.result(30)
    assert engine.stats().operations["forward_backward"] == 3
    assert engine.stats().tokens_trained == 22


def test_a_decode_step_is_not_queued_behind_passes(engine: Engine, tiny_tied: Path, device: Device) -> None:
    """Its share of the time would be charged with theirs. Then it has its turn, before the next call has its own."""
    model = model_of(engine, tiny_tied)
    device.go_on()
    sampler = engine.save_weights_for_sampler(model).result(30).sampling_session_id
    assert sampler is not None
    wanted = sampled(engine, sampler)
    device.hold()
    first = ask(engine, model)
    assert device.has(1)
    drawn: Future[Any] = Future()
    threading.Thread(target=lambda: drawn.set_result(sampled(engine, sampler))).start()
    time.sleep(0.1)
    second = ask(engine, model, 1)
    assert device.has(1)
    assert engine.stats().tokens_sampled == 16
    device.reach(1)
    first.result(30)
    assert device.has(2)
    assert engine.stats().tokens_sampled > 16, "it had its turn first"
    device.reach(2)
    second.result(30)
    assert drawn.result(30) == wanted


@pytest.fixture
def sharing(tmp_path: Path, tiny_tied: Path, device: Device) -> Iterator[tuple[Engine, list[int]]]:
    """An engine whose clients may share passes, and how many did in each."""
    with open_engine(tmp_path / "sharing", deterministic=False) as made:
        decoder = made._bases.get(str(tiny_tied)).decoder
        decoder.programs = programs = Programs(decoder, mark=device.mark)
        counts: list[int] = []
        queue = programs.queue

        def counted(calls: Any, **kwargs: Any) -> Any:
            counts.append(len(calls))
            return queue(calls, **kwargs)

        programs.queue = counted  # type: ignore[method-assign]
        yield made, counts
        device.go_on()


def test_clients_that_are_ready_together_are_queued_together(
    sharing: tuple[Engine, list[int]], tiny_tied: Path, device: Device
) -> None:
    """Behind a call of a client that has asked again, and so cannot be waited for; their steps follow at once."""
    engine, counts = sharing
    models = [model_of(engine, tiny_tied, seed) for seed in range(4)]
    futures: list[Future[Any]] = [ask(engine, models[0])]
    assert device.has(1)
    with held(engine):
        futures += [ask(engine, model, seed) for seed in (1, 2) for model in models]
        futures += [engine.optim_step(model, ADAM) for model in models]
    assert device.has(2)
    assert counts == [1, 4]
    device.reach(1)
    assert device.has(7)
    assert counts == [1, 4, 4]
    device.go_on()
    for future in futures:
        future.result(30)


def test_who_is_at_work_is_waited_for_if_the_next_pass_can_be_shared(
    sharing: tuple[Engine, list[int]], tiny_tied: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step is queued meanwhile. Where a pass would be too large for both nobody waits."""
    engine, counts = sharing
    models = [model_of(engine, tiny_tied, seed) for seed in range(2)]
    calls = [ask(engine, models[0])]
    assert device.has(1)
    monkeypatch.setattr("mint_engine.engine.together.PATIENCE_S", 10.0)
    calls.append(ask(engine, models[1]))
    steps = [engine.optim_step(models[0], ADAM)]
    assert device.has(2)
    device.reach(1)
    calls[0].result(30)
    assert device.has(2)
    device.reach(2)
    steps[0].result(30)
    calls.append(ask(engine, models[0]))
    assert device.has(3)
    assert counts == [1, 2]
    device.go_on()
    for call in calls:
        call.result(30)
    monkeypatch.setattr("mint_engine.engine.together.PATIENCE_S", 0.001)
    monkeypatch.setattr("mint_engine.engine.together.MAX_TOKENS", 21)
    device.hold()
    calls = [ask(engine, model) for model in models]
    assert device.has(2)
    device.go_on()
    for call in calls:
        call.result(30)


def test_clients_that_wait_for_each_answer_fall_into_step(
    sharing: tuple[Engine, list[int]], tiny_tied: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, counts = sharing
    monkeypatch.setattr("mint_engine.engine.together.PATIENCE_S", 0.5)
    device.go_on()
    models = [model_of(engine, tiny_tied, seed) for seed in range(4)]

    def train(model: str) -> None:
        for step in range(6):
            ask(engine, model, step)
            engine.optim_step(model, ADAM).result(30)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(train, models))
    assert sum(counts) == 24
    assert len(counts) <= 12, "not one after the other"
    assert max(counts) == 4


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_operations_gives_what_it_gives_one_after_the_other(
    engine: Engine, sharing: tuple[Engine, list[int]], plain: Engine, tiny_tied: Path, device: Device, share: bool,
    seed: int,
) -> None:  # fmt: skip
    """Three clients that wait for nothing, on a device that takes its time; refused calls and steps among theirs."""
    random, mine = np.random.default_rng(seed), sharing[0] if share else engine
    kinds = ["call", "call", "call", "offence", "step", "step", "too much", "forward", "save", "custom", "wrong"]
    work = [(int(random.integers(3)), str(random.choice(kinds)), i) for i in range(50)]
    device.takes = lambda: float(random.choice([0.0, 0.003]))
    device.go_on()

    def square(data: Any, found: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return torch.stack([(lp * lp).sum() for lp in found]).sum(), {}

    def begin(one: Engine, model: str, kind: str, i: int) -> Future[Any]:
        data = make_data("cross_entropy", (7,), VOCAB, i)
        return {
            "call": lambda: ask(one, model, i),
            "offence": lambda: offend(one, model),
            "step": lambda: one.optim_step(model, AdamParams(learning_rate=1e-3)),
            "too much": lambda: one.optim_step(model, AdamParams(learning_rate=1e38)),
            "forward": lambda: one.forward(model, data, "cross_entropy"),
            "save": lambda: one.save_weights(model, f"{kind}-{i}"),
            "custom": lambda: one.forward_backward_custom(model, data, square),
            "wrong": lambda: one.forward(model, [], "cross_entropy"),
        }[kind]()

    models = [[model_of(one, tiny_tied, i) for i in range(3)] for one in (mine, plain)]
    found, expected = (
        [begin(one, ids[who], kind, i) for who, kind, i in work] for one, ids in zip((mine, plain), models, strict=True)
    )
    for (_, kind, _), ours, theirs in zip(work, found, expected, strict=True):
        assert type(ours.exception(30)) is type(theirs.exception(30)), kind
        if theirs.exception() is None and kind != "save":
            assert ours.result().metrics == pytest.approx(theirs.result().metrics, rel=1e-3, abs=1e-3)
    for ours, theirs in zip(*models, strict=True):
        state, other = mine._models[ours].state, plain._models[theirs].state
        assert (state.step, state.has_grads) == (other.step, other.has_grads)
        assert relative(mine._models[ours].adapter.params, plain._models[theirs].adapter.params) < 1e-3
        assert not other.has_grads or relative(state.grads, other.grads) < 1e-2
