"""Storage by project, and timelines as files. (The audit log: tests/client/test_account.py.)"""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime

import pytest
from store_helpers import RUN, move_clock, save

from mint_engine.errors import UserError
from mint_engine.store import ARCHIVE_SECONDS, LedgerEntry, Store


def usage(store: Store, project_id: str | None = None) -> dict[str | None, tuple[int, int]]:
    items = store.storage_usage(project_id).data
    return {item.project_id: (item.checkpoint_count, item.size_bytes) for item in items}


def test_storage_is_counted_as_lists_and_quotas_see_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usage(store) == {}
    path = save(store, "a")
    save(store, "soon", ttl_seconds=60)
    store.copy_checkpoint(path, project_id="of the run")  # which has no session
    size = store.list_user_checkpoints().checkpoints[0].size_bytes
    assert usage(store) == {"p": (2, 2 * size), "of the run": (1, size)}
    assert sum(total for _, total in usage(store).values()) == store.disk_usage()
    assert usage(store, "of the run") == {"of the run": (1, size)}
    assert usage(store.as_owner("else")) == usage(store, "none") == {}
    store.update_session("s-1", project_id="new")
    assert set(usage(store)) == {"new", "of the run"}
    move_clock(monkeypatch, seconds=61)
    assert usage(store, "new") == {"new": (1, size)}
    with pytest.raises(UserError, match="project_id: expected text"):
        store.storage_usage("a\0b")


def test_timelines_are_kept_for_a_day(store: Store) -> None:
    start = datetime.now(UTC)
    store.ledger.append([LedgerEntry(f"{RUN}:req:1", "local", "OptimStep", "done", start, model_id=RUN)])
    file = store.session_trace_file("s-1")
    assert json.loads(file.read_text())["otherData"] == {"session_id": "s-1"}
    old = time.time() - ARCHIVE_SECONDS - 1
    other = file.with_name("other.json")
    other.write_text("{}")
    os.utime(other, (old, old))
    os.utime(file, (old, old))
    assert store.session_trace_file("s-1") == file
    assert [left.name for left in file.parent.iterdir()] == [file.name]
