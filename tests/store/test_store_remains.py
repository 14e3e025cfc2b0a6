"""What is left of replaced, deleted and unfinished checkpoints goes away, but not under a reader or a writer."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from pathlib import Path

import pytest
from store_helpers import META, RUN, Place, move_clock, note, save, text_of, versions

from mint_engine.errors import NotFoundError, StorageError
from mint_engine.store import GRACE_SECONDS, Store, artifacts
from mint_engine.store.database import Database

REMOVALS = {
    "overwritten": lambda store, path: save(store, "a", "new", overwrite=True),
    "deleted": lambda store, path: store.delete_checkpoint(path),
    "expired": lambda store, path: store.set_ttl(path, 1),
}


@pytest.mark.parametrize("removal", REMOVALS)
def test_a_resolved_directory_stays_readable_for_a_while(
    store: Store, removal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(store, "a", "old")
    directory = store.resolve(path).directory
    REMOVALS[removal](store, path)
    move_clock(monkeypatch, seconds=5)
    store.purge_expired()
    assert (directory / "note.txt").read_text() == "old", "somebody may be loading it"
    if removal == "overwritten":
        assert text_of(store, path) == "new"
    else:
        with pytest.raises(NotFoundError):
            store.resolve(path)
    move_clock(monkeypatch, seconds=GRACE_SECONDS)
    store.purge_expired()
    assert not directory.exists()
    assert len(versions(store)) == (1 if removal == "overwritten" else 0)


def test_a_deletion_can_be_at_once(store: Store) -> None:
    path = save(store, "a")
    store.resolve(path)
    store.delete_checkpoint(path, at_once=True)
    assert versions(store) == []


def test_the_remains_of_a_killed_writer_are_removed_once_it_is_dead(
    place: Place, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = f"""
def writer(directory):
    note("half")(directory)
    print("writing", flush=True)
    signal.pause()
save(store, {RUN!r}, "weights", "a", writer)
"""
    child = subprocess.Popen(place.python(writing), stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "writing\n"
        move_clock(monkeypatch, days=2)
        store.purge_expired()
        assert len(versions(store)) == 1, "its writer is slow, not dead"
        child.send_signal(signal.SIGKILL)
        child.wait()
    finally:
        child.kill()
        child.communicate()
    store.purge_expired()
    assert versions(store) == []


def test_a_row_committed_at_the_last_moment_saves_its_directory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The purge saw the directory before its row was there."""
    monkeypatch.setattr(Store, "_known", lambda self: set())
    path = save(store, "a")
    move_clock(monkeypatch, days=1)
    store.purge_expired()
    assert text_of(store, path) == "x"


def test_nothing_else_in_the_home_is_ever_removed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, "a")
    folder = store.home / "runs" / "s-1.train.0" / "weights"
    (folder / "my notes").mkdir()
    (folder / "b.0123456789ab").write_text("a file")
    (folder / "c.0123456789ab").symlink_to("/etc")
    before = versions(store)
    move_clock(monkeypatch, days=1000)
    store.purge_expired()
    assert versions(store) == before


def test_a_commit_that_may_have_happened_keeps_its_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection breaks while the database says yes: the row may be there."""
    write = Database.write

    class Broken:
        def __init__(self, inner: object) -> None:
            self.inner = inner

        def __enter__(self) -> object:
            return self.inner.__enter__()

        def __exit__(self, *error: object) -> None:
            self.inner.__exit__(*error)
            raise StorageError(5, "the connection was lost")

    monkeypatch.setattr(Database, "write", lambda self, action: Broken(write(self, action)))
    with pytest.raises(StorageError):
        save(store, "a")
    monkeypatch.undo()
    move_clock(monkeypatch, days=1)
    store.purge_expired()
    assert text_of(store, f"{RUN}/weights/a") == "x"


def test_saving_cleans_up_now_and_then_and_its_failure_is_not_the_savers(
    place: Place, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, "a", ttl_seconds=1)
    save(store, "kept")
    move_clock(monkeypatch, hours=1)
    save(place.open(), "b")
    assert len(versions(store)) == 2, "the first save of a process purges"

    def fail(*args: object, **more: object) -> None:
        raise StorageError(5, "cannot")

    monkeypatch.setattr(artifacts, "discard", fail)
    (store.home / "runs" / "s-1.train.0" / "weights" / "x.0123456789ab").mkdir()
    with caplog.at_level(logging.ERROR):
        save(place.open(), "c")
    assert "purging" in caplog.text


def test_a_home_that_cannot_be_written_can_still_be_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(store, "a")

    def refuse(*args: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    assert text_of(store, path) == "x"


def test_a_file_system_without_locks_gives_writers_a_day(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(artifacts.fcntl, "flock", refuse)
    path = store.write_checkpoint(RUN, "weights", "a", note("old"), **META)
    save(store, "a", "new", overwrite=True)
    assert text_of(store, path) == "new"
    assert len(versions(store)) == 2
    move_clock(monkeypatch, hours=25)
    store.purge_expired()
    assert len(versions(store)) == 1
    assert Path(store.resolve(path).directory).exists()
