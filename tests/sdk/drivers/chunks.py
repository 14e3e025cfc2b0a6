"""One call sent as many requests, as the server's client config may tell an SDK to do: the numbers do not change.

The SDKs since 0.25 take the sizes from the config; those before cut at 1024 datums (see `scenario`). Chunks go out
concurrently, the first one last.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scenario
from context import Context, configure


def run(ctx: Context) -> None:
    ways: dict[str, dict[str, Any]] = {
        "at most two datums": {"fwdbwd_max_chunk_len": 2},
        "at most 200 bytes": {"fwdbwd_max_chunk_bytes_count": 200},
        "one after the other": {"fwdbwd_max_chunk_len": 1, "parallel_fwdbwd_chunks": False},
        "compressed": {"proto_compress_fwdbwd": True},
        "protobuf requests": {"proto_write_fwdbwd": True},  # 0.22 sends JSON otherwise
    }
    whole = _trained(ctx)
    tried = []
    for name, changes in ways.items():
        before = ctx.service.holder._client_config
        if not configure(ctx.service, **changes):
            continue
        try:
            cut = _trained(ctx)
        finally:
            ctx.service.holder._client_config = before
        np.testing.assert_allclose(cut, whole, atol=2e-5, err_msg=name)
        tried.append(name)
    ctx.report.values["chunks"] = tried


def _trained(ctx: Context) -> np.ndarray:
    """The numbers of a forward_backward, of a custom one, and of the model after a step with each."""
    from reporting import settled

    data = scenario.supervised(ctx.types, (5, 9, 13, 4, 7, 8, 6))
    client = settled(ctx.service.create_lora_training_client(ctx.base_model, rank=4, seed=1))
    numbers = []
    for _ in range(2):
        outs = [settled(client.forward_backward(data, "cross_entropy"))]
        client.optim_step(ctx.types.AdamParams(learning_rate=1e-2)).result()
        outs.append(settled(client.forward_backward_custom(data, scenario.squared_loss)))
        client.optim_step(ctx.types.AdamParams(learning_rate=1e-2)).result()
        for out in outs:
            numbers += [value for row in scenario.output(out)["logprobs"] for value in row]
        numbers.append(outs[0].metrics["loss:sum"] / 100)
    return np.array(numbers)
