"""What a ServiceClient, TrainingClient and SamplingClient do besides training and sampling."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import scenario
import torch
from context import Context, configure
from reporting import settled


def run(ctx: Context) -> None:
    report, service, training, sampler = ctx.report, ctx.service, ctx.made.training, ctx.made.sampler
    capabilities = report.call(service, "get_server_capabilities")
    assert capabilities.supported_models[0].model_name, capabilities
    assert capabilities.supported_models[0].max_context_length == 512, capabilities

    info = report.call(training, "get_info")
    assert info.model_id == training.model_id, info
    assert info.lora_rank == scenario.RANK, info
    assert info.is_lora is True, info
    for client in (training, sampler):
        tokenizer = report.call(client, "get_tokenizer")
        assert tokenizer.decode(tokenizer.encode("mint")) == "mint"
    assert report.call(sampler, "get_base_model") == info.model_data.model_name
    for client in (service, training, sampler, ctx.rest):
        report.call(client, "get_telemetry")
        if report.has(client, "get_console_url"):
            report.call(client, "get_console_url")
    created = report.call(sampler, "create", service.holder, base_model=ctx.base_model)
    assert created.get_base_model() == info.model_data.model_name
    if report.has(service, "holder"):
        report.methods["ServiceClient.holder"] = "ok"  # a property, used just now
    if report.has(training, "save_weights_and_get_sampling_client_submit"):
        report.call(training, "save_weights_and_get_sampling_client_submit")
    if report.has(service, "create_custom_loss"):
        _custom_loss(ctx)
    before = service.holder._client_config
    if configure(service, create_model_via_load_weights=True):  # 0.25 can do it either way, 0.38 does only this
        _is_the_saved_one(ctx, settled(service.create_training_client_from_state(ctx.made.state_path)))
        service.holder._client_config = before
    if report.has(service, "copy_weights"):
        os.environ["TINKER_PROJECT_ID"] = "a project"  # the SDK asks for one
        path = report.call(service, "copy_weights", ctx.made.state_path, ttl_seconds=7200)
        _is_the_saved_one(ctx, service.create_training_client_from_state(path).result())


def _custom_loss(ctx: Context) -> None:
    """A traced loss runs in the client: its gradient is that of the same loss as a plain function."""

    def squares(logprobs: torch.Tensor, weights: torch.Tensor) -> Any:
        loss = ((logprobs + 4.0) ** 2 * weights).sum()
        return loss, {"custom/squares:sum": loss}

    def by_hand(data: list[Any], logprobs: list[torch.Tensor]) -> Any:
        weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
        return sum(squares(lp, w)[0] for lp, w in zip(logprobs, weights, strict=True)), {}

    handle = ctx.report.call(ctx.service, "create_custom_loss", squares, {"logprobs": 1, "weights": 1})
    trained = []
    for loss in (handle, by_hand):
        client = ctx.service.create_lora_training_client(ctx.base_model, rank=4, seed=1).result()
        client.forward_backward_custom(scenario.supervised(ctx.types), loss).result()
        client.optim_step(ctx.types.AdamParams(learning_rate=1e-2)).result()
        trained.append(client)
    one, other = (_logprobs(ctx, client) for client in trained)
    np.testing.assert_allclose(one, other, atol=1e-5)


def _is_the_saved_one(ctx: Context, client: Any) -> None:
    """It says what the model said when `state` was saved."""
    np.testing.assert_allclose(
        _logprobs(ctx, client), np.concatenate(ctx.report.values["trained"]["logprobs"]), atol=1e-5
    )


def _logprobs(ctx: Context, client: Any) -> np.ndarray:
    out = client.forward(scenario.supervised(ctx.types), "cross_entropy").result()
    return np.concatenate(scenario.output(out)["logprobs"])
