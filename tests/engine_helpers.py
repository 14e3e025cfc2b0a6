"""What the tests of the engine share: a model, some training, what it says, what it samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import numpy as np
from helpers import make_data

from mint_engine.engine import Engine
from mint_engine.types import AdamParams, LoraConfig, ModelInput, SamplingParams

VOCAB = 199
ADAM = AdamParams(learning_rate=1e-2)


@contextmanager
def open_engine(home: Path, dtype: str = "float32", deterministic: bool | None = None) -> Iterator[Engine]:
    """An engine with a small KV cache. Several may be opened on one home, one after the other or at once."""
    engine = Engine(dtype=dtype, home=home, kv_cache_bytes=1 << 22, deterministic=deterministic)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """The device thread waits until the block ends, so that all that is asked in it is ready at once."""
    begun, go = Event(), Event()

    def hold() -> None:
        begun.set()
        assert go.wait(30)

    engine._executor.lane().submit(hold)
    assert begun.wait(30)
    try:
        yield
    finally:
        go.set()


def new_model(engine: Engine, session: str, base: Path, **lora) -> str:
    return engine.create_model(session, str(base), LoraConfig(**{"rank": 4, "seed": 0, **lora})).result()


def train(engine: Engine, model: str, steps: int = 1, seed: int = 0) -> list[float]:
    data = make_data("cross_entropy", (6, 9), VOCAB, seed)
    losses = []
    for _ in range(steps):
        losses.append(engine.forward_backward(model, data, "cross_entropy").result().metrics["loss:sum"])
        engine.optim_step(model, ADAM).result()
    return losses


def logprobs(engine: Engine, model: str) -> np.ndarray:
    out = engine.forward(model, make_data("cross_entropy", (8,), VOCAB, 3), "cross_entropy").result()
    return out.loss_fn_outputs[0]["logprobs"].to_numpy()


def sampled(engine: Engine, sampler: str) -> list:
    params = SamplingParams(max_tokens=8, seed=1)
    return [
        (s.tokens, s.logprobs)
        for s in engine.sample(sampler, ModelInput.from_ints([1, 2, 3]), 2, params).result().sequences
    ]
