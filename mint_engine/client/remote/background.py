"""The thread that talks to servers: one event loop per process, shared by every connection."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from mint_engine.errors import EngineClosedError

T = TypeVar("T")


class LoopFuture(Future[T]):
    """A future that the loop's thread settles. Waiting for one on that very thread would wait for ever."""

    def __init__(self, thread: threading.Thread) -> None:
        super().__init__()
        self._settled_by = thread

    def result(self, timeout: float | None = None) -> T:
        self._check()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._check()
        return super().exception(timeout)

    def _check(self) -> None:
        if not self.done() and threading.current_thread() is self._settled_by:
            raise RuntimeError(
                "a callback of a future waits for another future: that would stop all traffic. Use await"
            )


class Background:
    """An event loop on a daemon thread."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()  # asyncio itself holds them weakly
        self._thread = threading.Thread(target=self._run, name="mint-http", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Coroutine[Any, Any, T]], *, cancellable: bool = False) -> Future[T]:
        """Run `work()` on the loop. Calls start in the order in which they were submitted.

        With `cancellable`, cancelling the future cancels the work; otherwise the future refuses to be cancelled.
        """
        future: LoopFuture[T] = LoopFuture(self._thread)
        if not cancellable:
            future.set_running_or_notify_cancel()

        def start() -> None:
            task = self._start(work())
            task.add_done_callback(lambda done: _pass_on(done, future))
            if cancellable:
                future.add_done_callback(lambda f: self.call(task.cancel) if f.cancelled() else None)

        try:
            self._loop.call_soon_threadsafe(start)
        except RuntimeError:  # the loop is closed: the process is ending
            _settle(future, error=EngineClosedError("the connection was closed"))
        return future

    def call(self, callback: Callable[[], Any]) -> None:
        """Run a callback on the loop. Takes no lock: the garbage collector may call this in the middle of anything."""
        with contextlib.suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(callback)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task from the loop's own thread."""
        return self._start(work)

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._cancel_all())
            self._loop.close()

    async def _cancel_all(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self) -> None:
        """End the loop; what was still under way is cancelled."""
        self.call(self._loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(5)


async def in_thread(call: Callable[[], T]) -> T:
    """Run something slow beside the loop, on a daemon thread: an executor's threads are gone when a process ends."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        value: Any = None
        problem: BaseException | None = None
        try:
            value = call()
        except BaseException as error:
            problem = error
        with contextlib.suppress(RuntimeError):  # the loop ended meanwhile
            loop.call_soon_threadsafe(_finish, waiter, value, problem)

    threading.Thread(target=run, name="mint-call", daemon=True).start()
    return await waiter


class _Carried(Exception):
    """Takes what would end the loop itself (SystemExit, KeyboardInterrupt, StopIteration) safely to its future."""

    def __init__(self, original: BaseException) -> None:
        super().__init__(repr(original))
        self.original = original


def _finish(waiter: asyncio.Future[Any], value: Any, problem: BaseException | None) -> None:
    if waiter.done():
        return
    if problem is None:
        waiter.set_result(value)
    elif isinstance(problem, Exception) and not isinstance(problem, StopIteration):
        waiter.set_exception(problem)
    else:
        waiter.set_exception(_Carried(problem))


def _pass_on(task: asyncio.Task[T], future: Future[T]) -> None:
    if task.cancelled():
        if not future.cancel():
            _settle(future, error=EngineClosedError("the connection was closed before the answer came"))
    elif (error := task.exception()) is not None:
        _settle(future, error=error.original if isinstance(error, _Carried) else error)
    else:
        _settle(future, task.result())


def _settle(future: Future[Any], result: Any = None, error: BaseException | None = None) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled by its owner
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


_lock = threading.Lock()
_current: Background | None = None
_inherited: list[Background] = []


def background() -> Background:
    """This process's loop, started on first use."""
    global _current
    with _lock:
        if _current is None:
            _current = Background()
        return _current


def stop_background() -> None:
    global _current
    with _lock:
        stopped, _current = _current, None
    if stopped is not None:
        stopped.stop()


def _forget_inherited() -> None:
    """In a forked child the loop has no thread, and its selector is the parent's: never touch or close it."""
    global _lock, _current
    _lock = threading.Lock()  # the parent may have held it
    if _current is not None:
        _inherited.append(_current)
    _current = None


os.register_at_fork(after_in_child=_forget_inherited)
