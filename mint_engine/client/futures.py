"""`APIFuture`: the result of a call that has been submitted, for threads and for event loops alike."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import CancelledError, Future
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

T = TypeVar("T")
S = TypeVar("S")
P = ParamSpec("P")

# Python tells a program of Ctrl-C between two of its instructions. A signal that comes just before a wait begins, or to
# another thread, is seen when the wait ends: so no wait is longer than this.
WAIT_SECONDS = 1.0


class APIFuture(Generic[T]):
    """A result that is on its way.

    - `.result(timeout=None)` blocks; `await future` and `.result_async(timeout=None)` do not. Use any, repeatedly.
    - Any public attribute of the result can be read directly, and is waited for: `future.sequences`, `future.loss`.
    - `.future()` is the `concurrent.futures.Future` underneath, for `concurrent.futures.wait` and the like.

    Giving up waiting (a timeout, a cancelled task) does not cancel the work.
    """

    __slots__ = ("_future",)

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> T:
        """The result. Raises what the call raised; TimeoutError after `timeout` seconds."""
        self._wait_for(timeout)
        return self._future.result(0)

    async def result_async(self, timeout: float | None = None) -> T:
        """The same, without blocking the event loop."""
        if self._future.done():
            return self._future.result()  # even if there is no time left
        return await asyncio.wait_for(self._wait(), timeout)

    def __await__(self) -> Generator[Any, None, T]:
        return self._wait().__await__()

    async def coroutine(self) -> T:
        """A coroutine of the result, for what insists on one (`asyncio.create_task`)."""
        return await self._wait()

    def future(self) -> Future[T]:
        return self._future

    def done(self) -> bool:
        return self._future.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the call raised, or None. Waits."""
        self._wait_for(timeout)
        return self._future.exception(0)

    def add_done_callback(self, fn: Callable[[APIFuture[T]], object]) -> None:
        """Call `fn(self)` when the result is there, on the thread that brings it (at once if it is there already)."""
        self._future.add_done_callback(lambda _: fn(self))

    def _wait_for(self, timeout: float | None) -> None:
        """Until it is done, at most `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._future.done():
            left = WAIT_SECONDS if deadline is None else min(WAIT_SECONDS, deadline - time.monotonic())
            if left <= 0:
                return
            with contextlib.suppress(TimeoutError, CancelledError):
                self._future.exception(left)

    async def _wait(self) -> T:
        # asyncio.wrap_future would pass a cancelled wait on to the work. A waiter of our own costs no thread either.
        if not self._future.done():
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[None] = loop.create_future()

            def wake(_: Future[T]) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is waiting any more
                    loop.call_soon_threadsafe(_finish, waiter)

            self._future.add_done_callback(wake)
            await waiter
        return self._future.result()

    def __getattr__(self, name: str) -> Any:
        # Private and dunder names are probed by copy, pickle, inspect and debuggers: those must not wait.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.result(), name)

    def __repr__(self) -> str:
        if not self._future.done():
            return "<APIFuture pending>"
        error = self._future.exception()
        return f"<APIFuture {'raised ' + repr(error) if error is not None else repr(self._future.result())}>"


def _finish(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def completed(value: T) -> APIFuture[T]:
    """A future that has its result already."""
    future: Future[T] = Future()
    future.set_result(value)
    return APIFuture(future)


def failed(error: Exception) -> APIFuture[Any]:
    """A future of a call that was refused."""
    future: Future[Any] = Future()
    future.set_exception(error)
    return APIFuture(future)


def transformed(source: Future[S], fn: Callable[[S], T]) -> Future[T]:
    """A future of `fn(result)`. `fn` runs on the thread that brings the result, so it must be quick."""
    target: Future[T] = Future()

    def pass_on(done: Future[S]) -> None:
        if not target.set_running_or_notify_cancel():
            return
        try:
            target.set_result(fn(done.result()))
        except BaseException as error:  # whatever it is, it belongs to whoever waits for `target`
            target.set_exception(error)

    source.add_done_callback(pass_on)
    return target


def value_twin(
    method: Callable[Concatenate[S, P], Awaitable[T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """The `_async` twin that gives the value when awaited."""

    @functools.wraps(method)
    async def twin(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await method(self, *args, **kwargs)

    return _named_async(twin)


def future_twin(
    method: Callable[Concatenate[S, P], APIFuture[T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, APIFuture[T]]]:
    """The `_async` twin that submits when awaited and gives the APIFuture, to be awaited for the result."""

    @functools.wraps(method)
    async def twin(self: S, /, *args: P.args, **kwargs: P.kwargs) -> APIFuture[T]:
        return method(self, *args, **kwargs)

    return _named_async(twin)


def _named_async(twin: Any) -> Any:
    twin.__name__ += "_async"
    twin.__qualname__ += "_async"
    return twin
