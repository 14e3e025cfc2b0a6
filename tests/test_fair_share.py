"""Training operations and decode steps share the device's time, and neither starves."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_engine.engine import Engine
from mint_engine.errors import UserError
from mint_engine.executor import Executor
from mint_engine.fair_share import FairShare
from mint_engine.joint import Joint
from mint_engine.pending import Pending


def times(share: FairShare, operations: list[float], steps: list[float]) -> tuple[float, float]:
    """(seconds of sampling, of training) while both have work, up to the last of either."""
    sampled = trained = 0.0
    while operations and steps:
        if share.samplers_turn:
            sampled += (seconds := steps.pop())
            share.sampled(seconds, others_waited=True)
        else:
            trained += (seconds := operations.pop())
            share.trained(seconds)
    return sampled, trained


durations = st.lists(st.floats(0.001, 5), min_size=1, max_size=60)


@given(sampling=st.floats(0.05, 0.95), operations=durations, steps=durations)
def test_each_side_gets_its_part_up_to_one_turn(sampling: float, operations: list, steps: list) -> None:
    longest = max(operations) * sampling, max(steps) * (1 - sampling)
    sampled, trained = times(FairShare(sampling), list(operations), list(steps))
    owed = trained * sampling - sampled * (1 - sampling)
    assert -longest[1] - 1e-9 <= owed <= longest[0] + 1e-9


def test_time_alone_is_not_held_against_anybody() -> None:
    share = FairShare()
    for _ in range(1000):
        share.sampled(1.0, others_waited=False)
    share.trained(0.1)
    assert share.samplers_turn, "an operation has just had its turn"
    share.forget()
    for _ in range(1000):
        share.trained(1.0)
        share.forget()
    assert not share.samplers_turn


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_a_share_starves_nobody(share: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sampling_share: expected a number between 0 and 1"):
        Engine(home=tmp_path, sampling_share=share)


class Busy:
    """A sampler that always has work, ``seconds`` a step."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.steps, self.stop = seconds, 0, False

    @property
    def busy(self) -> bool:
        return not self.stop

    def step(self) -> bool:
        if self.stop:
            return False
        time.sleep(self.seconds)
        self.steps += 1
        return True

    def fail(self, error: BaseException) -> None:
        raise AssertionError(error)

    def close(self, error: BaseException) -> None:
        pass


@pytest.mark.parametrize("sampled_before", [False, True])
def test_the_part_of_an_operation_before_anybody_sampled_is_not_owed(sampled_before: bool) -> None:
    """A long operation, near whose end a sample comes, does not keep the next one waiting for as long."""
    executor, sampler = Executor("test"), Busy(0.01)
    executor.add_stepper(sampler)
    if sampled_before:
        executor.notify()
        while sampler.steps < 3:
            time.sleep(0.001)
    sampler.stop, taken = True, sampler.steps

    def operation() -> None:
        time.sleep(0.6)
        sampler.stop = False
        executor.notify()
        time.sleep(0.05)

    executor.lane().submit(operation)
    before = executor.lane().submit(lambda: sampler.steps - taken).result(timeout=60)
    sampler.stop = True
    executor.close()
    assert 2 <= before <= 20, "a step of 10 ms for each of the 50 ms, or so"


def test_steppers_that_were_given_up_on_are_seen_to_between_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing to compute they are owed nothing, but have memory to give back."""
    executor, sampler, go = Executor("test"), Busy(0.0), threading.Event()
    order: list[str] = []

    def look() -> bool:
        order.append("step")
        return False

    def cancel() -> None:
        order.append("cancel")
        executor.notify()

    sampler.stop = True
    monkeypatch.setattr(sampler, "step", look)
    executor.add_stepper(sampler)
    lane = executor.lane()
    lane.submit(lambda: go.wait(30))
    lane.submit(cancel)
    last = lane.submit(lambda: order.append("operation"))
    go.set()
    last.result(timeout=60)
    executor.close()
    assert order[order.index("cancel") :][:3] == ["cancel", "step", "operation"]


class Queued(Joint):
    """Is queued on a device at once, which takes ``seconds`` for it; writes how long it took into ``ran``."""

    def __init__(self, seconds: float, ran: list[float]) -> None:
        self._seconds, self._ran = seconds, ran

    def choose(self, others: Sequence[Joint]) -> Sequence[Joint]:
        return []

    def run(self, company: Sequence[Joint]) -> Pending[list[None]]:
        def wait() -> None:
            begun = time.perf_counter()
            time.sleep(self._seconds)
            self._ran.append(time.perf_counter() - begun)

        return Pending(wait, lambda: [None])


class Noted(FairShare):
    """Notes the seconds of every turn."""

    def __init__(self, sampling: float) -> None:
        super().__init__(sampling)
        self.operations: list[float] = []
        self.steps: list[float] = []

    def trained(self, seconds: float) -> None:
        super().trained(seconds)
        self.operations.append(seconds)

    def sampled(self, seconds: float, *, others_waited: bool) -> None:
        super().sampled(seconds, others_waited=others_waited)
        if others_waited:
            self.steps.append(seconds)


@pytest.mark.parametrize(("step", "operation"), [(0.002, 0.04), (0.04, 0.002)])
@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("queued", [False, True])
def test_a_queue_of_operations_and_a_busy_sampler_both_go_on(
    step: float, operation: float, share: float, queued: bool
) -> None:
    """Whichever is the longer, sampling gets its part of the time. Sleeps stand for work: the machine may be busy, so
    what counts is the time that turns took.

    Also where operations are only queued, and a device is at them while the thread goes on.
    """
    noted = Noted(share)
    executor, sampler = Executor("test", noted), Busy(step)
    ran: list[float] = []

    def work() -> None:
        begun = time.perf_counter()
        time.sleep(operation)
        ran.append(time.perf_counter() - begun)

    lane, go = executor.lane(), threading.Event()
    lane.submit(lambda: go.wait(30))  # all of them wait before the first begins
    futures: list[Future] = [
        lane.submit(Queued(operation, ran) if queued else work) for _ in range(round(0.4 / operation))
    ]
    executor.add_stepper(sampler)
    executor.notify()
    go.set()
    for future in futures:
        future.result(timeout=60)
    steps, sampler.stop = sampler.steps, True
    executor.close()
    trained, sampled = sum(noted.operations), sum(noted.steps)
    assert trained >= 0.9 * sum(ran), "all that operations took is counted"
    assert sampled >= 0.9 * step * min(steps, len(noted.steps)), "all that steps took is counted"
    assert len(noted.steps) <= steps + 1
    longest = max(noted.operations) * share + max(noted.steps) * (1 - share)
    assert abs(sampled * (1 - share) - trained * share) <= 2 * longest, (sampled, trained)
