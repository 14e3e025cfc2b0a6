"""Making archives of checkpoints on request, without keeping the request waiting for ever."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

from fastapi import HTTPException, Request
from starlette.concurrency import run_in_threadpool

from mint_engine.server.shares import files
from mint_engine.server.signed_urls import version_of
from mint_engine.store import ResolvedCheckpoint, Store

_PATIENCE_SECONDS = 20.0  # the SDKs give a request 60


async def make_archive(request: Request, store: Store, path: str) -> ResolvedCheckpoint:
    """Have the archive of a checkpoint made (`Store.archive_file`), and say which checkpoint that is.

    Raises:
        HTTPException: 503 while it is being made; the next request finds it further on. SDKs ask again.
    """
    checkpoint, made = await run_in_threadpool(_look, store, path)
    version = version_of(checkpoint.directory)
    state = request.app.state
    if not hasattr(state, "mint_archives"):
        state.mint_archives = {}
    making: dict[str, asyncio.Task[Path]] = state.mint_archives
    task = making.get(version)
    if task is None:
        keep = partial(store.archive_file, checkpoint.tinker_path)
        task = asyncio.ensure_future(run_in_threadpool(keep) if made else files.run(store.owner, keep))
        making[version] = task
        task.add_done_callback(lambda done: _made(making, version, done))
    await asyncio.wait({task}, timeout=_PATIENCE_SECONDS)
    if not task.done():
        raise HTTPException(503, "the archive is being made: ask again", headers={"Retry-After": "5"})
    task.result()
    return checkpoint


def _look(store: Store, path: str) -> tuple[ResolvedCheckpoint, bool]:
    """The checkpoint, and whether its archive is there already."""
    checkpoint = store.resolve(path)
    return checkpoint, store.is_archived(checkpoint)


def _made(making: dict[str, asyncio.Task[Path]], version: str, done: asyncio.Task[Path]) -> None:
    making.pop(version, None)
    if not done.cancelled():
        done.exception()  # seen, also if whoever asked is gone
