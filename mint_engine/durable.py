"""Files and directories that are complete and on the disk before anybody is told about them."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mint_engine.errors import StorageError

_TEMPORARY = ".tmp-"


@contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Turn the operating system's refusals (disk full, read-only, ...) into a StorageError that says what failed."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(error.errno, f"{action} failed: {reason}; nothing was changed") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, against other threads and other processes. Not re-entrant."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Not left to close(): a child forked meanwhile holds the file open as well.
            fcntl.flock(file, fcntl.LOCK_UN)


def fsync(path: Path) -> None:
    """Flush a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """Flush a directory and everything in it."""
    for path in [*directory.rglob("*"), directory]:
        fsync(path)


def make_directory(path: Path) -> None:
    """Create `path` and its missing parents, durably."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        fsync(directory.parent)


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yields a temporary path to fill; on success it becomes `target`, on an exception it disappears."""
    handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(target.parent)
