"""An RL loop awaits thousands of samples at once in the engine's own process."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from engine_helpers import VOCAB, open_engine

import mint
from mint import types

REQUESTS = 2000


def test_two_thousand_samples_are_awaited_at_once(tiny_tied: Path, tmp_path: Path) -> None:
    """Each is its own call with its own seed, and none costs more than a few milliseconds of processor time."""

    calls = [
        ([i % VOCAB, i // VOCAB, 7], 1, types.SamplingParams(max_tokens=3, seed=i, stop=[])) for i in range(REQUESTS)
    ]

    async def everything(client: mint.SamplingClient) -> list[types.SampleResponse]:
        return await asyncio.gather(*(client.sample_async(*call) for call in calls))

    with open_engine(tmp_path / "home") as engine:
        client = mint.ServiceClient(engine=engine).create_sampling_client(base_model=str(tiny_tied))
        begun = time.process_time()
        answers = asyncio.run(everything(client))
        spent = time.process_time() - begun
        stats = engine.stats()
        assert client.sample(*calls[-1]).result().sequences[0].tokens == answers[-1].sequences[0].tokens
    assert [len(answer.sequences[0].tokens) for answer in answers] == [3] * REQUESTS
    assert (stats.samples_waiting, stats.samples_running, stats.failures["sample"]) == (0, 0, 0)
    assert spent < 0.02 * REQUESTS
