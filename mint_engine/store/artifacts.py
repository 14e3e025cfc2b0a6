"""Directories of checkpoints: every version has its own, written once and never changed.

A directory counts when the database has a row of it. It is complete and on the disk before that row is committed, so
what a crash leaves behind has no row: nobody sees it, and `discard` removes it when it is swept up. Two things keep a
directory from being removed:

- Its writer locks it (flock, which the kernel releases when a process dies) until the row is committed.
- Whoever resolves a checkpoint is about to read it. A directory's modification time says when that was last (1970:
  never), and for GRACE_SECONDS the directory stays, even if its checkpoint is replaced or deleted meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mint_engine import durable
from mint_engine.errors import UserError

GRACE_SECONDS = 300

_DOOMED = ".doomed-"
_NAME = re.compile(r".+\.[0-9a-f]{12}|\.doomed-[0-9a-f]{12}", re.DOTALL)
_UNLOCKABLE_SECONDS = 24 * 3600  # where directories cannot be locked (NFS), a writer is given a day


def write_version(folder: Path, name: str, fill: Callable[[Path], None], commit: Callable[[Path], None]) -> Path:
    """A new directory `<folder>/<name>.<random>`: filled, flushed to the disk, then given its row by `commit`.

    Raises what `fill` or `commit` raises; nothing is left behind then, or nothing that `discard` may not remove.
    """
    durable.make_directory(folder)
    directory = folder / f"{name}.{secrets.token_hex(6)}"
    directory.mkdir()
    with _lock(directory, fcntl.LOCK_EX):
        try:
            fill(directory)
            durable.fsync_tree(directory)
            durable.fsync(folder)
            os.utime(directory, (0, 0))
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        try:
            commit(directory)
        except UserError:  # raised inside the transaction: it was undone
            shutil.rmtree(directory, ignore_errors=True)
            raise
        except BaseException:
            # Perhaps the database committed and could not say so: leave it to who sees whether there is a row.
            os.utime(directory)
            raise
    return directory


def is_version(path: Path) -> bool:
    """Whether it looks like what `write_version` or `discard` made. Nothing else is ever swept up."""
    return _NAME.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def use(directory: Path) -> bool:
    """Say that `directory` is about to be read, so that it stays for a while. False if it is not there."""
    try:
        with _lock(directory, fcntl.LOCK_SH):
            os.utime(directory)
    except FileNotFoundError:
        return False
    except OSError:  # a home one may only read
        return directory.is_dir()
    return True


def discard(directory: Path, *, at_once: bool = False, unless: Callable[[], bool] = lambda: False) -> bool:
    """Remove a version whose row is gone, so that a reader sees all of it or nothing. False if it must stay for now.

    at_once: do not wait for readers. unless: asked last, when no writer can be at work any more.
    """
    try:
        with _lock(directory, fcntl.LOCK_EX if at_once else fcntl.LOCK_EX | fcntl.LOCK_NB) as held:
            if held is False or (not at_once and _in_use(directory, held)) or unless():
                return False
            doomed = directory.with_name(_DOOMED + secrets.token_hex(6))
            directory.rename(doomed)  # needs no space, even on a full disk
    except FileNotFoundError:
        return True  # somebody else was quicker
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def _in_use(directory: Path, lockable: bool | None) -> bool:
    status = directory.stat()
    if lockable is None:
        return time.time() - status.st_ctime < _UNLOCKABLE_SECONDS
    return abs(time.time() - status.st_mtime) < GRACE_SECONDS


@contextmanager
def _lock(directory: Path, operation: int) -> Iterator[bool | None]:
    """Yields whether the lock is held; None where the file system cannot lock directories."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    held: bool | None = True
    try:
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            held = False
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            held = None
        yield held
    finally:
        if held:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # not left to close(): a forked child has the descriptor too
        os.close(descriptor)
