"""Servers in processes of their own, for tests that end them: by SIGTERM or kill -9, to be started again."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nursery import STARTED_WITHIN, nursery

ENDED_WITHIN = 90.0  # seconds, on a busy machine


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
        self._lines: queue.SimpleQueue[str | int] = queue.SimpleQueue()
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
            self._lines.put(process.wait())

        threading.Thread(target=read, daemon=True).start()
        self._pid = process.pid
        self._read_until_ready()

    def signal(self, number: int) -> None:
        """Send it and do not wait."""
        assert self._pid is not None
        os.kill(self._pid, number)

    def ended(self) -> int:
        """Wait until the process is gone; its exit code, or minus the signal's number."""
        while isinstance(line := self._line(ENDED_WITHIN), str):
            pass
        self._pid = None
        return line

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

    def _read_until_ready(self) -> None:
        while isinstance(line := self._line(STARTED_WITHIN), str):
            if f"is ready on {self.url}" in line:
                return
        raise AssertionError(f"the server ended with {line}:\n{self.tail()}")

    def _line(self, seconds: float) -> str | int:
        """What it prints next, which goes into the log, or its exit code."""
        try:
            line = self._next(seconds)
        except queue.Empty:
            raise AssertionError(f"no line within {seconds} s:\n{self.tail()}") from None
        if isinstance(line, str):
            self.log.append(line)
        return line

    def _next(self, seconds: float) -> str | int:
        return self._lines.get(timeout=seconds)


_IMPORTS = """
import mint_engine.server.app, mint_engine.server.serve
import alembic.command, transformers.models.auto.tokenization_auto
"""
_SERVE = """
import json, os, sys
from mint_engine.server import Settings, serve
os._exit(serve.run(Settings(**json.loads(sys.argv[1]))))
"""


class QuickServerProcess(ServerProcess):
    """The same server, from a nursery: to be started and ended many times. Only one of them runs at a time."""

    def start(self) -> None:
        self._nursery = nursery(_IMPORTS)
        self._pid = self._nursery.start(_SERVE, json.dumps(self.settings))
        self._read_until_ready()

    def _next(self, seconds: float) -> str | int:
        return self._nursery.line(seconds)


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
