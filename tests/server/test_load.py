"""Sixty-four users at once for two minutes, each training an adapter of its own; then five hundred samples at once.

The time until a promise is printed and not asserted: the users share one Python process and two cores with the server,
and what was measured that way is far above the 100 ms aimed at (NOTES.md).

    python -m pytest tests/server/test_load.py -m slow -s

prints what was measured. MINT_LOAD_SECONDS changes the two minutes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest

import mint
from mint import types

CLIENTS, SAMPLES = 64, 500
SECONDS = float(os.environ.get("MINT_LOAD_SECONDS", "120"))
WARM_UP = 0.25  # part of the time after which memory must stay flat
CHECKED_STEPS = 25  # of each client, against its solo run; every later step is checked by the optimiser's own count
PROMISES = ("forward_backward", "optim_step")
ADAM = types.AdamParams(learning_rate=2e-3, weight_decay=0.01, grad_clip_norm=1.0)


@dataclass
class Process:
    url: str
    pid: int

    @property
    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


@dataclass
class Curve:
    losses: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


@contextmanager
def served(model: Path) -> Iterator[Process]:
    command = [str(Path(sys.executable).with_name("mint-engine")), "serve", "--model", str(model), "--dtype", "float32"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--log-level", "warning"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if " is ready on " in line:
                break
        assert " is ready on " in lines[-1], "".join(lines)
        yield Process(lines[-1].split()[-1], process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 0


@pytest.fixture
def latencies(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds from sending a training request to having its promise, as a client sees it."""
    found: list[float] = []
    send = httpx.AsyncClient.send

    async def timed(self: httpx.AsyncClient, request: httpx.Request, **options: object) -> httpx.Response:
        start = time.perf_counter()
        response = await send(self, request, **options)  # type: ignore[arg-type]
        if request.url.path.endswith(PROMISES):
            found.append(time.perf_counter() - start)
        return response

    monkeypatch.setattr(httpx.AsyncClient, "send", timed)
    return found


def batch(client: int, step: int) -> list[types.Datum]:
    rng = np.random.default_rng([client, step])
    data = []
    for length in rng.integers(4, 24, size=2):
        tokens = rng.integers(0, 199, size=length + 1).tolist()
        weights = rng.random(length).astype(np.float32)
        data.append(
            types.Datum(types.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights})
        )
    return data


async def train(client: mint.TrainingClient, index: int, curve: Curve, until: float) -> None:
    while time.monotonic() < until:
        outcome = client.forward_backward(batch(index, len(curve.losses)), "cross_entropy")
        stepped = client.optim_step(ADAM)
        curve.losses.append((await outcome).metrics["loss:sum"])
        curve.steps.append(((await stepped).metrics or {})["step"])


async def watch_memory(process: Process, until: float) -> list[float]:
    found = []
    while time.monotonic() < until:
        found.append(process.resident_mib)
        await asyncio.sleep(1.0)
    return found


@pytest.mark.slow
def test_many_users_at_once_lose_nothing(tiny_tied: Path, latencies: list[float]) -> None:
    with served(tiny_tied) as process:
        services = [mint.ServiceClient(base_url=process.url) for _ in range(CLIENTS)]
        curves = [Curve() for _ in services]

        async def all_at_once() -> list[float]:
            made = [
                service.create_lora_training_client_async(str(tiny_tied), rank=4, seed=i)
                for i, service in enumerate(services)
            ]
            clients = await asyncio.gather(*made)
            until = time.monotonic() + SECONDS
            training = [train(client, i, curves[i], until) for i, client in enumerate(clients)]
            memory, *_ = await asyncio.gather(watch_memory(process, until), *training)
            return memory

        memory = asyncio.run(all_at_once())
        sampler = services[0].create_sampling_client(base_model=str(tiny_tied))
        params = types.SamplingParams(max_tokens=8, seed=1, stop=[])
        sampled = [sampler.sample(types.ModelInput.from_ints([1, 2, 3]), 1, params) for _ in range(SAMPLES)]
        tokens = [future.result().sequences[0].tokens for future in sampled]
        for service in services:
            service.close()

    ordered = sorted(latencies)
    p50, p99 = statistics.median(ordered), ordered[int(len(ordered) * 0.99)]
    warm = memory[int(len(memory) * WARM_UP)]
    print(
        f"\n{sum(len(c.losses) for c in curves)} steps in {SECONDS:.0f} s; promise p50 {p50 * 1e3:.1f} ms, p99 "
        f"{p99 * 1e3:.1f} ms; resident {warm:.0f} MiB after {SECONDS * WARM_UP:.0f} s, {memory[-1]:.0f} MiB at the end"
    )
    for curve in curves:
        assert curve.steps == [float(n) for n in range(1, len(curve.losses) + 1)]  # none lost, none doubled
        assert len(curve.losses) >= 5
    for i, curve in enumerate(curves):
        np.testing.assert_allclose(curve.losses[:CHECKED_STEPS], solo(tiny_tied, i, curve), rtol=1e-5)
    assert memory[-1] < warm + 64
    assert len(tokens) == SAMPLES
    assert all(t == tokens[0] and len(t) == 8 for t in tokens)


def solo(model: Path, index: int, curve: Curve) -> list[float]:
    """The first losses of the same program, alone and in process."""
    client = mint.ServiceClient(dtype="float32").create_lora_training_client(str(model), rank=4, seed=index)
    losses = []
    for step in range(min(CHECKED_STEPS, len(curve.losses))):
        losses.append(client.forward_backward(batch(index, step), "cross_entropy").result().metrics["loss:sum"])
        client.optim_step(ADAM).result()
    return losses
