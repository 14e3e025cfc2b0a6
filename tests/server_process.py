"""Servers in processes of their own, for tests that end them: by SIGTERM or kill -9, to be started again."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STARTED_WITHIN = 120.0  # seconds, on a busy machine
ENDED_WITHIN = 90.0
_READY = re.compile(r"is ready on (http://127\.0\.0\.1:\d+)")
_ENDED = re.compile(r"<process ended (-?\d+)>")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """`mint-engine serve` on a home and a port that stay the same from start to start."""

    def __init__(self, home: Path, model: Path, **settings: Any) -> None:
        self.home, self.port, self.log = home, free_port(), [""]
        self.settings = {"dtype": "float32", "kv_cache_bytes": 1 << 22, **settings}
        self.settings |= {"home": str(home), "port": self.port, "models": [str(model)]}
        self.url = f"http://127.0.0.1:{self.port}"
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._pid: int | None = None

    def start(self) -> None:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in self.settings.items() if name != "models"]
        command = [str(Path(sys.executable).with_name("mint-engine")), "serve", *flags]
        command += [f"--model={model}" for model in self.settings["models"]]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_quiet())

        def read() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    self._lines.put(line)
            self._lines.put(f"<process ended {process.wait()}>")

        threading.Thread(target=read, daemon=True).start()
        self._pid = process.pid
        self._read_until(_READY, STARTED_WITHIN)

    def signal(self, number: int) -> None:
        """Send it and do not wait."""
        assert self._pid is not None
        os.kill(self._pid, number)

    def ended(self) -> int:
        """Wait until the process is gone; its exit code, or minus the signal's number."""
        code = int(self._read_until(_ENDED, ENDED_WITHIN))
        self._pid = None
        return code

    def terminate(self) -> None:
        """End it well."""
        self.signal(signal.SIGTERM)
        code = self.ended()
        assert code == 0, f"ended with {code} after SIGTERM:\n{self.tail()}"

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.ended() == -signal.SIGKILL

    def tail(self) -> str:
        return "".join(self.log[-40:])

    def close(self) -> None:
        if self._pid is not None:
            self.terminate()

    def _read_until(self, pattern: re.Pattern[str], seconds: float) -> str:
        """Wait for a line that matches; its first group."""
        while True:
            try:
                line = self._lines.get(timeout=seconds)
            except queue.Empty:
                raise AssertionError(f"no line like {pattern.pattern!r} within {seconds} s:\n{self.tail()}") from None
            assert line is not None
            self.log.append(line)
            if found := pattern.search(line):
                return found[1]
            assert not _ENDED.search(line), f"the server ended:\n{self.tail()}"


# Imports take seconds; a process forked from one that has done them starts serving at once. It has no threads yet.
_NURSERY = """
import json, os, sys
import mint_engine.server.app, mint_engine.server.serve
import alembic.command, transformers.models.auto.tokenization_auto
from mint_engine.server import Settings
print("<nursery>", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        print(f"<process {os.getpid()}>", flush=True)
        os._exit(mint_engine.server.serve.run(Settings(**json.loads(line))))
    status = os.waitpid(child, 0)[1]
    print(f"<process ended {os.waitstatus_to_exitcode(status)}>", flush=True)
"""
_BORN = re.compile(r"<process (\d+)>")


class QuickServerProcess(ServerProcess):
    """The same server, forked from a process that has imported everything: to be started and ended many times."""

    def __init__(self, home: Path, model: Path, **settings: Any) -> None:
        super().__init__(home, model, **settings)
        command = [sys.executable, "-c", _NURSERY]
        self._nursery = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_quiet()
        )

        def read() -> None:
            assert self._nursery.stdout is not None
            with self._nursery.stdout:
                for line in self._nursery.stdout:
                    self._lines.put(line)

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()
        self._read_until(re.compile("(<nursery>)"), STARTED_WITHIN)

    def start(self) -> None:
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(json.dumps(self.settings) + "\n")
        self._nursery.stdin.flush()
        self._pid = int(self._read_until(_BORN, STARTED_WITHIN))
        self._read_until(_READY, STARTED_WITHIN)

    def close(self) -> None:
        super().close()
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        assert self._nursery.wait(30) == 0
        self._reader.join(30)


class Restarts:
    """Restarts a server, `delay` seconds after each of `parts` was reached, while its clients go on."""

    def __init__(self, server: ServerProcess, parts: tuple[str, ...], delay: float) -> None:
        self._server, self._parts, self._delay = server, parts, delay
        self._threads: list[threading.Thread] = []
        self._one_at_a_time = threading.Lock()
        self.problems: list[BaseException] = []

    def reached(self, part: str) -> None:
        if part in self._parts:
            self._threads.append(threading.Thread(target=self._restart))
            self._threads[-1].start()

    def _restart(self) -> None:
        try:
            with self._one_at_a_time:
                threading.Event().wait(self._delay)
                self._server.terminate()
                self._server.start()
        except BaseException as problem:
            self.problems.append(problem)

    def join(self) -> int:
        for thread in self._threads:
            thread.join()
        assert not self.problems, self.problems
        return len(self._threads)


def _quiet() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MINT_")}
    return kept | {"PYTHONUNBUFFERED": "1"}


@contextmanager
def server_process(
    home: Path, model: Path, kind: type[ServerProcess] = QuickServerProcess, **settings: Any
) -> Iterator[ServerProcess]:
    """A started server, ended well at the end of the block."""
    server = kind(home, model, **settings)
    server.start()
    try:
        yield server
    finally:
        server.close()
