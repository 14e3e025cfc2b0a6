"""The samplers behind `model`: made when first asked for, kept while they are used."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool

from mint_engine.errors import NotFoundError, UserError
from mint_engine.server.openai.errors import ApiError

if TYPE_CHECKING:
    from mint_engine.engine import Engine
    from mint_engine.server.caller import Caller

SCHEMES = ("tinker://", "mint://")


@dataclass
class _Entry:
    """``users`` requests are about to use the sampler: it stays."""

    sampler: asyncio.Task[str]
    users: int = 0


class Samplers:
    """One sampler for every version an owner asks for, the least recently used let go of when there are too many.

    A checkpoint's version is its directory: one that was overwritten gets a new sampler, one that was deleted is gone.
    Used from one event loop.
    """

    def __init__(self, engine: Engine, resolve_base: Callable[[str], str], limit: int) -> None:
        self._engine, self._resolve_base, self._limit = engine, resolve_base, limit
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._sessions: dict[str, asyncio.Task[str]] = {}

    @asynccontextmanager
    async def use(self, caller: Caller, model: str) -> AsyncIterator[tuple[str, str]]:
        """(sampler id, base model) of what ``model`` names. Inside, the sampler is not let go of.

        Raises:
            ApiError: 404, there is no such model.
        """
        path = model if model.startswith(SCHEMES) else None
        base, version = await self._find(caller, model, path)
        key = caller.owner, version
        entry = self._entries.get(key)
        if entry is None or not self._usable(entry):
            entry = _Entry(_task(self._make(caller, base, path)))
            self._entries[key] = entry
        self._entries.move_to_end(key)
        entry.users += 1
        try:
            yield await asyncio.shield(entry.sampler), base  # who hangs up does not stop it for the others
        finally:
            entry.users -= 1
            self._trim()

    async def _find(self, caller: Caller, model: str, path: str | None) -> tuple[str, str]:
        """(base model, what tells this version from others)."""
        try:
            if path is None:
                base = self._resolve_base(model)
                return base, base
            found = await run_in_threadpool(caller.store.resolve, path, "sampler_weights")
        except (NotFoundError, UserError) as error:
            raise ApiError(404, f"model: {error}", param="model", code="model_not_found") from error
        try:
            return self._resolve_base(found.record.base_model), str(found.directory)
        except UserError as error:
            raise ApiError(404, f"model: its base is not served: {error}", param="model") from error

    def _usable(self, entry: _Entry) -> bool:
        """False for a sampler that could not be made, or that somebody else has let go of."""
        if not entry.sampler.done():
            return True
        if _failed(entry.sampler):
            return False
        try:
            self._engine.get_sampler(entry.sampler.result())
        except NotFoundError:
            return False
        return True

    async def _make(self, caller: Caller, base: str, path: str | None) -> str:
        session = self._sessions.get(caller.owner)
        if session is None or _failed(session):
            session = self._sessions[caller.owner] = _task(self._open_session(caller.owner))
        session_id = await session
        if path is None:
            future = self._engine.create_sampler(session_id, base_model=base)
        else:
            future = self._engine.create_sampler(session_id, model_path=path, reader=caller.store)
        return await asyncio.wrap_future(future)

    async def _open_session(self, owner: str) -> str:
        """What this face samples for an owner is listed under one session of that owner's."""
        return await run_in_threadpool(lambda: self._engine.create_session(owner=owner, tags=["openai"]))

    def _trim(self) -> None:
        for key in [k for k, entry in self._entries.items() if entry.users == 0 and entry.sampler.done()]:
            failed = _failed(self._entries[key].sampler)
            if failed or len(self._entries) > self._limit:
                entry = self._entries.pop(key)
                if not failed:
                    self._engine.release(entry.sampler.result())


def _task(work: Coroutine[Any, Any, str]) -> asyncio.Task[str]:
    """A task whose failure nobody may be left to hear of."""
    task = asyncio.create_task(work)
    task.add_done_callback(_failed)
    return task


def _failed(task: asyncio.Task[str]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
