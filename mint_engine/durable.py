"""Files that are either there and complete, or not there: temporary name, fsync, rename.

A file or directory is first written beside its target under a hidden temporary name. It and everything in it is
fsynced, then renamed, then the parent directory is fsynced. A failure on the way removes the temporary and leaves the
target as it was. What a killed process leaves behind is cleared by `recover`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mint_engine.errors import StorageError, UserError

_TEMPORARY = ".tmp-"
_REPLACED = ".old-"
_STALE_SECONDS = 24 * 3600  # a temporary this old belongs to a process that was killed, not to one still writing


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
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        yield


def fsync(path: Path) -> None:
    """Flush a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create `path` and its missing parents, durably."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        fsync(directory.parent)


def write_file(target: Path, data: bytes) -> None:
    """Replace `target` by `data` atomically."""
    with replacing_file(target) as temporary:
        temporary.write_bytes(data)


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a log, starting on a new one if a killed process left half a line."""
    with open(path, "a+b") as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line + b"\n")


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


def write_directory(target: Path, fill: Callable[[Path], None], *, overwrite: bool, lock: Path) -> None:
    """Create the directory `target` with what `fill(temporary)` puts into it, all or nothing.

    With `overwrite`, the old directory stays in place until the new one is complete and on the disk.

    Raises:
        UserError: `target` exists and `overwrite` is False (also when somebody else made it meanwhile).
        Whatever `fill` raises.
    """
    if not overwrite:
        _refuse_existing(target)
    make_directory(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=target.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp makes it private
        fill(temporary)
        _fsync_tree(temporary)
        with locked(lock):
            if not overwrite:
                _refuse_existing(target)
            _swap(temporary, target)
            remove_directory(_old_of(target))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise UserError(f"name: {target.name!r} already exists; choose another name or pass overwrite=True")


def _old_of(target: Path) -> Path:
    return target.with_name(_REPLACED + target.name)


def _swap(temporary: Path, target: Path) -> None:
    # rename() cannot replace a directory that is not empty, so the old one steps aside first. Killed between the two
    # renames, `recover` puts it back.
    old = _old_of(target)
    if target.exists():
        remove_directory(old)
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    fsync(target.parent)


def _fsync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        fsync(path)


def remove_directory(directory: Path) -> None:
    """Remove a directory so that a reader sees all of it or nothing. Fine if it does not exist."""
    if not directory.exists():
        return
    doomed = directory.with_name(_TEMPORARY + uuid.uuid4().hex)  # a rename needs no space, even on a full disk
    directory.rename(doomed)
    fsync(directory.parent)
    shutil.rmtree(doomed)


def recover(directory: Path, *, lock: Path) -> None:
    """Finish or undo what a killed process left in `directory`: swaps half done, temporaries of yesterday."""
    if not directory.is_dir():
        return
    leftovers = [path for path in directory.iterdir() if path.name.startswith((_TEMPORARY, _REPLACED))]
    if not leftovers:
        return
    with locked(lock):
        for path in leftovers:
            if not path.exists():
                continue  # another process was quicker
            if path.name.startswith(_REPLACED):
                target = path.with_name(path.name.removeprefix(_REPLACED))
                if target.exists():
                    shutil.rmtree(path)
                else:
                    path.rename(target)
            elif _age(path) > _STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _age(path: Path) -> float:
    """Seconds since the last change; 0 for a temporary whose writer, who needs no lock, has just finished with it."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
