"""The contenders' processes. Only the one that computes runs; the others are stopped, so that nobody's threads spin."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mint_engine.kernels.op import native

# numpy's OpenBLAS threads spin beside torch's; a waiting policy is the machine owner's, not the benchmark's.
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


class ContenderError(RuntimeError):
    """A contender could not be made, or failed at its work: the message says why."""


class Process:
    """A worker (worker.py), stopped whenever it is not asked."""

    def __init__(self, workload: str, contender: str, threads: int) -> None:
        self.name = contender
        kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        command = [sys.executable, "-m", "benchmarks.training.worker", workload, contender, str(threads), native.isa()]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
            env=kept | ENVIRONMENT,
        )  # fmt: skip
        self._answer()

    def ask(self, command: str, *arguments: object) -> dict[str, Any]:
        """Raises ContenderError if it failed, also if the system ended it (memory)."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(" ".join([command, *map(str, arguments)]) + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ContenderError(f"{self.name}: ended with {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ContenderError(f"{self.name}: {answer['error']}")
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def processes(workload: str, contenders: list[str], threads: int) -> Iterator[dict[str, Process | str]]:
    """A process for each, or the reason why there is none."""
    made: dict[str, Process | str] = {}
    try:
        for name in contenders:
            try:
                made[name] = Process(workload, name, threads)
            except ContenderError as error:
                made[name] = str(error)
        yield made
    finally:
        for process in made.values():
            if isinstance(process, Process):
                process.end()
