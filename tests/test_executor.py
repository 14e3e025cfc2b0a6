"""Who runs with whom: turns are kept, brief operations let others catch up, and nobody's fault is another's."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_engine.executor import Executor
from mint_engine.joint import Joint
from mint_engine.off_thread import Apart
from mint_engine.turns import Turns


class Work(Joint):
    """Takes along at most ``most`` others of its kind; writes who ran together into ``log``."""

    def __init__(self, name: str, log: list[Any], kind: str = "", most: int = 10, fails: bool = False) -> None:
        self.name, self.log, self.kind, self.most, self.fails = name, log, kind, most, fails

    def choose(self, others: Sequence[Joint]) -> Sequence[Joint]:
        return [other for other in others if isinstance(other, Work) and other.kind == self.kind][: self.most]

    def run(self, company: Sequence[Joint]) -> Sequence[Any]:
        everyone = [self, *(other for other in company if isinstance(other, Work))]
        self.log.append([work.name for work in everyone])
        return [ValueError(work.name) if work.fails else work.name.upper() for work in everyone]


@pytest.fixture
def executor() -> Iterator[Executor]:
    made = Executor("test")
    yield made
    made.close()


@contextmanager
def held(executor: Executor) -> Iterator[None]:
    """All that is submitted inside is ready at once."""
    begun, go = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert go.wait(30)

    executor.lane("holder").submit(hold)
    assert begun.wait(30)
    yield
    go.set()


def note(log: list[Any], name: str) -> Callable[[], str]:
    def operation() -> str:
        log.append(name)
        return name

    return operation


def test_those_that_suit_each_other_run_together_and_each_gets_its_own_answer(executor: Executor) -> None:
    log: list[Any] = []
    with held(executor):
        futures = [
            executor.lane(owner).submit(Work(owner, log, kind, fails=owner == "c"))
            for owner, kind in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "x"))
        ]
    assert [futures[i].result() for i in (0, 1, 3)] == ["A", "B", "D"]
    with pytest.raises(ValueError, match="c"):
        futures[2].result()
    assert log == [["a", "c", "d"], ["b"]]


def test_many_brief_operations_of_one_client_take_their_turns(executor: Executor) -> None:
    log: list[Any] = []
    with held(executor):
        futures = [executor.lane("a").submit(Work("a", log))]
        flood = executor.lane("flood")
        futures += [flood.submit(note(log, "brief"), brief=True) for _ in range(10)]
        futures.append(flood.submit(Work("flood", log)))
        futures.append(executor.lane("b").submit(Work("b", log)))
    for future in futures:
        future.result()
    assert log[:3] == ["brief", "brief", ["a", "b"]]


def test_company_is_offered_in_the_order_of_the_turns(executor: Executor) -> None:
    """An owner with many models does not keep one with few from being taken along; who is left keeps its turn."""
    log: list[Any] = []
    with held(executor):
        futures = [executor.lane("many").submit(Work(f"many{i}", log, most=2)) for i in range(4)]
        futures.append(executor.lane("few").submit(Work("few", log, most=2)))
        futures.append(executor.lane("other").submit(note(log, "other")))
    for future in futures:
        future.result()
    assert log == [["many0", "few", "many1"], "other", ["many2", "many3"]]


def test_a_lane_keeps_its_order_and_only_brief_operations_are_run_ahead(executor: Executor) -> None:
    log: list[Any] = []
    with held(executor):
        first, brief, long = (executor.lane(name) for name in ("first", "brief", "long"))
        futures: list[Future] = [first.submit(Work("a", log))]
        futures += [brief.submit(note(log, "step"), brief=True), brief.submit(note(log, "step2"), brief=True),
                    brief.submit(Work("b", log)), brief.submit(Work("b2", log))]  # fmt: skip
        futures += [long.submit(note(log, "save")), long.submit(Work("c", log))]
    for future in futures:
        future.result()
    assert log == ["step", "step2", ["a", "b"], "save", ["b2", "c"]]
    assert executor.queued == 0


def test_who_was_just_answered_has_a_moment_to_ask_again(executor: Executor) -> None:
    """The second lane's optimiser step is brief; its client asks again as soon as it is done."""
    log: list[Any] = []
    again: list[Future] = []
    first, second = Work("a", log), executor.lane("second")
    first.patience = 30.0

    def ask_again() -> str:
        threading.Timer(0.05, lambda: again.append(second.submit(Work("b", log)))).start()
        return "step"

    with held(executor):
        futures = [executor.lane("first").submit(first), second.submit(ask_again, brief=True)]
    assert [future.result(timeout=60) for future in futures] == ["A", "step"]
    assert again[0].result() == "B"
    assert log == [["a", "b"]]


def test_nobody_is_waited_for_who_was_not_there(executor: Executor) -> None:
    log: list[Any] = []
    lane = executor.lane("alone")
    for name in "abc":
        work = Work(name, log)
        work.patience = 30.0
        begun = time.monotonic()
        lane.submit(work).result()
        lane.submit(note(log, "step"), brief=True).result()
        assert time.monotonic() - begun < 20
    assert log == [["a"], "step", ["b"], "step", ["c"], "step"]


def test_one_that_is_cancelled_is_left_out_first_or_not(executor: Executor) -> None:
    log: list[Any] = []
    with held(executor):
        futures = [executor.lane(name).submit(Work(name, log)) for name in "abcd"]
        step = executor.lane("e")
        skipped = step.submit(note(log, "step"), brief=True)
        last = step.submit(Work("e", log))
        assert futures[0].cancel()
        assert futures[2].cancel()
        assert skipped.cancel()
    assert (futures[1].result(), futures[3].result(), last.result()) == ("B", "D", "E")
    assert log == [["b", "d", "e"]]
    with held(executor):
        assert (alone := executor.lane("a").submit(Work("a", log))).cancel()
    assert alone.cancelled()


def test_a_run_that_breaks_fails_those_that_were_in_it(executor: Executor) -> None:
    class Broken(Work):
        def run(self, company: Sequence[Joint]) -> Sequence[Any]:
            raise MemoryError("no room")

    log: list[Any] = []
    with held(executor):
        futures = [executor.lane(name).submit(Broken(name, log)) for name in "ab"]
        failing = executor.lane("c")
        step = failing.submit(lambda: 1 // 0, brief=True)
        futures.append(failing.submit(Broken("c", log)))
        after = executor.lane("d").submit(note(log, "d"))
    assert all(isinstance(future.exception(), MemoryError) for future in futures)
    assert isinstance(step.exception(), ZeroDivisionError)
    assert after.result() == "d"


def test_what_was_accepted_is_drained_together_or_refused(executor: Executor) -> None:
    log: list[Any] = []
    with held(executor):
        futures = [executor.lane(name).submit(Work(name, log)) for name in "abc"]
        closing = threading.Thread(target=lambda: executor.close(drain=True))
        closing.start()
    closing.join(30)
    assert [future.result(timeout=0) for future in futures] == ["A", "B", "C"]
    assert log == [["a", "b", "c"]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 99)), max_size=20), st.integers(0, 5))
def test_in_turn_is_the_order_of_popping(items: list[tuple[str, int]], popped: int) -> None:
    turns: Turns[tuple[str, int]] = Turns()
    for owner, item in items:
        turns.append(owner, (owner, item))
    for _ in range(min(popped, len(items))):
        turns.pop()
    expected = list(turns.in_turn())
    assert [turns.pop() for _ in range(len(turns))] == expected


def test_calls_off_the_device_thread_have_no_openmp_team_that_could_spin_beside_it(executor: Executor) -> None:
    """The number of threads is each thread's own: nobody else's changes, and new threads get the process's."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:

        def operation() -> Generator[Callable[[], int], int, tuple[int, int, int]]:
            off_thread = yield torch.get_num_threads
            apart = yield Apart(torch.get_num_threads)
            return off_thread, apart, torch.get_num_threads()

        assert executor.lane().submit(operation).result(10) == (1, 1, 3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_call_apart_is_one_of_the_others_where_the_system_gives_no_thread(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def operation() -> Generator[Callable[[], str], str, str]:
        return (yield Apart(lambda: threading.current_thread().name))

    assert executor.lane().submit(operation).result(10) == "test-apart"

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert executor.lane().submit(operation).result(10).startswith("test-io-")


def test_asking_for_work_ends_the_openmp_threads_that_idle_beside_the_device(executor: Executor) -> None:
    """With more of them than cores libgomp no longer spins: each parallel region of a step would wake its team."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        alone = len(os.listdir("/proc/self/task"))
        torch.ones(1 << 20).add_(1.0)  # parallel: this thread has a team now
        assert len(os.listdir("/proc/self/task")) > alone
        assert executor.lane().submit(lambda: 7).result(10) == 7
        assert len(os.listdir("/proc/self/task")) <= alone
        assert torch.ones(1 << 20).add_(1.0).sum() == 1 << 21  # and can have one again
    finally:
        torch.set_num_threads(before)


class Decoding:
    """A stepper of one step, which lasts until it is interrupted."""

    busy = True

    def __init__(self, executor: Executor) -> None:
        self.executor, self.begun, self.ended, self.alone = executor, threading.Event(), threading.Event(), False

    def step(self) -> bool:
        if self.ended.is_set():
            return False
        self.alone = not self.executor.interruption.wanted
        self.begun.set()
        until = time.monotonic() + 30
        while not self.executor.interruption.wanted and time.monotonic() < until:
            time.sleep(0.001)
        self.ended.set()
        return True

    def fail(self, error: BaseException) -> None:
        raise error

    def close(self, error: BaseException) -> None:
        pass


class Exits:
    """A stepper whose step breaks with what is no Exception."""

    def __init__(self) -> None:
        self.busy, self.failed = True, Future[None]()

    def step(self) -> bool:
        if not self.busy:
            return False
        raise SystemExit("from a callback")

    def fail(self, error: BaseException) -> None:
        self.busy = False
        self.failed.set_exception(error)

    def close(self, error: BaseException) -> None:
        pass


def test_a_step_that_breaks_with_no_exception_leaves_the_thread_to_the_others(executor: Executor) -> None:
    exits = Exits()
    executor.add_stepper(exits)
    executor.notify()
    assert isinstance(exits.failed.exception(10), SystemExit)
    assert executor.lane().submit(lambda: "done").result(10) == "done"


def test_a_callback_that_breaks_with_no_exception_leaves_the_thread_to_the_others(
    executor: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    def exits(future: Future) -> None:
        raise SystemExit("from a callback")

    lane = executor.lane()
    with held(executor):
        first = lane.submit(lambda: "first")
        first.add_done_callback(exits)
    assert lane.submit(lambda: "second").result(10) == "second"
    assert first.result(0) == "first"
    assert [r.message for r in caplog.records] == ["a callback of a future failed"]


def off_thread_first() -> Generator[Callable[[], Any], Any, str]:
    yield lambda: time.sleep(0.2)
    return "done"


@pytest.mark.parametrize("call", ["an operation", "another stepper's work", "an answer off the thread", "the end"])
def test_whoever_needs_the_device_interrupts_a_call_of_several_steps(executor: Executor, call: str) -> None:
    decoding = Decoding(executor)
    lane = executor.lane()
    later = lane.submit(off_thread_first) if call == "an answer off the thread" else None
    executor.add_stepper(decoding)
    executor.notify()
    assert decoding.begun.wait(10)
    assert decoding.alone, "nobody wanted the device when the step began"
    if later is None:
        assert not decoding.ended.wait(0.05)
    if call == "an operation":
        later = lane.submit(lambda: "done")
    elif call == "another stepper's work":
        executor.notify()
    elif call == "the end":
        executor.close()
    assert decoding.ended.wait(10)
    if later is not None:
        assert later.result(10) == "done"
