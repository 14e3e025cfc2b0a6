"""A training program whose every number and last bit can be compared: alone, over a bad network, through a restart.

    python faults.py request.json --clients 2

The tests run `train` through our own client, too, so this imports neither SDK nor engine. What it gives is plain data:
`values` are equal to the last bit in every run; `samples` nearly so, because who else is sampled in the same step shows
in a float's last bits; `paths` are checkpoints, whose tensors are equal to the last bit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import context
from reporting import settled
from scenario import output, rollouts, sampled, squared_loss, supervised, tokens

LENGTHS = (5, 9, 3, 7, 4, 6, 8)  # several requests, where a client or its config says that few datums fit one


def train(
    service: Any, types: Any, base_model: str, seed: int, *, many: bool = False,
    reached: Callable[[str], None] = lambda part: None,
) -> dict[str, Any]:  # fmt: skip
    """Losses of several kinds, steps, saves, loads and samples of one client.

    many: a batch of more datums than any SDK sends at once. reached: called with the name of each part as it begins.
    """
    values: list[Any] = []
    samples: list[Any] = []
    training = settled(service.create_lora_training_client(base_model, rank=4, seed=seed))
    paths = {}

    def steps(first: int, count: int) -> None:
        """Submitted at once, as a pipelined training loop does."""
        pending = []
        for step in range(first, first + count):
            data = supervised(types, LENGTHS, seed=100 * seed + step)
            rate = types.AdamParams(learning_rate=1e-2, weight_decay=0.1)
            pending.append((training.forward_backward(data, "cross_entropy"), training.optim_step(rate)))
        for forward_backward, optim_step in pending:
            values.append(output(forward_backward.result()))
            optim_step.result()

    reached("steps")
    steps(0, 3)
    paths["middle"] = training.save_state("middle").result().path
    reached("custom")
    values.append(output(settled(training.forward_backward_custom(supervised(types, LENGTHS), squared_loss))))
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()

    reached("samples")
    unnamed = settled(training.save_weights_and_get_sampling_client())
    samples += _samples(unnamed, types)
    paths["sampler"] = training.save_weights_for_sampler("sampler").result().path
    samples += _samples(settled(service.create_sampling_client(model_path=paths["sampler"])), types)

    reached("accumulation")
    accumulated = [
        training.forward_backward(rollouts(types, LENGTHS, seed=seed + i), "importance_sampling") for i in range(3)
    ]
    training.optim_step(types.AdamParams(learning_rate=1e-2, grad_clip_norm=0.5))
    values += [output(future.result()) for future in accumulated]
    reached("load")
    settled(training.load_state_with_optimizer(paths["middle"]))
    if many:
        data = [datum for i in range(206) for datum in supervised(types, (2, 3, 2, 3, 4), seed=i)]
        values.append(output(training.forward_backward(data, "cross_entropy").result()))
    steps(10, 3)
    paths["final"] = training.save_state("final").result().path

    reached("resumption")
    resumed = settled(service.create_training_client_from_state_with_optimizer(paths["final"]))
    values.append(output(resumed.forward(supervised(types, LENGTHS), "cross_entropy").result()))
    samples += _samples(unnamed, types)
    return {"values": values, "samples": samples, "paths": paths}


def _samples(sampler: Any, types: Any) -> list[Any]:
    """A seeded sample, a greedy one and a scored prompt, under way at once."""
    prompt = types.ModelInput.from_ints(tokens(9, 5))
    asked = [
        sampler.sample(prompt, 3, types.SamplingParams(max_tokens=8, seed=3, temperature=2.0)),
        sampler.sample(prompt, 1, types.SamplingParams(max_tokens=6, temperature=0.0)),
    ]
    scored = sampler.compute_logprobs(prompt)
    return [*(sampled(future.result()) for future in asked), scored.result()]


def main(path: str, clients: int) -> None:
    ctx = context.opened(path)

    def one(seed: int) -> dict[str, Any]:
        service = ctx.sdk.ServiceClient()
        cut = context.configure(service, fwdbwd_max_chunk_len=2)
        return train(service, ctx.types, ctx.base_model, seed, many=not cut)

    with ThreadPoolExecutor(clients) as threads:
        made = list(threads.map(one, range(clients)))
    (ctx.out / "report.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[sys.argv.index("--clients") + 1]))
