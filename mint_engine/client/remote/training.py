"""Training and checkpoints of a model on a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from mint_engine.client.remote.batches import Output, send_custom, send_data
from mint_engine.client.remote.core import RemoteCore
from mint_engine.client.remote.transport import json_object
from mint_engine.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoadWeightsResponse,
    ModelInput,
    OptimStepResponse,
    ReverseKLDatum,
    ReverseKLOutput,
    SaveWeightsExternalResponse,
    SaveWeightsResponse,
    TensorData,
)

if TYPE_CHECKING:
    from mint_engine.custom_loss import CustomLoss


class Training(RemoteCore):
    def forward(
        self, model_id: str, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[ForwardBackwardOutput]:
        return self._train(model_id, data, loss_fn, loss_fn_config, backward=False)

    def forward_backward(
        self, model_id: str, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """A batch beyond the server's limits goes as several requests. Should one of them fail, the gradients of the
        others stay: then, unlike in process, the call is not undone."""
        return self._train(model_id, data, loss_fn, loss_fn_config, backward=True)

    def _train(
        self, model_id: str, data: Sequence[Datum], loss_fn: str, config: Mapping[str, Any] | None, *, backward: bool
    ) -> Future[ForwardBackwardOutput]:
        data = list(data)
        config = None if config is None else dict(config)  # the caller may change both once this returns

        async def run() -> ForwardBackwardOutput:
            lane = self._lane(model_id)  # at once: the order of the calls is that in which they join the lane

            async def send() -> Output:
                return await send_data(lane, await self._get_limits(), data, loss_fn, config, backward=backward)

            return await lane.call(send)

        return self._submit(run)

    def forward_backward_custom(
        self, model_id: str, data: Sequence[Datum], fn: CustomLoss
    ) -> Future[ForwardBackwardOutput]:
        data = list(data)

        async def run() -> ForwardBackwardOutput:
            lane = self._lane(model_id)

            async def send() -> Output:
                return await send_custom(lane, await self._get_limits(), data, fn)

            return await lane.call(send)

        return self._submit(run)

    def forward_backward_reverse_kl(
        self, model_id: str, data: Sequence[ReverseKLDatum], *, reference_model_path: str, temperature: float
    ) -> Future[ReverseKLOutput]:
        body = {
            "model_id": model_id, "reference_model_path": reference_model_path, "temperature": temperature,
            "data": [_reverse_kl_datum(datum) for datum in data], "type": "mint_forward_backward_reverse_kl",
        }  # fmt: skip

        async def run() -> ReverseKLOutput:
            answer = json_object(
                await self._in_lane(
                    self._lane(model_id), "mint/forward_backward_reverse_kl", "MintForwardBackwardReverseKL", body
                )
            )
            outputs = [{name: TensorData(**tensor) for name, tensor in output.items()} for output in answer["outputs"]]
            return ReverseKLOutput(outputs, dict(answer.get("metrics") or {}))

        return self._submit(run)

    def optim_step(self, model_id: str, adam_params: AdamParams) -> Future[OptimStepResponse]:
        body = {"model_id": model_id, "adam_params": adam_params.model_dump(), "type": "optim_step"}
        return self._operation(OptimStepResponse, "optim_step", "OptimStep", body)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save_weights(
        self, model_id: str, name: str, *, ttl_seconds: int | None = None, overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[SaveWeightsResponse]:  # fmt: skip
        body = {
            "model_id": model_id, "path": name, "ttl_seconds": ttl_seconds, "overwrite": overwrite,
            "user_metadata": user_metadata, "type": "save_weights",
        }  # fmt: skip
        return self._operation(SaveWeightsResponse, "save_weights", "SaveWeights", body)

    def load_weights(
        self, model_id: str, path: str, *, optimizer: bool, weights_access_token: str | None = None
    ) -> Future[LoadWeightsResponse]:
        body = {
            "model_id": model_id, "path": path, "optimizer": optimizer, "weights_access_token": weights_access_token,
            "type": "load_weights",
        }  # fmt: skip
        return self._operation(LoadWeightsResponse, "load_weights", "LoadWeights", body)

    def save_weights_external(
        self, model_id: str, name: str, *, ttl_seconds: int | None = None, recipients: list[str] | None = None
    ) -> Future[SaveWeightsExternalResponse]:
        body = {
            "model_id": model_id, "path": name, "ttl_seconds": ttl_seconds, "age_encryption_recipients": recipients,
            "type": "save_weights_external",
        }  # fmt: skip
        return self._operation(SaveWeightsExternalResponse, "save_weights_external", "SaveWeightsExternal", body)


def _reverse_kl_datum(datum: ReverseKLDatum) -> dict[str, Any]:
    def tokens(value: ModelInput) -> dict[str, Any]:
        return {"chunks": [{"type": "encoded_text", "tokens": value.to_ints()}]}

    return {
        "student_input": tokens(datum.student_input), "reference_input": tokens(datum.reference_input),
        "target_tokens": datum.target_tokens.to_dict(), "weights": datum.weights.to_dict(),
    }  # fmt: skip
