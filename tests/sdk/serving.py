"""`mint-engine serve` as a process of its own, as a user starts it; drivers as processes in an SDK's environment."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import Environment

DRIVERS = Path(__file__).parent / "drivers"
COMMAND = Path(sys.executable).with_name("mint-engine")
_URL = re.compile(r"https?://127\.0\.0\.1:\d+")
_STARTED_WITHIN = 120.0  # seconds; the first start converts and loads a model


@dataclass(frozen=True)
class Server:
    """A running server and two users' keys; `sk_key` is one that mindlab-toolkit's documents show."""

    url: str
    home: Path
    key: str
    other_key: str
    sk_key: str
    other_sk_key: str

    def keys(self, package: str) -> dict[str, str]:
        if package == "mint":
            return {"key": self.sk_key, "other_key": self.other_sk_key}
        return {"key": self.key, "other_key": self.other_key}


@contextmanager
def serve(home: Path, model: str, *flags: str) -> Iterator[Server]:
    """Four keys, then the server, on a free port; ended by SIGTERM, after which it must exit 0."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MINT_", "TINKER_"))}
    environment["MINT_HOME"] = str(home)
    keys = _keys(home)
    command = [str(COMMAND), "serve", "--model", model, "--port", "0", *flags]
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=1
    )
    output = _Output(process)
    try:
        yield Server(output.url(), home, **keys)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=90)
        log = output.end()
    assert code == 0, f"the server ended with {code} after SIGTERM:\n{''.join(log[-40:])}"


def _keys(home: Path) -> dict[str, str]:
    from mint_engine.store import Store

    prefixes = {"key": "tml-", "other_key": "tml-", "sk_key": "sk-", "other_sk_key": "sk-"}
    store = Store(home)
    try:
        return {name: store.keys.create(name, prefix=prefix)[1] for name, prefix in prefixes.items()}
    finally:
        store.close()


class _Output:
    """What a server prints. A thread reads it, so that the server never waits for a full pipe."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._log: list[str] = []
        self._urls: queue.Queue[str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._log.append(line)
                if found := _URL.search(line):
                    self._urls.put(found[0])
        self._urls.put(None)

    def url(self) -> str:
        """From the lines that the server prints for pasting into a client."""
        url = self._urls.get(timeout=_STARTED_WITHIN)
        assert url is not None, f"the server did not start:\n{''.join(self._log)}"
        return url

    def end(self) -> list[str]:
        """All lines, once the server has ended."""
        self._thread.join()
        return self._log


def drive(
    environment: Environment, driver: str, out: Path, server: Server, base_model: str, *arguments: str,
    timeout: float = 600.0,
) -> dict[str, Any]:  # fmt: skip
    """Run `drivers/<driver>.py` in an environment; its report, if it wrote one."""
    package = "mint" if environment.name.startswith("mindlab") else "tinker"
    out.mkdir(parents=True, exist_ok=True)
    request = {"url": server.url, "base_model": base_model, "package": package, "out": str(out)}
    (out / "request.json").write_text(json.dumps(request | server.keys(package)))
    command = [str(environment.python), "-W", "ignore", str(DRIVERS / f"{driver}.py"), str(out / "request.json")]
    done = subprocess.run(
        [*command, *arguments], env=sdk_environment(), cwd=out, capture_output=True, text=True, timeout=timeout
    )
    (out / f"{driver}.log").write_text(done.stdout + done.stderr)
    report = out / "report.json"
    assert ended_well(done, finished=report.exists()), (
        f"{driver} in {environment.name} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    )
    return json.loads(report.read_text()) if report.exists() else {}


def ended_well(done: subprocess.CompletedProcess[str], *, finished: bool) -> bool:
    """Whether a program of an SDK did its work. ``finished``: it has left what it leaves last.

    tinker 0.38 now and then aborts after its last Python frame (3 of 80 runs of `tinker run list` under faulthandler,
    which names no frame; without it nothing is on stderr).
    """
    return done.returncode == 0 or (done.returncode == -signal.SIGABRT and finished)


def sdk_environment() -> dict[str, str]:
    """Nothing of this project's environment, nor of a developer's own SDK settings, reaches an SDK."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MINT_", "TINKER_", "PYTHON"))}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
