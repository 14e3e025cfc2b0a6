"""Training clients that call at the same time, against the same ones one after the other; and what company costs.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.packed_clients [--rounds 7] [--rank 16] [--save]

At the same time: the device thread is held until every client's forward_backward and optim_step wait. One after the
other: each client's two calls are made when the one before has its results. The same models, data and work, interleaved
in one run; each turn is taken twice and the second time counts, as clients that train go on as they began: the first
puts everybody into a seat again, after the others' turn. Last, one forward_backward of 8 adapters that share a batch
against one adapter with the same tokens.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch

from benchmarks.timing import interleaved, medians, report
from mint_engine import trainer
from mint_engine.adapters import Adapter, TrainState
from mint_engine.calls import Call
from mint_engine.datums import check_data
from mint_engine.engine import Engine
from mint_engine.losses import get_loss
from mint_engine.types import AdamParams, Datum, LoraConfig, ModelInput

CASES = {"8 x 16": (8, 16, 0.5), "4 x 128": (4, 128, 0.9)}  # clients, tokens of each, most of the time apart
SHARED = (8, 128, 0.9)  # adapters, tokens of each, least of the speed of one
ADAM = AdamParams(learning_rate=1e-5)
MODEL = "smollm2-135m"


def datum(tokens: int, seed: int) -> Datum:
    """Random tokens, the last half of them in the loss."""
    rng = np.random.default_rng(seed)
    weights = (np.arange(tokens) >= tokens // 2).astype(np.float32)
    inputs = {"target_tokens": rng.integers(0, 49000, tokens), "weights": weights}
    return Datum(ModelInput.from_ints(rng.integers(0, 49000, tokens).tolist()), inputs)


def apart(engine: Engine, models: Sequence[str], data: Sequence[Datum]) -> None:
    for model, one in zip(models, data, strict=True):
        engine.forward_backward(model, [one], "cross_entropy").result()
        engine.optim_step(model, ADAM).result()


def at_once(engine: Engine, models: Sequence[str], data: Sequence[Datum]) -> None:
    go = Event()
    engine._executor.lane().submit(go.wait)
    futures = []
    for model, one in zip(models, data, strict=True):
        engine.forward_backward(model, [one], "cross_entropy")
        futures.append(engine.optim_step(model, ADAM))
    go.set()
    for future in futures:
        future.result()


def clients(engine: Engine, count: int, tokens: int, rank: int) -> dict[str, Callable[[], None]]:
    session = engine.create_session()
    models = [engine.create_model(session, MODEL, LoraConfig(rank=rank, seed=i)).result() for i in range(count)]
    data = [datum(tokens, i) for i in range(count)]
    return {"at once": lambda: at_once(engine, models, data), "apart": lambda: apart(engine, models, data)}


def shared_batch(engine: Engine, count: int, tokens: int, rank: int) -> dict[str, Callable[[], None]]:
    """forward_backward only: eight optimisers have eight times the work of one, whoever shares what."""
    base = engine._bases.get(MODEL)
    loss = get_loss("cross_entropy")
    data = [datum(tokens, i) for i in range(count)]

    def step(shares: Sequence[Sequence[Datum]]) -> Callable[[], None]:
        calls = []
        for i, share in enumerate(shares):
            adapter = Adapter(base.decoder.groups, LoraConfig(rank=rank, seed=i))
            calls.append(Call(adapter, TrainState(adapter), check_data(share, loss, {}, base.limits), loss, {}))

        def run() -> None:
            for call in calls:
                assert call.state is not None
                call.state.has_grads = False  # as after an optimiser step; the numbers do not matter here
            trainer.run_together(base.decoder, calls)

        lane = engine._executor.lane()  # the device's thread: a second one that computes makes libgomp's teams sleep
        return lambda: lane.submit(run).result()

    return {"8 adapters": step([[one] for one in data]), "1 adapter": step([data])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true", help="keep the JSON under benchmarks/results/")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    document = measure(args.rounds, rank=args.rank, dtype=args.dtype)
    for line in lines(document):
        print(line)
    report("packed_clients", {"rank": args.rank, "dtype": args.dtype, "rounds": args.rounds, **document}, args.save)


def measure(rounds: int, *, rank: int = 16, dtype: str = "bfloat16") -> dict[str, Any]:
    """Of each of CASES the milliseconds, their ratio and the most it may be; of SHARED the speed and the least."""
    home = Path(os.environ.get("MINT_HOME") or Path.home() / ".mint-engine")
    engine = Engine(dtype=dtype, home=home, kv_cache_bytes=1 << 22, deterministic=False)
    document: dict[str, Any] = {}
    try:
        for name, (count, tokens, most) in CASES.items():
            ms = _ms(clients(engine, count, tokens, rank), rounds)
            ratio = round(ms["at once"] / ms["apart"], 3)
            document[name] = {"median_ms": ms, "ratio": ratio, "at_most": most}
        count, tokens, least = SHARED
        ms = _ms(shared_batch(engine, count, tokens, rank), rounds)
        speed = round(ms["1 adapter"] / ms["8 adapters"], 3)
        document["8 adapters share a batch"] = {"median_ms": ms, "speed": speed, "at_least": least}
    finally:
        engine.close()
    return document


def lines(document: dict[str, Any]) -> list[str]:
    out = []
    for name, found in document.items():
        (first, a), (second, b) = found["median_ms"].items()
        said = (
            f"{found['ratio']:.2f} of the time (target at most {found['at_most']})"
            if "ratio" in found
            else f"{found['speed']:.2f} of the speed (target at least {found['at_least']})"
        )
        out.append(f"{name:24s} {first} {a:.0f} ms, {second} {b:.0f} ms: {said}")
    return out


def _ms(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    times = interleaved(contenders, rounds=rounds, turn=2)
    return {name: round(s * 1e3, 1) for name, s in medians(times).items()}


if __name__ == "__main__":
    main()
