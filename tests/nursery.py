"""`python -c` that starts at once: forked from a process that has done the imports, which take up to seconds.

For processes that are to be started and killed many times. They are processes like others; only one runs at a time.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import queue
import re
import subprocess
import sys
import threading

STARTED_WITHIN = 120.0  # seconds, on a busy machine

# It has no threads when it forks. What a child raises ends it as it would end any program: a traceback and status 1.
_SOURCE = """
import json, os, sys
print("<nursery>", flush=True)
for line in sys.stdin:
    code, *sys.argv[1:] = json.loads(line)
    child = os.fork()
    if child == 0:
        print(f"<process {os.getpid()}>", flush=True)
        exec(code, {"__name__": "__main__"})
        sys.exit()
    status = os.waitpid(child, 0)[1]
    print(f"<process ended {os.waitstatus_to_exitcode(status)}>", flush=True)
"""
_BORN = re.compile(r"<process (\d+)>")
_ENDED = re.compile(r"<process ended (-?\d+)>$")


class Nursery:
    """``imports``: statements that it does before the first child comes. Children get the environment of now."""

    def __init__(self, imports: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MINT_")}
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._pid: int | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{imports}\n{_SOURCE}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=kept | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._match(re.compile("(<nursery>)"))

    def start(self, code: str, *arguments: str) -> int:
        """Run ``code`` in a child, with these in `sys.argv`; its process id."""
        assert self._pid is None, f"process {self._pid} has not ended"
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([code, *arguments]) + "\n")
        self._process.stdin.flush()
        self._pid = int(self._match(_BORN))
        return self._pid

    def line(self, seconds: float = STARTED_WITHIN) -> str | int:
        """What the child prints next or, when it has ended, its exit code or minus the signal's number.

        Without its end, if the child was killed within a line. Raises `queue.Empty` if nothing comes for so long.
        """
        line = self._lines.get(timeout=seconds)
        if not (found := _ENDED.search(line)):
            return line
        if found.start():
            self._lines.put(found[0])
            return line[: found.start()]
        self._pid = None
        return int(found[1])

    def close(self) -> None:
        """It ends when there is nothing more to read."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._reader.join(30)

    def _match(self, pattern: re.Pattern[str]) -> str:
        """Its own next line, which looks so; the first group."""
        line = self._lines.get(timeout=STARTED_WITHIN)
        found = pattern.search(line)
        assert found, f"no line like {pattern.pattern!r} but {line!r}"
        return found[1]

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout:
            for line in self._process.stdout:
                self._lines.put(line)


@functools.cache
def nursery(imports: str) -> Nursery:
    """That of all tests of this process which need these imports."""
    made = Nursery(imports)
    atexit.register(made.close)
    return made
