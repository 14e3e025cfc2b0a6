"""APIFuture: for threads and event loops, without a thread each, and without waiting by accident."""

from __future__ import annotations

import asyncio
import copy
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import SimpleNamespace

import pytest

from mint_engine.client.futures import APIFuture, completed, failed, future_twin, transformed, value_twin


def later(value: object, seconds: float = 0.02) -> APIFuture:
    future: Future = Future()
    finish = future.set_exception if isinstance(value, Exception) else future.set_result
    timer = threading.Timer(seconds, finish, [value])
    timer.daemon = True
    timer.start()
    return APIFuture(future)


def test_the_result_is_had_by_blocking_and_by_awaiting_any_number_of_times():
    future = later(7)

    async def main() -> list[int]:
        return [await future, await future.result_async(), await future, await future.coroutine()]

    assert asyncio.run(main()) == [7] * 4
    assert [future.result(), future.result(timeout=1)] == [7, 7]
    assert asyncio.run(main()) == [7] * 4  # also from another event loop


def test_an_error_reaches_everybody_who_asks():
    future = later(ValueError("mine"))
    with pytest.raises(ValueError, match="mine"):
        asyncio.run(future.coroutine())
    for ask in (future.result, lambda: future.anything, lambda: asyncio.run(future.result_async(1))):
        with pytest.raises(ValueError, match="mine"):
            ask()
    assert isinstance(future.exception(), ValueError)


def test_a_timeout_gives_up_waiting_and_not_the_work():
    work: Future = Future()
    future = APIFuture(work)
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)
    with pytest.raises(TimeoutError):
        asyncio.run(future.result_async(timeout=0.01))
    assert not work.cancelled()
    work.set_result(3)  # also wakes the waiter that gave up, whose loop is closed by now
    assert future.result(timeout=0) == 3
    assert asyncio.run(future.result_async(timeout=0)) == 3


@pytest.mark.parametrize("ask", [APIFuture.result, APIFuture.exception])
def test_a_signal_that_another_thread_took_ends_the_wait_too(ask: Callable[[APIFuture], object]):
    """Nothing wakes the main thread then: so also when Ctrl-C comes just before it begins to wait."""

    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    never = threading.Event()
    other = threading.Thread(target=never.wait, daemon=True)
    other.start()
    assert other.ident is not None
    threading.Timer(0.3, signal.pthread_kill, [other.ident, signal.SIGUSR1]).start()
    begun = time.monotonic()
    try:
        with pytest.raises(Interrupted):
            ask(later(7, 30))
        assert time.monotonic() - begun < 15
    finally:
        never.set()
        signal.signal(signal.SIGUSR1, before)


def test_cancelling_a_task_leaves_the_work_to_the_others():
    work: Future = Future()
    future = APIFuture(work)

    async def main() -> int:
        first, second = asyncio.create_task(future.coroutine()), asyncio.create_task(future.coroutine())
        await asyncio.sleep(0)
        first.cancel()
        work.set_result(5)
        with pytest.raises(asyncio.CancelledError):
            await first
        return await second

    assert asyncio.run(main()) == 5


def test_thousands_wait_at_once_without_a_thread_each():
    work = [Future() for _ in range(5000)]

    async def main() -> list[int]:
        before = threading.active_count()
        waiting = asyncio.gather(*map(APIFuture, work))
        await asyncio.sleep(0.01)
        assert threading.active_count() <= before
        threading.Thread(target=lambda: [future.set_result(i) for i, future in enumerate(work)]).start()
        return await waiting

    assert asyncio.run(main()) == list(range(5000))


def test_several_event_loops_wait_for_the_same_future():
    future = later("x", 0.05)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: asyncio.run(future.coroutine()), range(4))) == ["x"] * 4


def test_public_attributes_are_waited_for():
    future = later(SimpleNamespace(loss=1.5, sequences=[1, 2]))
    assert future.loss == 1.5
    assert future.sequences == [1, 2]
    with pytest.raises(AttributeError, match="nothing"):
        _ = future.nothing


def test_private_names_are_not_and_repr_does_not_wait():
    future = APIFuture(Future())
    started = time.monotonic()
    for name in ("_private", "__len__", "__fspath__", "_repr_html_"):
        assert not hasattr(future, name)
    assert repr(future) == "<APIFuture pending>"
    assert copy.copy(future).done() is False
    assert time.monotonic() - started < 1
    assert repr(completed(3)) == "<APIFuture 3>"
    assert repr(failed(ValueError("no"))) == "<APIFuture raised ValueError('no')>"


def test_callbacks_get_the_future_and_concurrent_futures_can_wait_for_it():
    future, seen = later(1), []
    future.add_done_callback(seen.append)
    assert wait([future.future()]).done == {future.future()}
    future.add_done_callback(seen.append)
    assert future.done()
    assert seen == [future, future]


def test_a_transformed_future_passes_on_results_and_errors():
    assert transformed(completed(3).future(), str).result() == "3"
    with pytest.raises(ValueError, match="source"):
        transformed(failed(ValueError("source")).future(), str).result()
    with pytest.raises(ZeroDivisionError):
        transformed(completed(0).future(), lambda x: 1 / x).result()


class Client:
    def call(self, x: int, *, y: int = 0) -> APIFuture[int]:
        """Doc."""
        return completed(x + y)

    call_async = value_twin(call)
    submit_async = future_twin(call)


def test_async_twins_have_the_signature_of_the_original():
    assert asyncio.run(Client().call_async(1, y=2)) == 3
    assert asyncio.run(Client().submit_async(x=1)).result() == 1
    assert (Client.call_async.__name__, Client.call_async.__doc__) == ("call_async", "Doc.")
