"""Runs the command line in a process that writes down whatever it does outside its home once it serves.

    python hostile_launcher.py RECORD DIRECTORY... -- serve --model ...

Files written anywhere but below the directories, processes started, hosts called and pickles read end up in RECORD, a
line each.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events, and how many of their arguments, from the first on, are paths that change.
_PATHS = {
    "os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.chmod": 1,
    "os.truncate": 1, "shutil.rmtree": 1, "sqlite3.connect": 1,
}  # fmt: skip
_NEVER = {
    "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "socket.connect", "socket.getaddrinfo",
    "pickle.find_class", "ctypes.dlopen",
}  # fmt: skip


def watch(record: str, directories: list[str]) -> None:
    """From now on, for as long as the process lives: an audit hook cannot be taken away."""
    out = open(record, "a", buffering=1)  # noqa: SIM115
    allowed = (*(os.path.realpath(directory) + os.sep for directory in directories), "/dev/null")

    def inside(path: Any) -> bool:
        return isinstance(path, int) or f"{os.path.realpath(os.fsdecode(path))}{os.sep}".startswith(allowed)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            paths = [path] if path is not None and (flags or 0) & _CHANGES else []
        else:
            paths = list(arguments[: _PATHS.get(event, 0)])
            folder = arguments[-1] if paths else None
            if event in ("os.remove", "os.rmdir", "os.mkdir") and isinstance(folder, int) and folder >= 0:  # dir_fd
                paths = [os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path)) for path in paths]
        if event in _NEVER or not all(inside(path) for path in paths):
            out.write(f"{event} {str(arguments)[:300]}\n")

    sys.addaudithook(hook)


def main() -> None:
    split = sys.argv.index("--")
    record, *directories = sys.argv[1:split]
    from mint_engine.cli import main as command
    from mint_engine.server import serve

    begin = serve._Server.startup

    async def startup(self: Any, sockets: Any = None) -> None:
        await begin(self, sockets)
        watch(record, directories)

    serve._Server.startup = startup  # type: ignore[method-assign]
    sys.argv = ["mint-engine", *sys.argv[split + 1 :]]
    command()


if __name__ == "__main__":
    main()
