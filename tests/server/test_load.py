"""Sixty-four users at once for a while, each training an adapter of its own; then five hundred samples at once.

    python -m pytest tests/server/test_load.py -m slow -s

prints what was measured, in two minutes with MINT_LOAD_SECONDS=120. The users are `load_users.User`: they speak the
protocol as the SDKs do, in one process that leaves the server most of the two cores.
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from load_users import ADAM, User, batch, connect

import mint

CLIENTS, SAMPLES = 64, 500
MEASURED = "MINT_LOAD_SECONDS" in os.environ  # by somebody who sees to it that the machine is quiet
SECONDS = float(os.environ.get("MINT_LOAD_SECONDS", "24"))
WARM_UP = 0.25  # part of the time after which memory must stay flat
CHECKED_STEPS = 25  # of each client, against its solo run; every later step is checked by the optimiser's own count
KEPT_S = 5  # results that were fetched: ten minutes of them would look like a leak
# Median and 99th percentile: 0.001 and 0.05 on a quiet machine, 0.05 and 0.5 of a server that cannot keep up. What a
# neighbour takes away on CI's machine shows in the second.
PROMISE_S = (0.02, 0.1 if MEASURED else 0.5)


@dataclass
class Process:
    url: str
    pid: int

    @property
    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


@contextmanager
def served(model: Path) -> Iterator[Process]:
    command = [str(Path(sys.executable).with_name("mint-engine")), "serve", "--model", str(model), "--dtype", "float32"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--log-level", "warning", "--fetched-ttl-s", str(KEPT_S)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
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


async def watch_memory(process: Process, until: float) -> list[float]:
    found = []
    while time.monotonic() < until:
        found.append(process.resident_mib)
        await asyncio.sleep(1.0)
    return found


async def load(process: Process, model: str) -> tuple[list[User], list[float], list[list[int]]]:
    """The users after their training, the server's memory second by second, and the tokens of every sample."""
    async with connect(process.url) as http:
        users = [User(http, i) for i in range(CLIENTS)]
        await asyncio.gather(*(user.create_model(model) for user in users))
        until = time.monotonic() + SECONDS
        memory, *_ = await asyncio.gather(watch_memory(process, until), *(user.train(until) for user in users))
        await users[0].create_sampler(model)
        return users, memory, await asyncio.gather(*(users[0].sample(i) for i in range(SAMPLES)))


@pytest.mark.slow
@pytest.mark.alone
def test_many_users_at_once_lose_nothing(tiny_tied: Path) -> None:
    with served(tiny_tied) as process:
        users, memory, tokens = asyncio.run(load(process, str(tiny_tied)))

    ordered = sorted(seconds for user in users for seconds in user.promise_seconds)
    p50, p99 = statistics.median(ordered), ordered[int(len(ordered) * 0.99)]
    warm = memory[int(len(memory) * WARM_UP)]
    print(
        f"\n{sum(len(user.losses) for user in users)} steps in {SECONDS:.0f} s; promise p50 {p50 * 1e3:.1f} ms, p99 "
        f"{p99 * 1e3:.1f} ms; resident {warm:.0f} MiB after {SECONDS * WARM_UP:.0f} s, {memory[-1]:.0f} MiB at the end"
    )
    for user in users:
        assert user.steps == [float(n) for n in range(1, len(user.losses) + 1)]  # none lost, none doubled
        assert len(user.losses) >= 5
        np.testing.assert_allclose(user.losses[:CHECKED_STEPS], solo(tiny_tied, user), rtol=1e-5)
    assert memory[-1] < warm + 16
    assert len(tokens) == SAMPLES
    assert all(t == tokens[0] and len(t) == 8 for t in tokens)
    assert (p50 < PROMISE_S[0], p99 < PROMISE_S[1]) == (True, True)


def solo(model: Path, user: User) -> list[float]:
    """The first losses of the same program, alone and in process."""
    client = mint.ServiceClient(dtype="float32").create_lora_training_client(str(model), rank=4, seed=user.index)
    losses = []
    for step in range(min(CHECKED_STEPS, len(user.losses))):
        losses.append(client.forward_backward(batch(user.index, step), "cross_entropy").result().metrics["loss:sum"])
        client.optim_step(ADAM).result()
    return losses
