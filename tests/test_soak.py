"""Many thousand samples beside training, as an RL loop asks for them: nobody waits for ever, and memory stays flat."""

from __future__ import annotations

import asyncio
import gc
import itertools
from pathlib import Path

import numpy as np
import psutil
import pytest
from engine_helpers import ADAM, VOCAB, open_engine
from helpers import make_data

import mint
from mint import types
from mint_engine.errors import SampleCancelledError

pytestmark = pytest.mark.slow  # a minute

ROUNDS, REQUESTS = 16, 400
WARM = 3  # rounds in which pools and caches may still grow
MOST_GROWTH = 16 << 20  # bytes; one request in a hundred that was kept would be more


async def one_round(service: mint.ServiceClient, trainer: mint.TrainingClient, rng: np.random.Generator) -> int:
    """A step, a sampler of the new weights, and requests of all sizes to it and to the base; answers how many ended."""
    sampler = await trainer.save_weights_and_get_sampling_client_async()
    base = await service.create_sampling_client_async(base_model=trainer.get_info().model_data.model_name)
    prefix = rng.integers(0, VOCAB, 70).tolist()

    async def ask(client: mint.SamplingClient) -> int:
        prompt = [*prefix[: rng.integers(1, 70)], *rng.integers(0, VOCAB, rng.integers(1, 60)).tolist()]
        params = types.SamplingParams(max_tokens=int(rng.integers(1, 40)), seed=int(rng.integers(1 << 30)))
        samples = int(rng.integers(1, 5))
        if rng.random() < 0.1:
            stream = client.stream(prompt, samples, params)
            async for _ in stream:
                break
            await stream.aclose()
            return 0
        answer = await client.sample_async(prompt, samples, params, include_prompt_logprobs=bool(rng.random() < 0.2))
        return len(answer.sequences)

    asked = [ask(client) for client in itertools.islice(itertools.cycle((sampler, base)), REQUESTS)]
    trained = trainer.forward_backward(make_data("cross_entropy", (6, 9), VOCAB), "cross_entropy")
    trainer.optim_step(ADAM)
    ended = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 120)
    await trained
    assert all(isinstance(one, int | SampleCancelledError) for one in ended), ended
    return sum(one for one in ended if isinstance(one, int))


def test_memory_stays_flat_and_nobody_waits_for_ever(tiny_tied: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    resident: list[int] = []
    with open_engine(tmp_path / "home", dtype="bfloat16") as engine:
        service = mint.ServiceClient(engine=engine)
        trainer = service.create_lora_training_client(str(tiny_tied), 8, seed=0)
        for _ in range(ROUNDS):
            assert asyncio.run(one_round(service, trainer, rng)) > REQUESTS
            gc.collect()
            resident.append(psutil.Process().memory_info().rss)
            stats = engine.stats()
            assert (stats.samples_waiting, stats.samples_running, stats.kv_cache_bytes_used) == (0, 0, 0)
            assert stats.samplers <= 4
    assert max(resident[WARM:]) - min(resident[:WARM]) < MOST_GROWTH, [size >> 20 for size in resident]
