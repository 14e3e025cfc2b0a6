"""The `*_async` methods of the clients that train and sample, inside one event loop."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import numpy as np
import scenario
from context import Context


async def run(ctx: Context) -> None:
    report, service, types = ctx.report, ctx.service, ctx.types
    assert (await report.acall(service, "get_server_capabilities_async")).supported_models
    training = await report.acall(service, "create_lora_training_client_async", ctx.base_model, rank=4, seed=1)
    step = types.AdamParams(learning_rate=1e-2)
    data = scenario.supervised(types)
    # Submitted without waiting in between, as the cookbook does.
    first = await training.forward_backward_async(data, "cross_entropy")
    second = await training.optim_step_async(step)
    await first, await second
    await report.acall(training, "forward_backward_async", data, "cross_entropy")
    await report.acall(training, "optim_step_async", step)
    custom = await report.acall(training, "forward_backward_custom_async", data, scenario.squared_loss)
    assert custom.metrics["datums"] == 3.0
    await report.acall(training, "optim_step_async", step)
    trained = await _numbers(report, training, data)
    assert (await report.acall(training, "get_info_async")).lora_rank == 4
    path = (await report.acall(training, "save_state_async", "state", ttl_seconds=7200)).path
    if "overwrite" in inspect.signature(training.save_state_async).parameters:
        await report.acall(training, "save_state_async", "state", overwrite=True)
    if report.has(training, "save_weights_external_async"):
        await report.acall(training, "save_weights_external_async", "external")
    sampler_path = (await report.acall(training, "save_weights_for_sampler_async", "sampler")).path
    await _come_back(ctx, training, path, trained, data)
    await _sample(ctx, training, sampler_path)


async def _come_back(ctx: Context, training: Any, path: str, trained: np.ndarray, data: Any) -> None:
    report = ctx.report
    for method in ("create_training_client_from_state_async", "create_training_client_from_state_with_optimizer_async"):
        client = await report.acall(ctx.service, method, path)
        np.testing.assert_allclose(await _numbers(report, client, data), trained, atol=1e-5, err_msg=method)
    await report.acall(training, "optim_step_async", ctx.types.AdamParams(learning_rate=1e-2))
    for method in ("load_state_async", "load_state_with_optimizer_async"):
        await report.acall(training, method, path)
        np.testing.assert_allclose(await _numbers(report, training, data), trained, atol=1e-5, err_msg=method)


async def _sample(ctx: Context, training: Any, path: str) -> None:
    report, types = ctx.report, ctx.types
    samplers = [
        await report.acall(training, "save_weights_and_get_sampling_client_async"),
        await report.acall(training, "create_sampling_client_async", path),
        await report.acall(ctx.service, "create_sampling_client_async", model_path=path),
    ]
    prompt = types.ModelInput.from_ints(scenario.tokens(9, 5))
    params = types.SamplingParams(max_tokens=8, seed=3, temperature=4.0)
    responses = await asyncio.gather(*(report.acall(s, "sample_async", prompt, 2, params) for s in samplers))
    drawn = [[list(map(int, s.tokens)) for s in response.sequences] for response in responses]
    assert drawn[0] == drawn[1] == drawn[2], drawn
    scores = [await report.acall(s, "compute_logprobs_async", prompt) for s in samplers]
    np.testing.assert_allclose(scores[0][1:], scores[1][1:], atol=1e-5)
    assert scores[0][0] is None
    assert await report.acall(samplers[0], "get_base_model_async") == samplers[0].get_base_model()


async def _numbers(report: Any, client: Any, data: Any) -> np.ndarray:
    out = await report.acall(client, "forward_async", data, "cross_entropy")
    return np.concatenate(scenario.output(out)["logprobs"])
