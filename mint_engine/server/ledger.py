"""The request ledger: one row for every promise, written in batches off the event loop."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool

from mint_engine.store import LedgerEntry

if TYPE_CHECKING:
    from mint_engine.server.promises import Promise
    from mint_engine.store import Store

log = logging.getLogger(__name__)

DELAY_S = 1.0
"""From the first entry of a batch to its write; at the end of the process `flush` writes the rest."""
_MOST = 10_000  # entries kept while the database refuses


class Ledger:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._entries: list[LedgerEntry] = []
        self._writing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def record(self, promise: Promise) -> None:
        """Remember a settled promise."""
        failure = promise.failure
        self._entries.append(
            LedgerEntry(
                request_id=promise.request_id,
                owner=promise.owner,
                model_id=promise.model_id,
                seq_id=promise.seq_id,
                kind=promise.kind,
                status="done" if failure is None else "failed",
                accepted=datetime.fromtimestamp(promise.accepted, UTC),
                finished=datetime.fromtimestamp(promise.finished or promise.accepted, UTC),
                tokens=promise.tokens,
                error=None if failure is None else failure.detail[:1000],
            )
        )
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(DELAY_S, self._write_soon)

    async def flush(self) -> None:
        """Write everything now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writing is not None:
            await self._writing
        await self._write()

    def _write_soon(self) -> None:
        self._timer = None
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write())
        else:  # the database is slow: the next batch waits for this one
            self._timer = asyncio.get_running_loop().call_later(DELAY_S, self._write_soon)

    async def _write(self) -> None:
        entries, self._entries = self._entries, []
        if not entries:
            return
        try:
            await run_in_threadpool(self._store.ledger.append, entries)
        except Exception:
            log.exception("the request ledger could not be written; %d entries wait", len(entries))
            self._entries = [*entries, *self._entries][-_MOST:]
